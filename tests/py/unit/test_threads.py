"""Many threads, the GIL, tickets that nobody keeps, and a fork."""

import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import testing
from kvtier.ranks import Keeper, Worker

LAYOUT = kvtier.KVLayout(2, 1, 8, "uint8", 4)
BLOCKS = 4
THREADS = 8
PATIENCE = 60.0


def config(blocks: int) -> kvtier.Config:
    return kvtier.Config(groups=[LAYOUT], block_tokens=4, model="m@1", host=blocks * 8192)


def keys_of(cfg: kvtier.Config, prompt: int, namespace: str = "") -> np.ndarray:
    return kvtier.block_keys(np.full(BLOCKS * 4, prompt, np.int32), cfg, namespace)


def values_of(prompt: int) -> np.ndarray:
    """Bytes of a prompt, [layers, pages, K, T, H, D]."""
    return np.random.default_rng(prompt).integers(0, 256, (2, BLOCKS, 2, 4, 1, 8), np.uint8)


def run_threads(work: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("simulated", [False, True], ids=["cpu", "simulated"])
def test_threads_store_look_up_and_load_at_once(simulated: bool) -> None:
    """Own prompts and shared ones, in a tier that is too small for all: right bytes or a miss (I7)."""
    cfg = config(3 * BLOCKS)
    device = testing.SimulatedDevice(7) if simulated else None
    loaded = [0] * THREADS
    with kvtier.Engine(cfg) as engine:
        engine.wait_until_whole()

        def work(index: int) -> None:
            shape = (2 * BLOCKS, 2, 4, 1, 8)
            stream = device.stream() if device is not None else None
            layers = [
                device.empty(shape, np.uint8) if device is not None else np.zeros(shape, np.uint8)
                for _ in "ab"
            ]
            pages = engine.attach(layers)
            source, target = np.arange(BLOCKS), np.arange(BLOCKS, 2 * BLOCKS)

            def write(values: np.ndarray) -> None:
                for layer, of_layer in zip(layers, values, strict=True):
                    whole = np.concatenate([of_layer, np.full_like(of_layer, 0xEE)])
                    if device is not None:
                        device.write(layer, whole, stream)
                    else:
                        layer[:] = whole

            def read(layer: int) -> np.ndarray:
                return device.read(layers[layer], stream).result() if device is not None else layers[layer]

            for turn in range(12):
                prompt = index if turn % 2 else 100 + turn % 3  # one's own, or everybody's
                keys, values = keys_of(cfg, prompt), values_of(prompt)
                write(values)
                stored = engine.store(keys, pages, source, stream=stream, namespace=f"thread {index}")
                stored.released.wait(PATIENCE)
                match = engine.lookup(keys)
                with match.pin() as lease:
                    result = engine.load(lease, pages, target[: lease.num_blocks], stream=stream).result()
                    assert result.valid_blocks == lease.num_blocks
                for layer in range(2):
                    have = read(layer)[BLOCKS:]
                    assert (have[: lease.num_blocks] == values[layer, : lease.num_blocks]).all()
                    assert (have[lease.num_blocks :] == 0xEE).all()
                loaded[index] += lease.num_blocks
                engine.touch(keys)
                engine.stats()
                if turn % 6 == 5:  # one's own: a block that somebody drops between pin and load is a miss
                    engine.drop(keys)
            pages.detach(PATIENCE)

        run_threads(work)
        assert sum(loaded) > 0
        engine.flush(PATIENCE)
        stats = engine.stats()
        (host,) = stats.host
        assert (host.filling, host.leaving, host.free + host.ready) == (0, 0, host.capacity)  # I1
        assert (stats.pins, stats.leases, stats.quarantined_blocks) == (0, 0, 0)
        assert (
            stats.lookup_blocks
            == THREADS * 12 * BLOCKS
            == stats.lookup_hits_host
            + sum((stats.lookup_misses_absent, stats.lookup_misses_pending, stats.lookup_misses_failed))
        )
    assert device is None or device.violations() == []


class Rig:
    """An engine on a simulated device, with a store that is held back."""

    def __init__(self) -> None:
        self.config = config(2 * BLOCKS)
        self.device = testing.SimulatedDevice(3)
        self.engine = kvtier.Engine(self.config)
        self.layers = [self.device.empty((BLOCKS, 2, 4, 1, 8), np.uint8) for _ in "ab"]
        self.pages = self.engine.attach(self.layers)
        self.engine.wait_until_whole()
        self.keys = keys_of(self.config, 1)
        self.ids = np.arange(BLOCKS)
        for layer, values in zip(self.layers, values_of(1), strict=True):
            self.device.write(layer, values)
        self.device.synchronize()
        self.device.hold()
        self.ticket = self.engine.store(self.keys, self.pages, self.ids)


def close(rig: Rig) -> None:
    rig.engine.close(PATIENCE)


def synchronize(rig: Rig) -> None:
    rig.device.write(rig.layers[0], 0)
    rig.device.synchronize()


ENOUGH = 200_000


def count_during(wait: Callable[[], object], then: Callable[[], object] = lambda: None) -> int:
    """How far another thread has counted when a wait is over; at ENOUGH it does something.

    Whoever has the GIL keeps it until it lets go by itself.
    """
    counted = 0
    waiting = threading.Event()

    def count() -> None:
        nonlocal counted
        waiting.wait()
        while counted < ENOUGH:
            counted += 1
        then()

    counter = threading.Thread(target=count)
    counter.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        waiting.set()
        wait()
        return counted
    finally:
        sys.setswitchinterval(interval)
        counter.join()


@pytest.mark.parametrize(
    "wait",
    [
        lambda rig: rig.ticket.wait(PATIENCE),
        lambda rig: rig.ticket.wait(),
        lambda rig: rig.ticket.released.wait(PATIENCE),
        lambda rig: rig.ticket.ready.wait(PATIENCE),
        lambda rig: rig.ticket.result(),
        lambda rig: rig.engine.flush(PATIENCE),
        lambda rig: rig.pages.detach(PATIENCE),
        close,
        synchronize,
    ],
    ids=["wait", "wait_for_ever", "released", "ready", "result", "flush", "detach", "close", "synchronize"],
)
def test_a_wait_holds_no_gil(wait: Callable[[Rig], object]) -> None:
    """The copies go on only after another thread has counted: with the GIL held, the wait would time out."""
    rig = Rig()
    assert count_during(lambda: wait(rig), rig.device.release) == ENOUGH
    assert rig.ticket.result().stored == BLOCKS
    rig.engine.close(PATIENCE)


def counted_by_the_way(begin: Callable[[], Callable[[], object]]) -> bool:
    """Whether another thread counts in a wait that is over by itself, perhaps before that one wakes up."""
    return any(count_during(begin()) == ENOUGH for _ in range(5))


BIG = kvtier.KVLayout(1, 8, 1024, "uint8", 16)
BIG_BLOCKS = 256  # of 256 KiB


def big_config(**options: Any) -> kvtier.Config:
    options.setdefault("host", BIG_BLOCKS * (BIG.block_bytes(16) + 4096))
    return kvtier.Config(groups=[BIG], model="m@1", copy_threads=1, **options)


@pytest.mark.parametrize(
    "wait",
    [
        lambda ticket: ticket.wait(PATIENCE),
        lambda ticket: ticket.wait_stream(),
        lambda ticket: ticket.wait_layer(0),
    ],
    ids=["wait", "wait_stream", "wait_layer"],
)
def test_a_wait_for_the_cpu_holds_no_gil(wait: Callable[[kvtier.LoadTicket], object]) -> None:
    cfg = big_config()
    keys = kvtier.block_keys(np.arange(BIG_BLOCKS * 16), cfg)
    with kvtier.Engine(cfg) as engine:
        pages = engine.attach([np.ones((BIG_BLOCKS, 2, 16, 8, 1024), np.uint8)])
        assert engine.store(keys, pages, np.arange(BIG_BLOCKS)).result().stored == BIG_BLOCKS

        def begin() -> Callable[[], object]:
            ticket = engine.load(keys, pages, np.arange(BIG_BLOCKS), layers_per_batch=1)
            return lambda: wait(ticket)

        assert counted_by_the_way(begin)


def test_wait_until_whole_holds_no_gil() -> None:
    cfg = big_config(host="512MiB")  # takes longer than to open it
    with ExitStack() as opened:

        def begin() -> Callable[[], object]:
            opened.close()
            return opened.enter_context(kvtier.Engine(cfg)).wait_until_whole

        assert counted_by_the_way(begin)


def test_a_wait_for_a_prefetch_holds_no_gil(tmp_path: Path) -> None:
    cfg = big_config(disk=kvtier.Disk(str(tmp_path), "512MiB"), disk_write_budget="unlimited")
    keys = kvtier.block_keys(np.arange(BIG_BLOCKS * 16), cfg)
    with kvtier.Engine(cfg) as engine:
        pages = engine.attach([np.ones((BIG_BLOCKS, 2, 16, 8, 1024), np.uint8)])
        engine.store(keys, pages, np.arange(BIG_BLOCKS)).durable.wait(PATIENCE)
    with ExitStack() as opened:

        def begin() -> Callable[[], object]:
            opened.close()
            engine = opened.enter_context(kvtier.Engine(cfg))
            engine.wait_until_whole()
            return engine.prefetch(keys).wait

        assert counted_by_the_way(begin)


def test_a_wait_for_workers_holds_no_gil(tmp_path: Path) -> None:
    cfg = config(BLOCKS)
    with (
        kvtier.Engine(cfg) as engine,
        Keeper(engine, tmp_path / "meet") as keeper,
        Worker(tmp_path / "meet", 0, cfg) as worker,
    ):
        joins = functools.partial(worker.join, PATIENCE)
        assert count_during(lambda: keeper.wait_for_workers(PATIENCE), joins) == ENOUGH


def test_a_dropped_ticket_cancels_nothing() -> None:
    rig = Rig()
    del rig.ticket
    gc.collect()
    assert rig.engine.stats().host[0].filling == BLOCKS  # I5
    rig.device.release()
    rig.engine.flush(PATIENCE)
    assert rig.engine.lookup(rig.keys).ready_blocks == BLOCKS
    rig.engine.close(PATIENCE)


def test_tensors_live_until_no_copy_touches_them() -> None:
    layers = [np.ones((BLOCKS, 2, 4, 1, 8), np.uint8) for _ in "ab"]
    alive = [weakref.ref(layer) for layer in layers]
    cfg = config(BLOCKS)
    engine = kvtier.Engine(cfg)
    pages = engine.attach(layers)
    engine.store(keys_of(cfg, 1), pages, np.arange(BLOCKS))
    del layers, pages
    gc.collect()
    assert all(ref() is not None for ref in alive)
    engine.close(PATIENCE)
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_everything_dropped_at_once_while_copies_run() -> None:
    rig = Rig()
    device = rig.device
    rig.engine.load(rig.keys, rig.pages, rig.ids)
    timer = threading.Timer(0.05, device.release)  # the engine's destructor waits for the copies
    timer.start()
    del rig
    gc.collect()
    timer.join()
    assert device.violations() == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_in_a_forked_child_every_call_says_closed() -> None:
    rig = Rig()
    rig.device.release()
    rig.ticket.wait(PATIENCE)
    match = rig.engine.lookup(rig.keys)
    lease = match.pin()
    calls: list[Callable[[], object]] = [
        lambda: rig.engine.lookup(rig.keys),
        lambda: rig.engine.store(rig.keys, rig.pages, rig.ids),
        lambda: rig.engine.load(rig.keys, rig.pages, rig.ids),
        lambda: rig.engine.touch(rig.keys),
        lambda: rig.engine.drop(rig.keys),
        lambda: rig.engine.drop(namespace=""),
        lambda: rig.engine.attach(rig.layers),
        rig.engine.poll,
        rig.engine.flush,
        rig.engine.stats,
        rig.engine.close,
        rig.pages.detach,
        rig.ticket.wait,
        rig.ticket.result,
        match.pin,
        lease.release,
    ]
    child = os.fork()
    if child == 0:
        open_calls = 0
        try:
            for call in calls:
                try:
                    call()
                except kvtier.ClosedError:
                    continue
                except BaseException:  # noqa: BLE001 - counted
                    pass
                open_calls += 1
            del calls, match, lease, rig
            gc.collect()  # dropping them touches nothing of the parent's
        finally:
            os._exit(open_calls)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert lease.active
    assert rig.engine.lookup(rig.keys).ready_blocks == BLOCKS
    rig.engine.close(PATIENCE)
