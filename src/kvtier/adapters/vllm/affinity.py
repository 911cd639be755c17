"""unbound(): threads that may run where vLLM's worker may not. Imports neither vLLM nor torch."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def unbound() -> Iterator[None]:
    """Threads that the calling one makes meanwhile may run on every processor of the parent process.

    On the CPU platform vLLM has OpenMP bind a worker's first thread to one processor (GOMP_CPU_AFFINITY), and
    leaves others free, one of them for its connector. Threads inherit that: all that copy would share the one
    processor, with the thread that waits for them and with every other server on this machine.
    """
    own = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):  # the parent is gone, or was bound to processors that we may not use
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
