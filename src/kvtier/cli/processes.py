"""How commands end, and that what they have started ends with them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

# What becomes of the process before it is another program: PR_SET_PDEATHSIG (1) outlives an execve(2).
_BOUND = """
import ctypes, os, sys
parent, signal = map(int, sys.argv[1:3])
if ctypes.CDLL(None).prctl(1, signal, 0, 0, 0) or os.getppid() != parent:
    sys.exit(1)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM came: everything is unwound as of Ctrl-C."""


@contextlib.contextmanager
def unwound_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated inside.

    Only the first: timeout(1) sends two, and the unwinding is to end, and the process with its own status. So
    the others are ignored from then on, also behind it. Where somebody else handles or ignores the signal,
    and off the main thread, nothing changes.
    """
    came = False

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, lambda *_: None)
        raise Terminated

    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if came else signal.SIG_DFL)


def bound(command: Sequence[str], number: signal.Signals) -> list[str]:
    """The command, which gets a signal when the thread that starts it ends, however that ends.

    Nothing runs between fork and exec in the caller's copy, where other threads may hold locks.
    """
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), str(int(number)), *command]
