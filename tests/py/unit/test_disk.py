"""The disk tier as a user sees it: what survives a restart, what does not, and what is said about it."""

import json
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvtier
from kvtier import (
    BlockOutcome,
    Config,
    ConfigError,
    Disk,
    Engine,
    KVLayout,
    Pages,
    ResourceError,
    StoreTicket,
    Tier,
    UnsupportedError,
)
from kvtier.keys import Keys
from kvtier.testing import ManualClock

LAYOUT = KVLayout(2, 2, 8, "float16", 4)
WINDOW = KVLayout(3, 2, 8, "float16", 4, window_tokens=16)
BLOCK_TOKENS = 8
PAGES = 64
PATIENCE = 30.0
Array = npt.NDArray[Any]


def config_of(path: Path, capacity: int | str = "8MiB", **changed: Any) -> Config:
    values: dict[str, Any] = {
        "groups": [LAYOUT],
        "block_tokens": BLOCK_TOKENS,
        "host": "1MiB",
        "chunk": "1MiB",
        "model": "m@1",
        "copy_threads": 1,
        "disk": Disk(str(path / "disk"), capacity),
        "disk_commit_seconds": 0.01,
        "disk_write_budget": "unlimited",
        "disk_admission": "all",
    }
    return Config(**{**values, **changed})


def tensors(layout: KVLayout = LAYOUT, seed: int = 0) -> list[Array]:
    shape = (layout.num_layers, PAGES, 2, layout.page_tokens, layout.num_kv_heads, layout.head_dim)
    return list(np.random.default_rng(seed).integers(0, 1 << 16, shape, np.uint16).view(np.float16))


def keys_of(config: Config, num_blocks: int = 8, seed: int = 0, namespace: str = "") -> Keys:
    return kvtier.block_keys(np.arange(BLOCK_TOKENS * num_blocks) + 1000 * seed, config, namespace=namespace)


def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for what a thread of the engine does by itself."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.002)


def opened(config: Config, slots: int | None = None) -> Engine:
    """An engine whose drives have room: files grow in the background, and what comes earlier is declined.

    Waits until every class has as many slots, None for all.
    """
    engine = kvtier.open(config)
    disks = [disk for disk in engine.stats().disks if disk.classes]

    def grown() -> bool:
        classes = [c for disk in engine.stats().disks for c in disk.classes]
        return all(c.usable >= (c.capacity if slots is None else slots) for c in classes)

    if disks:
        until(grown, "slot files to grow")
    return engine


def store(engine: Engine, pages: Pages, keys: Keys, **options: Any) -> StoreTicket:
    ticket = engine.store(keys, pages, range(2 * len(keys)), **options)
    ticket.durable.wait(PATIENCE)
    return ticket


def load(engine: Engine, keys: Keys, expected: list[Array], group: int = 0) -> kvtier.LoadResult:
    """Loads into other pages; what was loaded must be the very bytes."""
    target = [np.zeros_like(t) for t in expected]
    pages = engine.attach(target, group)
    try:
        result = engine.load(keys, pages, range(2 * len(keys))).wait(PATIENCE).result()
    finally:
        pages.detach(PATIENCE)
    for block, outcome in enumerate(result.outcomes):
        if outcome == BlockOutcome.LOADED:
            for was, came in zip(expected, target, strict=True):
                part = slice(2 * block, 2 * block + 2)
                assert np.array_equal(was[part].view(np.uint16), came[part].view(np.uint16))
    return result


def filled(config: Config, num_blocks: int = 8, **options: Any) -> tuple[Keys, list[Array]]:
    """Opens, stores, waits until it is durable, and closes."""
    data = tensors()
    keys = keys_of(config, num_blocks, namespace=options.get("namespace", ""))
    with opened(config) as engine:
        ticket = store(engine, engine.attach(data), keys, **options)
        assert ticket.durable_blocks == num_blocks
    return keys, data


def stores(config: Config) -> list[Path]:
    return sorted((Path(config.disks[0].path) / "stores").iterdir())


def forget_catalogs(config: Config) -> None:
    """As after the loss of a catalog: the next opening reads the slots' headers."""
    for folder in stores(config):
        (folder / "catalog.mdb").unlink()


