"""Engine against ReferenceCache: random calls on both, and after every step both must agree on everything.

What is compared: every outcome, every byte that a load delivers (into poisoned pages, of which nothing else
may change), the state of every block that was ever named, all counters, slots by state (I1, I2), pins (I4),
leases. Since the set of resident blocks is compared after each step, the order of evictions is predicted
exactly.

Once on the CPU device, and once on the simulated device under a drawn seed. There copies can be held back, so
that stores and loads overlap with drops, pins, evictions and each other, and the end may be a device that
dies or a close() that finds copies running.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import kvtier
from kvtier import testing
from kvtier.reference import ReferenceLease, ReferenceOperation

BLOCK_TOKENS = 4
POISON = 0xEE
PAGES_PER_CALL = 12  # enough for the longest call; calls that overlap have pages of their own
MAX_RUNNING = 5
PATIENCE = 60.0
MODEL = "model@1"
STICKY = 700  # cudaErrorIllegalAddress

# Block numbers of each sequence. Equal beginnings are shared prefixes.
SEQUENCES = ([0, 1, 2, 3], [0, 1, 4, 5, 6], [0, 7, 8], [9, 10])
NAMESPACES = ("", "tenant")


def make_config(shape: str, blocks: int) -> kvtier.Config:
    """Full attention with blocks of two pages, and a window of two blocks with pages of two blocks."""
    head_dim = {"shared": 4, "apart": 1024}[shape]  # slots of one size class, or of two
    full = kvtier.KVLayout(2, 2, 4, "uint8", 2, name="full")
    window = kvtier.KVLayout(1, 1, head_dim, "uint8", 8, page_order="KHTD", window_tokens=6, name="window")
    strides = {"shared": 2 * 8192, "apart": 8192 + 12288}[shape]
    return kvtier.Config(
        groups=[full, window],
        block_tokens=BLOCK_TOKENS,
        model=MODEL,
        host=blocks * strides,
        copy_threads=1,
        eviction="lru",  # which ReferenceCache predicts
    )


def keys_of_sequence(config: kvtier.Config, namespace: str, blocks: Sequence[int]) -> list[bytes]:
    tokens = np.repeat(np.asarray(blocks, np.int32), BLOCK_TOKENS)
    return [key.tobytes() for key in kvtier.block_keys(tokens, config, namespace)]


class PageSet:
    """A framework's tensors of one group, one per layer, on one device."""

    def __init__(
        self,
        engine: kvtier.Engine,
        group: int,
        simulated: testing.SimulatedDevice | None,
        faulty: testing.TestDevice,
    ) -> None:
        self.layout = engine.config.groups[group]
        extents = {
            "K": 2,
            "T": self.layout.page_tokens,
            "H": self.layout.num_kv_heads,
            "D": self.layout.head_dim,
        }
        self._token_axis = self.layout.page_order.index("T")
        self._shape = (
            2 * PAGES_PER_CALL * MAX_RUNNING,
            *(extents[letter] for letter in self.layout.page_order),
        )
        self._simulated = simulated
        self.tensors: list[Any]
        if simulated is not None:
            self.tensors = [simulated.empty(self._shape, np.uint8) for _ in range(self.layout.num_layers)]
        else:
            self.tensors = [np.zeros(self._shape, np.uint8) for _ in range(self.layout.num_layers)]
        self.pages = engine.attach(self.tensors, group, device=faulty)

    def page_ids(self, call: int, stream: int, first_block: int, num_blocks: int) -> list[int]:
        """Pages that no other running call uses, nor the kernels of another stream."""
        each = self.layout.pages_per_block(BLOCK_TOKENS)
        shared = self.layout.blocks_per_page(BLOCK_TOKENS)
        first = (2 * call + stream) * PAGES_PER_CALL
        if shared > 1:
            return [first + (first_block % shared + i) // shared for i in range(num_blocks)]
        return list(range(first, first + num_blocks * each))

    def _parts(self, views: Sequence[Any], page_ids: Sequence[int], first_block: int, i: int) -> list[Any]:
        """Views of block i of a call, in the order of its content."""
        each = self.layout.pages_per_block(BLOCK_TOKENS)
        parts = [view[page] for view in views for page in page_ids[i * each : (i + 1) * each]]
        shared = self.layout.blocks_per_page(BLOCK_TOKENS)
        if shared > 1:
            begin = (first_block + i) % shared * BLOCK_TOKENS
            cut = (slice(None),) * self._token_axis + (slice(begin, begin + BLOCK_TOKENS),)
            parts = [part[cut] for part in parts]
        return parts

    def _fill(
        self,
        views: Sequence[Any],
        page_ids: Sequence[int],
        first_block: int,
        contents: Sequence[bytes | None],
    ):
        for i, content in enumerate(contents):
            at = 0
            for part in self._parts(views, page_ids, first_block, i) if content is not None else ():
                part[...] = np.frombuffer(content, np.uint8, part.size, at).reshape(part.shape)
                at += part.size

    def _run(self, kernel: Callable[..., None], stream: Any) -> None:
        if self._simulated is not None:
            self._simulated.launch(kernel, *self.tensors, stream=stream)
        else:
            kernel(*self.tensors)

    def write(
        self, page_ids: Sequence[int], first_block: int, contents: Sequence[bytes], stream: Any
    ) -> None:
        self._run(lambda *views: self._fill(views, page_ids, first_block, contents), stream)

    def poison(self, page_ids: Sequence[int], stream: Any) -> None:
        def kernel(*views: Any) -> None:
            for view in views:
                view[page_ids] = POISON

        self._run(kernel, stream)

    def check(
        self, page_ids: Sequence[int], first_block: int, contents: Sequence[bytes | None], stream: Any
    ) -> None:
        """The pages hold these contents, and poison where there is none."""
        seen = [np.zeros(self._shape, np.uint8) for _ in self.tensors]
        wanted = [np.full(self._shape, POISON, np.uint8) for _ in self.tensors]
        self._fill(wanted, page_ids, first_block, contents)

        def kernel(*views: Any) -> None:
            for to, view in zip(seen, views, strict=True):
                np.copyto(to, view)

        self._run(kernel, stream)
        if self._simulated is not None:
            self._simulated.synchronize(stream)
        for layer, (have, want) in enumerate(zip(seen, wanted, strict=True)):
            np.testing.assert_array_equal(have[page_ids], want[page_ids], err_msg=f"layer {layer}")


@dataclass(frozen=True)
class Call:
    """Blocks [begin, end) of a sequence."""

    namespace: int
    sequence: int
    begin: int
    end: int


RECENT = (0, 1, 2)  # the blocks that were stored last, or before that: without them hits would be rare
CALLS = [
    Call(namespace, sequence, begin, end)
    for namespace in (0, 0, 0, 1)
    for sequence, blocks in enumerate(SEQUENCES)
    for begin, end in (
        (0, len(blocks)),
        (0, len(blocks)),
        (0, len(blocks) - 1),
        (0, 2),
        (0, 1),
        (1, len(blocks)),
        (len(blocks) - 1, len(blocks)),
        (1, 1),
    )
]
calls: st.SearchStrategy[Call | int] = st.sampled_from([*CALLS, *RECENT * (len(CALLS) // 3)])
groups = st.integers(0, 1)


@dataclass(frozen=True)
class Running:
    """A ticket and what the model says about it."""

    ticket: kvtier.StoreTicket | kvtier.LoadTicket
    operation: ReferenceOperation
    failed: bool
    check_pages: Callable[[list[bytes | None]], None] | None = None


@dataclass(frozen=True)
class Leased:
    """A lease and what the model says about it."""

    lease: kvtier.Lease
    expected: ReferenceLease
    keys: list[bytes]
    begin: int


class EngineModel(RuleBasedStateMachine):
    """The rules. What differs between the devices is in the two classes below."""

    simulates = False

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        shape=st.sampled_from(["shared", "apart"]),
        blocks=st.sampled_from([1, 2, 2, 3, 4, 5]),
        end=st.sampled_from(["close", "close", "sticky"]),
    )
    def open(self, seed: int, shape: str, blocks: int, end: str) -> None:
        self.config = make_config(shape, blocks)
        self.clock = testing.ManualClock()
        self.engine = kvtier.Engine(self.config, clock=self.clock, hash_seed=seed)
        self.model = testing.ReferenceCache.for_config(self.config)
        self.plan = testing.FaultPlan()
        self.simulated = testing.SimulatedDevice(seed) if self.simulates else None
        self.streams: list[Any] = (
            [None, self.simulated.stream()] if self.simulated is not None else [None, None]
        )
        faulty = testing.faulty_device(self.simulated or testing.cpu_device(1), self.plan)
        self.page_sets = [PageSet(self.engine, group, self.simulated, faulty) for group in range(2)]
        self.engine.wait_until_whole()  # no copy is pageable then, so none waits while it is submitted
        self.keys = [[keys_of_sequence(self.config, ns, blocks) for blocks in SEQUENCES] for ns in NAMESPACES]
        self.all_keys = list(dict.fromkeys(key for of_ns in self.keys for of_seq in of_ns for key in of_seq))
        self.end = end
        self.held = False
        self.running: list[Running] = []
        self.leases: list[Leased] = []
        self.contents_made = 0
        self.stored = [CALLS[0]] * len(RECENT)

    # --- what the rules share ---

    def chosen(self, call: Call | int) -> Call:
        return self.stored[call] if isinstance(call, int) else call

    def keys_of(self, call: Call) -> list[bytes]:
        return self.keys[call.namespace][call.sequence][call.begin : call.end]

    def new_contents(self, group: int, count: int) -> list[bytes]:
        """Content that was never stored before, so that no stale byte looks right."""
        size = self.config.groups[group].block_bytes(BLOCK_TOKENS)
        self.contents_made += count
        first = self.contents_made
        return [
            np.random.default_rng(first + i).integers(0, 256, size, np.uint8).tobytes() for i in range(count)
        ]

    def settle(self, running: Running) -> None:
        """Waits for a ticket, ends the model's operation and compares."""
        running.ticket.wait(PATIENCE)
        result = running.ticket.result()
        outcomes = running.operation.finish(failed=running.failed)
        assert [kvtier.BlockOutcome(x).name.lower() for x in result.outcomes] == outcomes
        assert (result.error is None) == (not running.failed or not running.operation.has_copies)
        if isinstance(result, kvtier.StoreResult):
            running.ticket.released.wait(PATIENCE)
            for name in ("stored", "present", "pending", "declined", "failed", "dropped"):
                assert getattr(result, name) == outcomes.count(name)
        else:
            valid = next((i for i, outcome in enumerate(outcomes) if outcome != "loaded"), len(outcomes))
            assert (result.valid_blocks, result.valid_tokens) == (valid, valid * BLOCK_TOKENS)
        if running.check_pages is not None:
            running.check_pages(running.operation.contents)

    def add(self, running: Running) -> None:
        if self.held:
            self.running.append(running)
        else:
            self.settle(running)

    def let_go(self) -> None:
        self.held = False
        if self.simulated is not None:
            self.simulated.release()
        while self.running:
            self.settle(self.running.pop(0))

    def fault_strikes(self, fault: str | None, operation: ReferenceOperation) -> bool:
        struck = self.plan.injected > 0
        self.plan.reset()
        assert struck == (fault is not None and operation.has_copies)
        return struck

    def plan_fault(self, fault: str | None) -> str | None:
        self.plan.reset()
        # While copies are held waiters may be making these calls, too; copies are only ever submitted by us.
        if fault is not None and (fault == "copy" or not self.held):
            self.plan.fail(1, call=fault)
            return fault
        return None

    # --- rules ---

    faults = st.sampled_from([*[None] * 9, "copy", "record", "create_event"])
    running_is_few = precondition(lambda self: len(self.running) < MAX_RUNNING - 1)  # a store may need two

    def _store(
        self,
        call: Call | int,
        into: tuple[int, ...],
        linked: bool,
        stream: int,
        fault: str | None,
        priority: str | None,
        ttl: float | None,
    ) -> None:
        chosen = self.chosen(call)
        self.stored = [chosen, *self.stored[:-1]]
        for group in into:
            self.store_one(chosen, group, linked, stream, fault, priority, ttl)

    store_arguments: ClassVar[dict[str, Any]] = {
        "call": calls,
        "into": st.sampled_from([(0, 1), (0, 1), (1, 0), (0,), (1,)]),
        "linked": st.booleans(),
        "stream": st.integers(0, 1),
        "fault": faults,
        "priority": st.sampled_from([None, None, None, "low", "normal", "high"]),
        "ttl": st.sampled_from([None, None, None, 0.0, 1.0, 2.0]),
    }
    # Three times, for rules are chosen alike often, and without pressure nothing is evicted.
    store = running_is_few(rule(**store_arguments)(_store))
    store_more = running_is_few(rule(**store_arguments)(_store))
    store_yet_more = running_is_few(rule(**store_arguments)(_store))

    def store_one(
        self,
        call: Call,
        group: int,
        linked: bool,
        stream: int,
        fault: str | None,
        priority: str | None,
        ttl: float | None,
    ) -> None:
        keys = self.keys_of(call)
        contents = self.new_contents(group, len(keys))
        namespace = NAMESPACES[call.namespace]
        parent = (
            self.keys[call.namespace][call.sequence][call.begin - 1] if linked and call.begin > 0 else None
        )
        page_set = self.page_sets[group]
        page_ids = page_set.page_ids(len(self.running), stream, call.begin, len(keys))
        page_set.write(page_ids, call.begin, contents, self.streams[stream])
        fault = self.plan_fault(fault)
        ticket = self.engine.store(
            keys,
            page_set.pages,
            page_ids,
            stream=self.streams[stream],
            first_block=call.begin,
            parent=parent,
            namespace=namespace,
            priority=priority,
            ttl=ttl,
        )
        operation = self.model.begin_store(
            keys,
            contents,
            group=group,
            parent=parent,
            namespace=namespace,
            priority=priority,
            ttl_us=None if ttl is None else int(ttl * 1e6),
        )
        self.add(Running(ticket, operation, self.fault_strikes(fault, operation)))

    @running_is_few
    @rule(
        call=calls,
        what=st.sampled_from(["keys", "keys", "match", "lease"]),
        stream=st.integers(0, 1),
        behind_stream=st.booleans(),
        layers=st.sampled_from([None, None, 1, 2]),
        fault=faults,
        group=groups,
        data=st.data(),
    )
    def load(
        self,
        call: Call | int,
        what: str,
        stream: int,
        behind_stream: bool,
        layers: int | None,
        fault: str | None,
        group: int,
        data: st.DataObject,
    ) -> None:
        call = self.chosen(call)
        keys, begin = self.keys_of(call), call.begin
        target: Any = keys
        if what == "lease" and self.leases:
            leased = data.draw(st.sampled_from(self.leases))
            target, keys, begin = leased.lease, leased.keys[: leased.expected.num_blocks], leased.begin
        elif what == "match":
            target = self.engine.lookup(keys)
            keys = keys[: self.model.lookup(keys).ready_blocks]
        page_set, handle = self.page_sets[group], self.streams[stream]
        page_ids = page_set.page_ids(len(self.running), stream, begin, len(keys))
        page_set.poison(page_ids, handle)
        fault = self.plan_fault(fault)
        operation = self.model.begin_load(keys, group=group)

        def load() -> kvtier.LoadTicket:
            return self.engine.load(
                target, page_set.pages, page_ids, stream=handle, first_block=begin, layers_per_batch=layers
            )

        if layers is not None and any(outcome != "running" for outcome in operation.outcomes):
            with pytest.raises(kvtier.UnsupportedError):
                load()
            operation.finish(failed=True)
            self.plan.reset()
            return

        ticket = load()
        failed = self.fault_strikes(fault, operation)

        def check_pages(contents: list[bytes | None]) -> None:
            if not failed:
                page_set.check(page_ids, begin, contents, handle)

        if behind_stream and not failed and not self.held:
            # Nobody on the host waits for the copies: the stream alone puts the reading kernel behind them.
            ticket.wait_stream(handle)
            resident = self.model.resident()
            check_pages([resident.get((key, group)) for key in keys])
        self.add(Running(ticket, operation, failed, check_pages))

    @rule(call=calls)
    def lookup(self, call: Call | int) -> None:
        call = self.chosen(call)
        keys = self.keys_of(call)
        match, expected = self.engine.lookup(keys), self.model.lookup(keys)
        assert (match.ready_blocks, match.ready_tokens) == (
            expected.ready_blocks,
            expected.ready_blocks * BLOCK_TOKENS,
        )

    @precondition(lambda self: len(self.leases) < 4)
    @rule(call=calls, ttl=st.sampled_from([None, 0.0, 1.0]), data=st.data())
    def pin(self, call: Call | int, ttl: float | None, data: st.DataObject) -> None:
        call = self.chosen(call)
        keys = self.keys_of(call)
        match, expected = self.engine.lookup(keys), self.model.lookup(keys)
        if data.draw(st.booleans(), label="drop in between"):
            assert self.engine.drop(keys[-1:]) == self.model.drop(keys[-1:])
        lease = match.pin(ttl)
        ttl_us = None if ttl is None else int(ttl * 1e6)
        expected_lease = self.model.pin(keys, expected.ready_blocks, ttl_us)
        assert lease.num_blocks == expected_lease.num_blocks
        self.leases.append(Leased(lease, expected_lease, keys, call.begin))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release_lease(self, data: st.DataObject) -> None:
        leased = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        leased.lease.release()
        leased.expected.release()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def ask_lease(self, data: st.DataObject) -> None:
        leased = data.draw(st.sampled_from(self.leases))
        self.model.poll()  # the engine looks at the clock when it is asked
        assert leased.lease.active == leased.expected.active

    @rule(us=st.sampled_from([400_000, 1_000_000]), poll=st.booleans())
    def time_passes(self, us: int, poll: bool) -> None:
        self.clock.advance_us(us)
        self.model.now_us += us
        if poll:
            self.engine.poll()
            self.model.poll()

    @rule(call=calls)
    def touch(self, call: Call | int) -> None:
        call = self.chosen(call)
        keys = self.keys_of(call)
        assert self.engine.touch(keys) == self.model.touch(keys)

    @rule(call=calls)
    def drop(self, call: Call | int) -> None:
        call = self.chosen(call)
        keys = self.keys_of(call)
        assert self.engine.drop(keys) == self.model.drop(keys)

    @rule(namespace=st.sampled_from([*NAMESPACES, "never seen"]))
    def drop_namespace(self, namespace: str) -> None:
        assert self.engine.drop(namespace=namespace) == self.model.drop_namespace(namespace)

    # --- after every step ---

    @invariant()
    def both_agree(self) -> None:
        if not hasattr(self, "engine"):
            return
        match, expected = self.engine.lookup(self.all_keys), self.model.lookup(self.all_keys)
        for group, states in enumerate(expected.states):
            assert [kvtier.BlockState(x).name.lower() for x in match.states(group)] == states
        self.check_stats()

    def check_stats(self) -> None:
        stats = self.engine.stats()
        for have, want in zip(stats.host, self.model.slot_counts(), strict=True):
            assert have.free + have.filling + have.ready + have.leaving == have.capacity  # I1
            for state in ("free", "filling", "ready", "leaving"):
                assert getattr(have, state) == getattr(want, state), state
        assert {name: getattr(stats, name) for name in self.model.counters} == self.model.counters
        assert (stats.pins, stats.pinned_blocks, stats.leases) == (
            self.model.pins,
            self.model.pinned_blocks,
            self.model.num_leases,
        )
        causes = ("lookup_misses_absent", "lookup_misses_pending", "lookup_misses_failed")
        assert stats.lookup_hits_host + sum(getattr(stats, cause) for cause in causes) == stats.lookup_blocks
        assert stats.quarantined_blocks == 0

    # --- the end ---

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        if self.end == "sticky" and self.simulated is not None:
            self.the_device_dies()
        else:
            if any(running.operation.has_copies for running in self.running):
                with pytest.raises(kvtier.TimeoutError):
                    self.engine.close(0.001)
                with pytest.raises(kvtier.ClosedError):
                    self.engine.lookup(self.all_keys)
                self.let_go()
            else:
                self.let_go()
                self.every_resident_block_has_its_bytes()
            assert all(page_set.pages.attached for page_set in self.page_sets)
            self.model.close()
            self.engine.close(PATIENCE)
        self.check_stats()
        assert not any(leased.lease.active for leased in self.leases)
        assert not any(page_set.pages.attached for page_set in self.page_sets)
        if self.simulated is not None:
            assert self.simulated.violations() == []

    def every_resident_block_has_its_bytes(self) -> None:
        for (key, group), content in self.model.resident().items():
            page_set = self.page_sets[group]
            page_ids = page_set.page_ids(0, 0, 0, 1)
            page_set.poison(page_ids, None)
            result = self.engine.load([key], page_set.pages, page_ids).result()
            assert self.model.load([key], group=group) == [content]
            assert result.valid_blocks == 1
            page_set.check(page_ids, 0, [content], None)

    def the_device_dies(self) -> None:
        assert self.simulated is not None
        self.simulated.fail_sticky(STICKY)
        died_in_use = False
        for running in self.running:
            died_in_use = died_in_use or running.operation.has_copies
            self.settle(Running(running.ticket, running.operation, failed=True))
        self.running.clear()
        keys = self.keys[0][0]
        page_set = self.page_sets[0]
        ticket = self.engine.load(keys, page_set.pages, page_set.page_ids(0, 0, 0, len(keys)))
        if died_in_use:
            self.model.fail()
        operation = self.model.begin_load(keys)
        died_in_use = died_in_use or operation.has_copies
        self.settle(Running(ticket, operation, failed=True))
        if died_in_use:
            self.model.fail()
            assert "simulated sticky error" in self.engine.stats().health
        self.both_agree()
        self.model.close()
        self.engine.close(PATIENCE)


class OnCpuDevice(EngineModel):
    """Every ticket is waited for at once."""


class OnSimulatedDevice(EngineModel):
    """Copies may also be held back while other calls go on."""

    simulates = True

    @precondition(lambda self: not self.held)
    @rule()
    def hold(self) -> None:
        self.simulated.hold()
        self.held = True

    @precondition(lambda self: self.held)
    @rule()
    def release(self) -> None:
        self.let_go()


QUICK = settings(
    max_examples=300,
    stateful_step_count=50,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
DEEP = settings(
    QUICK,
    max_examples=int(os.environ.get("KVTIER_DEEP_EXAMPLES", "1000")),
    stateful_step_count=80,
    derandomize=False,
)


@pytest.mark.parametrize("machine", [OnCpuDevice, OnSimulatedDevice])
def test_the_engine_does_what_the_model_says_i1_i4(machine: type[EngineModel]) -> None:
    run_state_machine_as_test(machine, settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("machine", [OnCpuDevice, OnSimulatedDevice])
def test_the_engine_does_what_the_model_says_for_long(machine: type[EngineModel]) -> None:
    run_state_machine_as_test(machine, settings=DEEP)
