"""Tickets: waiting by call, by await and by stream, on a simulated device that shows who forgot to wait."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import Config, ConfigError, Engine, KVLayout
from kvtier.keys import Keys
from kvtier.testing import DeviceArray, SimulatedDevice, disable_ordering, ordering_points

LAYOUT = KVLayout(2, 2, 8, "float16", 4)
CONFIG = Config(groups=[LAYOUT], block_tokens=4, host="1MiB", model="m@1")
SHAPE = (16, 2, 4, 2, 8)


class Rig:
    """An engine and pages on a simulated device."""

    def __init__(self, seed: int = 1) -> None:
        self.device = SimulatedDevice(seed)
        self.arrays: list[DeviceArray] = [self.device.empty(SHAPE, np.float16) for _ in range(2)]
        self.engine = Engine(CONFIG, hash_seed=seed)
        self.pages = self.engine.attach(self.arrays)
        self.engine.wait_until_whole()  # a store from a chunk that is not registered yet waits for its copy
        self.stream = self.device.stream()

    def fill(self, value: float, stream: Any = None) -> None:
        for array in self.arrays:
            self.device.write(array, value, stream or self.stream)

    def read(self, stream: Any = None) -> list[Any]:
        reads = [self.device.read(array, stream or self.stream) for array in self.arrays]
        return [read.result() for read in reads]


def keys_of(num_blocks: int, seed: int = 0) -> Keys:
    return kvtier.block_keys(np.arange(4 * num_blocks) + 1000 * seed, CONFIG)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.device.release()
    made.engine.close()
    assert made.device.violations() == []


def test_a_ticket_is_done_when_its_copies_are_over_and_not_before(rig: Rig) -> None:
    rig.device.hold()
    ticket = rig.engine.store(keys_of(4), rig.pages, range(4), stream=rig.stream)
    moments = (ticket.released, ticket.ready)
    assert not ticket.done()
    assert not any(moment.done() for moment in moments)
    assert rig.engine.lookup(keys_of(4)).states().tolist() == [kvtier.BlockState.PENDING] * 4
    for wait in (ticket.wait, ticket.released.wait, ticket.ready.wait):
        with pytest.raises(kvtier.TimeoutError):
            wait(0)
        with pytest.raises(TimeoutError):
            wait(timeout=0.01)
    rig.device.release()
    assert ticket.wait() is ticket
    assert ticket.done()
    assert all(moment.done() for moment in moments)
    assert ticket.result().stored == 4
    with pytest.raises(kvtier.UnsupportedError):
        ticket.durable.wait()


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_a_bad_timeout_is_refused(rig: Rig, timeout: Any) -> None:
    ticket = rig.engine.store(keys_of(1), rig.pages, [0], stream=rig.stream)
    for wait in (ticket.wait, rig.engine.flush, rig.engine.close, rig.pages.detach):
        with pytest.raises(ConfigError, match="timeout is"):
            wait(timeout)


def test_a_long_timeout_is_as_good_as_none(rig: Rig) -> None:
    ticket = rig.engine.store(keys_of(1), rig.pages, [0], stream=rig.stream)
    assert ticket.wait(1e300).done()
    assert ticket.wait(float("inf")).done()
    assert ticket.wait(10**400).done()


def test_waiting_lets_other_threads_run(rig: Rig) -> None:
    rig.device.hold()
    ticket = rig.engine.store(keys_of(1), rig.pages, [0], stream=rig.stream)
    threading.Timer(0.05, rig.device.release).start()
    assert ticket.result().stored == 1


def test_ctrl_c_ends_a_wait_and_not_the_transfer(rig: Rig) -> None:
    rig.device.hold()
    ticket = rig.engine.store(keys_of(1), rig.pages, [0], stream=rig.stream)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ticket.wait(30)
    assert time.monotonic() - begin < 10
    assert not ticket.done()
    rig.device.release()
    assert ticket.result().stored == 1


def test_ctrl_c_ends_a_flush_and_not_the_stores(rig: Rig) -> None:
    rig.device.hold()
    ticket = rig.engine.store(keys_of(1), rig.pages, [0], stream=rig.stream)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        rig.engine.flush(30)
    assert not ticket.done()
    with pytest.raises(TimeoutError, match="1 stores are still running"):
        rig.engine.flush(0.25)  # longer than a slice of the wait
    threading.Timer(0.3, rig.device.release).start()
    assert rig.engine.flush(30).settled == 1
    assert ticket.result().stored == 1


async def test_a_ticket_is_awaited_many_times_at_once(rig: Rig) -> None:
    rig.device.hold()
    ticket = rig.engine.store(keys_of(2), rig.pages, range(2), stream=rig.stream)

    async def result() -> int:
        return (await ticket).stored

    waiting = [asyncio.ensure_future(result()) for _ in range(5)]
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    rig.device.release()
    assert await asyncio.gather(*waiting) == [2] * 5
    assert (await ticket).stored == 2


async def test_cancelling_an_await_cancels_nothing_below(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only counted
    rig.device.hold()
    ticket = rig.engine.store(keys_of(2), rig.pages, range(2), stream=rig.stream)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ticket, 0.02)
    task = asyncio.ensure_future(ticket)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    rig.device.release()
    assert (await ticket).stored == 2
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208 - the ticket's own


async def test_awaits_do_not_block_the_loop(rig: Rig) -> None:
    rig.device.hold()
    ticket = rig.engine.load(keys_of(2), rig.pages, range(2), stream=rig.stream)
    assert (await ticket).valid_blocks == 0  # nothing to copy: done at once
    store = rig.engine.store(keys_of(2), rig.pages, range(2), stream=rig.stream)
    asyncio.get_running_loop().call_later(0.02, rig.device.release)
    assert (await store).stored == 2


def test_a_dropped_ticket_leaves_its_transfer_running(rig: Rig) -> None:
    rig.fill(7)
    rig.engine.store(keys_of(4), rig.pages, range(4), stream=rig.stream)
    gc.collect()
    rig.engine.flush()
    assert rig.engine.lookup(keys_of(4)).ready_blocks == 4


def test_a_flush_times_out_and_succeeds_later(rig: Rig) -> None:
    rig.device.hold()
    rig.engine.store(keys_of(4), rig.pages, range(4), stream=rig.stream)
    with pytest.raises(kvtier.TimeoutError):
        rig.engine.flush(timeout=0.01)
    rig.device.release()
    rig.engine.flush()
    assert rig.engine.stats().store_stored == 4


@pytest.mark.parametrize("seed", range(8))
def test_streams_are_ordered_before_and_behind_transfers(seed: int) -> None:
    rig = Rig(seed)
    with rig.engine as engine:
        rig.fill(1)
        rig.fill(5)
        store = engine.store(keys_of(8), rig.pages, range(8), stream=rig.stream)
        store.wait_stream(rig.stream)
        rig.fill(2)  # must not reach what is being stored
        assert store.result().stored == 8
        load = engine.load(keys_of(8), rig.pages, range(8, 16), stream=rig.stream)
        load.wait_stream(rig.stream)
        for values in rig.read():
            assert (values[:8] == 2).all()
            assert (values[8:] == 5).all()
    assert rig.device.violations() == []


def test_a_layer_wise_load_orders_each_layer(rig: Rig) -> None:
    rig.fill(5)
    rig.engine.store(keys_of(8), rig.pages, range(8), stream=rig.stream).wait()
    ticket = rig.engine.load(keys_of(8), rig.pages, range(8, 16), stream=rig.stream, layers_per_batch=1)
    for layer, array in enumerate(rig.arrays):
        ticket.wait_layer(layer, rig.stream)
        assert (rig.device.read(array, rig.stream).result()[8:] == 5).all()
    for bad in (2, -1, "0"):
        with pytest.raises(ConfigError):
            ticket.wait_layer(bad, rig.stream)  # type: ignore[arg-type]
    whole = rig.engine.load(keys_of(8), rig.pages, range(8, 16), stream=rig.stream)
    with pytest.raises(kvtier.UnsupportedError):
        whole.wait_layer(0, rig.stream)
    with pytest.raises(kvtier.UnsupportedError):
        rig.engine.load(keys_of(9), rig.pages, range(9), stream=rig.stream, layers_per_batch=1)


class TorchStream:
    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


class ProtocolStream:
    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


@pytest.mark.parametrize("wrap", [int, TorchStream, ProtocolStream, np.int64])
def test_a_stream_is_taken_in_every_form(rig: Rig, wrap: Any) -> None:
    rig.fill(3)
    stream = wrap(rig.stream.ptr)
    assert rig.engine.store(keys_of(1), rig.pages, [0], stream=stream).result().stored == 1


def test_a_lost_context_fails_the_ticket_and_later_lookups_miss() -> None:
    rig = Rig()
    rig.device.fail_sticky_at_copy(1, 700)
    result = rig.engine.store(keys_of(4), rig.pages, range(4), stream=rig.stream).result()
    assert result.failed == 4
    assert isinstance(result.error, kvtier.DeviceError)
    assert rig.engine.lookup(keys_of(4)).ready_blocks == 0


def test_ordering_points_can_be_disabled_by_name() -> None:
    names = ordering_points()
    assert "store_after_framework_stream" in names
    assert len(set(names)) == len(names) >= 10
    with pytest.raises(ConfigError, match="'nonsense' is not known; allowed: load_after_framework_stream"):
        disable_ordering("nonsense").__enter__()


def test_a_disabled_ordering_point_gives_wrong_bytes_on_some_seed() -> None:
    wrong = 0
    for seed in range(12):
        rig = Rig(seed)
        with rig.engine as engine, disable_ordering("store_after_framework_stream"):
            rig.fill(1)
            rig.device.synchronize(rig.stream)
            rig.fill(5)
            engine.store(keys_of(8), rig.pages, range(8), stream=rig.stream).wait()
            rig.device.synchronize(rig.stream)
            engine.load(keys_of(8), rig.pages, range(8, 16), stream=rig.stream).wait_stream(rig.stream)
            wrong += any((values[8:] != 5).any() for values in rig.read())
    assert wrong > 0
