"""Processes that are killed: one does something, says how far it is, and ends by SIGKILL.

It is `python -m MODULE WHAT ARGUMENTS` and says on standard output, a JSON object a line, what it has to say,
at last {"end": ...}; then it waits. It is killed with the process that started it, too, however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from kvtier.cli.processes import bound
from kvtier.cli.progress import Progress
from kvtier.errors import StorageError


class Lines:
    """A Progress that tells another process."""

    def phase(self, name: str) -> None:
        """Begins a phase."""
        say(phase=name)

    def step(self, units: float = 1) -> None:
        """Some units of work are done."""
        say(step=units)


def say(**values: Any) -> None:
    """Writes one line."""
    print(json.dumps(values), flush=True)


def end(values: Any) -> None:
    """Says what was found, and waits to be killed: nothing is closed in order."""
    say(end=values)
    sys.stdin.read()


def live(
    module: str,
    what: str,
    arguments: Any,
    progress: Progress,
    heard: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Lets a process live until it says that it is done, and kills it with SIGKILL.

    Args:
        module: What it runs; its `main(what, arguments)` gets the arguments as JSON text.
        what: The first of them.
        arguments: JSON types.
        progress: Told about phases and steps.
        heard: Gets every other line.

    Returns:
        What it said at its end.

    Raises:
        StorageError: It ended by itself.
    """
    argv = bound([sys.executable, "-m", module, what, json.dumps(arguments)], signal.SIGKILL)
    process = subprocess.Popen(  # noqa: S603 - this very Python; Ctrl-C is for us
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        for line in process.stdout or ():
            said: dict[str, Any] = json.loads(line)
            if "end" in said:
                return said["end"]
            if "phase" in said:
                progress.phase(said["phase"])
            elif "step" in said:
                progress.step(said["step"])
            elif heard is not None:
                heard(said)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        with process:  # closes its pipes and takes it away
            pass
    raise StorageError(f"the process of {module} ended by itself, with status {process.returncode}")
