"""The `kvtier` command: what it shows, measures and checks.

Each subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit status: 0, or 1 when
a check failed; 2 means that the command line was wrong, 130 that somebody pressed Ctrl-C, 143 that SIGTERM
came.
"""

from kvtier.cli.main import main

__all__ = ["main"]
