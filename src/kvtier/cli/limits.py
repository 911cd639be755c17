"""What the machine itself can do, in plain calls: copies, reads and writes of a drive.

Measured beside what is held against it, in the same round. A drive is read and written with `preadv`,
`pwritev` and O_DIRECT by threads, 2 MiB at a time, in buffers in huge pages where the kernel gives them.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtier.engine import copy_limit

_REQUEST_BYTES = 2 << 20
_THREADS = 16
_HUGE_PAGE = 2 << 20


def huge_buffer(size: int) -> npt.NDArray[np.uint8]:
    """Anonymous memory that begins with a huge page where the kernel gives them, each page touched."""
    # Private: the kernel gives shared anonymous memory no huge pages.
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    begin = -whole.ctypes.data % _HUGE_PAGE
    whole[::4096] = 1
    return whole[begin : begin + size]


class HostCopy:
    """Plain contiguous copies within the host's memory: the faster of memcpy and non-temporal stores.

    Args:
        size: Bytes of each copy.
        threads: That copy a share each.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self._threads = threads
        self._source, self._target = huge_buffer(size), huge_buffer(size)

    def rate(self) -> float:
        """Bytes per second of one copy."""
        took = min(
            copy_limit(self._target, self._source, method=method, threads=self._threads)
            for method in ("memcpy", "streaming")
        )
        return self.size / took


class DriveFile:
    """Plain reads and writes of one file on a drive, past the page cache.

    Args:
        folder: On the drive; the file in it is removed by `close`.
        size: Bytes of the file, rounded down to requests of 2 MiB, at least one.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._requests = max(1, size // _REQUEST_BYTES)
        self.size = self._requests * _REQUEST_BYTES
        self._path = folder / "limit"
        count = min(_THREADS, self._requests)
        self._buffers = np.split(huge_buffer(count * _REQUEST_BYTES), count)
        noise = np.random.default_rng(0).integers(0, 256, _REQUEST_BYTES, np.uint8).tobytes()
        with self._path.open("wb") as file:
            for _ in range(self._requests):
                file.write(noise)
            file.flush()
            os.fsync(file.fileno())
        self._handle = _open_direct(self._path)
        self.direct = self._handle[1]

    def read_rate(self) -> float:
        """Bytes per second of reading the whole file once. Raises OSError where a part was not read."""
        return self._rate("read", os.preadv)

    def write_rate(self) -> float:
        """Bytes per second of writing the whole file once, in place, and of one fdatasync.

        Raises:
            OSError: A part was not written.
        """
        return self._rate("wrote", os.pwritev)

    def _rate(self, word: str, call: Callable[[int, Any, int], int]) -> float:
        left = iter(range(self._requests))
        lock = threading.Lock()
        failures: list[OSError] = []

        def move(buffer: npt.NDArray[np.uint8]) -> None:
            while True:
                with lock:
                    request = next(left, None)
                if request is None:
                    return
                try:
                    done = call(self._handle[0], [buffer.data], request * _REQUEST_BYTES)
                except OSError as error:
                    failures.append(error)
                    return
                if done != _REQUEST_BYTES:
                    failures.append(OSError(0, f"{self._path}: {word} {done} of {_REQUEST_BYTES} bytes"))

        threads = [threading.Thread(target=move, args=(buffer,)) for buffer in self._buffers]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if call is os.pwritev:
            os.fdatasync(self._handle[0])
        took = time.perf_counter() - begin
        if failures:
            raise failures[0]
        return self.size / took

    def close(self) -> None:
        """Removes the file."""
        os.close(self._handle[0])
        self._path.unlink(missing_ok=True)


def _open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether it is past the page cache (tmpfs and others refuse O_DIRECT)."""
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT), True
    except OSError:
        return os.open(path, os.O_RDWR), False
