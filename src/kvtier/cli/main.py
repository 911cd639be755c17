"""The command line of `kvtier`: parses, and hands over to the subcommand's module."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

from kvtier.cli.processes import Terminated, unwound_by_sigterm
from kvtier.errors import KVTierError

# What each command does, and the module that does it: imported only when it is named, since some are slow to.
_COMMANDS = {
    "demo": "a real transformer: time to first token, cold and with its prefix restored",
    "bench": "how fast the parts are, beside what the machine can do",
    "replay": "what a request trace would hit, with which tiers and eviction policies",
    "size": "how much DRAM and NVMe reach which hit rate and time to first token, by a request trace",
    "verify": "reads every block on a drive and proves it",
    "inspect": "what is on a drive: occupancy, namespaces, ages, hits",
    "purge": "forgets a tenant's blocks on a drive for good",
    "doctor": "what kvtier finds on this machine, and whether it works here",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: Without the program's name; None: the process's own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = ""
    try:
        with unwound_by_sigterm():
            args = _parser(words).parse_args(words)
            command = f" {args.command}"
            if args.command == "version":
                print(version())
                return 0
            return int(importlib.import_module(f"kvtier.cli.{args.command}").run(args))
    except Terminated:
        print("kvtier: terminated", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("kvtier: interrupted", file=sys.stderr)
        return 130
    except (KVTierError, OSError) as error:
        print(f"kvtier{command}: {error}", file=sys.stderr)
        return 1


def version() -> str:
    """Of the installed package."""
    return metadata.version("kvtier")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvtier",
        description="Keeps the KV cache of transformers below the GPU, in host memory and on disk: no prefix "
        "twice.",
    )
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name in words:
            importlib.import_module(f"kvtier.cli.{name}").add_arguments(sub)
    commands.add_parser("version", help="the version of kvtier")
    return parser
