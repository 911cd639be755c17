"""Every place that waits, disabled in turn: a scenario must notice, and with all of them enabled none may.

Each scenario holds one stream of the simulated device, so that what the engine waits for has not happened,
and then takes the engine at its word. It returns what went wrong: wrong bytes, or a broken invariant.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import kvtier
from kvtier import testing

BLOCKS = 3  # of a prompt, and of the tier
LAYOUT = kvtier.KVLayout(2, 1, 8, "uint8", 4)
STORE_LANE, LOAD_LANE = (
    1,
    2,
)  # the engine's streams: made by the first attach(), the framework's own only after
SHORT = 0.2  # seconds that a scenario waits for what must not happen
PATIENCE = 60.0
SEEDS = range(3)
OLD, POISON = 0x11, 0xEE


class Rig:
    """An engine whose tier holds one prompt, on a simulated device."""

    def __init__(self, seed: int) -> None:
        self.config = kvtier.Config(groups=[LAYOUT], block_tokens=4, model="m@1", host=BLOCKS * 8192)
        self.device = testing.SimulatedDevice(seed)
        self.engine = kvtier.Engine(self.config, hash_seed=seed)
        self.layers = [self.device.empty((2 * BLOCKS, 2, 4, 1, 8), np.uint8) for _ in range(2)]
        self.pages = self.engine.attach(self.layers)
        self.stream = self.device.stream()
        self.engine.wait_until_whole()
        self.here, self.there = np.arange(BLOCKS), np.arange(BLOCKS, 2 * BLOCKS)
        self.values = np.random.default_rng(seed).integers(0, 256, (2, *self.layers[0].shape), np.uint8)

    def keys(self, prompt: int = 0) -> np.ndarray:
        return kvtier.block_keys(np.full(BLOCKS * 4, prompt, np.int32), self.config)

    def fill(self, stream: testing.Stream | None = None, *, value: int | None = None) -> None:
        """Writes all pages: with this rig's values, or with one."""
        for layer, values in zip(self.layers, self.values, strict=True):
            self.device.write(layer, values if value is None else value, stream)

    def store(self, prompt: int = 0, stream: testing.Stream | None = None) -> kvtier.StoreTicket:
        return self.engine.store(self.keys(prompt), self.pages, self.here, stream=stream)

    def load(self, prompt: int = 0, stream: testing.Stream | None = None) -> kvtier.LoadTicket:
        return self.engine.load(self.keys(prompt), self.pages, self.there, stream=stream)

    def stored(self) -> None:
        """Makes the prompt resident, and leaves poison in the pages."""
        self.fill()
        assert self.store().result().stored == BLOCKS
        self.fill(value=POISON)
        self.device.synchronize()

    def wrong_bytes(self, what: str) -> list[str]:
        """Complains unless the target pages hold what was stored."""
        for layer, values in zip(self.layers, self.values, strict=True):
            if (self.device.read(layer).result()[self.there] != values[self.here]).any():
                return [f"wrong bytes: {what}"]
        return []

    def loaded_bytes(self, what: str) -> list[str]:
        assert self.load().result().valid_blocks == BLOCKS
        return self.wrong_bytes(what)


def comes(moment: kvtier.Moment | kvtier.StoreTicket | kvtier.LoadTicket) -> bool:
    """Whether it is over soon."""
    try:
        moment.wait(SHORT)
    except kvtier.TimeoutError:
        return False
    return True


@contextmanager
def held(rig: Rig, stream: testing.Stream | int) -> Iterator[None]:
    rig.device.hold(stream)
    yield
    rig.device.release(stream)


def load_overtakes_a_kernel_that_reads_the_pages(rig: Rig) -> list[str]:
    rig.stored()
    rig.fill(value=OLD)
    rig.device.synchronize()
    with held(rig, rig.stream):
        seen = [rig.device.read(layer, rig.stream) for layer in rig.layers]
        ticket = rig.load(stream=rig.stream)
        comes(ticket)
    ticket.wait(PATIENCE)
    wrong = any((read.result() != OLD).any() for read in seen)
    return ["a kernel read what a later load wrote"] if wrong else rig.wrong_bytes("after the load")


def store_overtakes_the_kernel_that_writes_the_pages(rig: Rig) -> list[str]:
    with held(rig, rig.stream):
        rig.fill(rig.stream)
        ticket = rig.store(stream=rig.stream)
        comes(ticket)
    ticket.wait(PATIENCE)
    return rig.loaded_bytes("the pages before the kernel")


def pages_are_reused_under_a_store(rig: Rig) -> list[str]:
    rig.fill()
    with held(rig, STORE_LANE):
        ticket = rig.store()
        if comes(ticket.released):
            rig.fill(value=POISON)
            rig.device.synchronize()
    ticket.wait(PATIENCE)
    return rig.loaded_bytes("what the pages were reused for")