def allocated_bytes(path: str) -> int:
    """What stands on the drive below a directory, itself included; files may come and go meanwhile."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in [folder, *(os.path.join(folder, f) for f in files)]:  # noqa: PTH118
            try:
                total += os.lstat(name).st_blocks * 512
            except FileNotFoundError:  # noqa: PERF203
                continue
    return total


# --- what survives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("catalog", ["catalog", "headers"])
def test_what_was_durable_is_loaded_after_a_restart(tmp_path: Path, catalog: str) -> None:
    config = config_of(tmp_path)
    keys, data = filled(config)
    if catalog == "headers":
        forget_catalogs(config)
    with kvtier.open(config) as engine:
        match = engine.lookup(keys)
        assert match.ready_blocks == 8
        assert match.tiers().tolist() == [Tier.DISK] * 8
        assert engine.stats().disks[0].opened_from.startswith(catalog)
        result = load(engine, keys, data)
        assert result.valid_blocks == 8
        assert result.outcomes.tolist() == [BlockOutcome.LOADED] * 8
        assert engine.lookup(keys).tiers().tolist() == [Tier.HOST] * 8
        stats = engine.stats()
        assert (stats.promote_good, stats.promote_bad, stats.lookup_hits_disk) == (8, 0, 8)
        assert stats.disks[0].reads_good == 8


def test_the_host_tier_is_registered_with_the_drives_or_it_is_said_why_not(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk=[Disk(str(tmp_path / name), "8MiB") for name in "ab"])
    with opened(config) as engine:
        engine.wait_until_whole()

        def told() -> bool:
            disks = engine.stats().disks
            return all("registered" in d.queue or d.buffers_problem for d in disks)

        until(told, "the drives to be told of the arena")
        for disk in engine.stats().disks:
            assert ("registered" in disk.queue) == (disk.buffers_problem == "")
        data = tensors()
        keys = keys_of(config)
        assert store(engine, engine.attach(data), keys).durable_blocks == 8
    with kvtier.open(config) as engine:
        assert load(engine, keys, data).valid_blocks == 8  # maybe before the drives are told


def test_flush_says_how_many_became_durable(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk_commit_seconds=60)
    with opened(config) as engine:
        pages = engine.attach(tensors())
        keys = keys_of(config)
        ticket = engine.store(keys, pages, range(16))
        ticket.ready.wait(PATIENCE)
        flushed = engine.flush(PATIENCE)
        assert (flushed.durable, flushed.dropped) == (8, 0)
        assert ticket.durable_blocks == 8
        assert ticket.durable.done()
        again = store(engine, pages, keys)  # present, and durable before
        assert again.durable_blocks == 8


def test_without_a_disk_nothing_is_durable(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk=())
    with kvtier.open(config) as engine:
        ticket = engine.store(keys_of(config), engine.attach(tensors()), range(16))
        with pytest.raises(UnsupportedError):
            ticket.durable.wait(1)
        assert ticket.durable_blocks == 0
        assert engine.stats().disks == ()


def test_blocks_that_host_evicted_come_back_from_disk(tmp_path: Path) -> None:
    config = config_of(tmp_path, host="128KiB")
    data = tensors()
    batches = [keys_of(config, 8, seed=seed) for seed in range(4)]
    with opened(config) as engine:
        pages = engine.attach(data)
        for keys in batches:
            store(engine, pages, keys)
        assert engine.stats().evictions > 0
        tiers = np.concatenate([engine.lookup(keys).tiers() for keys in batches])
        assert Tier.NONE not in tiers
        assert Tier.DISK in tiers
        for keys in batches:
            assert load(engine, keys, data).valid_blocks == 8
        stats = engine.stats()
        lookups = stats.lookup_hits_host + stats.lookup_hits_disk + stats.lookup_misses_absent
        assert stats.lookup_blocks == lookups + stats.lookup_misses_pending + stats.lookup_misses_failed


def test_a_lease_whose_time_is_over_keeps_no_place_from_what_is_read(tmp_path: Path) -> None:
    clock = ManualClock()
    config = config_of(tmp_path, host="128KiB")
    data = tensors()
    batches = [keys_of(config, 8, seed=seed) for seed in range(4)]
    with Engine(config, clock=clock) as engine:
        until(lambda: engine.stats().disks[0].classes[0].usable >= 32, "slot files to grow")
        pages = engine.attach(data)
        for keys in batches:
            store(engine, pages, keys)
        on_disk = next(keys for keys in batches if Tier.HOST not in engine.lookup(keys).tiers())
        leases = [engine.lookup(keys).pin(ttl=5) for keys in batches if keys is not on_disk]
        stats = engine.stats()
        assert stats.host[0].usable - stats.pinned_blocks < 8
        clock.advance_us(6_000_000)
        assert load(engine, on_disk, data).valid_blocks == 8
        assert not any(lease.active for lease in leases)


def test_several_groups_and_a_sliding_window_survive(tmp_path: Path) -> None:
    config = config_of(tmp_path, groups=[LAYOUT, WINDOW])
    full, window = tensors(), tensors(WINDOW, 1)
    keys = keys_of(config, 6)
    with opened(config) as engine:
        store(engine, engine.attach(full), keys)
        # Of a window of 16 tokens only the last two blocks are needed.
        store(engine, engine.attach(window, group=1), keys[4:], first_block=4)
    with kvtier.open(config) as engine:
        match = engine.lookup(keys)
        assert match.tiers(0).tolist() == [Tier.DISK] * 6
        assert match.tiers(1).tolist() == [Tier.NONE] * 4 + [Tier.DISK] * 2
        assert match.ready_blocks == 6
        assert load(engine, keys, full).valid_blocks == 6
        assert load(engine, keys[4:], window, group=1).valid_blocks == 2


def test_blocks_are_spread_over_several_disks(tmp_path: Path) -> None:
    disks = [Disk(str(tmp_path / name), "8MiB") for name in ("a", "b")]
    config = config_of(tmp_path, disk=disks)
    keys, data = filled(config, 16)
    with kvtier.open(config) as engine:
        assert engine.lookup(keys).ready_blocks == 16
        assert load(engine, keys, data).valid_blocks == 16
        assert all(disk.reads_good > 0 for disk in engine.stats().disks)
    with kvtier.open(replace(config, disk=disks[:1])) as engine:  # one was taken away
        there = int((engine.lookup(keys).tiers() == Tier.DISK).sum())
        assert 0 < there < 16


# --- dropping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("catalog", ["catalog", "headers"])
def test_what_was_dropped_stays_away_after_a_restart(tmp_path: Path, catalog: str) -> None:
    config = config_of(tmp_path)
    keys, data = filled(config)
    with kvtier.open(config) as engine:
        assert engine.drop(keys[:3]) == 3
        assert engine.lookup(keys).tiers().tolist() == [Tier.NONE] * 3 + [Tier.DISK] * 5
    if catalog == "headers":
        forget_catalogs(config)
    with kvtier.open(config) as engine:
        assert engine.lookup(keys).tiers().tolist() == [Tier.NONE] * 3 + [Tier.DISK] * 5
        assert (
            load(engine, keys, data).outcomes.tolist()
            == [BlockOutcome.MISSED] * 3 + [BlockOutcome.LOADED] * 5
        )


@pytest.mark.parametrize("catalog", ["catalog", "headers"])
def test_tenants_are_dropped_one_by_one(tmp_path: Path, catalog: str) -> None:
    config = config_of(tmp_path)
    mine, data = filled(config, namespace="a")
    others, _ = filled(config, namespace="b")
    assert not np.array_equal(mine, others)
    with kvtier.open(config) as engine:
        assert engine.drop(namespace="nobody") == 0
        assert engine.drop(namespace="a") == 8
    if catalog == "headers":
        forget_catalogs(config)
    with kvtier.open(config) as engine:
        assert engine.lookup(mine).tiers().tolist() == [Tier.NONE] * 8
        assert load(engine, others, data).valid_blocks == 8


def test_dropped_blocks_can_be_stored_again(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    keys, _ = filled(config)
    data = tensors(seed=7)
    with opened(config) as engine:
        engine.drop(keys)
        assert store(engine, engine.attach(data), keys).durable_blocks == 8
    with kvtier.open(config) as engine:
        assert load(engine, keys, data).valid_blocks == 8


# --- prefetch -----------------------------------------------------------------------------------------


def test_prefetch_brings_blocks_into_the_host_tier(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    keys, data = filled(config)
    with kvtier.open(config) as engine:
        prefetch = engine.prefetch(keys[:5]).wait(PATIENCE)
        assert prefetch.done()
        assert prefetch.ready_blocks() == 5
        assert engine.lookup(keys).tiers().tolist() == [Tier.HOST] * 5 + [Tier.DISK] * 3
        assert engine.prefetch(keys[:5]).wait(PATIENCE).ready_blocks() == 5  # nothing to read
        assert engine.stats().disks[0].reads == 5
        missing = engine.prefetch(keys_of(config, seed=9)).wait(PATIENCE)
        assert missing.ready_blocks() == 0
        assert load(engine, keys, data).valid_blocks == 8


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_prefetch_that_is_given_up_ends_and_harms_nothing(tmp_path: Path, how: str) -> None:
    config = config_of(tmp_path, disk_queue_depth=1)
    keys, data = filled(config, 32)
    with kvtier.open(config) as engine:
        prefetch = engine.prefetch(keys, deadline=0 if how == "deadline" else None)
        given_up = prefetch.cancel() if how == "cancel" else None
        prefetch.wait(PATIENCE)
        stats = engine.stats()
        ended = stats.promote_good + stats.promote_cancelled + stats.promote_declined
        assert ended == 32
        assert given_up is None or given_up == stats.promote_cancelled
        assert prefetch.ready_blocks() <= stats.promote_good
        assert prefetch.cancel() == 0
        assert load(engine, keys, data).valid_blocks == 32
        assert engine.stats().pins == 0


def test_a_load_needs_no_prefetch_and_overtakes_it(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk_queue_depth=1)
    keys, data = filled(config, 32)
    with kvtier.open(config) as engine:
        prefetch = engine.prefetch(keys)
        assert load(engine, keys[16:], [t[32:] for t in data]).valid_blocks == 16
        prefetch.cancel()
        prefetch.wait(PATIENCE)


@pytest.mark.parametrize("deadline", [-1, "soon", float("nan"), True])
def test_a_deadline_is_seconds(tmp_path: Path, deadline: Any) -> None:
    config = config_of(tmp_path)
    with kvtier.open(config) as engine, pytest.raises(ConfigError):
        engine.prefetch(keys_of(config), deadline=deadline)


# --- sharing a directory ------------------------------------------------------------------------------


def test_two_models_share_a_directory_and_nothing_else(tmp_path: Path) -> None:
    first = config_of(tmp_path, "8MiB")
    second = config_of(tmp_path, "24MiB", model="m@2")
    keys, data = filled(first)
    with kvtier.open(first) as engine, opened(second, 64) as other:
        assert other.lookup(keys).ready_blocks == 0
        assert store(other, other.attach(tensors(seed=2)), keys_of(second)).durable_blocks == 8
        assert engine.lookup(keys_of(second)).ready_blocks == 0
        assert load(engine, keys, data).valid_blocks == 8
        assert other.drop(keys) == 0
        assert len({folder.name.split("-")[0] for folder in stores(first)}) == 2
    with kvtier.open(first) as engine:
        assert load(engine, keys, data).valid_blocks == 8


def test_a_store_takes_no_more_than_it_needs_so_that_closed_ones_stay(tmp_path: Path) -> None:
    first = config_of(tmp_path, "96MiB")
    second = replace(first, model="m@2")
    step = (16 << 20) // 8192
    kept = []
    for config in (first, second):
        data = tensors()
        with opened(config, step) as engine:
            assert store(engine, engine.attach(data), keys_of(config)).durable_blocks == 8
            until(lambda engine=engine: engine.stats().disks[0].classes[0].usable == 2 * step, "a step ahead")
            assert engine.stats().disks[0].growth == "ok"
            kept.append((config, keys_of(config), data))
    assert allocated_bytes(first.disks[0].path) < 80 << 20
    for config, keys, data in kept:
        with kvtier.open(config) as engine:
            assert load(engine, keys, data).valid_blocks == 8


def test_another_model_takes_the_room_of_a_store_that_nobody_has_open(tmp_path: Path) -> None:
    first = config_of(tmp_path)
    keys, _ = filled(first)
    second_keys, data = filled(replace(first, model="m@2"))
    with kvtier.open(replace(first, model="m@2")) as engine:
        assert load(engine, second_keys, data).valid_blocks == 8
    with kvtier.open(first) as engine:
        assert engine.lookup(keys).ready_blocks == 0


SECOND = """
    import sys
    import kvtier
    from kvtier import Config, Disk, KVLayout
    config = Config(groups=[KVLayout(2, 2, 8, "float16", 4)], block_tokens=8, host="1MiB", chunk="1MiB",
                    model="m@1", disk=Disk(sys.argv[1], "8MiB"), disk_second_process=sys.argv[2])
    try:
        with kvtier.open(config) as engine:
            print(len(engine.stats().disks), engine.stats().disks[0].health)
    except kvtier.ResourceError as error:
        print("refused:", error)
