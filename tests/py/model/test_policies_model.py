"""Every eviction policy under random use of a real engine: pins hold, bytes are right, books balance.

The order of evictions is held to simple models in tests/cpp/index and, through whole traces, to the
simulation in tests/py/unit/test_replay.py; test_engine_model.py predicts it exactly for LRU.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier.config import ADMISSIONS, EVICTIONS
from kvtier.testing import ManualClock

NUM_KEYS = 60
HOST_BLOCKS = 24
STRIDE = 8192  # header and payload, in whole pages
LAYOUT = kvtier.KVLayout.mla(num_layers=1, latent_dim=64, dtype="uint8", page_tokens=1)
OURS = "return-hazard"
LEAF_FIRST = ("lru", OURS)
PATIENCE = 60.0
DISK_BLOCKS = 40
CATALOG_BYTES = 4205568  # what a drive's catalog and header take beside its blocks


class Run:
    """An engine whose blocks hold their key's number."""

    def __init__(self, policy: str, seed: int, **more: Any) -> None:
        self.rng = random.Random(seed)
        config = kvtier.Config(
            groups=[LAYOUT], host=HOST_BLOCKS * STRIDE, model="m@1", block_tokens=1, eviction=policy, **more
        )
        self.clock = ManualClock()
        self.engine = kvtier.Engine(config, clock=self.clock)
        self.engine.wait_until_whole()
        self.memory = np.zeros((NUM_KEYS, 1, 64), np.uint8)
        self.pages = self.engine.attach([self.memory])
        # Prompts: block n hangs on block n - 1 of the same ten.
        self.keys = np.concatenate(
            [kvtier.block_keys(np.arange(10) + 100 * p, config) for p in range(NUM_KEYS // 10)]
        )
        self.leases: list[tuple[Any, int, int]] = []

    def prompt(self) -> tuple[int, int]:
        begin = self.rng.randrange(NUM_KEYS // 10) * 10
        return begin, begin + self.rng.randint(1, 10)

    def step(self) -> None:
        begin, end = self.prompt()
        keys, ids = self.keys[begin:end], np.arange(begin, end)
        what = self.rng.randrange(10)
        self.clock.advance_us(self.rng.choice((0, 100_000, 2_000_000, 30_000_000)))
        if what < 5:
            self.memory[begin:end] = np.arange(begin, end, dtype=np.uint8)[:, None, None]
            self.engine.store(keys, self.pages, ids).result()
        elif what < 7:
            self.load()
        elif what == 7 and len(self.leases) < 3:
            match = self.engine.lookup(keys)
            if match.ready_blocks:
                self.leases.append((match.pin(), begin, begin + match.ready_blocks))
        elif what == 8 and self.leases:
            self.leases.pop(self.rng.randrange(len(self.leases)))[0].release()
        elif self.rng.random() < 0.3:
            held = {key for _, first, last in self.leases for key in range(first, last)}
            if not held & set(range(begin, end)):
                self.engine.drop(keys[-1:])
        else:
            self.engine.touch(keys)

    def load(self) -> None:
        begin, end = self.prompt()
        self.memory[begin:end] = 255
        ticket = self.engine.load(self.keys[begin:end], self.pages, np.arange(begin, end))
        valid = ticket.result().valid_blocks
        loaded = self.memory[begin : begin + valid, 0]
        assert (loaded == np.arange(begin, begin + valid, dtype=np.uint8)[:, None]).all()

    def check(self, policy: str) -> None:
        for _, begin, end in self.leases:
            assert self.engine.lookup(self.keys[begin:end]).ready_blocks == end - begin, "a pinned block went"
        stats = self.engine.stats()
        host = stats.host[0]
        assert host.free + host.filling + host.ready + host.leaving == host.capacity == HOST_BLOCKS
        assert stats.health == "ok"
        for disk in stats.disks:
            for each in disk.classes:
                assert each.free + each.filling + each.ready + each.leaving == each.capacity
        if policy in LEAF_FIRST:
            assert stats.orphans == 0


@pytest.mark.parametrize("policy", EVICTIONS)
def test_pins_bytes_and_books_under_random_use(policy: str) -> None:
    evicted = 0
    for seed in range(4):
        run = Run(policy, seed)
        with run.engine:
            for _ in range(300):
                run.step()
                run.check(policy)
            evicted += run.engine.stats().evictions
    assert evicted > 500


class RunWithDisk(Run):
    """With a drive that holds more than the host tier and less than all prompts."""

    def __init__(
        self, path: Path, seed: int, *, policy: str = OURS, admission: str = OURS, **more: Any
    ) -> None:
        disk = kvtier.Disk(str(path), CATALOG_BYTES + DISK_BLOCKS * STRIDE)
        super().__init__(
            policy,
            seed,
            disk=disk,
            disk_eviction=policy,
            disk_admission=admission,
            disk_commit_seconds=0.01,
            **more,
        )
        self.policy = policy
        self.waiting: list[Any] = []

    def step(self) -> None:
        what = self.rng.randrange(8)
        begin, end = self.prompt()
        keys = self.keys[begin:end]
        if what == 0:
            self.engine.prefetch(keys).wait(PATIENCE)
        elif what == 1:
            fetch = self.engine.prefetch(keys)
            fetch.cancel()
            fetch.wait(PATIENCE)
        elif what == 2 and len(self.waiting) < 6:
            self.waiting.append(self.engine.expect(keys))
        elif what == 3 and self.waiting:
            self.waiting.pop(self.rng.randrange(len(self.waiting))).end()
        elif what == 4:
            self.engine.flush(PATIENCE)
        else:
            super().step()

    def run_to_the_end(self, steps: int) -> Any:
        """Returns the last stats of the engine, which is closed."""
        with self.engine:
            for _ in range(steps):
                self.step()
                self.check(self.policy)
            for each in self.waiting:
                each.end()
            self.engine.flush(PATIENCE)
            self.check(self.policy)
            stats = self.engine.stats()
        assert stats.lookup_blocks == (
            stats.lookup_hits_host
            + stats.lookup_hits_disk
            + stats.lookup_misses_absent
            + stats.lookup_misses_pending
            + stats.lookup_misses_failed
        )
        if self.policy in LEAF_FIRST:
            assert stats.disk_orphans == 0
        return stats

    def load_what_is_there(self) -> None:
        """Of an engine that was opened again."""
        with self.engine:
            for _ in range(30):
                self.load()
                self.check(self.policy)
            assert self.engine.stats().promote_good > 0


@pytest.mark.parametrize("budget", ["unlimited", None])
def test_tiers_that_learn_give_right_bytes_under_random_use(tmp_path: Path, budget: str | None) -> None:
    evicted = written = promoted = declined = 0
    for seed in range(6):
        path = tmp_path / str(seed)
        stats = RunWithDisk(path, seed, disk_write_budget=budget).run_to_the_end(300)
        evicted += stats.disk_evictions
        promoted += stats.promote_good
        declined += stats.disk_declined_admission
        written += stats.disk_durable
        RunWithDisk(path, seed + 100, disk_write_budget=budget).load_what_is_there()
    assert promoted > 100
    assert written > 40
    if budget == "unlimited":
        assert evicted > 50
        assert declined > 0


def check_with_a_drive(folder: Path, policy: str, seeds: range, steps: int) -> int:
    """Each seed with another admission, every fourth with the default budget; returns what was declined."""
    evicted = promoted = declined = 0
    for seed in seeds:
        path = folder / str(seed)
        admission = ADMISSIONS[seed % len(ADMISSIONS)]
        budget = None if seed % 4 == 3 else "unlimited"
        run = RunWithDisk(path, seed, policy=policy, admission=admission, disk_write_budget=budget)
        stats = run.run_to_the_end(steps)
        evicted += stats.disk_evictions
        promoted += stats.promote_good
        declined += stats.disk_declined_admission
        again = RunWithDisk(path, seed + 100, policy=policy, admission=admission, disk_write_budget=budget)
        again.load_what_is_there()
    assert evicted > 10 * len(seeds)
    assert promoted > 10 * len(seeds)
    return declined


@pytest.mark.parametrize("policy", [policy for policy in EVICTIONS if policy != OURS])
def test_every_policy_of_a_drive_gives_right_bytes_under_random_use(tmp_path: Path, policy: str) -> None:
    check_with_a_drive(tmp_path, policy, range(3), 150)


@pytest.mark.slow
@pytest.mark.parametrize("policy", EVICTIONS)
def test_every_policy_of_a_drive_under_long_random_use(tmp_path: Path, policy: str) -> None:
    assert check_with_a_drive(tmp_path, policy, range(10, 22), 400) > 0
