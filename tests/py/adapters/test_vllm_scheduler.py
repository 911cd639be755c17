"""SchedulerSide without vLLM: a scheduler and a block pool of a few lines, the real keeper, a real worker."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kvtier
from kvtier import Config, Disk, KVLayout
from kvtier.adapters.vllm.events import Cleared, EventLog, Removed, Stored
from kvtier.adapters.vllm.groups import CacheGroup, CachePlan
from kvtier.adapters.vllm.loads import RankLoads
from kvtier.adapters.vllm.meeting import meeting_place, sweep
from kvtier.adapters.vllm.options import DiskOption, Options
from kvtier.adapters.vllm.scheduler import SchedulerSide
from kvtier.adapters.vllm.state import PageHolds
from kvtier.costs import pairs
from kvtier.engine import Engine
from kvtier.errors import ConfigError, DeviceError
from kvtier.handles import EventKind, Events, Tier
from kvtier.metrics import Hops, HopStats
from kvtier.ranks import Worker
from kvtier.testing import FaultPlan, SimulatedDevice, SimulatedDrive, cpu_device, faulty_device
from kvtier.traces import load_trace

T, D, PAGES = 4, 8, 64


@dataclass
class Request:
    request_id: str
    block_hashes: list[bytes]
    num_tokens: int
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    kv_transfer_params: Any = None
    lora_request: Any = None
    skip_reading_prefix_cache: bool = False
    session_id: str | None = None

    @property
    def all_token_ids(self) -> list[int]:
        return list(range(self.num_tokens))


def request(name: str, blocks: int, seed: int = 0, **more: Any) -> Request:
    numbers = np.random.default_rng(seed).integers(0, 256, (blocks, 32), np.uint8)
    tokens = blocks * T + 1
    return Request(name, [row.tobytes() for row in numbers], tokens, tokens, **more)


@dataclass
class Block:
    """Nobody's, unless a test says that a request has it."""

    block_id: int
    ref_cnt: int = 0


