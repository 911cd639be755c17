"""Engine.events(): whoever reads all of them knows what is in which tier."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvtier
from kvtier import (
    Config,
    ConfigError,
    Disk,
    Engine,
    EventKind,
    Events,
    KVLayout,
    Pages,
    Tier,
    UnsupportedError,
)
from kvtier.keys import Keys

LAYOUTS = [KVLayout(1, 1, 8, "float16", 4), KVLayout(2, 1, 8, "float16", 4)]
PAGES = 64
PATIENCE = 30.0
Resident = dict[int, set[tuple[bytes, int]]]  # (key, group) of each tier


def config_of(path: Path | None, blocks: int = 6, events: int = 4096) -> Config:
    return Config(
        groups=LAYOUTS,
        block_tokens=4,
        host=blocks * 2 * 8192,
        model="m@1",
        copy_threads=1,
        disk=() if path is None else Disk(str(path / "disk"), "8MiB"),
        disk_admission="all",
        disk_write_budget="unlimited",
        disk_commit_seconds=0.01,
        events=events,
    )


def keys_of(config: Config, sequence: int, blocks: int = 3) -> Keys:
    return kvtier.block_keys(np.arange(4 * blocks) + 1000 * sequence, config)


def attached(engine: Engine) -> list[Pages]:
    return [
        engine.attach([np.ones((PAGES, 2, 4, 1, 8), np.float16) for _ in range(layout.num_layers)], group)
        for group, layout in enumerate(LAYOUTS)
    ]


def apply(resident: Resident, events: Events) -> None:
    """Every event must fit what the events before it said."""
    assert events.lost == 0
    for key, group, tier, kind in zip(events.keys, events.groups, events.tiers, events.kinds, strict=True):
        block = (key.tobytes(), int(group))
        if kind == EventKind.RESET:
            for blocks in resident.values():
                blocks.clear()
        elif kind == EventKind.STORED:
            assert block not in resident[tier]
            resident[tier].add(block)
        else:
            assert block in resident[tier]
            resident[tier].remove(block)


def found(engine: Engine, keys: list[bytes], tier: Tier) -> set[tuple[bytes, int]]:
    match = engine.lookup(keys)
    return {
        (key, group)
        for group in range(2)
        for key, at in zip(keys, match.tiers(group), strict=True)
        if at == tier
    }


@pytest.fixture
def engine() -> Iterator[Engine]:
    with kvtier.open(config_of(None)) as opened:
        yield opened


@pytest.mark.parametrize("with_disk", [False, True])
def test_who_reads_all_events_knows_what_is_in_which_tier(tmp_path: Path, with_disk: bool) -> None:
    config = config_of(tmp_path if with_disk else None)
    chosen = random.Random(5)
    resident: Resident = {Tier.HOST: set(), Tier.DISK: set()}
    kinds: set[int] = set()
    sequences = [keys_of(config, n) for n in range(12)]
    names = list(dict.fromkeys(key.tobytes() for keys in sequences for key in keys))
    with kvtier.open(config) as engine:
        pages = attached(engine)
        for step in range(300):
            keys = chosen.choice(sequences)
            what = chosen.choice(["store", "store", "store", "load", "drop", "touch"])
            for group in range(2) if what in ("store", "load") else ():
                if what == "store":
                    engine.store(keys, pages[group], range(len(keys))).wait(PATIENCE)
                else:
                    engine.load(keys, pages[group], range(len(keys))).wait(PATIENCE)
            if what == "drop":
                engine.drop(keys[-1:])
            elif what == "touch":
                engine.touch(keys)
            engine.flush(PATIENCE)  # what goes to the drive in the background
            events = engine.events()
            kinds.update(events.kinds.tolist())
            apply(resident, events)
            if step % 10 == 0:
                assert resident[Tier.HOST] == found(engine, names, Tier.HOST)
                assert resident[Tier.DISK] - resident[Tier.HOST] == found(engine, names, Tier.DISK)
        stats = engine.stats()
        assert len(engine.events()) == 0
    assert kinds == {EventKind.STORED, EventKind.EVICTED, EventKind.DROPPED}
    assert bool(resident[Tier.DISK]) == with_disk
    assert stats.evictions > 20
    assert stats.promote_good > 0 or not with_disk


def test_after_a_reset_nothing_is_known_and_new_keys_are_the_callers(engine: Engine) -> None:
    pages = attached(engine)
    first, second = keys_of(engine.config, 1), keys_of(engine.config, 2)
    engine.store(first, pages[0], range(3)).wait()
    engine.reset()
    engine.store(second, pages[0], range(3)).wait()
    events = engine.events()
    assert events.kinds.tolist() == [EventKind.STORED] * 3 + [EventKind.RESET] + [EventKind.STORED] * 3
    assert {key.tobytes() for key in events.keys[:3]} == {key.tobytes() for key in first}
    assert {key.tobytes() for key in events.keys[4:]} == {key.tobytes() for key in second}
    for n in range(3, 9):  # evicts what was before the reset
        engine.store(keys_of(engine.config, n), pages[0], range(3)).wait()
    ours = {key.tobytes() for n in range(2, 9) for key in keys_of(engine.config, n)}
    events = engine.events()
    gone = [key.tobytes() for key in events.keys[events.kinds == EventKind.EVICTED]]
    assert len(gone) > 6
    assert sum(key in ours for key in gone) == len(gone) - 3
    assert not any(key.tobytes() in gone for key in first)


def test_a_late_reader_learns_how_many_it_lost() -> None:
    with kvtier.open(config_of(None, events=4)) as engine:
        pages = attached(engine)
        engine.store(keys_of(engine.config, 1, 6), pages[0], range(6)).wait()
        events = engine.events(most=1)
        assert (len(events), events.lost) == (1, 2)
        events = engine.events()
        assert (len(events), events.lost) == (3, 0)
        assert (events.keys.shape, events.keys.dtype, events.groups.dtype) == ((3, 32), np.uint8, np.uint16)
        assert events.tiers.tolist() == [Tier.HOST] * 3


def test_events_are_off_unless_asked_for() -> None:
    with (
        kvtier.open(config_of(None, events=0)) as engine,
        pytest.raises(UnsupportedError, match="open it with events=N"),
    ):
        engine.events()
    for wrong in (-1, 2**25, 1.5, "many"):
        with pytest.raises(ConfigError, match="events is"):
            config_of(None, events=wrong)  # type: ignore[arg-type]
    assert Config.from_env({"KVTIER_EVENTS": "7"}, groups=LAYOUTS, host="1MiB", model="m@1").events == 7


def test_after_close_there_are_no_events() -> None:
    engine = kvtier.open(config_of(None))
    engine.close()
    with pytest.raises(kvtier.ClosedError):
        engine.events()
