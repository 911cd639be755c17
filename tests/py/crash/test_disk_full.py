"""A file system that others fill while an engine's disk tier is on it: serving goes on, and it comes back."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from disk_driver import LOADED, PATIENCE, Tensors, chain_keys, config, group_of, payloads

import kvtier

pytestmark = pytest.mark.timeout(180)

SEED = 5
CAPACITY = 76 << 20  # files that do not fit beside the ballast, but without it
FILE_SYSTEM_BYTES = 96 << 20
COMES_BACK = 75.0  # seconds: a catalog that could not be written is tried again after 30


class World:
    """An engine and the chains that it called durable."""

    def __init__(self, directory: Path) -> None:
        self.engine = kvtier.open(config(str(directory), CAPACITY))
        self.tensors = [Tensors(self.engine, group) for group in range(2)]
        self.durable: list[int] = []
        self.next_chain = 0

    def store(self, chains: int) -> int:
        """Stores chains; returns how many became durable. None may wait for ever, or raise."""
        before = len(self.durable)
        for _ in range(chains):
            chain, self.next_chain = self.next_chain, self.next_chain + 1
            keys, group = chain_keys(SEED, chain), group_of(chain)
            self.tensors[group].fill(0, payloads(keys, group))
            ticket = self.engine.store(keys, self.tensors[group].pages, np.arange(len(keys)))
            ticket.wait(PATIENCE)
            self.engine.flush(PATIENCE)
            if ticket.durable_blocks == len(keys):
                self.durable.append(chain)
        return len(self.durable) - before

    def assert_served(self) -> None:
        """Everything durable, most of it from the drive: the host tier is smaller."""
        for chain in self.durable:
            keys, group = chain_keys(SEED, chain), group_of(chain)
            tensors = self.tensors[group]
            tensors.layers[0][:] = 0xEE
            ticket = self.engine.load(keys, tensors.pages, np.arange(len(keys)))
            ticket.wait(PATIENCE)
            assert (ticket.result().outcomes == LOADED).all()
            assert (tensors.read(len(keys)) == payloads(keys, group)).all()

    def troubles(self) -> list[str]:
        disk = self.engine.stats().disks[0]
        return [text for text in (disk.growth, disk.health, disk.catalog_health) if text != "ok"]

    def wait(self, condition: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, self.engine.stats().disks[0]
            time.sleep(0.02)

    def usable(self) -> list[int]:
        return [of_class.usable for of_class in self.engine.stats().disks[0].classes]


def live_through(world: World, fill: Callable[[], None], free: Callable[[], None]) -> None:
    """The scenario, whatever it is that makes the drive full."""
    assert world.store(40) == 40
    fill()
    # Its files want to grow only when they have little room left.
    world.wait(lambda: bool(world.store(1) + 1 and world.troubles()), 20)
    world.store(20)  # taken or not, but never an error
    world.assert_served()
    assert world.engine.stats().health == "ok"
    served = world.engine.stats().promote_good
    assert served > 0, "nothing came from the drive"
    usable = world.usable()

    free()
    world.wait(lambda: not world.troubles(), COMES_BACK)
    world.wait(lambda: world.usable() > usable, 20)
    assert world.store(20) == 20
    world.assert_served()
    world.engine.close(PATIENCE)


def cannot_mount(why: str) -> NoReturn:
    """Skips, where it may be skipped."""
    if os.environ.get("KVTIER_REQUIRE_MOUNTS") == "1":
        pytest.fail(f"KVTIER_REQUIRE_MOUNTS=1, but {why}")
    pytest.skip(why)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small ext4 of its own."""
    if os.geteuid() != 0:
        cannot_mount("loop mounts need root")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(FILE_SYSTEM_BYTES)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, mount], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        cannot_mount(f"loop mounts are not allowed here: {getattr(error, 'stderr', error)!r}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", mount], check=True)


def fill_up(file: Path, leave: int) -> None:
    """Takes all room but `leave` bytes."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        size = 1 << 20
        while size >= 4096:
            found = os.statvfs(file.parent)
            if found.f_bavail * found.f_frsize <= leave + size:
                size //= 2
                continue
            os.posix_fallocate(fd, os.fstat(fd).st_size, size)
    except OSError:
        pass  # full
    finally:
        os.close(fd)


def test_a_file_system_that_fills_up_is_lived_through(mounted: Path) -> None:
    # Room for the first steps only, so that the files want to grow when the rest is taken.
    ballast, rest = mounted / "ballast", mounted / "rest"
    fill_up(ballast, leave=44 << 20)
    world = World(mounted / "disk")

    def free() -> None:
        rest.unlink()
        ballast.unlink()

    live_through(world, lambda: fill_up(rest, leave=0), free)


def test_a_limit_on_the_size_of_files_is_lived_through(tmp_path: Path) -> None:
    """In a process of its own, since the limit is the process's."""
    found = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "disk")], capture_output=True, text=True, timeout=150
    )
    assert found.returncode == 0, found.stderr


def main() -> None:
    # Above what the host tier and the catalog need, below what the slot files want.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (18 << 20, hard))
    world = World(Path(sys.argv[1]))
    live_through(world, lambda: None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard)))


if __name__ == "__main__":
    main()