def a_block_is_hit_before_it_is_there(rig: Rig) -> list[str]:
    rig.fill()
    complaints = []
    with held(rig, STORE_LANE):
        ticket = rig.store()
        match = rig.engine.lookup(rig.keys())
        if match.ready_blocks > 0:
            complaints = rig.loaded_bytes("a block that was not copied yet")
    ticket.wait(PATIENCE)
    return complaints or rig.loaded_bytes("after the store")


def a_load_is_done_before_its_copies(rig: Rig) -> list[str]:
    rig.stored()
    complaints = []
    with held(rig, LOAD_LANE):
        ticket = rig.load()
        if comes(ticket):
            complaints = rig.wrong_bytes("the ticket was done")
    ticket.wait(PATIENCE)
    return complaints or rig.wrong_bytes("after the load")


def kernels_behind(rig: Rig, ticket: kvtier.LoadTicket, order: Callable[[int], None]) -> list[str]:
    """Kernels that the load's ticket was to hold back, run as far as the stream lets them."""
    seen = []
    for layer in range(2):
        order(layer)
        seen.append(rig.device.read(rig.layers[layer], rig.stream))
    while rig.device.step(rig.stream):
        pass
    rig.device.release(LOAD_LANE)
    ticket.wait(PATIENCE)
    right = all(
        (read.result()[rig.there] == values[rig.here]).all()
        for read, values in zip(seen, rig.values, strict=True)
    )
    return [] if right else ["a kernel ran before the copies that it was ordered behind"]


def a_stream_does_not_wait_for_a_load(rig: Rig) -> list[str]:
    rig.stored()
    rig.device.hold(LOAD_LANE)
    ticket = rig.load()
    return kernels_behind(rig, ticket, lambda layer: ticket.wait_stream(rig.stream) if layer == 0 else None)


def a_stream_does_not_wait_for_a_layer(rig: Rig) -> list[str]:
    rig.stored()
    rig.device.hold(LOAD_LANE)
    ticket = rig.engine.load(rig.keys(), rig.pages, rig.there, layers_per_batch=1)
    return kernels_behind(rig, ticket, lambda layer: ticket.wait_layer(layer, rig.stream))


def slots_are_reused_under_a_load(rig: Rig) -> list[str]:
    rig.stored()
    with held(rig, LOAD_LANE):
        load = rig.load()
        rig.store(prompt=1).wait(PATIENCE)  # of poison, into the only slots that there are
    load.wait(PATIENCE)
    return rig.wrong_bytes("what evicted a block that was being loaded (I4, I5)")


def slots_are_reused_under_a_store(rig: Rig) -> list[str]:
    rig.fill()
    with held(rig, STORE_LANE):
        first = rig.store()
        second = rig.store(prompt=1)
    first.wait(PATIENCE)
    if second.result().declined != BLOCKS:
        return ["slots were given away while a copy into them was running (I2, I5)"]
    return rig.loaded_bytes("after the store")


def pages_are_freed_under_a_load(rig: Rig) -> list[str]:
    rig.stored()
    with held(rig, LOAD_LANE):
        ticket = rig.load()
        try:
            rig.pages.detach(SHORT)
        except kvtier.TimeoutError:
            pass
        else:
            for layer in rig.layers:
                rig.device.free(layer)
    ticket.wait(PATIENCE)
    return rig.device.violations()


SCENARIOS: dict[str, Callable[[Rig], list[str]]] = {
    "load_after_framework_stream": load_overtakes_a_kernel_that_reads_the_pages,
    "store_after_framework_stream": store_overtakes_the_kernel_that_writes_the_pages,
    "released_after_store_copy": pages_are_reused_under_a_store,
    "ready_after_store_copy": a_block_is_hit_before_it_is_there,
    "done_after_load_copy": a_load_is_done_before_its_copies,
    "wait_stream_event": a_stream_does_not_wait_for_a_load,
    "wait_layer_event": a_stream_does_not_wait_for_a_layer,
    "pins_until_load_copy": slots_are_reused_under_a_load,
    "reservation_until_store_copy": slots_are_reused_under_a_store,
    "detach_after_copies": pages_are_freed_under_a_load,
}


def complaints(point: str, seed: int) -> list[str]:
    rig = Rig(seed)
    found = SCENARIOS[point](rig)
    rig.engine.close(PATIENCE)
    return found


def test_every_ordering_point_has_a_scenario() -> None:
    assert set(SCENARIOS) == set(testing.ordering_points())


@pytest.mark.parametrize("point", SCENARIOS)
def test_a_disabled_ordering_point_is_noticed(point: str) -> None:
    with testing.disable_ordering(point):
        assert any(complaints(point, seed) for seed in SEEDS)


@pytest.mark.parametrize("point", SCENARIOS)
@pytest.mark.parametrize("seed", SEEDS)
def test_with_all_points_enabled_nothing_is_noticed(point: str, seed: int) -> None:
    assert complaints(point, seed) == []
