"""Engine: lookup, leases, store and load as a user sees them; bad input; closing and dropping at any time."""

import dataclasses
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvtier
from kvtier import (
    BlockOutcome,
    BlockState,
    ClosedError,
    Config,
    ConfigError,
    Disk,
    Engine,
    KVLayout,
    Pages,
    Tier,
)
from kvtier.control import ask_to_purge
from kvtier.keys import Keys
from kvtier.testing import FaultPlan, ManualClock, SimulatedDevice, faulty_device, faulty_memory

LAYOUT = KVLayout(2, 2, 8, "float16", 4)
CONFIG = Config(groups=[LAYOUT], block_tokens=8, host="1MiB", model="m@1", copy_threads=1)
PAGES = 32
SHAPE = (PAGES, 2, 4, 2, 8)
Array = npt.NDArray[Any]


def tensors() -> list[Array]:
    return [np.random.default_rng(i).random(SHAPE).astype(np.float16) for i in range(2)]


def keys_of(num_blocks: int, seed: int = 0) -> Keys:
    return kvtier.block_keys(np.arange(8 * num_blocks) + 1000 * seed, CONFIG)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with kvtier.open(CONFIG) as opened:
        yield opened


@pytest.fixture
def pages(engine: Engine) -> Pages:
    return engine.attach(tensors())


def test_lookup_reports_states_tiers_and_the_ready_prefix(engine: Engine, pages: Pages) -> None:
    keys = keys_of(5)
    engine.store(keys[:2], pages, range(4)).wait()
    engine.store(keys[3:4], pages, [6, 7], first_block=3).wait()
    match = engine.lookup(keys)
    assert (match.ready_blocks, match.ready_tokens) == (2, 16)
    ready, miss = BlockState.READY, BlockState.MISS
    assert match.states(0).tolist() == [ready, ready, miss, ready, miss]
    host, none = Tier.HOST, Tier.NONE
    assert match.tiers().tolist() == [host, host, none, host, none]
    with pytest.raises(ConfigError, match="group is 1"):
        match.states(1)


def test_states_outlive_their_match_and_are_its_own(engine: Engine, pages: Pages) -> None:
    keys = keys_of(5)
    engine.store(keys[:2], pages, range(4)).wait()
    states = engine.lookup(keys).states(0)
    gc.collect()
    for _ in range(100):  # whatever took over the memory of a freed one would show
        engine.lookup(keys_of(5, seed=3))
    assert states.tolist() == [BlockState.READY] * 2 + [BlockState.MISS] * 3
    assert engine.lookup(keys[:0]).states(0).shape == (0,)


@pytest.mark.parametrize("present", [0, 7, 8, 9, 15, 16, 4096, 4105])
def test_the_ready_prefix_ends_at_any_length(present: int) -> None:
    layout = KVLayout(1, 1, 16, "uint8", 1)
    config = Config(groups=[layout], block_tokens=1, host="64MiB", model="m@1")
    keys = np.random.default_rng(present).integers(0, 256, (present + 20, 32), np.uint8)
    with kvtier.open(config) as opened:
        pages = opened.attach([np.ones((len(keys), 2, 1, 1, 16), np.uint8)])
        others = [*range(present), *range(present + 1, present + 20)]  # all but one
        opened.store(keys[others], pages, others).wait()
        assert opened.lookup(keys).ready_blocks == present


def test_transfers_of_many_batches_are_byte_exact() -> None:
    layout = KVLayout(64, 2, 8, "float16", 4)  # 128 runs for a block of one page
    config = Config(groups=[layout], block_tokens=4, host="256MiB", model="m@1")
    blocks = 500
    rng = np.random.default_rng(4)
    memory = rng.integers(0, 1 << 16, (64, 2, 2 * blocks, 4, 2, 8), np.uint16)
    keys = rng.integers(0, 256, (blocks, 32), np.uint8)
    ids = rng.permutation(2 * blocks)
    source, target = ids[:blocks], ids[blocks:]
    with kvtier.open(config) as opened:
        pages = opened.attach(list(memory.view(np.float16)), axes="KPTHD")
        expected = memory[:, :, source].copy()
        assert opened.store(keys, pages, source).result().stored == blocks
        memory[:, :, source] = 0
        assert opened.load(keys, pages, target).result().valid_blocks == blocks
    assert np.array_equal(memory[:, :, target], expected)
    assert not memory[:, :, source].any()


