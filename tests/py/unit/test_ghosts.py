"""Ghost caches through an engine: what another capacity would give, beside engines that have it."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvtier
from kvtier import _core
from kvtier.engine import group_spec

SLOT_BYTES = 8192
KEYS = 32
PATIENCE = 30.0


class Cache:
    """An engine of so many blocks; a request is looked up, what is found is loaded and the rest stored.

    With a drive of `disk_blocks` in `directory` each request waits for what it wrote.
    """

    def __init__(
        self, blocks: int, ghosts: bool = True, directory: Path | None = None, disk_blocks: int = 0
    ) -> None:
        layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="uint8", page_tokens=1)
        config = kvtier.Config(
            groups=[layout],
            block_tokens=1,
            model="m@1",
            host=blocks * SLOT_BYTES,
            chunk="1MiB",
            ghosts=ghosts,
            eviction="lru",  # which ghost caches estimate
            disk_eviction="lru",
            disk_admission="all",  # as they suppose
            disk_write_budget="unlimited",
            disk_commit_seconds=0.01,
        )
        self.has_disk = directory is not None
        if directory is not None:
            _, disk_bytes = _core.bytes_for_blocks([group_spec(layout, config)], disk_blocks)
            config = replace(config, disk=kvtier.Disk(str(directory), disk_bytes))
        self.engine = kvtier.open(config)
        self.engine.wait_until_whole()
        self.pages = self.engine.attach([np.zeros((64, 2, 1, 1, 16), np.uint8)])
        self.found = self.asked = 0

    def request(self, keys: np.ndarray) -> None:
        match = self.engine.lookup(keys)
        ready = match.ready_blocks
        self.found += ready
        self.asked += len(keys)
        ids = np.arange(len(keys))
        if ready:
            self.engine.load(keys[:ready], self.pages, ids[:ready]).wait()
        if ready < len(keys):
            parent = keys[ready - 1].tobytes() if ready else None
            self.engine.store(keys[ready:], self.pages, ids[ready:], first_block=ready, parent=parent).wait()
        if self.has_disk:
            self.engine.flush(PATIENCE)

    def close(self) -> None:
        self.pages.detach()
        self.engine.close()


def requests(count: int, conversations: int, seed: int) -> Iterator[np.ndarray]:
    """Conversations that return and grow, the recent ones more often; all begin with the same two blocks."""
    rng = np.random.default_rng(seed)
    digests = rng.integers(0, 256, (count * 10, KEYS), np.uint8)
    prompts: list[list[int]] = [[] for _ in range(conversations)]
    fresh = 2
    for n in range(count):
        prompt = prompts[(n // 3 + int(rng.random() ** 3 * conversations)) % conversations]
        if len(prompt) > 40 or rng.random() < 0.25:
            prompt.clear()
        if not prompt:
            prompt += [0, 1]
        grow = int(rng.integers(1, 9))
        prompt += range(fresh, fresh + grow)
        fresh += grow
        yield digests[prompt]


def test_ghosts_know_what_engines_of_other_capacities_find() -> None:
    blocks = 200
    caches = {factor: Cache(int(blocks * factor)) for factor in (0.5, 1, 2, 4)}
    for keys in requests(1500, 60, seed=1):
        for cache in caches.values():
            cache.request(keys)
    ghost = caches[1].engine.stats().ghost_host
    assert ghost is not None
    assert ghost.sample_rate == 1
    assert ghost.asked_blocks == ghost.sampled_blocks == caches[1].asked
    assert [point.factor for point in ghost.points] == [0.5, 1, 2, 4]
    rates = []
    for point in ghost.points:
        other = caches[point.factor]
        assert point.capacity_blocks == blocks * point.factor
        rates.append(other.found / other.asked)
        # Not equal: an engine evicts leaf first, and a request's tail is stored after its head was loaded.
        assert point.hit_rate == pytest.approx(rates[-1], abs=0.02)
    assert rates[-1] - rates[0] > 0.2  # else any constant would do
    assert ghost.memory_bytes <= 512 << 10
    for cache in caches.values():
        cache.close()


def test_a_lookup_alone_is_no_use_and_a_drop_is_known() -> None:
    with closing(Cache(100)) as cache:
        keys = next(requests(1, 1, seed=2))
        for _ in range(3):
            cache.engine.lookup(keys)
        assert cache.engine.stats().ghost_host.points[-1].hit_rate == 0
        cache.request(keys)
        cache.engine.lookup(keys)
        before = cache.engine.stats().ghost_host
        assert before.points[-1].hit_rate == pytest.approx(1 / 5)
        cache.engine.drop(keys)
        cache.engine.lookup(keys)
        after = cache.engine.stats().ghost_host
        assert after.points[-1].hit_rate * after.asked_blocks == pytest.approx(len(keys))


def test_without_ghosts_there_are_none() -> None:
    with closing(Cache(10, ghosts=False)) as cache:
        cache.request(next(requests(1, 1, seed=3)))
        stats = cache.engine.stats()
        assert (stats.ghost_host, stats.ghost_disk) == (None, None)
        assert stats.to_dict()["ghost_host"] is None


def test_the_disk_tier_has_its_own_and_knows_it_again_after_a_restart(tmp_path: object) -> None:
    layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="uint8", page_tokens=1)
    config = kvtier.Config(
        groups=[layout],
        block_tokens=1,
        model="m@1",
        host=4 * SLOT_BYTES,
        chunk="1MiB",
        disk=kvtier.Disk(str(tmp_path), "64MiB"),
    )
    keys = np.random.default_rng(1).integers(0, 256, (4, KEYS), np.uint8)
    with kvtier.open(config) as engine:
        pages = engine.attach([np.zeros((4, 2, 1, 1, 16), np.uint8)])
        engine.store(keys, pages, np.arange(4)).wait()
        assert engine.flush().durable == 4
        ghost = engine.stats().ghost_disk
        assert ghost is not None
        assert ghost.points[1].capacity_blocks == sum(c.capacity for c in engine.stats().disks[0].classes)
        pages.detach()
    with kvtier.open(config) as engine:
        engine.lookup(keys)
        stats = engine.stats()
        assert stats.ghost_host is not None
        assert stats.ghost_host.points[-1].hit_rate == 0
        assert stats.ghost_disk is not None
        assert stats.ghost_disk.points[0].hit_rate == 1
        assert stats.to_dict()["ghost_disk"]["points"][0]["factor"] == 0.5


def test_the_disk_tier_s_ghost_knows_what_drives_of_other_capacities_find(tmp_path: Path) -> None:
    blocks = 100
    caches = {
        factor: Cache(48, directory=tmp_path / str(factor), disk_blocks=int(blocks * factor))
        for factor in (0.5, 1, 2, 4)
    }
    for keys in requests(400, 30, seed=1):
        for cache in caches.values():
            cache.request(keys)
    ghost = caches[1].engine.stats().ghost_disk
    assert ghost is not None
    assert ghost.sample_rate == 1
    assert ghost.asked_blocks == caches[1].asked
    assert [point.factor for point in ghost.points] == [0.5, 1, 2, 4]
    rates = []
    for point in ghost.points:
        other = caches[point.factor]
        assert point.capacity_blocks == other.engine.stats().disks[0].classes[0].capacity
        rates.append(other.found / other.asked)  # in host memory or on the drive
        # Not equal: a drive does not hear of what is found in host memory.
        assert point.hit_rate == pytest.approx(rates[-1], abs=0.01)
    assert min(np.diff(rates)) > 0.05  # else a point would do for its neighbour
    for cache in caches.values():
        cache.close()


def test_ghosts_must_be_true_or_false() -> None:
    layout = kvtier.KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="uint8", page_tokens=1)
    with pytest.raises(kvtier.ConfigError, match="ghosts is 'yes'; allowed: true or false"):
        kvtier.Config(groups=[layout], block_tokens=1, model="m@1", host="1MiB", ghosts="yes")
    environ = {"KVTIER_GHOSTS": "false"}
    assert not kvtier.Config.from_env(environ, groups=[layout], model="m@1", host="1MiB").ghosts
    with pytest.raises(kvtier.ConfigError, match="KVTIER_GHOSTS is 'no'; allowed"):
        kvtier.Config.from_env({"KVTIER_GHOSTS": "no"}, groups=[layout], model="m@1", host="1MiB")


def test_of_many_lookups_one_in_eight_is_measured_and_the_rates_stay() -> None:
    with closing(Cache(100)) as cache:
        keys = np.random.default_rng(5).integers(0, 256, (4096, KEYS), np.uint8)
        head = keys[:40]
        cache.engine.store(head, cache.pages, np.arange(40)).wait()
        for _ in range(64):  # all of them, as long as they are few
            cache.engine.lookup(keys)
        first = cache.engine.stats().ghost_host
        assert first.asked_blocks == 64 * 4096
        assert first.points[1].hit_rate == pytest.approx(40 / 4096)
        rounds = 4000
        for _ in range(rounds):
            cache.engine.lookup(head)
        later = cache.engine.stats().ghost_host
        measured = (later.asked_blocks - first.asked_blocks) / 40
        assert measured == pytest.approx(rounds / 8, rel=0.2)
        found = later.points[1].hit_rate * later.asked_blocks - first.points[1].hit_rate * first.asked_blocks
        assert found == pytest.approx(measured * 40)
        with cache.engine._without_ghosts():
            cache.engine.lookup(head)
        assert cache.engine.stats().ghost_host.asked_blocks == later.asked_blocks