"""


def second_process(config: Config, how: str) -> str:
    code = textwrap.dedent(SECOND)
    argv = [sys.executable, "-c", code, config.disks[0].path, how]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def test_a_second_process_gets_a_store_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, "16MiB")
    half = replace(config, disk=Disk(config.disks[0].path, "8MiB"))
    keys, data = filled(half)
    with kvtier.open(half) as engine:
        assert second_process(config, "next").split() == ["1", "ok"]
        assert engine.lookup(keys).ready_blocks == 8
        assert load(engine, keys, data).valid_blocks == 8
    assert [folder.name.split("-")[1] for folder in stores(config)] == ["0", "1"]


def test_a_second_process_is_refused_where_that_is_wanted(tmp_path: Path) -> None:
    config = config_of(tmp_path, "16MiB", disk_second_process="refuse")
    with kvtier.open(config):
        said = second_process(config, "refuse")
        assert said.startswith("refused: ")
        assert "open in another process" in said
        with pytest.raises(ResourceError, match="open in another process"):
            kvtier.open(config)
    with kvtier.open(config) as engine:
        assert engine.stats().disks[0].health == "ok"


# --- encryption ---------------------------------------------------------------------------------------


@pytest.fixture
def key_files(tmp_path: Path) -> list[str]:
    files = []
    for i in range(2):
        file = tmp_path / f"key{i}"
        file.write_text(os.urandom(32).hex() + "\n")
        files.append(str(file))
    return files


def slot_bytes(config: Config) -> bytes:
    return b"".join(file.read_bytes() for folder in stores(config) for file in folder.glob("slots.*"))


def test_encrypted_blocks_need_their_key(
    tmp_path: Path, key_files: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, disk_key=key_files[0])
    keys, data = filled(config)
    needle = data[0][0].tobytes()[:64]
    assert needle not in slot_bytes(config)
    with kvtier.open(config) as engine:
        assert load(engine, keys, data).valid_blocks == 8
    with kvtier.open(replace(config, disk_key=key_files[1])) as engine:
        assert "holds 8 of 8 blocks" in engine.stats().disks[0].key_problem  # before any is read
        result = load(engine, keys, data)
        assert result.outcomes.tolist() == [BlockOutcome.MISSED] * 8
        stats = engine.stats()
        assert stats.disks[0].bad_unknown_key == 8
        assert "under a key that was not given" in stats.disks[0].key_problem
        assert (stats.promote_good, stats.promote_bad) == (0, 8)
    assert capfd.readouterr().err.count("encrypted under a key that was not given") == 1


def test_open_counts_the_blocks_whose_key_was_not_given(tmp_path: Path, key_files: list[str]) -> None:
    config = config_of(tmp_path, disk_key=key_files[0])
    filled(config)
    both = replace(config, disk_key=f"{key_files[1]},{key_files[0]}")
    with opened(both) as engine:
        assert engine.stats().disks[0].key_problem == ""
        assert store(engine, engine.attach(tensors()), keys_of(config, 5, seed=1)).durable_blocks == 5
    for given, unknown in ((both.disk_key, 0), (key_files[1], 8), (key_files[0], 5), (None, 13)):
        with kvtier.open(replace(config, disk_key=given)) as engine:
            said = engine.stats().disks[0].key_problem
            assert said.startswith(f"holds {unknown} of 13 blocks") if unknown else said == ""


def test_plain_blocks_do_contain_the_bytes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    _, data = filled(config)
    assert data[0][0].tobytes()[:64] in slot_bytes(config)  # so the needle above could have been found


def test_a_key_is_rotated_by_giving_both(tmp_path: Path, key_files: list[str]) -> None:
    old, new = key_files
    config = config_of(tmp_path, disk_key=old)
    keys, data = filled(config)
    rotated = replace(config, disk_key=f"{new}, {old}")
    more = keys_of(config, seed=3)
    with opened(rotated) as engine:
        assert load(engine, keys, data).valid_blocks == 8
        assert store(engine, engine.attach(data), more).durable_blocks == 8
    with kvtier.open(replace(config, disk_key=new)) as engine:
        assert load(engine, more, data).valid_blocks == 8
        assert load(engine, keys, data).outcomes.tolist() == [BlockOutcome.MISSED] * 8


def test_a_key_may_stand_in_the_environment(
    tmp_path: Path, key_files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", Path(key_files[0]).read_text())
    config = config_of(tmp_path, disk_key="env:MY_KEY")
    keys, data = filled(config)
    with kvtier.open(replace(config, disk_key=key_files[0])) as engine:
        assert load(engine, keys, data).valid_blocks == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [("00" * 31, "does not hold 64 hexadecimal digits"), ("secret" * 12, "64 hexadecimal"), (None, "read")],
)
def test_a_bad_key_is_named_and_never_shown(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        kvtier.open(config_of(tmp_path, disk_key=str(file)))
    assert str(file) in str(caught.value)
    assert content is None or content not in str(caught.value)


def test_a_key_that_is_not_in_the_environment_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="env:NOT_THERE"):
        kvtier.open(config_of(tmp_path, disk_key="env:NOT_THERE"))


# --- what cannot be used ------------------------------------------------------------------------------


def works_without_disk(engine: Engine, config: Config) -> None:
    data = tensors()
    keys = keys_of(config)
    engine.store(keys, engine.attach(data), range(16)).wait(PATIENCE)
    assert engine.lookup(keys).tiers().tolist() == [Tier.HOST] * 8
    assert load(engine, keys, data).valid_blocks == 8
    engine.flush(PATIENCE)


def test_a_path_that_cannot_be_made_leaves_the_disk_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "no" / "such" / "place")
    with kvtier.open(config) as engine:
        works_without_disk(engine, config)
        (disk,) = engine.stats().disks
        assert disk.path == config.disks[0].path
        assert disk.health.startswith("left out: ")
    said = capfd.readouterr().err.splitlines()
    assert [line for line in said if "left out" in line] == said
    assert len(said) == 1


def test_a_directory_without_room_leaves_the_disk_out(tmp_path: Path) -> None:
    with kvtier.open(config_of(tmp_path, "8MiB")):
        config = config_of(tmp_path, "5MiB", model="m@2")
        with kvtier.open(config) as engine:
            works_without_disk(engine, config)
            assert engine.stats().disks[0].health != "ok" or not engine.stats().disks[0].classes[0].usable


def test_a_capacity_below_one_block_is_refused_with_the_least_that_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"capacity is 4194304 bytes; allowed: at least \d+ "):
        kvtier.open(config_of(tmp_path, "4MiB"))


def test_one_bad_disk_of_two_is_left_out(tmp_path: Path) -> None:
    good, bad = Disk(str(tmp_path / "good"), "8MiB"), Disk(str(tmp_path / "no" / "such"), "8MiB")
    config = config_of(tmp_path, disk=[bad, good])
    keys, data = filled(config)
    with kvtier.open(config) as engine:
        assert load(engine, keys, data).valid_blocks == 8
        health = {disk.path: disk.health for disk in engine.stats().disks}
        assert health[good.path] == "ok"
        assert health[bad.path].startswith("left out: ")


@pytest.mark.parametrize("what", ["file", "link", "version", "capacity"])
def test_what_is_no_store_directory_is_refused_and_left_as_it_is(tmp_path: Path, what: str) -> None:
    config = config_of(tmp_path)
    path = Path(config.disks[0].path)
    if what == "file":
        path.write_text("mine")
    elif what == "link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "version":
        path.mkdir(mode=0o700)
        (path / "VERSION").write_text("kvtier store directory 99\n")
    else:
        config = config_of(tmp_path, "64KiB")
    with pytest.raises(kvtier.KVTierError, match=str(path)):
        kvtier.open(config)
    if what == "file":
        assert path.read_text() == "mine"
    elif what == "link":
        assert list((tmp_path / "elsewhere").iterdir()) == []
    elif what == "version":
        assert [p.name for p in path.iterdir()] == ["VERSION"]


def test_damaged_slots_are_misses(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    keys, data = filled(config)
    (folder,) = stores(config)
    file = folder / "slots.0"
    image = bytearray(file.read_bytes())
    at = image.index(data[0][6].tobytes()[:64])  # in the payload of block 3
    image[at] ^= 1
    file.write_bytes(image)
    with kvtier.open(config) as engine:
        result = load(engine, keys, data)
        expected = [BlockOutcome.LOADED] * 3 + [BlockOutcome.MISSED] + [BlockOutcome.LOADED] * 4
        assert result.outcomes.tolist() == expected
        assert result.valid_blocks == 3
        assert engine.stats().disks[0].bad_corrupt_payload == 1
        assert engine.lookup(keys).ready_blocks == 3


def test_a_broken_catalog_costs_nothing_but_time(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    keys, data = filled(config)
    (folder,) = stores(config)
    (folder / "catalog.mdb").write_bytes(b"not a catalog" * 1000)
    with kvtier.open(config) as engine:
        assert engine.stats().disks[0].opened_from.startswith("headers")
        assert load(engine, keys, data).valid_blocks == 8
        assert engine.stats().disks[0].catalog_health == "ok"


# --- bounds -------------------------------------------------------------------------------------------


def test_the_capacity_is_a_bound_on_everything_below(tmp_path: Path) -> None:
    capacity = 6 << 20
    config = config_of(tmp_path, capacity, host="512KiB")
    most = [0]
    over = threading.Event()

    def sample() -> None:
        while not over.is_set():
            most[0] = max(most[0], allocated_bytes(config.disks[0].path))
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with opened(config) as engine:
            pages = engine.attach(tensors())
            for seed in range(40):
                store(engine, pages, keys_of(config, 16, seed=seed))
            stats = engine.stats()
            assert stats.disk_evictions > 0
            assert stats.disks[0].allocated_bytes <= capacity
        with opened(replace(config, model="m@2")) as engine:  # takes the first one's room
            store(engine, engine.attach(tensors()), keys_of(engine.config, 16))
    finally:
        over.set()
        sampler.join()
    assert capacity // 8 < most[0] <= capacity


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    filled(config)
    for entry in [Path(config.disks[0].path), *Path(config.disks[0].path).rglob("*")]:
        mode = stat.S_IMODE(entry.lstat().st_mode)
        assert mode == (0o700 if entry.is_dir() else 0o600), entry


def test_second_use_admits_once_the_drive_was_full(tmp_path: Path) -> None:
    config = config_of(tmp_path, "6MiB", disk_admission="second-use", host="512KiB")
    with opened(config) as engine:
        pages = engine.attach(tensors())
        slots = engine.stats().disks[0].classes[0].capacity
        for seed in range(slots // 16 + 3):
            store(engine, pages, keys_of(config, 16, seed=seed))
        before = engine.stats()
        assert before.disk_declined_admission > 0
        assert before.disk_durable + before.disk_declined_admission >= slots


def test_the_write_budget_declines_what_is_too_much(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk_write_budget="64KiB")
    with opened(config) as engine:
        ticket = store(engine, engine.attach(tensors()), keys_of(config, 32))
        stats = engine.stats()
        assert 0 < ticket.durable_blocks <= 8
        assert stats.disk_declined_budget > 0
        assert stats.write_budget_left_bytes <= 64 << 10


def test_the_write_budget_outlives_a_restart(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk_write_budget="64KiB")
    with opened(config) as engine:
        assert store(engine, engine.attach(tensors()), keys_of(config, 32)).durable_blocks == 8
        left = engine.stats().write_budget_left_bytes
    with kvtier.open(config) as engine:
        # A second fills less than a byte of 64 KiB a day.
        assert left <= engine.stats().write_budget_left_bytes < 8192
        other = keys_of(config, 8, seed=1)
        assert store(engine, engine.attach(tensors()), other).durable_blocks == 0
    (saved,) = [folder / "budget" for folder in stores(config)]
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    saved.unlink()  # as a store of an older kvtier
    with kvtier.open(config) as engine:
        assert engine.stats().write_budget_left_bytes == 64 << 10


BUDGET_DRIVER = """
    import os, signal, sys
    import numpy as np
    import kvtier
    from kvtier import Config, Disk, KVLayout
    config = Config(groups=[KVLayout(2, 2, 8, "float16", 4)], block_tokens=8, host="1MiB", chunk="1MiB",
                    model="m@1", disk=Disk(sys.argv[1], "8MiB"), disk_commit_seconds=0.01,
                    disk_write_budget="64KiB")
    engine = kvtier.open(config)
    pages = engine.attach([np.ones((64, 2, 4, 2, 8), np.float16) for _ in range(2)])
    engine.store(kvtier.block_keys(np.arange(32), config), pages, range(8)).durable.wait(30)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_finds_no_fuller_budget(tmp_path: Path) -> None:
    config = config_of(tmp_path, disk_write_budget="64KiB")
    argv = [sys.executable, "-c", textwrap.dedent(BUDGET_DRIVER), config.disks[0].path]
    subprocess.run(argv, check=False, timeout=60)
    with kvtier.open(config) as engine:
        # Four blocks of 8 KiB, and at most a 64th of the whole.
        assert 31 << 10 <= engine.stats().write_budget_left_bytes <= 32 << 10


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    filled(config)  # first use of whatever is made once

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208

    before = held()
    for _ in range(5):
        with kvtier.open(config) as engine:
            engine.lookup(keys_of(config))
    until(lambda: held() <= before, f"descriptors and threads to come back to {before}, they are {held()}")