def test_stored_again_is_present_and_missing_is_missed(engine: Engine, pages: Pages) -> None:
    keys = keys_of(3)
    assert engine.store(keys[:2], pages, range(4)).result().stored == 2
    again = engine.store(keys, pages, range(6)).result()
    assert (again.present, again.stored) == (2, 1)
    loaded = engine.load(keys_of(2, seed=9), pages, range(4)).result()
    assert loaded.outcomes.tolist() == [BlockOutcome.MISSED] * 2
    assert (loaded.valid_blocks, loaded.valid_tokens, loaded.error) == (0, 0, None)


def test_keys_may_be_a_list_of_bytes(engine: Engine, pages: Pages) -> None:
    keys = keys_of(2)
    engine.store([row.tobytes() for row in keys], pages, [0, 1, 2, 3]).wait()
    assert engine.lookup([keys[0].tobytes(), keys[1]]).ready_blocks == 2


def test_a_stream_that_the_cpu_has_not_is_refused_before_anything_is_done(
    engine: Engine, pages: Pages
) -> None:
    engine.store(keys_of(2), pages, range(4)).wait()
    before = engine.stats()
    with pytest.raises(ConfigError, match="stream is 1234; allowed for pages on the CPU: None, or 0"):
        engine.store(keys_of(4), pages, range(8), stream=1234)
    with pytest.raises(ConfigError, match="stream is 1234"):
        engine.load(keys_of(2), pages, range(4), stream=1234)
    assert engine.stats() == before


def test_a_lease_pins_until_it_is_released_or_its_time_is_over() -> None:
    clock = ManualClock()
    with Engine(CONFIG, clock=clock) as engine:
        pages = engine.attach(tensors())
        keys = keys_of(3)
        engine.store(keys, pages, range(6)).wait()
        with engine.lookup(keys).pin() as lease:
            assert (lease.num_blocks, lease.active, engine.stats().pinned_blocks) == (3, True, 3)
        assert not lease.active
        lease.release()
        timed = engine.lookup(keys).pin(ttl=5)
        clock.advance_us(4_999_999)
        engine.poll()
        assert timed.active
        clock.advance_us(1)
        engine.poll()
        assert not timed.active
        assert engine.stats().pins == 0
        dropped = engine.lookup(keys).pin()
        assert engine.stats().leases == 1
        del dropped
        gc.collect()
        assert engine.stats().leases == 0


def test_a_lease_loads_what_it_pinned(engine: Engine) -> None:
    arrays = tensors()
    wanted = [array[:6].copy() for array in arrays]
    pages = engine.attach(arrays)
    keys = keys_of(4)
    engine.store(keys[:3], pages, range(6)).wait()
    lease = engine.lookup(keys).pin()
    assert engine.load(lease, pages, range(20, 26)).result().valid_blocks == 3
    for array, old in zip(arrays, wanted, strict=True):
        assert (array[20:26] == old).all()


