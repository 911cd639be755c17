"""One benchmark at a time on this machine: what is timed beside another one is no figure."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_POLL_SECONDS = 0.5


def lock_file() -> Path:
    """Where the lock is: one for all users of the machine."""
    return Path(tempfile.gettempdir()) / "kvtier-bench.lock"


@contextlib.contextmanager
def alone(out: TextIO) -> Iterator[None]:
    """Waits until no other benchmark runs, and keeps others waiting. A process that dies lets go.

    Args:
        out: Is told whom we wait for.

    Raises:
        OSError: The file cannot be made.
    """
    handle = _open(lock_file())
    try:
        told = False
        while not _taken(handle):
            if not told:
                other = os.pread(handle, 64, 0).decode(errors="replace").strip() or "unknown"
                print(f"waiting: another benchmark runs (process {other})", file=out, flush=True)
                told = True
            time.sleep(_POLL_SECONDS)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    # Without O_CREAT first: the kernel refuses it for others' files in /tmp (fs.protected_regular).
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):
            os.fchmod(handle, 0o666)  # any user's benchmark disturbs any other's
        return handle


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
