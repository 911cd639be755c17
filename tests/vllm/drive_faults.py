"""What happens to a directory of the disk tier: damaged slots, a file system that is full."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

MAGIC = b"\x89KVSLOT\n"
HEADER_BYTES = 4096


def slots(directory: Path) -> list[tuple[Path, int]]:
    """Every slot image below a directory: its file, and where in it the image begins."""
    found = []
    for file in sorted(directory.glob("stores/*/slots.*")):
        with file.open("rb") as handle:
            for at in range(0, file.stat().st_size, HEADER_BYTES):
                handle.seek(at)
                if handle.read(len(MAGIC)) == MAGIC:
                    found.append((file, at))
    return found


def flip_bits(directory: Path, each: int) -> int:
    """Flips one bit in the payload of every so manieth block; returns in how many."""
    chosen = slots(directory)[each // 2 :: each]
    for n, (file, at) in enumerate(chosen):
        with file.open("r+b") as handle:
            handle.seek(at + HEADER_BYTES + 97 * n % 1000)
            byte = handle.read(1)[0]
            handle.seek(-1, os.SEEK_CUR)
            handle.write(bytes([byte ^ 1 << n % 8]))
            os.fsync(handle.fileno())
    return len(chosen)


@contextlib.contextmanager
def small_file_system(folder: Path, num_bytes: int) -> Iterator[Path]:
    """An ext4 of its own.

    Raises:
        OSError: Loop mounts are not allowed here; the message says why.
    """
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(num_bytes)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, mount], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"loop mounts are not allowed here: {error.stderr!r}") from error
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


class SilentDrive:
    """Lets what a process asks of a drive go without an answer, and answers it all later."""

    def __init__(self, group: Path, device: str) -> None:
        self._group = group
        self._device = device

    def silence(self) -> None:
        """What is asked from now on waits for a byte a second."""
        self._limit(1)

    def answer(self) -> None:
        """No limit; what waits is answered at once."""
        self._limit(0)

    def _limit(self, rate: int) -> None:
        for way in ("read", "write"):
            (self._group / f"blkio.throttle.{way}_bps_device").write_text(f"{self._device} {rate}")


@contextlib.contextmanager
def silent_drive(mount: Path) -> Iterator[SilentDrive]:
    """Puts this process, and those that it starts meanwhile, under a limit of the file system's drive.

    Raises:
        OSError: There is no blkio controller to ask; the message says so.
    """
    root = Path("/sys/fs/cgroup/blkio")
    if not (root / "blkio.throttle.read_bps_device").exists():
        raise OSError(f"{root} has no throttling here")
    number = mount.stat().st_dev
    group = root / f"kvtier-test-{os.getpid()}"
    group.mkdir()
    drive = SilentDrive(group, f"{os.major(number)}:{os.minor(number)}")
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield drive
    finally:
        drive.answer()
        for process in (group / "cgroup.procs").read_text().split():
            (root / "cgroup.procs").write_text(process)
        group.rmdir()


def fill_up(file: Path) -> None:
    """Takes all room of a file system, up to one of its blocks."""
    with file.open("wb") as handle, contextlib.suppress(OSError):
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(handle.fileno(), os.fstat(handle.fileno()).st_size, size)