# --- what it is told ----------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"groups": [LAYOUT], "block_tokens": 8, "host": "1MiB", "model": "m@1"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"disk": "/mnt"}, "disk is '/mnt'; allowed: a Disk"),
        ({"disk": [Disk("/a", 1), Disk("/a/", 1)]}, "each another path"),
        (
            {"disk_eviction": "mru"},
            "disk_eviction is 'mru'; allowed: return-hazard, lru, fifo, lfu, slru, sieve, s3-fifo, arc",
        ),
        ({"eviction": "mru"}, "eviction is 'mru'; allowed: return-hazard, lru"),
        ({"trace": 7}, "trace is 7; allowed: the path of a file"),
        (
            {"disk_admission": "some"},
            "disk_admission is 'some'; allowed: return-hazard, all, second-use, tiny-lfu",
        ),
        ({"disk_second_process": "kill"}, "disk_second_process is 'kill'; allowed: next, refuse"),
        ({"disk_write_budget": "lots"}, "disk_write_budget is 'lots'"),
        ({"disk_queue_depth": 0}, "disk_queue_depth is 0"),
        ({"disk_queue_depth": "deep"}, "disk_queue_depth is 'deep'"),
        ({"disk_commit_seconds": 0}, "disk_commit_seconds is 0; allowed: 0.001 to 60"),
        ({"disk_commit_seconds": "soon"}, "disk_commit_seconds is 'soon'"),
        ({"disk_key": 3}, "disk_key is 3"),
        ({"disk_key": ""}, "disk_key is ''"),
        ({"disk_key": "/a,,/b"}, "disk_key is '/a,,/b'"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{**GOOD, **changed})


