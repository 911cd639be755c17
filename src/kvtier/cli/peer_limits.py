"""A reference: what plain calls do with as many bytes as a pass of `kvtier bench peers` moves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from kvtier.cli.limits import DriveFile, HostCopy

_COPY_THREADS = 2


@contextlib.contextmanager
def plain_rates(tier: str, folder: Path, size: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Functions "put" and "get" that do the plain form of either once: GB/s.

    Between a process' pages and its host tier: a contiguous copy, the faster of memcpy and non-temporal
    stores. On a drive: O_DIRECT writes in place with one fdatasync, and O_DIRECT reads. So a put to a drive
    is held against the drive alone, though its bytes are copied, too. Python's threads do not get the most
    out of every drive: io_uring may be faster.

    Args:
        tier: "host" or "disk".
        folder: Empty, on the drive.
        size: Bytes of a pass.
    """
    if tier == "host":
        copy = HostCopy(size, _COPY_THREADS)
        yield dict.fromkeys(("put", "get"), lambda: copy.rate() / 1e9)
        return
    drive = DriveFile(folder, size)
    try:
        yield {"put": lambda: drive.write_rate() / 1e9, "get": lambda: drive.read_rate() / 1e9}
    finally:
        drive.close()
