"""One side of `kvtier bench peers`: a process that answers in JSON lines (benchmarks/peers/harness.py).

A process that does not answer in time, or ends, is killed with all that it started and costs a reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kvtier.errors import KVTierError

_PATIENCE_SECONDS = 120.0
_TAIL_BYTES = 4000
# Large malloc()s of libraries come in transparent huge pages, as all other buffers do.
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONUNBUFFERED": "1"}


class SideError(KVTierError):
    """A side could not do what it was asked, did not answer in time, or ended; the message says why.

    Args:
        message: Why.
        side: Its name; empty where there was no side yet.
    """

    def __init__(self, message: str, side: str = "") -> None:
        super().__init__(message)
        self.side = side


class HangError(SideError):
    """It did not answer in time and was killed."""


class Side:
    """A running side; a context manager that kills it, and what it started, in the end.

    Args:
        command: Program and arguments.
        log: Where its standard error goes; its last line explains an end.
        patience: Seconds that an answer may take.
        name: Of its errors.
    """

    def __init__(
        self, command: Sequence[str], log: Path, patience: float = _PATIENCE_SECONDS, name: str = ""
    ) -> None:
        self.name = name
        self._log = log
        self._patience = patience
        self._rest = b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Asks for an operation of the harness and waits for the answer.

        Raises:
            SideError: It failed or ended.
            HangError: It did not answer in time.
        """
        pipe = self._process.stdin
        if pipe is None:
            raise SideError("it is closed", self.name)
        try:
            pipe.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            pipe.flush()
        except OSError:
            raise SideError(f"{op}: it ended: {self._last_words()}", self.name) from None
        answer = self._line(op)
        if "error" in answer:
            raise SideError(f"{op}: {answer['error']}", self.name)
        return answer

    def _line(self, op: str) -> dict[str, Any]:
        pipe = self._process.stdout
        if pipe is None:
            raise SideError("it is closed", self.name)
        until = time.monotonic() + self._patience
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = until - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self.kill()
                    raise HangError(f"{op}: no answer in {self._patience:.0f} s, killed", self.name)
                if not (more := os.read(pipe.fileno(), 1 << 16)):
                    raise SideError(f"{op}: it ended: {self._last_words()}", self.name)
                self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise SideError(f"{op}: not an answer: {line[:80]!r}", self.name) from None
        return answer if isinstance(answer, dict) else {"error": f"not an answer: {answer!r}"}

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        text = self._log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"status {self._process.returncode}, {lines[-1] if lines else 'without a word'}"

    def kill(self) -> None:
        """SIGKILL, to it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills it and closes the pipes."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
