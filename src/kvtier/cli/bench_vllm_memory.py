"""vLLM's own host memory, put into huge pages from outside, as an operator could: kvtier's is in them, too.

vLLM keeps it in a file in /dev/shm (vllm/v1/kv_offload/cpu/shared_offload_region.py), with pages of 4 KiB
wherever /sys/kernel/mm/transparent_hugepage/shmem_enabled is "never". MADV_COLLAPSE (Linux 6.1) asks for huge
ones whatever that says, for all who have the file mapped.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path("/dev/shm")  # noqa: S108 - where vLLM puts it
_HUGE_PAGE = 2 << 20
_AT_ONCE = 64 << 20
_MADV_POPULATE_WRITE = 23
_MADV_COLLAPSE = 25
_MAP_FIXED = 0x10


def into_huge_pages(engine_id: str) -> dict[str, float] | None:
    """Collapses the files of an engine (with data parallelism more than one).

    Returns:
        MiB, and the share that is in huge pages now; None where there is no file.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    total = huge = 0
    for path in sorted(_FOLDER.glob(f"vllm_offload_{engine_id}*.mmap")):
        size = path.stat().st_size
        with _mapped(libc, path, size) as begin:
            for offset in range(0, size, _AT_ONCE):  # what the kernel cannot is not in the share
                for advice in (_MADV_POPULATE_WRITE, _MADV_COLLAPSE):  # holes do not collapse
                    part = ctypes.c_size_t(min(_AT_ONCE, size - offset))
                    libc.madvise(ctypes.c_void_p(begin + offset), part, advice)
            total += size
            huge += _huge_bytes(path)
    return {"mib": total >> 20, "in_huge_pages": round(huge / total, 3)} if total else None


@contextlib.contextmanager
def _mapped(libc: ctypes.CDLL, path: Path, size: int) -> Iterator[int]:
    """The address of the file's mapping, which begins with a huge page: else there are none in it."""
    libc.mmap.restype = ctypes.c_void_p
    with mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        first = ctypes.addressof(ctypes.c_char.from_buffer(room))
        begin = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        with path.open("r+b") as file:
            found = libc.mmap(
                ctypes.c_void_p(begin),
                ctypes.c_size_t(size),
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_SHARED | _MAP_FIXED,
                file.fileno(),
                ctypes.c_long(0),
            )
        if found != begin:
            raise OSError(ctypes.get_errno(), f"{path}: {os.strerror(ctypes.get_errno())}")
        yield begin  # closing `room` unmaps the file, too


def _huge_bytes(path: Path) -> int:
    """Of a file in shared memory that is mapped here, by /proc/self/smaps."""
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, _, rest = mapping.partition("\n")
        found = re.search(r"(?m)^ShmemPmdMapped:\s+(\d+) kB", rest)
        if first.endswith(f" {path}") and found:
            return int(found[1]) << 10
    return 0