def test_drop_and_touch_count_blocks(engine: Engine, pages: Pages) -> None:
    keys = keys_of(4)
    engine.store(keys[:2], pages, range(4), namespace="a").wait()
    engine.store(keys[2:], pages, range(4), first_block=2, parent=keys[1], namespace="b").wait()
    assert engine.touch(keys) == 4
    assert engine.drop(namespace="b") == 2
    assert engine.drop(namespace="nobody") == 0
    assert engine.lookup(keys).ready_blocks == 2
    assert engine.drop(keys) == 2
    assert engine.lookup(keys).ready_blocks == 0
    for wrong, message in (
        ({}, r"drop\(\) is given neither keys nor namespace; allowed: one of the two"),
        ({"keys": keys, "namespace": "a"}, r"drop\(\) is given both keys and namespace; allowed: one"),
        ({"namespace": 3}, "namespace is 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.drop(**wrong)  # type: ignore[arg-type]


def test_a_full_tier_evicts_and_the_bytes_stay_right(engine: Engine) -> None:
    arrays = tensors()
    pages = engine.attach(arrays)
    capacity = engine.stats().host[0].capacity
    for round_number in range(capacity // 16 + 8):
        result = engine.store(keys_of(16, seed=round_number), pages, range(32)).result()
        assert result.stored == 16
    stats = engine.stats()
    assert stats.evictions >= 16
    assert stats.host[0].ready <= capacity
    of_class = stats.host[0]
    assert of_class.free + of_class.filling + of_class.ready + of_class.leaving == of_class.capacity
    assert engine.lookup(keys_of(16, seed=capacity // 16 + 7)).ready_blocks == 16


def test_stats_have_every_field_of_the_core_and_add_up(engine: Engine, pages: Pages) -> None:
    keys = keys_of(4)
    engine.store(keys[:2], pages, range(4)).wait()
    engine.lookup(keys)
    stats = engine.stats()
    native = engine._native.stats()
    assert set(native) == {field.name for field in dataclasses.fields(kvtier.Stats)}
    assert set(native["host"][0]) == {field.name for field in dataclasses.fields(kvtier.SlotClassStats)}
    misses = stats.lookup_misses_absent + stats.lookup_misses_pending + stats.lookup_misses_failed
    assert stats.lookup_blocks == stats.lookup_hits_host + misses == 4
    assert (stats.health, stats.bytes_stored) == ("ok", 2 * LAYOUT.block_bytes(8))
    assert stats.to_dict()["host"][0]["ready"] == 2


@pytest.mark.parametrize(
    ("page_ids", "message"),
    [
        ([0, 1, 2], "page_ids has 3 entries; allowed: 4, 2 for each of 2 keys"),
        ([0, 1, 2, 3, 4], "page_ids has 5 entries"),
        ([0, 1, 2, 32], r"page_ids\[3\] is 32; allowed: 0 to 31"),
        ([0, -1, 2, 3], r"page_ids\[1\] is -1; allowed: 0 to 31"),
        ([0, 1, 2, 2**40], r"page_ids\[3\] is 1099511627776"),
        ([0.0, 1.0, 2.0, 3.0], "dtype float64; allowed: integers"),
        ([[0, 1], [2, 3]], r"shape \(2, 2\); allowed: one axis, \[4\]"),
        ("0123", r"page_ids has shape \(\)"),
        ([True] * 4, "dtype bool"),
    ],
)
def test_bad_page_ids_are_refused_and_nothing_is_done(
    engine: Engine, pages: Pages, page_ids: Any, message: str
) -> None:
    keys = keys_of(2)
    for call in (engine.store, engine.load):
        with pytest.raises(ConfigError, match=message):
            call(keys, pages, page_ids)  # type: ignore[operator]
    assert engine.stats().store_stored == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (np.zeros((2, 31), np.uint8), r"shape \(2, 31\); allowed: uint8 \[n, 32\]"),
        (np.zeros((2, 32), np.int8), "dtype int8"),
        (np.zeros(64, np.uint8), r"shape \(64,\)"),
        ([b"short"], r"keys\[0\] is b'short'; allowed: 32 bytes"),
        (b"x" * 64, "keys is a bytes"),
        (None, "keys is a NoneType"),
    ],
)
def test_bad_keys_are_refused_everywhere(engine: Engine, pages: Pages, keys: Any, message: str) -> None:
    calls: list[Any] = [
        lambda: engine.lookup(keys),
        lambda: engine.touch(keys),
        lambda: engine.store(keys, pages, [0, 1]),
        lambda: engine.load(keys, pages, [0, 1]),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_block": -1}, "first_block is -1"),
        ({"first_block": 2**32}, "first_block is 4294967296"),
        ({"parent": b"x"}, "parent has 1 bytes"),
        ({"namespace": None}, "namespace is None"),
        ({"stream": "s"}, "stream is 's'"),
        ({"stream": -1}, "stream is -1"),
    ],
)
def test_bad_options_of_a_store_are_refused(
    engine: Engine, pages: Pages, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        engine.store(keys_of(1), pages, [0, 1], **options)


def test_a_bad_deadline_of_a_prefetch_is_called_so(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="deadline is -1; allowed: None or seconds of 0 or more"):
        engine.prefetch(keys_of(1), deadline=-1)


def test_a_load_into_one_place_twice_is_refused(engine: Engine, pages: Pages) -> None:
    keys = keys_of(2)
    engine.store(keys, pages, range(4)).wait()
    with pytest.raises(ConfigError):
        engine.load(keys, pages, [0, 1, 1, 2])


def test_pages_of_another_engine_are_refused(engine: Engine, pages: Pages) -> None:
    with kvtier.open(CONFIG) as other, pytest.raises(ConfigError, match="this engine"):
        other.store(keys_of(1), pages, [0, 1])
    with pytest.raises(ConfigError, match="pages is None"):
        engine.store(keys_of(1), None, [0, 1])  # type: ignore[arg-type]


def test_no_keys_are_no_work(engine: Engine, pages: Pages) -> None:
    empty = keys_of(0)
    assert engine.lookup(empty).ready_blocks == 0
    assert engine.store(empty, pages, []).result().outcomes.tolist() == []
    assert engine.load(empty, pages, []).result().valid_blocks == 0


def test_detached_pages_are_refused_and_their_tensors_are_let_go(engine: Engine) -> None:
    arrays = tensors()
    alive = weakref.ref(arrays[0])
    pages = engine.attach(arrays)
    del arrays
    gc.collect()
    assert alive() is not None
    engine.store(keys_of(2), pages, range(4))
    pages.detach()
    pages.detach()
    assert not pages.attached
    assert alive() is None
    with pytest.raises(ClosedError):
        engine.store(keys_of(2), pages, range(4))


def test_every_call_of_a_closed_engine_says_so() -> None:
    engine = kvtier.open(CONFIG)
    pages = engine.attach(tensors())
    keys = keys_of(1)
    match = engine.lookup(keys)
    engine.close()
    engine.close()
    assert engine.closed
    calls: list[Any] = [
        lambda: engine.lookup(keys),
        lambda: engine.store(keys, pages, [0, 1]),
        lambda: engine.load(keys, pages, [0, 1]),
        lambda: engine.attach(tensors()),
        lambda: engine.touch(keys),
        lambda: engine.drop(keys),
        lambda: engine.drop(namespace=""),
        lambda: engine.flush(),
        lambda: match.pin(),
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_close_waits_for_running_transfers_and_lets_go_of_tensors() -> None:
    arrays = tensors()
    alive = weakref.ref(arrays[0])
    engine = kvtier.open(CONFIG)
    pages = engine.attach(arrays)
    del arrays
    tickets = [engine.store(keys_of(16, seed=i), pages, range(32)) for i in range(4)]
    engine.close()
    assert all(ticket.done() for ticket in tickets)
    assert all(ticket.result().stored == 16 for ticket in tickets)
    assert alive() is None


def test_a_purge_over_the_socket_does_not_keep_the_engine_open(tmp_path: Path) -> None:
    disk = Disk(str(tmp_path / "disk"), "8MiB")
    engine = kvtier.open(Config(groups=[LAYOUT], block_tokens=8, host="1MiB", model="m@1", disk=disk))
    (store,) = (Path(disk.path) / "stores").iterdir()
    control, asked = engine._control, threading.Event()
    assert control is not None
    purge = control._purge

    def reported(namespace: str) -> int:
        asked.set()
        return purge(namespace)

    control._purge = reported
    with ThreadPoolExecutor() as threads:
        with engine._dropping:  # as long as others drop, the purge waits
            answer = threads.submit(ask_to_purge, store, "x", 30)
            assert asked.wait(30)
            with pytest.raises(kvtier.TimeoutError, match="purge"):
                engine.close(timeout=0.2)
            assert engine.closed
        with pytest.raises(kvtier.StorageError, match="closed"):
            answer.result()
    engine.close()
    assert not (store / "control").exists()


def test_a_close_that_times_out_keeps_tensors_until_a_later_one_succeeds() -> None:
    device = SimulatedDevice(seed=3)
    engine = kvtier.open(CONFIG)
    arrays = [device.empty(SHAPE, np.float16) for _ in range(2)]
    alive = weakref.ref(arrays[0])
    pages = engine.attach(arrays)
    engine.wait_until_whole()
    del arrays
    device.hold()
    ticket = engine.store(keys_of(2), pages, range(4))
    with pytest.raises(kvtier.TimeoutError):
        engine.close(timeout=0.01)
    with pytest.raises(kvtier.TimeoutError):
        pages.detach(timeout=0)
    gc.collect()
    assert alive() is not None
    device.release()
    engine.close()
    assert ticket.done()
    assert alive() is None
    assert device.violations() == []


def test_dropping_everything_at_once_is_safe_while_copies_run() -> None:
    device = SimulatedDevice(seed=5)
    arrays = [device.empty(SHAPE, np.float16) for _ in range(2)]
    engine = kvtier.open(CONFIG)
    engine.store(keys_of(8), engine.attach(arrays), range(16))
    del engine, arrays
    gc.collect()
    assert device.violations() == []


def test_many_threads_share_an_engine(engine: Engine) -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        arrays = [np.full(SHAPE, seed * 10 + i, np.float16) for i in range(2)]
        pages = engine.attach(arrays)
        keys = keys_of(8, seed=seed)
        for _ in range(20):
            engine.store(keys, pages, range(16)).wait()
            result = engine.load(keys, pages, range(16, 32)).result()
            if result.valid_blocks != 8 or any((a != seed * 10 + i).any() for i, a in enumerate(arrays)):
                wrong.append(f"{seed}: {result}")
            engine.drop(keys)
        pages.detach()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_failing_device_makes_failed_blocks_and_no_exception() -> None:
    plan = FaultPlan()
    device = SimulatedDevice()
    arrays = [device.empty(SHAPE, np.float16) for _ in range(2)]
    with kvtier.open(CONFIG) as engine:
        pages = engine.attach(arrays, device=faulty_device(device, plan))
        plan.reset()
        plan.fail(1, call="copy", native_code=700)
        result = engine.store(keys_of(2), pages, range(4)).result()
        assert result.failed == 2
        assert isinstance(result.error, kvtier.DeviceError)
        assert result.error.code == 700
        assert plan.injected == 1
        assert engine.lookup(keys_of(2)).ready_blocks == 0


def test_no_memory_is_a_resource_error() -> None:
    plan = FaultPlan()
    plan.fail(1, call="map_shared", code="resource", native_code=12)
    with pytest.raises(kvtier.ResourceError) as caught:
        Engine(CONFIG, memory=faulty_memory(plan))
    assert caught.value.code == 12
    with pytest.raises(kvtier.ResourceError):
        kvtier.open(Config(groups=[KVLayout(32, 8, 1024, "float16", 16)], host="16TiB", model="m@1"))


def test_a_forked_child_gets_closed_errors_and_can_exit() -> None:
    # In a process of its own: pytest has threads, and fork() is not for programs that have.
    code = """
        import os, sys
        import numpy as np
        import kvtier
        layout = kvtier.KVLayout(1, 1, 8, "float16", 8)
        config = kvtier.Config(groups=[layout], block_tokens=8, host="1MiB", model="m@1")
        engine = kvtier.open(config)
        pages = engine.attach(np.zeros((8, 2, 8, 1, 8), np.float16))
        keys = kvtier.block_keys(range(16), config)
        ticket = engine.store(keys, pages, [0, 1])
        ticket.wait()
        match = engine.lookup(keys)
        lease = match.pin()
        child = os.fork()
        if child == 0:
            status = 0
            calls = [lambda: engine.lookup(keys), lambda: engine.store(keys, pages, [0, 1]), engine.stats,
                     lambda: engine.load(keys, pages, [0, 1]), lambda: engine.touch(keys), ticket.wait,
                     lambda: engine.drop(keys), engine.flush, engine.poll, pages.detach, match.pin,
                     ticket.done, lease.release, ticket.result, engine.close,
                     lambda: engine.attach(np.zeros((8, 2, 8, 1, 8), np.float16))]
            for i, call in enumerate(calls):
                try:
                    call()
                except kvtier.ClosedError:
                    continue
                status = i + 1
            del engine, pages, ticket, lease, match, calls, call
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert engine.load(lease, pages, [2, 3]).result().valid_blocks == 2
        engine.close()
        print("parent fine")
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "parent fine"), done.stderr


@pytest.mark.parametrize("held", [False, True], ids=["running", "hung"])
def test_an_interpreter_that_ends_with_work_running_neither_crashes_nor_hangs(held: bool) -> None:
    code = f"""
        import numpy as np
        import kvtier, kvtier.engine
        from kvtier.testing import SimulatedDevice
        kvtier.engine._EXIT_PATIENCE_SECONDS = 0.2
        layout = kvtier.KVLayout(1, 1, 8, "float16", 8)
        config = kvtier.Config(groups=[layout], block_tokens=8, host="1MiB", model="m@1")
        engine = kvtier.open(config)
        device = SimulatedDevice(seed=1)
        array = device.empty((8, 2, 8, 1, 8), np.float16)
        pages = engine.attach(array)
        engine.wait_until_whole()
        if {held}:
            device.hold()
        device.write(array, 3)
        ticket = engine.store(kvtier.block_keys(range(16), config), pages, [0, 1])
        print("end")
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "end", "")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environ = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


@pytest.mark.parametrize("shared", ["same", "shifted"])
def test_layers_that_share_memory_are_refused(shared: str) -> None:
    layout = kvtier.KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="uint8", page_tokens=4)
    config = kvtier.Config(groups=[layout], block_tokens=4, model="m@1", host="2MiB")
    buffer = np.zeros((5, 2, 4, 1, 8), np.uint8)
    tensors = [buffer, buffer] if shared == "same" else [buffer[:4], buffer[1:]]
    with kvtier.open(config) as engine, pytest.raises(kvtier.ConfigError, match="share memory"):
        engine.attach(tensors)