@dataclass
class Pool:
    """vLLM's block pool, as far as holds need it."""

    blocks: list[Block] = field(default_factory=lambda: [Block(n) for n in range(PAGES)])

    @property
    def references(self) -> dict[int, int]:
        return {block.block_id: block.ref_cnt for block in self.blocks if block.ref_cnt}

    def touch(self, blocks: list[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0


class Bench:
    def __init__(self, directory: Path, window: int | None = None, **options: Any) -> None:
        layout = KVLayout(2, 1, D, "uint8", T, "TD", num_parts=1)
        windowed = KVLayout(1, 1, D, "uint8", T, "TD", window_tokens=window, num_parts=1)
        layouts = [layout] if window is None else [layout, windowed]
        groups = [CacheGroup(g, each, (), 1) for g, each in enumerate(layouts)]
        events = bool(options.pop("events", False))
        disks = [Disk(str(directory / "disk"), "32MiB")] if options.pop("disk", False) else []
        trace = options.pop("trace", None)
        config = Config(groups=layouts, host="4MiB", model="m@1", block_tokens=T, disk=disks, trace=trace)
        self.now = 0.0
        self.side = SchedulerSide(
            config,
            CachePlan(tuple(groups), T, T, 0),
            Options(host=4 << 20, disk=tuple(DiskOption(d.path, d.capacity_bytes) for d in disks), **options),
            str(directory / "meet"),
            events=events,
            clock=lambda: self.now,
        )
        self.pool = Pool()
        self.side.holds.bind(self.pool)
        self.worker = Worker(directory / "meet", 0, config)
        self.tensors = [[np.zeros((PAGES, T, D), np.uint8) for _ in range(n.num_layers)] for n in layouts]
        self.pages = [self.worker.attach(each, g, axes="PTD") for g, each in enumerate(self.tensors)]
        self.worker.join(10)

    def step(self, scheduled: dict[str, tuple[int, Any]] | None = None, total: int | None = None) -> Any:
        """One step of vLLM: {request: (tokens, block ids of each group)}."""
        scheduled = scheduled or {}
        tokens = {name: count for name, (count, _) in scheduled.items()}
        return self.side.step(
            SimpleNamespace(
                num_scheduled_tokens=tokens,
                total_num_scheduled_tokens=sum(tokens.values()) if total is None else total,
                kv_connector_block_state=SimpleNamespace(get_block_ids=lambda name: scheduled[name][1]),
            )
        )

    def execute(self, copies: Any) -> None:
        for instruction, ids in copies:
            self.worker.execute(instruction, self.pages[instruction.group], ids).wait(10)

    def settle(self) -> None:
        """Until every page is free."""
        for ended in self.side.holds.poll(self.now, patience=10):
            assert ended.ticket.result().error is None

    def store(self, one: Request, pages: list[int]) -> None:
        """Computes and stores the whole of a request that is new."""
        self.side.on_new_request(one)
        for tensors in self.tensors:
            for layer, tensor in enumerate(tensors):
                for page in pages:
                    tensor[page] = page + 100 * layer
        ids = tuple(pages for _ in self.tensors)
        _, stores, _ = self.step({one.request_id: (one.num_tokens, ids)})
        self.execute(stores)
        self.settle()
        self.side.finish(one)

    def close(self) -> None:
        self.worker.close(10)
        self.side.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_a_prefix_comes_back_into_other_pages(bench: Bench) -> None:
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    again = request("b", 5)
    bench.side.on_new_request(again)
    assert bench.side.match(again, 0) == 5 * T
    bench.side.grant(again, ([11, 12, 13, 14, 15, 16],), 5 * T)
    ((name, copies),), stores, stale = bench.step()
    assert (name, stores, stale) == ("b", [], [])
    bench.execute(copies)
    for layer, tensor in enumerate(bench.tensors[0]):
        assert [int(tensor[page, 0, 0]) for page in range(11, 16)] == [n + 100 * layer for n in range(1, 6)]
    bench.side.received({"b"}, set())
    assert bench.side.counters.take()["load_blocks"] == 5


def test_only_what_the_device_lacks_is_loaded_and_the_last_token_is_computed(bench: Bench) -> None:
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    again = request("b", 5)
    again.num_tokens = 5 * T  # the whole prompt is there
    bench.side.on_new_request(again)
    assert bench.side.match(again, 2 * T) == 2 * T
    bench.side.grant(again, ([1, 2, 13, 14, 15],), 2 * T)
    ((_, ((_, ids),)),), _, _ = bench.step()
    assert ids.tolist() == [13, 14]


def test_asking_changes_nothing_and_a_promise_lapses_in_the_same_step(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    assert [bench.side.match(again, 0) for _ in range(5)] == [3 * T] * 5
    assert bench.side._engine.stats().leases == 1
    bench.step()
    assert bench.side._engine.stats().leases == 0
    assert bench.side.match(again, 0) == 3 * T
    bench.side.finish(again)
    assert bench.side._engine.stats().leases == 0


def test_nobody_waits_for_anothers_load_of_the_same_prefix(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    orders = []
    for name, pages in (("b", [11, 12, 13]), ("c", [21, 22, 23])):  # b's load has not even begun
        again = request(name, 3)
        bench.side.on_new_request(again)
        assert bench.side.match(again, 0) == 3 * T
        bench.side.grant(again, (pages,), 3 * T)
        ((_, copies),), _, _ = bench.step()
        orders.append(copies)
    for copies in reversed(orders):
        bench.execute(copies)
    bench.side.received({"b", "c"}, set())
    assert [int(bench.tensors[0][0][page, 0, 0]) for page in (11, 12, 13, 21, 22, 23)] == [1, 2, 3] * 2
    counted = bench.side.counters.take()
    assert (counted["load_requests"], counted.get("ask_again", 0)) == (2, 0)


@pytest.mark.parametrize("waits", [True, False])
def test_what_a_queued_request_wants_outlives_what_nobody_waits_for(bench: Bench, waits: bool) -> None:
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    queued = request("b", 5)
    bench.side.on_new_request(queued)
    bench.step()  # it is not scheduled in it
    if not waits:
        bench.side.grant(queued, ([],), 0)
    slots = bench.side._engine.stats().host[0].capacity
    for n in range(slots // 20 + 2):  # the host tier once over
        bench.store(request(f"other{n}", 20, seed=1 + n), list(range(20, 40)))
    assert bench.side.match(queued, 0) == (5 * T if waits else 0)
    bench.side.finish(queued)
    assert not bench.side._waiting._expected


def test_who_is_scheduled_at_once_is_not_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    told: list[int] = []
    expect = Engine.expect
    monkeypatch.setattr(
        Engine, "expect", lambda self, keys, **more: told.append(len(keys)) or expect(self, keys, **more)
    )
    for name in ("b", "c"):
        bench.side.on_new_request(request(name, 5))
    bench.step({"b": (1, ([1, 2, 3, 4, 5, 6],))})
    assert told == [5]  # c's
    bench.step()
    assert told == [5]
    bench.side.reset()
    assert not bench.side._waiting._expected


def test_a_recorded_trace_has_each_prompt_whole_and_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path, trace=str(tmp_path / "trace.jsonl"), disk=True)
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    again = request("b", 5)
    bench.side.on_new_request(again)
    for computed in (0, 2 * T, 0):  # asked again, and for a part
        bench.side.match(again, computed)
        bench.step()
    bench.side.on_new_request(request("c", 3, seed=9, kv_transfer_params={"kvtier": {"pin": 60.0}}))
    bench.step()
    bench.close()
    trace = load_trace(str(tmp_path / "trace.jsonl"))
    assert [trace.blocks[a:b].tolist() for a, b in zip(trace.begins, trace.begins[1:], strict=False)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4],
        [5, 6, 7],
    ]


def test_pages_are_held_until_their_store_is_over_whatever_frees_them(bench: Bench) -> None:
    one = request("a", 3)
    bench.side.on_new_request(one)
    _, stores, _ = bench.step({"a": (one.num_tokens, ([7, 8, 9],))})
    assert bench.pool.references == {7: 1, 8: 1, 9: 1}
    bench.side.finish(one)
    bench.step()
    assert bench.pool.references == {7: 1, 8: 1, 9: 1}
    assert bench.side.holds.pending
    bench.execute(stores)
    bench.settle()
    assert bench.pool.references == {}
    assert not bench.side.holds.pending


def test_patience_with_many_stores_is_that_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Slow:
        released: Any

        def __init__(self) -> None:
            self.released = self

        def done(self) -> bool:
            return False

        def wait(self, seconds: float) -> None:  # it takes 0.4 s
            nonlocal now
            now += min(seconds, 0.4)
            if seconds < 0.4:
                raise kvtier.TimeoutError("not yet")

    monkeypatch.setattr("kvtier.adapters.vllm.state.time.monotonic", lambda: now)
    holds = PageHolds()
    holds.bind(Pool())
    slow: list[Any] = [Slow() for _ in range(5)]
    for page, ticket in enumerate(slow):
        holds.add(ticket, [page], 0, 0.0)
    assert [ended.ticket for ended in holds.poll(0.0, patience=0.5)] == slow[:1]
    assert now == pytest.approx(0.5)


def test_nobody_waits_for_stores_while_a_request_runs_though_it_is_not_cached(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = request("a", 3)
    bench.side.on_new_request(one)
    _, stores, _ = bench.step({"a": (one.num_tokens, ([1, 2, 3],))})
    refused = request("b", 3, kv_transfer_params={"kvtier": {"what": 1}})
    bench.side.on_new_request(refused)
    bench.side.finish(one)
    patience: list[float] = []
    poll = bench.side.holds.poll

    def spy(now: float, **how: float) -> Any:
        patience.append(how["patience"])
        return poll(now, patience=0.0)

    monkeypatch.setattr(bench.side.holds, "poll", spy)
    bench.side.settle()
    bench.side.finish(refused)
    bench.side.settle()
    assert (patience[0], patience[1] > 0) == (0.0, True)
    monkeypatch.undo()
    bench.execute(stores)
    bench.settle()


def test_a_store_that_does_not_end_promises_no_free_pages(bench: Bench) -> None:
    one = request("a", 3)
    bench.side.on_new_request(one)
    assert not bench.side.frees_soon()
    _, stores, _ = bench.step({"a": (2 * T, ([1, 2, 3],))})
    bench.now = 4.0
    assert bench.side.frees_soon()
    bench.now = 6.0
    assert not bench.side.frees_soon()
    one.num_computed_tokens = 2 * T
    _, more, _ = bench.step({"a": (T, ([1, 2, 3],))})
    assert bench.side.frees_soon()
    bench.now = 20.0
    bench.side.settle()
    assert not bench.side.frees_soon()
    assert bench.pool.references == {1: 1, 2: 1, 3: 1}  # and they are held all the same
    bench.execute(stores + more)
    bench.settle()
    assert bench.pool.references == {}


def test_pages_that_a_running_request_has_too_are_not_about_to_be_free(bench: Bench) -> None:
    """Else vLLM would wait for them, and preempt nobody, for as long as anything is stored."""
    one = request("a", 3)
    bench.side.on_new_request(one)
    bench.pool.touch(bench.pool.blocks[1:4])  # as the request has them
    _, stores, _ = bench.step({"a": (one.num_tokens, ([1, 2, 3],))})
    assert not bench.side.frees_soon()
    bench.pool.free_blocks(bench.pool.blocks[1:2])  # a window moves on
    assert bench.side.frees_soon()
    bench.pool.free_blocks(bench.pool.blocks[2:4])
    bench.now = 6.0
    assert not bench.side.frees_soon()  # not soon
    bench.execute(stores)
    bench.settle()
    assert bench.pool.references == {}


def test_nothing_is_stored_twice_nor_before_it_is_computed(bench: Bench) -> None:
    one = request("a", 4)
    bench.side.on_new_request(one)
    _, stores, _ = bench.step({"a": (2 * T + 1, ([1, 2, 3, 4],))})
    assert [ids.tolist() for _, ids in stores] == [[1, 2]]
    one.num_computed_tokens = 2 * T + 1
    _, more, _ = bench.step({"a": (T - 1, ([1, 2, 3, 4],))})
    assert [ids.tolist() for _, ids in more] == [[3]]
    one.num_computed_tokens = 3 * T
    assert bench.step({"a": (1, ([1, 2, 3, 4],))})[1] == []
    bench.execute(stores + more)
    bench.settle()


def test_drafts_are_not_stored(bench: Bench) -> None:
    one = request("a", 4)
    one.num_tokens = 2 * T  # known; the rest of what is scheduled are guesses
    bench.side.on_new_request(one)
    _, stores, _ = bench.step({"a": (4 * T, ([1, 2, 3, 4],))})
    assert [ids.tolist() for _, ids in stores] == [[1, 2]]
    bench.execute(stores)
    bench.settle()


def test_a_failed_load_drops_its_blocks_and_is_not_tried_again(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    bench.side.grant(again, ([4, 5, 6],), bench.side.match(again, 0) or 0)
    ((_, copies),), _, _ = bench.step()
    bench.execute(copies)
    bench.side.received({"b"}, {"b"})
    assert bench.side.match(again, 0) == 0
    other = request("c", 3)
    bench.side.on_new_request(other)
    assert bench.side.match(other, 0) == 0
    assert bench.side.counters.take()["load_failures"] == 1


def fail_a_load(bench: Bench, one: Request) -> None:
    bench.side.on_new_request(one)
    found = bench.side.match(one, 0)
    assert found
    bench.side.grant(one, ([4, 5, 6],), found)
    ((_, copies),), _, _ = bench.step()
    bench.execute(copies)
    bench.side.received({one.request_id}, {one.request_id})


def test_a_failed_load_ends_no_server_whose_drive_is_out_of_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drive = SimulatedDrive(1)
    monkeypatch.setattr(
        "kvtier.adapters.vllm.scheduler.open_engine", lambda config: Engine(config, drive=drive)
    )
    bench = Bench(tmp_path, disk=True)
    try:
        bench.store(request("a", 3), [1, 2, 3])
        bench.side._engine.flush(30)
        drive.power_loss()
        fail_a_load(bench, request("b", 3))
        other = request("c", 3)
        bench.side.on_new_request(other)
        assert bench.side.match(other, 0) == 0
        assert bench.side._drops.wait(30)
        assert bench.side.match(other, 0) == 0
        assert bench.side._engine.stats().host[0].ready == 0
        assert "may be found again after a restart" in caplog.text
    finally:
        bench.close()


def test_nobody_waits_for_a_drop_and_nobody_finds_its_blocks_meanwhile(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    bench.store(request("other", 3, seed=1), [1, 2, 3])
    confirmed = threading.Event()
    drop = bench.side._engine.drop

    def slow(keys: Any) -> int:
        assert threading.current_thread() is not threading.main_thread()
        confirmed.wait(30)
        return drop(keys)

    monkeypatch.setattr(bench.side._engine, "drop", slow)
    try:
        fail_a_load(bench, request("b", 3))
        waiting = request("c", 3)
        bench.side.on_new_request(waiting)
        assert bench.side.match(waiting, 0) == 0
        again = request("d", 3, seed=1)
        bench.side.on_new_request(again)
        assert bench.side.match(again, 0) == 3 * T
        _, stores, _ = bench.step({"c": (waiting.num_tokens, ([1, 2, 3],))})
        assert stores == []  # they would be found, and dropped then
    finally:
        confirmed.set()
    assert bench.side._drops.wait(30)
    _, stores, _ = bench.step({"c": (waiting.num_tokens, ([1, 2, 3],))})
    bench.execute(stores)
    bench.settle()
    assert bench.side.match(waiting, 0) == 3 * T


def test_a_load_is_over_when_all_its_copies_are_though_one_could_not_begin(tmp_path: Path) -> None:
    bench = Bench(tmp_path, window=2 * T)
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    bench.side.grant(again, ([4, 5, 6], [0, 8, 9]), bench.side.match(again, 0) or 0)
    ((_, ((first, first_pages), (second, second_pages))),), _, _ = bench.step()
    device = SimulatedDevice()
    device.hold()
    there = bench.worker.attach([device.empty((PAGES, T, D), np.uint8) for _ in "ab"], 0, axes="PTD")
    running = bench.worker.execute(first, there, first_pages)
    with pytest.raises(ConfigError):
        bench.worker.execute(second, bench.pages[1], second_pages + PAGES)
    loads = RankLoads()
    loads.begin("b", [running, None])
    for idle in (False, True):
        assert loads.take_ended(idle=idle) == (set(), set())
    assert len(loads) == 1
    bench.side.received({"b"}, {"b"})  # had a rank said so nevertheless: nobody may have these pages
    assert [bench.pool.references.get(page) for page in (4, 5, 6)] == [1, 1, 1]
    device.release()
    running.wait(10)
    assert loads.take_ended(idle=False) == ({"b"}, {"b"})
    assert loads.take_ended(idle=False) == (set(), set())
    assert not loads
    bench.side._stores.poll(bench.now, patience=10)
    assert bench.pool.references == {}
    there.detach(10)
    bench.close()


def test_a_load_that_no_rank_began_is_over(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    bench.side.grant(again, ([4, 5, 6],), bench.side.match(again, 0) or 0)
    bench.step()
    bench.side.received({"b"}, {"b"})  # the keeper was told nothing
    bench.side._stores.poll(bench.now, patience=10)
    assert bench.pool.references == {}
    assert bench.side._drops.wait(30)
    assert bench.side._engine.stats().pins == 0


def test_pages_of_a_load_that_may_never_be_over_are_never_used_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    bench.side.grant(again, ([4, 5, 6],), bench.side.match(again, 0) or 0)
    ((_, ((instruction, pages),)),), _, _ = bench.step()
    plan = FaultPlan()
    broken = faulty_device(cpu_device(1), plan)
    there = bench.worker.attach(bench.tensors[0], 0, axes="PTD", device=broken)
    plan.fail(1, call="synchronize", code="device", native_code=719, from_then_on=True)
    ticket = bench.worker.execute(instruction, there, pages).wait(10)
    loads = RankLoads()
    loads.begin("b", [ticket])
    assert loads.take_ended(idle=False) == ({"b"}, {"b"})
    bench.side.received({"b"}, {"b"})
    bench.side.holds.poll(bench.now, patience=10)
    assert bench.side.holds.quarantined_pages == 3
    assert bench.pool.references == {4: 1, 5: 1, 6: 1}
    assert not bench.side.holds.pending
    with pytest.raises(DeviceError):
        bench.worker.close(10)
    with pytest.raises(DeviceError):
        bench.side.close()


def test_a_reset_hides_everything_and_fails_running_loads(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    bench.side.grant(again, ([4, 5, 6],), bench.side.match(again, 0) or 0)
    ((_, copies),), _, _ = bench.step()
    bench.side.reset()
    assert bench.step()[2] == ["b"]
    bench.execute(copies)
    bench.side.received({"b"}, {"b"})
    # It was running: what it has computed may be old.
    assert bench.step({"b": (again.num_tokens, ([4, 5, 6],))})[1] == []
    fresh = request("c", 3)
    bench.side.on_new_request(fresh)
    assert bench.side.match(fresh, 0) == 0
    bench.store(request("d", 3), [1, 2, 3])
    assert bench.side.match(fresh, 0) == 3 * T


def test_a_reset_drops_nothing_itself_whatever_tenants_there_were(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop = bench.side._engine.drop
    dropped: list[str | None] = []

    def elsewhere(keys: Any = None, namespace: str | None = None) -> int:
        assert threading.current_thread() is not threading.main_thread()
        dropped.append(namespace)
        return drop(keys, namespace)

    monkeypatch.setattr(bench.side._engine, "drop", elsewhere)
    for n in range(2000):
        wishes = {"namespace": f"tenant {n}", "priority": "high" if n < 2 else None}
        one = request(f"r{n}", 1, seed=n, kv_transfer_params={"kvtier": wishes})
        if n < 5:
            bench.store(one, [1])
        else:
            bench.side.on_new_request(one)
            bench.side.finish(one)
    bench.side.reset()
    assert bench.side._drops.wait(30)
    assert dropped == ["tenant 0", "tenant 1"]  # nothing of normal priority could take their place
    assert bench.side._engine.stats().host[0].ready == 3
    assert bench.side._root.cache_info().currsize == 1024


def test_a_prefix_comes_back_from_disk_after_a_restart(tmp_path: Path) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True)
    try:
        again = request("b", 3)
        second.side.on_new_request(again)
        deadline = time.monotonic() + 30
        while (found := second.side.match(again, 0)) is None:  # asked again at most for max_wait of its clock
            assert time.monotonic() < deadline
        state = second.side._requests["b"]
        state.prefetch.wait(30)
        found = second.side.match(again, 0)
        assert found == 3 * T
        assert second.side.disk_tokens(again, 3 * T) == 3 * T
        second.side.grant(again, ([4, 5, 6],), found)
        ((_, copies),), _, _ = second.step()
        second.execute(copies)
        second.side.received({"b"}, set())
        for layer, tensor in enumerate(second.tensors[0]):
            for old, new in ((1, 4), (2, 5), (3, 6)):
                assert (tensor[new] == old + 100 * layer).all()
        assert second.side.counters.take()["hit_tokens_disk"] > 0
        refused = request("c", 3, kv_transfer_params={"kvtier": {"tiers": ["host"]}})
        second.side.on_new_request(refused)
        assert second.side._requests["c"].prefetch is None
    finally:
        second.close()


def test_from_disk_alone_only_what_was_on_disk_is_loaded(tmp_path: Path) -> None:
    from_disk = {"kvtier": {"tiers": ["disk"]}}
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True)
    try:
        again = request("b", 3, kv_transfer_params=from_disk)
        second.side.on_new_request(again)
        second.side._requests["b"].prefetch.wait(30)
        assert second.side.match(again, 0) == 3 * T
        assert second.side._requests["b"].fetches == 0
        second.side.grant(again, ([4, 5, 6],), 3 * T)
        ((_, copies),), _, _ = second.step()
        second.execute(copies)
        second.side.received({"b"}, set())
        assert [int(second.tensors[0][0][page, 0, 0]) for page in (4, 5, 6)] == [1, 2, 3]
        later = request("c", 3, kv_transfer_params=from_disk)  # now they are in host memory
        second.side.on_new_request(later)
        assert second.side.match(later, 0) == 0
        assert "ask_again" not in second.side.counters.take()
    finally:
        second.close()


@pytest.mark.parametrize("tiers", [[], ["disk"]])
def test_who_loads_nothing_does_not_wait_for_a_store(bench: Bench, tiers: list[str]) -> None:
    storing = request("a", 3)
    bench.side.on_new_request(storing)
    _, stores, _ = bench.step({"a": (storing.num_tokens, ([1, 2, 3],))})
    one, other = request("b", 3, kv_transfer_params={"kvtier": {"tiers": tiers}}), request("c", 3)
    for each in (one, other):
        bench.side.on_new_request(each)
    assert bench.side.match(other, 0) is None
    assert bench.side.match(one, 0) == 0
    bench.execute(stores)
    bench.settle()
    assert bench.side.match(one, 0) == 0


def test_reads_that_end_while_a_request_is_looked_up_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True)
    try:
        again = request("b", 3)
        answers: list[Any] = []
        look_up = second.side._engine.lookup
        over = False

        def slow(keys: Any, **_: Any) -> Any:
            # match() gets what was true before the reads, which are over by then
            nonlocal over
            answers.append(look_up(keys, record=False))
            if len(answers) == 2:
                second.side._requests["b"].prefetch.wait(30)
                over = True
            return answers[0] if len(answers) == 2 else answers[-1]

        monkeypatch.setattr(second.side._engine, "lookup", slow)
        second.side.on_new_request(again)
        monkeypatch.setattr(second.side._requests["b"].prefetch, "done", lambda: over)  # not before
        assert second.side.match(again, 0) is None
        assert second.side.match(again, 0) == 3 * T
        assert second.side._requests["b"].fetches == 0
    finally:
        second.close()


def test_what_was_stored_before_a_reset_is_not_found_after_a_restart(tmp_path: Path) -> None:
    """Nor what was stored after it: of updated weights, where the restart loads those of the files.

    This test once asked for the opposite of the latter, and so for KV of other weights.
    """

    def found_after_restart() -> int:
        again = Bench(tmp_path, disk=True)
        try:
            one = request("again", 3)
            again.side.on_new_request(one)
            return again.side._requests["again"].disk_blocks(0, 3)
        finally:
            again.close()

    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    assert found_after_restart() == 3
    second = Bench(tmp_path, disk=True)  # it has seen nothing of what it resets
    second.side.reset()
    second.store(request("updated", 3), [1, 2, 3])
    again = request("updated again", 3)
    second.side.on_new_request(again)
    assert second.side.match(again, 0) == 3 * T  # as long as the process lives
    second.side._engine.flush(30)
    second.close()
    assert found_after_restart() == 0
    (epoch,) = (tmp_path / "disk").glob("epoch-*")
    assert epoch.stat().st_mode & 0o777 == 0o600
    third = Bench(tmp_path, disk=True)
    third.store(request("b", 3), [1, 2, 3])
    third.close()
    assert found_after_restart() == 3
    epoch.write_bytes(b"damaged")
    assert found_after_restart() == 0


def test_tenants_adapters_and_what_a_request_allows(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])

    def match(name: str, **more: Any) -> int | None:
        one = request(name, 3, **more)
        bench.side.on_new_request(one)
        return bench.side.match(one, 0)

    assert match("same") == 3 * T
    assert match("tenant", kv_transfer_params={"kvtier": {"namespace": "t"}}) == 0
    lora = SimpleNamespace(lora_name="l", lora_path="org/l", lora_int_id=1)
    assert match("adapter", lora_request=lora) == 0
    assert match("skipping", skip_reading_prefix_cache=True) == 0
    assert match("little", kv_transfer_params={"kvtier": {"max_load_tokens": 2 * T + 1}}) == 2 * T
    assert match("elsewhere", kv_transfer_params={"kvtier": {"tiers": ["disk"]}}) == 0
    assert match("unknown", kv_transfer_params={"kvtier": {"what": 1}}) == 0


def test_an_adapter_that_cannot_be_read_is_not_cached(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter.safetensors").symlink_to("/proc/self/mem")  # reads of it fail
    adapter = SimpleNamespace(lora_name="l", lora_path=str(tmp_path / "lora"), lora_int_id=1)
    for name in ("a", "b"):
        assert not uses_cache(bench, request(name, 3, lora_request=adapter))
    assert caplog.text.count("its adapter") == 1


def uses_cache(bench: Bench, one: Request) -> bool:
    """Whether a request whose blocks are there, or come into being now, loads or stores any."""
    bench.side.on_new_request(one)
    found = bench.side.match(one, 0)
    _, stores, _ = bench.step({one.request_id: (one.num_tokens, ([1, 2, 3],))})
    bench.execute(stores)
    bench.settle()
    bench.side.finish(one)
    return bool(found or stores)


def test_an_adapter_whose_files_were_replaced_is_not_cached(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"1" * 100)
    one, again = (
        SimpleNamespace(lora_name="l", lora_path=str(tmp_path), lora_int_id=number) for number in (1, 2)
    )
    assert uses_cache(bench, request("a", 3, lora_request=one))
    file.write_bytes(b"2" * 101)  # vLLM goes on with those of before
    for name in ("b", "c"):
        assert not uses_cache(bench, request(name, 3, lora_request=one))
    assert caplog.text.count("have changed") == 1
    loaded = request("d", 3, lora_request=again)
    bench.side.on_new_request(loaded)
    assert bench.side.match(loaded, 0) == 0  # other weights
    bench.side.finish(loaded)
    assert uses_cache(bench, request("e", 3, lora_request=again))


def test_a_request_pins_its_blocks_for_a_time(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    try:
        pinning = {"kvtier": {"pin": 100.0}}
        bench.store(request("a", 3, kv_transfer_params=pinning), [1, 2, 3])
        bench.side.settle()
        assert bench.side._engine.stats().pinned_blocks == 3
        slots = bench.side._engine.stats().host[0].capacity
        for seed in range(1, 2 * slots // 50 + 2):  # twice what the host tier holds
            bench.store(request(f"b{seed}", 50, seed), list(range(1, 51)))
        again = request("c", 3)
        bench.side.on_new_request(again)
        assert bench.side.match(again, 0) == 3 * T
        bench.step()
        bench.now = 99.0
        bench.step()
        bench.side.settle()
        assert bench.side._engine.stats().pinned_blocks == 3
        bench.now = 101.0
        bench.side.settle()
        assert bench.side._engine.stats().pinned_blocks == 0
    finally:
        bench.close()


def test_a_request_says_how_long_its_blocks_live_and_which_go_first(bench: Bench) -> None:
    def store(name: str, blocks: int, seed: int, **wishes: Any) -> None:
        bench.store(request(name, blocks, seed, kv_transfer_params={"kvtier": wishes}), [1] * blocks)

    def found(name: str, blocks: int, seed: int) -> int | None:
        again = request(name, blocks, seed)
        bench.side.on_new_request(again)
        return bench.side.match(again, 0)

    store("short", 3, 1, ttl=0.05)
    store("dear", 3, 2, priority="high")
    store("plain", 3, 3)
    time.sleep(0.1)
    assert found("short again", 3, 1) == 0
    bench.step()
    slots = bench.side._engine.stats().host[0].capacity
    for n in range(slots // 50 + 1):  # once over all slots
        store(f"other {n}", 50, 10 + n)
    assert found("plain again", 3, 3) == 0
    assert found("dear again", 3, 2) == 3 * T


@pytest.mark.parametrize("allowed", [True, False])
def test_an_operator_may_leave_clients_no_priorities(tmp_path: Path, allowed: bool) -> None:
    bench = Bench(tmp_path, client_priority=allowed)
    try:
        wishes = {"kvtier": {"priority": "high"}}
        bench.store(request("dear", 3, 1, kv_transfer_params=wishes), [1, 2, 3])
        slots = bench.side._engine.stats().host[0].capacity
        for n in range(slots // 50 + 1):  # once over all slots
            bench.store(request(f"other {n}", 50, 10 + n), [1] * 50)
        again = request("dear again", 3, 1)
        bench.side.on_new_request(again)
        assert bench.side.match(again, 0) == (3 * T if allowed else 0)
    finally:
        bench.close()


def test_pins_wait_for_the_last_stores_and_end_with_a_reset(bench: Bench) -> None:
    one = request("a", 3, kv_transfer_params={"kvtier": {"pin": 100.0}})
    bench.side.on_new_request(one)
    _, stores, _ = bench.step({"a": (one.num_tokens, ([1, 2, 3],))})
    bench.side.finish(one)
    bench.side.settle()
    assert bench.side._engine.stats().leases == 0
    bench.execute(stores)
    bench.settle()
    bench.side.settle()
    assert bench.side._engine.stats().pinned_blocks == 3
    bench.side.reset()
    assert bench.side._engine.stats().leases == 0


def test_no_more_than_half_of_the_host_tier_is_pinned(bench: Bench) -> None:
    slots = bench.side._engine.stats().host[0].capacity
    for seed in range(slots // 50 + 1):
        one = request(f"a{seed}", 50, seed, kv_transfer_params={"kvtier": {"pin": 100.0}})
        bench.store(one, list(range(1, 51)))
        bench.side.settle()
    assert slots // 2 - 50 < bench.side._engine.stats().pinned_blocks <= slots // 2


def test_a_prefetch_goes_on_without_its_request(tmp_path: Path) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True)
    try:
        sent = request("b", 3, kv_transfer_params={"kvtier": {"prefetch_only": True}})
        second.side.on_new_request(sent)
        state = second.side._requests["b"]
        _, stores, _ = second.step({"b": (sent.num_tokens, ([4, 5, 6],))})
        assert not stores
        second.side.finish(sent)  # its client has gone
        state.prefetch.wait(30)
        assert state.prefetch.ready_blocks() == 3
        later = request("c", 3, kv_transfer_params={"kvtier": {"tiers": ["host"]}})
        second.side.on_new_request(later)
        assert second.side.match(later, 0) == 3 * T
        assert second.side.disk_tokens(later, 3 * T) == 0
    finally:
        second.close()


def store_blocks(bench: Bench, name: str, tokens: int, pages: list[int]) -> None:
    _, stores, _ = bench.step({name: (tokens, (pages,))})
    bench.execute(stores)
    bench.side._stores.poll(bench.now, patience=10)


def test_events_name_what_is_stored_loaded_and_gone(tmp_path: Path) -> None:
    bench = Bench(tmp_path, events=True)
    try:
        one = request("a", 3)
        tokens = one.all_token_ids
        bench.side.on_new_request(one)
        _, stores, _ = bench.step({"a": (2 * T, ([1, 2, 3],))})
        assert bench.side.take_events() == []  # nothing is there yet
        bench.execute(stores)
        bench.side._stores.poll(bench.now, patience=10)
        stored = Stored(one.block_hashes[:2], None, tokens[: 2 * T], T, None, None, "CPU", 0)
        assert bench.side.take_events() == [stored]
        one.num_computed_tokens = 2 * T
        store_blocks(bench, "a", T, [1, 2, 3])
        last = Stored(
            one.block_hashes[2:], one.block_hashes[1], tokens[2 * T : 3 * T], T, None, None, "CPU", 0
        )
        assert bench.side.take_events() == [last]
        bench.side.finish(one)

        again = request("b", 3)
        bench.side.on_new_request(again)
        bench.side.grant(again, ([4, 5, 6],), bench.side.match(again, 0) or 0)
        whole = Stored(one.block_hashes, None, tokens[: 3 * T], T, None, None, "CPU", 0)
        assert bench.side.take_events() == [whole]
        bench.side.received({"b"}, {"b"})  # a rank has failed
        assert bench.side._drops.wait(30)
        (gone,) = bench.side.take_events()
        assert isinstance(gone, Removed)
        assert (sorted(gone.block_hashes), gone.medium) == (sorted(one.block_hashes), "CPU")
        bench.side.reset()
        assert bench.side.take_events() == [Cleared()]
    finally:
        bench.close()


def test_what_is_evicted_is_removed_and_only_that(tmp_path: Path) -> None:
    bench = Bench(tmp_path, events=True)
    there: set[bytes] = set()
    try:
        stored = removed = 0
        requests = 300  # of 3 blocks, in 4 MiB
        for i in range(requests):
            each = request(f"r{i}", 3, seed=i)
            bench.side.on_new_request(each)
            store_blocks(bench, each.request_id, 3 * T, [1, 2, 3])
            bench.side.finish(each)
            for event in bench.side.take_events():
                if isinstance(event, Stored):
                    stored += len(event.block_hashes)
                    there |= set(event.block_hashes)
                else:
                    assert isinstance(event, Removed)
                    assert event.medium == "CPU"
                    removed += len(event.block_hashes)
                    there -= set(event.block_hashes)
        assert removed == bench.side._engine.stats().evictions > 0
        assert len(there) == stored - removed > 0
        for i in (0, requests - 1):  # what was told is so
            again = request(f"again{i}", 3, seed=i)
            bench.side.on_new_request(again)
            assert bool(bench.side.match(again, 0)) == (again.block_hashes[0] in there)
            bench.side.finish(again)
    finally:
        bench.close()


def test_a_block_of_both_tiers_is_told_of_in_both(tmp_path: Path) -> None:
    bench = Bench(tmp_path, disk=True, events=True)
    try:
        one = request("a", 3)
        bench.side.on_new_request(one)
        store_blocks(bench, "a", 3 * T, [1, 2, 3])
        assert bench.side._engine.flush(30).durable == 3
        events = bench.side.take_events()
        for medium in ("CPU", "STORAGE"):
            told = [e for e in events if isinstance(e, Stored) and e.medium == medium]
            assert [h for e in told for h in e.block_hashes] == one.block_hashes
            assert [t for e in told for t in e.token_ids] == list(one.all_token_ids[: 3 * T])
    finally:
        bench.close()


def test_events_that_were_lost_take_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.adapters.vllm.scheduler._EVENTS", 2)
    bench = Bench(tmp_path, events=True)
    try:
        one = request("a", 3)
        bench.side.on_new_request(one)
        store_blocks(bench, "a", 3 * T, [1, 2, 3])
        # The one of the last block, of which nobody heard, is not told; the others are still there.
        stored = Stored(one.block_hashes[:2], None, one.all_token_ids[: 2 * T], T, None, None, "CPU", 0)
        assert bench.side.take_events() == [stored]
        other = request("b", 3, seed=1)
        bench.side.on_new_request(other)
        store_blocks(bench, "b", 3 * T, [4, 5, 6])
        removed, stored = bench.side.take_events()
        assert removed == Removed(one.block_hashes[:2], "CPU", 0)
        assert isinstance(stored, Stored)
        assert stored.block_hashes == other.block_hashes[:2]
        assert len(bench.side._events._known) == 2
    finally:
        bench.close()


def test_what_came_before_a_reset_is_not_told_after_it(tmp_path: Path) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True, events=True)
    try:
        one = request("b", 3)
        second.side.on_new_request(one)
        second.side._requests["b"].prefetch.wait(30)  # they came into host memory, and nobody has heard of it
        second.side.finish(one)
        second.side.reset()
        again = request("c", 3)
        second.side.on_new_request(again)
        _, stores, _ = second.step({"c": (again.num_tokens, ([1, 2, 3],))})
        assert second.side.take_events() == [Cleared()]  # those of now are only about to come
        second.execute(stores)
        second.side._stores.poll(second.now, patience=10)
        told = [event for event in second.side.take_events() if isinstance(event, Stored)]
        assert [event.block_hashes for event in told if event.medium == "CPU"] == [again.block_hashes]
    finally:
        second.close()


def heard_of(log: EventLog, key: Any, *told: tuple[EventKind, Tier]) -> list[Any]:
    """What the log makes of events of one block."""
    n = len(told)
    kinds, tiers = (np.array(each, np.uint8) for each in zip(*told, strict=True))
    log.heard(Events(np.tile(key, (n, 1)), np.zeros(n, np.uint16), tiers, kinds, lost=0))
    return list(log.take())


def test_a_store_in_flight_is_told_though_the_block_leaves_another_tier_meanwhile() -> None:
    log = EventLog(T, T, [0])
    one = request("a", 1)
    keys = np.ones((1, 32), np.uint8)
    blocks = log.watch(one, 0, keys, np.ones(1, np.bool_), 0)
    assert heard_of(log, keys[0], (EventKind.EVICTED, Tier.DISK)) == []  # never announced there
    (stored,) = heard_of(log, keys[0], (EventKind.STORED, Tier.HOST))
    assert (stored.block_hashes, stored.medium) == (one.block_hashes, "CPU")
    log.forget(blocks, keys)
    assert heard_of(log, keys[0], (EventKind.EVICTED, Tier.HOST)) == [Removed(one.block_hashes, "CPU", 0)]


def test_what_one_store_does_not_bring_another_may() -> None:
    log = EventLog(T, T, [0])
    one = request("a", 1)
    keys = np.ones((1, 32), np.uint8)
    first = log.watch(one, 0, keys, np.zeros(1, np.bool_), 0)  # of another request, which came later
    second = log.watch(one, 0, keys, np.ones(1, np.bool_), 0)
    log.forget(first, keys)
    assert len(heard_of(log, keys[0], (EventKind.STORED, Tier.HOST))) == 1
    log.forget(second, keys)
    assert len(heard_of(log, keys[0], (EventKind.DROPPED, Tier.HOST))) == 1


def test_an_event_says_what_hashes_cover_besides_tokens_and_whose_session_it_was() -> None:
    def salted(_: Any, first: int, last: int, tokens: int) -> list[Any]:
        assert tokens == T
        return [("salt",) if n == 0 else None for n in range(first, last)]

    log = EventLog(T, T, [0], salted)
    one = request("a", 4)
    one.session_id = "session"
    keys = np.arange(4 * 32, dtype=np.uint8).reshape(4, 32)
    log.loaded(one, 0, keys[:2], np.zeros(2, np.bool_), 0)
    log.loaded(one, 2, keys[2:], np.zeros(2, np.bool_), 0)
    (told,) = log.take()
    assert isinstance(told, Stored)
    assert (told.block_hashes, told.session_id) == (one.block_hashes, "session")
    assert told.extra_keys == [("salt",), None, None, None]
    log.loaded(request("b", 4, seed=1), 0, keys[:2], np.ones(2, np.bool_), 0)
    assert {each.session_id for each in log.take()} == {None}


def test_blocks_on_disk_alone_are_announced_when_they_are_loaded(tmp_path: Path) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True, events=True)
    try:
        again = request("b", 3)
        second.side.on_new_request(again)
        second.side._requests["b"].prefetch.wait(30)
        second.side.grant(again, ([4, 5, 6],), second.side.match(again, 0) or 0)
        events = second.side.take_events()
        assert [(e.block_hashes, e.medium) for e in events if isinstance(e, Stored)] == [
            (again.block_hashes, "STORAGE"),
            (again.block_hashes, "CPU"),
        ]
    finally:
        second.close()


def test_blocks_that_are_being_stored_are_waited_for_at_most_as_long_as_they_take(bench: Bench) -> None:
    bench.step(total=1000)
    bench.now = 1.0  # 1000 tokens a second
    bench.side.step_ended()
    storing = request("a", 100)
    bench.side.on_new_request(storing)
    _, stores, _ = bench.step({"a": (storing.num_tokens, ([1 + n % 60 for n in range(100)],))})
    waiting = request("b", 100)
    bench.side.on_new_request(waiting)
    bench.now = 10.0
    assert bench.side.match(waiting, 0) is None
    bench.now = 10.39
    assert bench.side.match(waiting, 0) is None
    bench.now = 10.41  # 400 tokens take 0.4 s
    assert bench.side.match(waiting, 0) == 0
    bench.execute(stores)
    bench.settle()
    assert bench.side.match(waiting, 0) == 100 * T


def test_before_anything_was_measured_a_request_waits_two_seconds_at_most(bench: Bench) -> None:
    storing = request("a", 5)
    bench.side.on_new_request(storing)
    _, stores, _ = bench.step({"a": (storing.num_tokens, ([1, 2, 3, 4, 5],))})
    waiting = request("b", 5)
    bench.side.on_new_request(waiting)
    asked = []
    for now in (10.0, 11.99, 12.01):
        bench.now = now
        asked.append(bench.side.match(waiting, 0))
    assert asked == [None, None, 0]
    bench.execute(stores)
    bench.settle()


def test_hits_and_misses_by_cause_add_up_to_lookups(bench: Bench) -> None:
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    longer = request("b", 9)  # the same five blocks, and four more
    longer.block_hashes[:5] = request("a", 5).block_hashes
    bench.side.on_new_request(longer)
    assert bench.side.match(longer, 0) == 5 * T
    _, stores, _ = bench.step({"b": (longer.num_tokens, ([*range(1, 10)],))})
    bench.side.finish(longer)
    third = request("c", 12)  # those nine, of which four are being stored, and three more
    third.block_hashes[:9] = longer.block_hashes
    bench.side.on_new_request(third)
    bench.now += 100.0
    bench.side.match(third, 0)
    bench.now += 100.0
    bench.side.match(third, 0)
    counted = bench.side.counters.take()
    causes = (
        "hit_tokens_host",
        "hit_tokens_disk",
        "miss_tokens_absent",
        "miss_tokens_pending",
        "left_tokens",
    )
    parts = {name: int(counted.get(name, 0)) for name in (*causes, "left_tokens")}
    assert sum(parts.values()) == counted["lookup_tokens"]
    assert min(parts["miss_tokens_pending"], parts["miss_tokens_absent"], parts["hit_tokens_host"]) > 0
    bench.execute(stores)
    bench.settle()


def measure(bench: Bench, seconds_per_token: float, bytes_per_second: float) -> None:
    """Gives the planner rates: of the server's steps, and of the hop to the device."""
    for begin in range(0, 6000, 1000):
        bench.side._planner.observe_prefill(1000, pairs(begin, begin + 1000), 1000 * seconds_per_token)
    hop = HopStats(
        transfers=9,
        bytes=9,
        seconds=1.0,
        running_bytes=0,
        latency_seconds=0.0,
        bytes_per_second=bytes_per_second,
    )
    bench.side._planner._hops = lambda: Hops(to_device=hop, from_disk=hop)


def test_a_hit_that_is_faster_to_compute_is_left(bench: Bench) -> None:
    bench.store(request("a", 50), list(range(1, 51)))
    again = request("b", 50)
    bench.side.on_new_request(again)
    assert bench.side.match(again, 0) == 50 * T  # nothing was measured yet
    bench.side.grant(again, (), 0)
    measure(bench, seconds_per_token=1e-6, bytes_per_second=50 * T * D * 2)  # all of it takes a second
    bench.side.counters.take()
    for _ in range(3):  # vLLM may ask more than once
        assert bench.side.match(again, 0) == 0
    bench.side.grant(again, (), 0)
    counted = bench.side.counters.take()
    assert counted["left_tokens"] == counted["lookup_tokens"] == 3 * 50 * T
    assert {name: n for name, n in counted.items() if name.startswith("chose_")} == {"chose_none": 1}
    stats = bench.side._planner.stats()
    assert (stats.decisions, stats.chose_none, stats.blocks_left) == (1, 1, 50)
    bench.step()
    assert not bench.side._leased


def test_a_hit_that_is_faster_to_load_is_loaded_and_timed(bench: Bench) -> None:
    bench.store(request("a", 5), [1, 2, 3, 4, 5])
    measure(bench, seconds_per_token=0.059, bytes_per_second=5 * T * D * 2)
    again = request("b", 5)
    bench.side.on_new_request(again)
    assert bench.side.match(again, 0) == 5 * T
    bench.side.grant(again, ([11, 12, 13, 14, 15, 16],), 5 * T)
    ((_, copies),), _, _ = bench.step()
    bench.execute(copies)
    bench.now += 1.25
    bench.side.received({"b"}, set())
    stats = bench.side._planner.stats()
    assert (stats.chose_all, stats.blocks_loaded, stats.settled) == (1, 5, 1)
    assert bench.side.counters.take()["chose_all"] == 1
    assert (stats.predicted_seconds, stats.observed_seconds) == (pytest.approx(1.0), 1.25)


def test_with_load_always_whatever_is_found_is_loaded(tmp_path: Path) -> None:
    bench = Bench(tmp_path, load="always")
    bench.store(request("a", 50), list(range(1, 51)))
    measure(bench, seconds_per_token=1e-6, bytes_per_second=1.0)
    again = request("b", 50)
    bench.side.on_new_request(again)
    assert bench.side.match(again, 0) == 50 * T
    bench.close()


def test_a_slow_disk_is_not_waited_for(tmp_path: Path) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 50), list(range(1, 51)))
    first.close()
    second = Bench(tmp_path, disk=True)
    try:
        measure(second, seconds_per_token=1e-6, bytes_per_second=50 * T * D * 2)
        again = request("b", 50)
        second.side.on_new_request(again)
        assert second.side.match(again, 0) == 0  # and not: ask again
        assert "ask_again" not in second.side.counters.take()
    finally:
        second.close()


def test_what_a_step_computes_is_learned_with_its_position(bench: Bench) -> None:
    for n in range(4):
        one = request(f"r{n}", 30, seed=n)
        one.num_computed_tokens = 1000 * n
        bench.side.on_new_request(one)
        bench.step({one.request_id: (100, ([1 + k % 60 for k in range(30)],))})
        bench.now += 1.0 + n
        bench.side.step_ended()
    prefill = bench.side._planner.prefill
    assert prefill is not None
    assert prefill.per_pair == pytest.approx(1e-5, rel=0.05)  # a second more for 100 x 1000 pairs more


def test_prompts_only(tmp_path: Path) -> None:
    bench = Bench(tmp_path, store="prompt")
    one = request("a", 4)
    one.num_prompt_tokens = 2 * T + 3
    bench.side.on_new_request(one)
    _, stores, _ = bench.step({"a": (one.num_tokens, ([1, 2, 3, 4],))})
    assert [ids.tolist() for _, ids in stores] == [[1, 2]]
    bench.execute(stores)
    bench.settle()
    bench.close()


def test_a_window_loads_only_what_it_reaches(tmp_path: Path) -> None:
    bench = Bench(tmp_path, window=2 * T)
    bench.store(request("a", 6), [1, 2, 3, 4, 5, 6])
    again = request("b", 6)
    bench.side.on_new_request(again)
    assert bench.side.match(again, 0) == 6 * T
    # vLLM gives the null block for what the window has left behind.
    bench.side.grant(again, ([11, 12, 13, 14, 15, 16], [0, 0, 0, 0, 21, 22]), 6 * T)
    ((_, copies),), _, _ = bench.step()
    assert [ids.tolist() for _, ids in copies] == [[11, 12, 13, 14, 15, 16], [21, 22]]
    bench.execute(copies)
    assert [int(bench.tensors[1][0][page, 0, 0]) for page in (21, 22)] == [5, 6]
    assert not bench.tensors[1][0][0].any()
    bench.side.received({"b"}, set())
    bench.close()


def test_a_window_stores_from_its_first_kept_block_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, window=2 * T)
    one = request("a", 6)
    bench.side.on_new_request(one)
    # Of a prompt computed in one step the window keeps its end alone.
    _, stores, _ = bench.step({"a": (one.num_tokens, ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 5, 6]))})
    assert [(i.group, i.first_block, i.num_blocks) for i, _ in stores] == [(0, 0, 6), (1, 4, 2)]
    bench.execute(stores)
    bench.settle()
    again = request("b", 6)
    bench.side.on_new_request(again)
    assert bench.side.match(again, 0) == 6 * T
    bench.side.grant(again, ([11, 12, 13, 14, 15, 16], [0, 0, 0, 0, 21, 22]), 6 * T)
    ((_, copies),), _, _ = bench.step()
    assert [(i.group, i.first_block, i.num_blocks) for i, _ in copies] == [(0, 0, 6), (1, 4, 2)]
    bench.execute(copies)
    bench.side.received({"b"}, set())
    bench.close()


def lose_worker(bench: Bench) -> None:
    bench.worker.close(10)
    deadline = time.monotonic() + 10
    while bench.side._keeper.workers() != [None]:  # the keeper hears of it a moment later
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_nothing_is_promised_while_a_rank_is_missing(tmp_path: Path) -> None:
    first = Bench(tmp_path, disk=True)
    first.store(request("a", 3), [1, 2, 3])
    first.close()
    second = Bench(tmp_path, disk=True)
    try:
        second.store(request("in memory", 3, seed=1), [1, 2, 3])
        lose_worker(second)
        for seed in (0, 1):
            one = request(f"b{seed}", 3, seed=seed)
            second.side.on_new_request(one)
            assert second.side._requests[one.request_id].prefetch is None
            assert second.side.match(one, 0) == 0
        assert second.side.counters.take().get("ask_again", 0) == 0
        assert second.side._engine.stats().leases == 0
        second.worker = Worker(tmp_path / "meet", 0, second.worker.config)
        second.worker.join(10)
        for seed in (0, 1):
            one = request(f"c{seed}", 3, seed=seed)
            second.side.on_new_request(one)
            if (prefetch := second.side._requests[one.request_id].prefetch) is not None:
                prefetch.wait(30)
            assert second.side.match(one, 0) == 3 * T
    finally:
        second.close()


def test_blocks_whose_load_no_rank_was_given_are_not_dropped(bench: Bench) -> None:
    bench.store(request("a", 3), [1, 2, 3])
    again = request("b", 3)
    bench.side.on_new_request(again)
    found = bench.side.match(again, 0)
    assert found == 3 * T
    lose_worker(bench)  # between the promise and the grant
    bench.side.grant(again, ([4, 5, 6],), found)
    ((_, ((instruction, _),)),), _, _ = bench.step()
    assert instruction.grant == 0
    bench.side.received({"b"}, {"b"})
    assert bench.side.counters.take()["load_failures"] == 1
    assert bench.side.match(again, 0) == 0  # of this request no load is tried again
    assert bench.side._drops.wait(30)
    assert bench.side._engine.stats().host[0].ready == 3
    bench.side.settle()
    assert bench.pool.references == {}


def test_ranks_that_do_not_come_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvtier.adapters.vllm.scheduler._JOIN_SECONDS", 0.05)
    layout = KVLayout(2, 1, D, "uint8", T, "TD", num_parts=1)
    config = Config(groups=[layout], host="4MiB", model="m@1", block_tokens=T, world_size=3)
    plan = CachePlan((CacheGroup(0, layout, (), 1),), T, T, 0)
    side = SchedulerSide(config, plan, Options(host=4 << 20), str(tmp_path / "meet"))
    worker = Worker(tmp_path / "meet", 1, config)
    try:
        worker.join(10)
        deadline = time.monotonic() + 10
        while "a rank is missing" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        worker.close(10)
        side.close()
    assert caplog.text.count("have not joined") == 1
    assert "ranks [0, 2]" in caplog.text


def test_a_request_keeps_nothing_when_no_slot_is_free(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    one = request("a", 3)
    bench.side.on_new_request(one)
    lose_worker(bench)  # nobody could carry a store out: all is declined
    _, stores, _ = bench.step({"a": (one.num_tokens, ([1, 2, 3],))})
    assert (stores, bench.pool.references) == ([], {})
    assert bench.side.counters.take()["store_blocks_declined"] == 3
    bench.close()


def test_folders_of_killed_servers_are_swept_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = meeting_place(str(tmp_path), "engine")
    assert place == meeting_place(str(tmp_path), "engine") != meeting_place(str(tmp_path), "another")
    living = Bench(tmp_path)
    kept = [tmp_path / "meet"]
    kept[0] = kept[0].rename(meeting_place(str(tmp_path), "living"))
    for name in ("dead", "young", "strange"):
        folder = meeting_place(str(tmp_path), name)
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as ended:
            monkeypatch.chdir(folder)  # sockets' paths are short
            ended.bind("keeper.sock")
        (folder / "keeper.lock").touch()
        kept.append(folder)
    dead = kept.pop(1)
    (meeting_place(str(tmp_path), "strange") / "mine").touch()
    for folder in [dead, kept[0], kept[2]]:
        os.utime(folder, (0, 0))
    sweep(place)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert (kept[0] / "keeper.sock").exists()
    kept[0].rename(tmp_path / "meet")
    living.close()


def test_closing_leaves_nothing_where_keeper_and_workers_met(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert (tmp_path / "meet").is_dir()
    bench.close()
    assert list(tmp_path.iterdir()) == []
    bench.side.close()
