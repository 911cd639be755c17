"""What proves a block, broken in turn: each scenario must notice its mutant, and without one must be content.

A scenario stores blocks, lets something happen to them, opens the disk tier anew and loads them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import disk_driver
import numpy as np
from disk_driver import BLOCK_TOKENS, LOADED, PAGES, PATIENCE, Tensors, chain_keys, config, payloads

import kvtier
from kvtier import testing

CAPACITY = 8 << 20
STORE_LANE = 1  # the engine's first stream: attach() makes it before the framework makes its own
SHORT = 0.1  # seconds in which a store must not let go of its pages
POISON = 0xEE


@dataclass
class Found:
    """Blocks that were loaded, that must have been, and that had wrong bytes."""

    checked: int = 0
    hits: int = 0
    hits_expected: int = 0
    wrong: int = 0

    @property
    def good(self) -> bool:
        return self.wrong == 0 and self.hits >= self.hits_expected


class Store:
    """An engine on `home` for as long as the `with` block lasts."""

    def __init__(self, home: Path, seed: int, drive: testing.SimulatedDrive | None = None) -> None:
        self.seed = seed
        # Commits when it is told to, and not before.
        self.engine = kvtier.Engine(
            config(str(home / "disk"), CAPACITY, disk_commit_seconds=10.0), drive=drive
        )
        self.tensors = Tensors(self.engine, 0)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(kvtier.KVTierError):  # the drive may be gone
            self.engine.close(PATIENCE)

    def put(self, chain: int, version: int = 0) -> kvtier.StoreTicket:
        keys = chain_keys(self.seed, chain)
        self.tensors.fill(0, payloads(keys, 0, version))
        ticket = self.engine.store(keys, self.tensors.pages, np.arange(len(keys)))
        ticket.wait(PATIENCE)
        return ticket

    def durable(self, chain: int, version: int = 0) -> None:
        ticket = self.put(chain, version)
        self.engine.flush(PATIENCE)
        assert ticket.durable_blocks == len(chain_keys(self.seed, chain))

    def find(self, chains: list[int], found: Found, *, promised: bool, version: int = 0) -> None:
        for chain in chains:
            keys = chain_keys(self.seed, chain)
            self.tensors.layers[0][:] = POISON
            ticket = self.engine.load(keys, self.tensors.pages, np.arange(len(keys)))
            ticket.wait(PATIENCE)
            loaded = ticket.result().outcomes == LOADED
            right = (self.tensors.read(len(keys)) == payloads(keys, 0, version)).all(axis=1)
            found.checked += len(keys)
            found.wrong += int((loaded & ~right).sum())
            if promised:
                found.hits += int(loaded.sum())
                found.hits_expected += len(keys)


def slots_file(home: Path) -> Path:
    (found,) = (home / "disk" / "stores").glob("*/slots.0")
    return found


def flipped_bits(home: Path, seed: int) -> Found:
    """Some payloads change on the drive."""
    found = Found()
    chains = list(range(0, 40, 2))
    with Store(home, seed) as store:
        for chain in chains:
            store.durable(chain)
    random = np.random.default_rng(seed)
    with slots_file(home).open("r+b") as file:
        for slot in random.choice(40, 10, replace=False).tolist():
            at = slot * 8192 + 4096 + int(random.integers(0, 4096))
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << int(random.integers(0, 8)))]))
    with Store(home, seed) as store:
        store.find(chains, found, promised=False)
    return found


def older_image(home: Path, seed: int) -> Found:
    """The drive shows a slot as it was before its block was dropped and stored anew with other bytes."""
    found = Found()
    chain, others = 0, [2, 4, 6]
    with Store(home, seed) as store:
        store.durable(chain)
        before = slots_file(home).read_bytes()[:8192]
        for other in others:
            store.durable(other)
        store.engine.drop(chain_keys(seed, chain))
        store.durable(chain, version=1)
    with slots_file(home).open("r+b") as file:
        file.write(before)
    with Store(home, seed) as store:
        store.find([chain], found, promised=False, version=1)
        store.find(others, found, promised=True)
    return found


def lost_power(home: Path, seed: int) -> Found:
    """The drive forgets what was not synced."""
    found = Found()
    drive = testing.SimulatedDrive(seed)
    chains = list(range(0, 32, 2))
    with Store(home, seed, drive) as store:
        for chain in chains:
            store.durable(chain)
        store.put(100)  # written perhaps, durable never
        drive.power_loss()
    with Store(home, seed) as store:
        store.find(chains, found, promised=True)
        store.find([100], found, promised=False)
    return found


def early_release(home: Path, seed: int) -> Found:
    """The caller reuses its pages as soon as the engine says that it may."""
    found = Found()
    chain = 6
    keys = chain_keys(seed, chain)
    device = testing.SimulatedDevice(seed)
    engine = kvtier.Engine(config(str(home / "disk"), CAPACITY))
    layer = device.empty((PAGES, 2, BLOCK_TOKENS, 1, 128), np.uint8)
    pages = engine.attach([layer])
    stream = device.stream()
    values = np.zeros(layer.shape, np.uint8)
    values[: len(keys)] = payloads(keys, 0).reshape(len(keys), *layer.shape[1:])
    device.write(layer, values, stream)
    device.synchronize()
    device.hold(STORE_LANE)
    ticket = engine.store(keys, pages, np.arange(len(keys)), stream=stream)
    with contextlib.suppress(kvtier.TimeoutError):
        ticket.released.wait(SHORT)
        device.write(layer, POISON, stream)
        device.synchronize(stream)
    device.release(STORE_LANE)
    ticket.wait(PATIENCE)
    engine.flush(PATIENCE)
    engine.close(PATIENCE)
    with Store(home, seed) as store:
        store.find([chain], found, promised=True)
    return found


SCENARIOS: dict[str, Callable[[Path, int], Found]] = {
    "disk_verify_checksum": flipped_bits,
    "disk_verify_generation": older_image,
    "disk_sync_before_commit": lost_power,
    "released_after_store_copy": early_release,
}
assert all(disk_driver.group_of(chain) == 0 for chain in (0, 2, 100))


def run(point: str, home: Path, seed: int, *, mutant: bool) -> Found:
    """One scenario, with its ordering point disabled or not."""
    home.mkdir(parents=True)
    with testing.disable_ordering(point) if mutant else contextlib.nullcontext():
        return SCENARIOS[point](home, seed)
