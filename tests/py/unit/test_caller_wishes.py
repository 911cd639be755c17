"""store(priority=, ttl=): what the caller says of blocks stands above the policy, in every tier."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import (
    BlockOutcome,
    BlockState,
    Config,
    ConfigError,
    Disk,
    Engine,
    EventKind,
    KVLayout,
    Pages,
    Tier,
)
from kvtier.keys import Keys
from kvtier.replay import policies
from kvtier.testing import ManualClock

LAYOUT = KVLayout(1, 1, 8, "float16", 4)
PAGES = 64
PATIENCE = 30.0
SLOT = 8192
CATALOG = 4205568


def config_of(path: Path | None = None, blocks: int = 4, **changed: Any) -> Config:
    values: dict[str, Any] = {
        "groups": [LAYOUT],
        "block_tokens": 4,
        "host": blocks * SLOT,
        "model": "m@1",
        "copy_threads": 1,
        "disk": () if path is None else Disk(str(path / "disk"), CATALOG + 40 * SLOT),
        "disk_admission": "all",
        "disk_write_budget": "unlimited",
        "disk_commit_seconds": 0.01,
        "events": 1024,
    }
    return Config(**{**values, **changed})


def keys_of(config: Config, sequence: int, blocks: int = 2) -> Keys:
    return kvtier.block_keys(np.arange(4 * blocks) + 1000 * sequence, config)


def attached(engine: Engine) -> Pages:
    return engine.attach([np.ones((PAGES, 2, 4, 1, 8), np.float16)])


def opened(config: Config, **options: Any) -> Engine:
    """With all slots of the drive: what comes earlier is declined there."""
    engine = Engine(config, **options)
    deadline = time.monotonic() + PATIENCE
    while any(c.usable < c.capacity for disk in engine.stats().disks for c in disk.classes):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return engine


def store(engine: Engine, pages: Pages, keys: Keys, **wish: Any) -> list[int]:
    ticket = engine.store(keys, pages, range(len(keys)), **wish)
    return list(ticket.result().outcomes.tolist())


def ready(engine: Engine, keys: Keys) -> int:
    return int((engine.lookup(keys).states() == BlockState.READY).sum())


@pytest.mark.parametrize("policy", policies())
def test_a_high_priority_outlives_any_traffic_under_every_policy(policy: str) -> None:
    with kvtier.open(config_of(eviction=policy)) as engine:
        pages = attached(engine)
        kept = keys_of(engine.config, 0)
        store(engine, pages, kept, priority="high")
        for n in range(1, 30):
            assert store(engine, pages, keys_of(engine.config, n)) == [BlockOutcome.STORED] * 2
            assert ready(engine, kept) == 2
        last = keys_of(engine.config, 29)
        refused = store(engine, pages, keys_of(engine.config, 30), priority="low")
        assert refused == [BlockOutcome.DECLINED] * 2
        assert ready(engine, last) == 2
        store(engine, pages, last, priority="low")
        assert store(engine, pages, keys_of(engine.config, 31)) == [BlockOutcome.STORED] * 2
        assert (ready(engine, last), ready(engine, kept)) == (0, 2)
        store(engine, pages, kept, priority="normal")  # the last word counts
        for n in range(32, 60):
            store(engine, pages, keys_of(engine.config, n))
        if policy in ("lru", "fifo"):
            assert ready(engine, kept) == 0


def test_a_store_without_a_priority_leaves_it_as_it_is() -> None:
    with kvtier.open(config_of()) as engine:
        pages = attached(engine)
        kept = keys_of(engine.config, 0)
        store(engine, pages, kept, priority="high")
        store(engine, pages, kept)
        for n in range(1, 10):
            store(engine, pages, keys_of(engine.config, n))
        assert ready(engine, kept) == 2


def test_a_block_is_gone_when_its_time_is_over() -> None:
    clock = ManualClock()
    with Engine(config_of(), clock=clock) as engine:
        pages = attached(engine)
        keys = keys_of(engine.config, 0)
        store(engine, pages, keys, ttl=10)
        lease = engine.lookup(keys).pin()
        clock.advance_us(9_999_999)
        assert ready(engine, keys) == 2
        engine.events()
        clock.advance_us(1)
        assert engine.lookup(keys).states().tolist() == [BlockState.MISS] * 2
        stats = engine.stats()
        assert (stats.expirations, stats.drops, stats.evictions) == (2, 0, 0)
        assert engine.events().kinds.tolist() == [EventKind.EXPIRED] * 2
        assert engine.stats().host[0].leaving == 2  # the lease still holds its slots
        lease.release()
        assert engine.stats().host[0].free == 4
        loaded = engine.load(keys, pages, range(2)).result()
        assert loaded.outcomes.tolist() == [BlockOutcome.MISSED] * 2


def test_the_longest_time_of_several_stores_counts_and_none_is_for_ever() -> None:
    clock = ManualClock()
    with Engine(config_of(), clock=clock) as engine:
        pages = attached(engine)
        keys = keys_of(engine.config, 0)
        store(engine, pages, keys, ttl=10)
        store(engine, pages, keys, ttl=1)
        clock.advance_us(5_000_000)
        assert ready(engine, keys) == 2
        store(engine, pages, keys[:1], ttl=10)
        clock.advance_us(5_000_000)
        assert engine.lookup(keys).states().tolist() == [BlockState.READY, BlockState.MISS]
        store(engine, pages, keys[:1])
        store(engine, pages, keys[:1], ttl=0)
        clock.advance_us(10**12)
        assert ready(engine, keys) == 1


def test_a_block_with_a_time_to_live_is_not_on_a_drive_until_it_lives_for_ever(tmp_path: Path) -> None:
    clock = ManualClock()
    config = config_of(tmp_path)
    with Engine(config, clock=clock) as engine:
        pages = attached(engine)
        passing, staying = keys_of(config, 0), keys_of(config, 1)
        first = engine.store(passing, pages, range(2), ttl=10)
        first.durable.wait(PATIENCE)
        assert first.result().stored == 2
        assert engine.stats().disk_declined_ttl == 2
        assert engine.stats().disk_durable == 0
        store(engine, pages, staying, ttl=10)
        store(engine, pages, staying)  # somebody wants it for longer
        engine.flush(PATIENCE)
        clock.advance_us(10_000_000)
        store(engine, pages, staying, ttl=1)  # on a drive: too late
        clock.advance_us(10_000_000)
        assert (ready(engine, passing), ready(engine, staying)) == (0, 2)
        assert engine.stats().disk_durable == 2
    with kvtier.open(config) as engine:
        assert (ready(engine, passing), ready(engine, staying)) == (0, 2)


def left_the_drive(engine: Engine, keys: Keys) -> int:
    events = engine.events()
    assert events.lost == 0
    gone = events.keys[(events.kinds == EventKind.EVICTED) & (events.tiers == Tier.DISK)]
    ours = {key.tobytes() for key in keys}
    return sum(key.tobytes() in ours for key in gone)


def test_a_drive_too_lets_a_high_priority_go_last_and_a_low_one_first(tmp_path: Path) -> None:
    with opened(config_of(tmp_path, blocks=16)) as engine:
        pages = attached(engine)
        kept = keys_of(engine.config, 0)
        store(engine, pages, kept, priority="high")
        engine.flush(PATIENCE)
        capacity = engine.stats().disks[0].classes[0].capacity
        for n in range(1, capacity):  # twice what the drive holds
            store(engine, pages, keys_of(engine.config, n))
            engine.flush(PATIENCE)
        assert engine.stats().disk_evictions >= capacity // 2
        assert left_the_drive(engine, kept) == 0
        store(engine, pages, kept, priority="low")  # in both tiers
        store(engine, pages, keys_of(engine.config, capacity))
        engine.flush(PATIENCE)
        assert left_the_drive(engine, kept) == 2


# A sketch learns at once what was never offered; return-hazard must see what returns and what does not, on a
# drive that is small enough for its victims to be worth something.
@pytest.mark.parametrize(
    ("admission", "disk_blocks", "prompts"),
    [("second-use", 40, 14), ("tiny-lfu", 40, 14), ("return-hazard", 20, 42)],
)
def test_a_full_drive_takes_a_high_priority_that_its_admission_declines(
    tmp_path: Path, admission: str, disk_blocks: int, prompts: int
) -> None:
    clock = ManualClock()
    disk = Disk(str(tmp_path / "disk"), CATALOG + disk_blocks * SLOT)
    config = config_of(tmp_path, blocks=16, disk=disk, disk_admission=admission)
    with opened(config, clock=clock, hash_seed=7) as engine:
        pages = attached(engine)

        def offer(number: int, blocks: int = 1, **wish: Any) -> tuple[int, int, int]:
            """Returns how many the admission declined, how many were written, and how many went for them."""
            clock.advance_us(1_000_000)
            before = engine.stats()
            store(engine, pages, keys_of(config, number, blocks), **wish)
            engine.flush(PATIENCE)
            after = engine.stats()
            return (
                after.disk_declined_admission - before.disk_declined_admission,
                after.disk_durable - before.disk_durable,
                after.disk_evictions - before.disk_evictions,
            )

        for number in range(prompts):  # the heads of two blocks return, single blocks never
            offer(number, 2)
            if number >= 6:
                engine.load(keys_of(config, number - 6)[:1], pages, range(1)).result()
            offer(1000 + number)
        assert engine.stats().disks[0].classes[0].free == 0
        normal, high = [], []
        for number in range(12):
            normal.append(offer(2000 + number))
            high.append(offer(3000 + number, priority="high"))
        assert normal.count((1, 0, 0)) >= 8  # else nothing stood against the others
        assert high == [(0, 1, 1)] * 12


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"priority": "urgent"}, "priority is 'urgent'; allowed: None"),
        ({"priority": 1}, "priority is 1"),
        ({"ttl": -1}, "ttl is -1"),
        ({"ttl": "1h"}, "ttl is '1h'; allowed: None or seconds"),
        ({"ttl": float("nan")}, "ttl is nan"),
    ],
)
def test_a_bad_wish_is_refused_by_name(wish: dict[str, Any], message: str) -> None:
    with kvtier.open(config_of()) as engine:
        pages = attached(engine)
        with pytest.raises(ConfigError, match=message):
            engine.store(keys_of(engine.config, 0), pages, range(2), **wish)
        assert engine.stats().store_stored == 0


def test_expected_blocks_are_read_ahead_and_go_last(tmp_path: Path) -> None:
    clock = ManualClock()
    config = config_of(tmp_path, blocks=8, eviction="return-hazard")
    config = replace(config, disk=Disk(str(tmp_path / "disk"), CATALOG + 400 * SLOT))

    def others(engine: Engine, pages: Pages, numbers: range) -> None:
        for n in numbers:
            clock.advance_us(1_000_000)
            store(engine, pages, keys_of(config, n))
            engine.flush(PATIENCE)

    with opened(config, clock=clock) as engine:
        pages = attached(engine)
        wanted = keys_of(config, 0)
        others(engine, pages, range(20))
        assert engine.lookup(wanted).tiers().tolist() == [Tier.DISK] * 2
        expected = engine.expect(wanted)
        expected.prefetch.wait(PATIENCE)
        others(engine, pages, range(20, 40))
        assert engine.lookup(wanted).tiers().tolist() == [Tier.HOST] * 2
        expected.end()
        expected.end()
        others(engine, pages, range(40, 60))
        assert engine.lookup(wanted).tiers().tolist() == [Tier.DISK] * 2
        with engine.expect(wanted) as again:
            again.prefetch.wait(PATIENCE)
    again.end()  # after close too
    with pytest.raises(kvtier.ClosedError):
        engine.expect(wanted)