@pytest.mark.parametrize(
    ("path", "capacity", "message"),
    [
        ("relative", 1, "disk path is 'relative'; allowed: an absolute path"),
        ("/a\0b", 1, "allowed: an absolute path"),
        (3, 1, "disk path is 3"),
        ("/a", 0, "disk capacity is 0"),
        ("/a", "big", "disk capacity is 'big'"),
        ("/a", None, "disk capacity is None"),
    ],
)
def test_a_bad_disk_is_named(path: Any, capacity: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Disk(path, capacity)


def test_disks_are_read_from_toml_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "kvtier.toml"
    head = (
        'host = "1MiB"\nmodel = "m@1"\nblock_tokens = 8\ndisk_admission = "tiny-lfu"\ndisk_queue_depth = 8\n'
    )
    group = '[[groups]]\nnum_layers = 2\nnum_kv_heads = 2\nhead_dim = 8\ndtype = "float16"\npage_tokens = 4\n'
    tables = '[[disk]]\npath = "/a"\ncapacity = "1GiB"\n[[disk]]\npath = "/b"\ncapacity = "4096"\n'
    file.write_text(head + group + tables)
    wanted = Config(
        **GOOD, disk=[Disk("/a", "1GiB"), Disk("/b", "4096")], disk_admission="tiny-lfu", disk_queue_depth=8
    )
    assert Config.load(file) == wanted
    environ = {
        "KVTIER_DISK": "/a=1GiB;/b=4096",
        "KVTIER_DISK_ADMISSION": "tiny-lfu",
        "KVTIER_DISK_QUEUE_DEPTH": "8",
        "KVTIER_DISK_COMMIT_SECONDS": "0.25",
        "KVTIER_DISK_WRITE_BUDGET": "unlimited",
        "KVTIER_DISK_SECOND_PROCESS": "refuse",
    }
    read = Config.from_env(environ, **GOOD)
    assert read == replace(
        wanted, disk_commit_seconds=0.25, disk_write_budget="unlimited", disk_second_process="refuse"
    )
    assert [disk.capacity_bytes for disk in read.disks] == [1 << 30, 4096]
    assert read.disk_write_bytes_per_day == 0


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("KVTIER_DISK", "/mnt", "disk is '/mnt'; allowed: \"PATH=CAPACITY\""),
        ("KVTIER_DISK", "/mnt=big", "disk capacity is 'big'"),
        ("KVTIER_DISK_QUEUE_DEPTH", "many", "KVTIER_DISK_QUEUE_DEPTH is 'many'; allowed: an integer"),
        ("KVTIER_DISK_COMMIT_SECONDS", "soon", "KVTIER_DISK_COMMIT_SECONDS is 'soon'; allowed: seconds"),
    ],
)
def test_a_bad_variable_is_named(variable: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_env({variable: text}, **GOOD)


def test_fingerprints_differ_where_blocks_do(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    others = [
        config_of(tmp_path, model="m@2"),
        config_of(tmp_path, block_tokens=16),
        config_of(tmp_path, world_size=2),
        config_of(tmp_path, groups=[LAYOUT, WINDOW]),
        config_of(tmp_path, groups=[KVLayout(2, 2, 8, "bfloat16", 4)]),
    ]
    assert len({each.fingerprint() for each in [config, *others]}) == 6
    same = config_of(tmp_path, "1GiB", host="2MiB", disk_queue_depth=1)
    assert same.fingerprint() == config.fingerprint()


def test_stats_are_plain_json(tmp_path: Path) -> None:
    with kvtier.open(config_of(tmp_path)) as engine:
        document = json.loads(json.dumps(engine.stats().to_dict()))
    assert document["disks"][0]["path"] == engine.config.disks[0].path
    assert document["disks"][0]["queue"] in {"io_uring", "threads"} or document["disks"][0]["queue"]
