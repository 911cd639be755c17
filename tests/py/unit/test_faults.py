"""The n-th call of a seam fails, for every n: a miss or a KVTierError follows, and nothing leaks (I7)."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import kvtier
from kvtier import testing

LAYOUT = kvtier.KVLayout(2, 1, 8, "uint8", 4)
BLOCKS = 4
PATIENCE = 60.0
CONFIG = kvtier.Config(
    groups=[LAYOUT], block_tokens=4, model="m@1", host=2 * BLOCKS * 8192, copy_threads=1, host_numa_node=0
)
KEYS = kvtier.block_keys(np.arange(BLOCKS * 4, dtype=np.int32), CONFIG)
SHAPE = (2 * BLOCKS, 2, 4, 1, 8)
VALUES = np.random.default_rng(1).integers(0, 256, (2, *SHAPE), np.uint8)
SOURCE, TARGET = np.arange(BLOCKS), np.arange(BLOCKS, 2 * BLOCKS)
# Seen by the host memory and by the device in every run of the scenario.
OFTEN = ["create_stream", "create_event", "record", "wait", "synchronize", "copy", "register_host"]
HOST_MEMORY = ["available_bytes", "create_shared", "map_shared", "prefer_node", "populate"]


def in_use() -> tuple[int, int]:
    """Threads and descriptors of this process."""
    return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def nothing_leaks() -> Iterator[None]:
    """Threads and descriptors are as before; the kernel takes a moment to forget a thread that was joined."""
    gc.collect()
    before = in_use()
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while (threads := in_use())[0] > before[0] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threads[0] <= before[0]
    assert in_use()[1] == before[1]


@dataclass
class Run:
    """What a run of the scenario saw."""

    errors: list[kvtier.KVTierError] = field(default_factory=list)
    outcomes: set[str] = field(default_factory=set)
    hits: int = 0


def one_run(plan: testing.FaultPlan, device: str, layers_per_batch: int | None) -> Run:
    """Opens, attaches, stores, looks up, loads, stores again and closes, whatever fails."""
    run = Run()
    simulated = testing.SimulatedDevice(5) if device == "simulated" else None
    try:
        engine = kvtier.Engine(CONFIG, memory=testing.faulty_memory(plan))
    except kvtier.KVTierError as error:
        run.errors.append(error.with_traceback(None))  # its frames hold the device
        return run
    try:
        calls(run, engine, simulated, plan, layers_per_batch)
    except kvtier.KVTierError as error:
        run.errors.append(error.with_traceback(None))  # its frames hold the device
    stats = engine.stats()
    for host in stats.host:
        assert host.free + host.filling + host.ready + host.leaving == host.capacity  # I1
        assert host.filling == 0
        assert host.leaving == stats.quarantined_blocks
    assert stats.pins == 0
    assert stats.health == "ok"
    engine.close(PATIENCE)
    assert simulated is None or simulated.violations() == []
    return run


def calls(
    run: Run,
    engine: kvtier.Engine,
    simulated: testing.SimulatedDevice | None,
    plan: testing.FaultPlan,
    layers_per_batch: int | None,
) -> None:
    layers = [simulated.empty(SHAPE, np.uint8) if simulated else np.zeros(SHAPE, np.uint8) for _ in "ab"]

    def write(target_value: int) -> None:
        for layer, values in zip(layers, VALUES, strict=True):
            wanted = values.copy()
            wanted[TARGET] = target_value
            if simulated:
                simulated.write(layer, wanted)
                simulated.synchronize()
            else:
                layer[:] = wanted

    def read() -> np.ndarray:
        return np.stack([simulated.read(layer).result() if simulated else layer for layer in layers])

    pages = engine.attach(layers, device=testing.faulty_device(simulated or testing.cpu_device(1), plan))
    try:
        engine.wait_until_whole()
    except kvtier.KVTierError as error:
        run.errors.append(error.with_traceback(None))  # its frames hold the device
    write(0xEE)
    for _ in range(2):  # what failed once is stored at the second time
        stored = engine.store(KEYS, pages, SOURCE).result()
        names = [kvtier.BlockOutcome(outcome).name for outcome in stored.outcomes]
        run.outcomes |= set(names)
        assert (stored.error is not None) == ("FAILED" in names)
        match = engine.lookup(KEYS)
        assert match.ready_blocks == names.count("STORED") + names.count("PRESENT")
        run.hits += match.ready_blocks
        with match.pin() as lease:
            loaded = engine.load(
                lease, pages, TARGET[: lease.num_blocks], layers_per_batch=layers_per_batch
            ).result()
        run.outcomes |= {kvtier.BlockOutcome(outcome).name for outcome in loaded.outcomes}
        assert (loaded.error is None) == (loaded.valid_blocks == lease.num_blocks)
        if loaded.error is None:
            seen = read()
            assert (seen[:, TARGET[: lease.num_blocks]] == VALUES[:, SOURCE[: lease.num_blocks]]).all()
            assert (seen[:, TARGET[lease.num_blocks :]] == 0xEE).all()
        assert (read()[:, SOURCE] == VALUES[:, SOURCE]).all()
        write(0xEE)
    pages.detach(PATIENCE)


def faulty_runs(
    device: str,
    call: str | None,
    code: str,
    *,
    from_then_on: bool = False,
    layers_per_batch: int | None = None,
) -> Iterator[Run]:
    """Runs with the first, the second ... call failing, until no run has that many."""
    for n in range(1, 200):
        plan = testing.FaultPlan()
        plan.fail(n, call=call, code=code, native_code=12, from_then_on=from_then_on)
        run = one_run(plan, device, layers_per_batch)
        if plan.injected == 0:
            assert n > 1, f"no {call} was ever called"
            assert not run.errors
            assert run.hits == 2 * BLOCKS
            return
        yield run
    pytest.fail("the scenario never got past its faults")


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_without_faults_all_is_stored_and_loaded(device: str) -> None:
    run = one_run(testing.FaultPlan(), device, None)
    assert (run.errors, run.outcomes, run.hits) == ([], {"STORED", "PRESENT", "LOADED"}, 2 * BLOCKS)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("layers_per_batch", [None, 1])
def test_any_one_call_fails_and_nothing_leaks(device: str, layers_per_batch: int | None) -> None:
    one_run(testing.FaultPlan(), device, layers_per_batch)  # what is made once for a process, is made now
    with nothing_leaks():
        runs = list(faulty_runs(device, None, "device", layers_per_batch=layers_per_batch))
    assert len(runs) > 20
    assert any(run.errors for run in runs)
    assert any("FAILED" in run.outcomes for run in runs)
    assert all(run.hits > 0 or run.errors for run in runs)


@pytest.mark.parametrize("code", ["resource", "device", "io", "internal"])
@pytest.mark.parametrize("call", [*OFTEN, *HOST_MEMORY])
def test_the_nth_call_of_each_kind_fails(call: str, code: str) -> None:
    """An error that is raised is of the class that the code stands for."""
    wanted = {
        "resource": kvtier.ResourceError,
        "device": kvtier.DeviceError,
        "io": kvtier.StorageError,
        "internal": kvtier.InternalError,
    }[code]
    with nothing_leaks():
        for run in faulty_runs("cpu", call, code):
            for error in run.errors:
                assert isinstance(error, (wanted, kvtier.ResourceError)), error  # open() says ResourceError


def test_memory_that_cannot_be_had_is_said_by_open() -> None:
    for call in HOST_MEMORY:
        if call == "available_bytes":
            continue
        plan = testing.FaultPlan()
        plan.fail(1, call=call, code="resource", native_code=12)
        with pytest.raises(kvtier.ResourceError, match="a planned fault"):
            kvtier.Engine(CONFIG, memory=testing.faulty_memory(plan))


def test_a_refused_registration_only_makes_it_slow() -> None:
    plan = testing.FaultPlan()
    plan.fail(1, call="register_host", code="device", native_code=2, from_then_on=True)
    run = one_run(plan, "simulated", None)
    assert plan.injected > 0
    assert (run.errors, run.hits) == ([], 2 * BLOCKS)


@pytest.mark.parametrize("call", ["create_event", "record", "wait", "copy"])
def test_a_device_that_goes_on_failing_only_makes_misses(call: str) -> None:
    plan = testing.FaultPlan()
    plan.fail(1, call=call, code="device", native_code=700, from_then_on=True)
    with nothing_leaks():
        run = one_run(plan, "cpu", None)
    assert plan.injected > 0
    assert run.hits == 0
    assert "FAILED" in run.outcomes
    assert "LOADED" not in run.outcomes


def test_what_cannot_be_proved_over_is_quarantined_for_good() -> None:
    """synchronize() fails for ever: nobody knows whether the copies run, so their slots stay out of use."""
    plan = testing.FaultPlan()
    engine = kvtier.Engine(CONFIG)
    layers = [np.zeros(SHAPE, np.uint8) for _ in "ab"]
    pages = engine.attach(layers, device=testing.faulty_device(testing.cpu_device(1), plan))
    plan.fail(1, call="synchronize", code="device", native_code=719, from_then_on=True)
    ticket = engine.store(KEYS, pages, SOURCE)
    result = ticket.result()
    assert result.failed == BLOCKS
    assert isinstance(result.error, kvtier.DeviceError)
    with pytest.raises(kvtier.DeviceError):
        ticket.released.wait(PATIENCE)
    stats = engine.stats()
    assert (stats.quarantined_blocks, stats.host[0].leaving, stats.host[0].filling) == (BLOCKS, BLOCKS, 0)
    assert engine.lookup(KEYS).ready_blocks == 0
    with pytest.raises(kvtier.DeviceError, match="never be freed"):
        pages.detach(PATIENCE)
    for _ in range(2):
        with pytest.raises(kvtier.DeviceError, match="never be freed"):
            engine.close(PATIENCE)
    assert engine.closed


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_sticky_error_ends_in_misses(n: int) -> None:
    device = testing.SimulatedDevice(n)
    engine = kvtier.Engine(CONFIG)
    layers = [device.empty(SHAPE, np.uint8) for _ in "ab"]
    pages = engine.attach(layers)
    engine.wait_until_whole()
    device.fail_sticky_at_copy(n, 700)
    results = [engine.store(KEYS, pages, SOURCE).result()]
    results += [engine.load(KEYS, pages, TARGET).result() for _ in range(3)]
    errors = [result.error for result in results if result.error is not None]
    assert errors
    assert all(isinstance(error, kvtier.DeviceError) for error in errors)
    assert errors[0].code == 700
    stats = engine.stats()
    assert stats.health != "ok"
    assert stats.pins == 0
    match = engine.lookup(KEYS)
    assert match.ready_blocks == 0
    assert engine.stats().lookup_misses_failed == BLOCKS
    assert engine.store(KEYS, pages, SOURCE).result().declined == BLOCKS
    engine.close(PATIENCE)


def test_every_kind_of_fault_is_covered() -> None:
    assert {*OFTEN, *HOST_MEMORY} | {"query", "unregister_host"} == set(testing.fault_calls())


def test_an_unregistration_that_fails_keeps_the_mapping_and_hurts_nobody() -> None:
    plan = testing.FaultPlan()
    plan.fail(1, call="unregister_host", code="device", from_then_on=True)
    run = one_run(plan, "simulated", None)
    assert plan.injected > 0
    assert (run.errors, run.hits) == ([], 2 * BLOCKS)
