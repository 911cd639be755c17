"""An engine at full occupancy of both tiers: what it holds comes back to where it began (I1, I4)."""

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from disk_campaign import allocated_bytes
from disk_driver import LOADED, PATIENCE, TIGHT, Tensors, chain_keys, config, group_of, payloads

import kvtier

ROUNDS = int(os.environ.get("KVTIER_SOAK_ROUNDS", "6"))  # of 200 operations
SEED = 9
RSS_SLACK_BYTES = 24 << 20


@dataclass(frozen=True)
class Held:
    """By this process."""

    rss_bytes: int
    descriptors: int
    threads: list[str]


def held() -> Held:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    # io_uring's workers (iou-wrk-...) are the kernel's, and come and go.
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    threads = sorted(name.strip() for name in names if not name.startswith("iou-"))
    return Held(pages * os.sysconf("SC_PAGE_SIZE"), len(list(Path("/proc/self/fd").iterdir())), threads)


class Soak:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.engine = kvtier.open(config(str(directory), TIGHT))
        self.tensors = [Tensors(self.engine, group) for group in range(2)]
        self.random = np.random.default_rng(SEED)
        self.next_chain = 0
        self.served = 0

    def operation(self) -> None:
        what = self.random.random()
        if what < 0.45:
            chain, self.next_chain = self.next_chain, self.next_chain + 1
            keys, group = chain_keys(SEED, chain), group_of(chain)
            self.tensors[group].fill(0, payloads(keys, group))
            self.engine.store(keys, self.tensors[group].pages, np.arange(len(keys))).wait(PATIENCE)
            return
        chain = max(0, self.next_chain - 1 - int(self.random.integers(0, 120)))
        keys, group = chain_keys(SEED, chain), group_of(chain)
        if what < 0.5:
            self.engine.drop(keys)
        elif what < 0.6:
            self.engine.prefetch(keys, 1.0).wait(PATIENCE)
        else:
            match = self.engine.lookup(keys)
            with match.pin(ttl=30):
                tensors = self.tensors[group]
                ticket = self.engine.load(keys, tensors.pages, np.arange(len(keys)))
                ticket.wait(PATIENCE)
                hits = ticket.result().outcomes == LOADED
                right = (tensors.read(len(keys)) == payloads(keys, group)).all(axis=1)
                assert right[hits].all(), f"wrong bytes of chain {chain}"
                self.served += int(hits.sum())

    def round(self) -> None:
        for n in range(200):
            self.operation()
            if n % 20 == 0:
                assert 0 < allocated_bytes(self.directory) <= TIGHT
        self.engine.flush(PATIENCE)

    def assert_conserved(self) -> None:
        stats = self.engine.stats()
        misses = stats.lookup_misses_absent + stats.lookup_misses_pending + stats.lookup_misses_failed
        assert stats.lookup_hits_host + stats.lookup_hits_disk + misses == stats.lookup_blocks
        assert (stats.pins, stats.pinned_blocks, stats.leases, stats.transfers_running) == (0, 0, 0, 0)
        assert stats.quarantined_blocks == 0
        assert stats.promotions_running == 0
        for of_class in (*stats.host, *stats.disks[0].classes):
            counts = (of_class.free, of_class.filling, of_class.ready, of_class.leaving)
            assert sum(counts) == of_class.capacity
            assert of_class.filling == of_class.leaving == 0
        disk = stats.disks[0]
        bad = sum(getattr(disk, name) for name in disk.__dataclass_fields__ if name.startswith("bad_"))
        assert disk.reads == disk.reads_good + disk.reads_failed + bad
        assert bad == disk.reads_failed == 0


def test_full_tiers_give_back_what_they_took(tmp_path: Path) -> None:
    before = held()
    soak = Soak(tmp_path / "disk")
    for _ in range(3):  # until both tiers are full, and every pool has grown
        soak.round()
    stats = soak.engine.stats()
    assert stats.evictions > 0
    assert stats.disk_evictions > 0
    settled = held()
    for _ in range(ROUNDS):
        soak.round()
        soak.assert_conserved()
    after = held()
    assert soak.served > 100
    assert after.descriptors == settled.descriptors
    assert after.threads == settled.threads
    assert after.rss_bytes <= settled.rss_bytes + RSS_SLACK_BYTES
    for tensors in soak.tensors:
        tensors.pages.detach()
    soak.engine.close(PATIENCE)
    del soak, tensors  # the CPU device's copy threads end with the last that uses it
    closed = held()
    assert closed.descriptors == before.descriptors
    assert closed.threads == before.threads


def test_engines_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    def once() -> None:
        soak = Soak(tmp_path / "disk")
        for _ in range(20):
            soak.operation()
        soak.engine.close(PATIENCE)

    for _ in range(3):
        once()
    before = held()
    for _ in range(10):
        once()
    after = held()
    assert after.descriptors == before.descriptors
    assert after.threads == before.threads
    assert after.rss_bytes <= before.rss_bytes + RSS_SLACK_BYTES


if os.environ.get("KVTIER_SOAK_ROUNDS"):
    pytestmark = pytest.mark.timeout(3600)
