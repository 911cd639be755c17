"""SchedulerSide: what the connector does in vLLM's scheduler process - lookup, promises, grants, holds.

It imports no vLLM: it reads attributes of what vLLM hands over. One thread, vLLM's scheduler, calls it.
"""

import contextlib
import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvtier.adapters.vllm.counters import Counters
from kvtier.adapters.vllm.drops import BlockDrops
from kvtier.adapters.vllm.events import Event, EventLog, ExtraKeys
from kvtier.adapters.vllm.groups import CachePlan
from kvtier.adapters.vllm.identity import LoRAIdentity
from kvtier.adapters.vllm.keys import BlockKeys
from kvtier.adapters.vllm.matching import PageIds, on_disk_alone, pages_of, pending_after, servable_blocks
from kvtier.adapters.vllm.options import Options, parse_request_options
from kvtier.adapters.vllm.pins import TimedPins
from kvtier.adapters.vllm.recompute import RecomputeClock
from kvtier.adapters.vllm.state import PageHolds, RequestState, RunningLoad
from kvtier.adapters.vllm.stores import BlockStores, Copies
from kvtier.adapters.vllm.waiting import WaitingRequests
from kvtier.config import Config
from kvtier.costs import Hit, LoadPlanner, Plan, pairs
from kvtier.engine import Engine, Match, open_engine
from kvtier.errors import ClosedError, ConfigError, TimeoutError, UnsupportedError  # noqa: A004 - kvtier's
from kvtier.keys import Keys, root_key
from kvtier.ranks import Keeper, LoadOrder

_log = logging.getLogger(__name__)

_LEASE_SECONDS = 60.0  # a promise lapses in the same step; this is for a scheduler that never takes one
_IDLE_PATIENCE_SECONDS = 0.5
_STUCK_PATIENCE_SECONDS = 0.02  # for what may never end: the next request is not to wait long
_MOST_FETCHES = 16  # of one request: host memory that cannot hold its prefix is not to be churned
_FETCH_PAUSE_SECONDS = 0.02  # between two of them
_CLOSE_SECONDS = 10.0
_JOIN_SECONDS = 20.0  # workers join within a moment: vLLM makes them first
_MOST_ROOTS = 1024  # of tenants and adapters, that are not made again for each request
_EVENTS = 1 << 18  # that the engine keeps for the next step; 9 MiB
_PREFETCH_ONLY_SECONDS = 60.0  # for a request whose client may have gone: reads begun later are of no use


class SchedulerSide:
    """Owns the engine and the keeper; promises blocks to vLLM and grants copies to the workers."""

    def __init__(
        self,
        config: Config,
        plan: CachePlan,
        options: Options,
        directory: str,
        *,
        identity: bytes = b"",
        events: bool = False,
        extra_keys: ExtraKeys | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the engine and begins to serve the workers.

        Args:
            config: The engine's, as the workers made it.
            plan: The cache groups.
            options: The connector's.
            directory: Where the workers find the keeper.
            identity: What keys cover besides the config, of one length.
            events: Whether to collect KV events.
            extra_keys: As of EventLog.
            clock: Monotonic seconds, for tests.

        Raises:
            KVTierError: As kvtier.open() and Keeper.
        """
        self.counters = Counters()
        self.holds = PageHolds()
        self._events: EventLog | None = None
        if events:
            self._events = EventLog(
                plan.block_tokens, plan.hash_tokens, [group.index for group in plan.groups], extra_keys
            )
            config = replace(config, events=_EVENTS)
        self._config = config
        self._plan = plan
        self._options = options
        self._clock = clock
        self._directory = directory
        ranks = [1 if layout.replicated else config.world_size for layout in config.groups]
        self._block_bytes = [  # of each group, all ranks together
            layout.block_bytes(plan.block_tokens) * n for layout, n in zip(config.groups, ranks, strict=True)
        ]
        self._identity = identity
        self._loras = LoRAIdentity()
        self._lora_refused: set[type[Exception]] = set()
        self._root = functools.lru_cache(_MOST_ROOTS)(functools.partial(root_key, config))
        self._requests: dict[str, RequestState] = {}
        self._alive: set[str] = set()  # those too that are not cached
        self._leased: list[RequestState] = []
        self._loading: dict[str, RunningLoad] = {}
        self._new_loads: list[tuple[str, Copies]] = []
        self._stale: list[str] = []
        self._engine: Engine = open_engine(config)  # makes the drives' directories
        self._pins = TimedPins(self._engine)
        self._waiting = WaitingRequests(self._engine)
        self._planner = LoadPlanner(self._engine.hops, options.load)
        self._recompute = RecomputeClock(self._planner.observe_prefill)
        try:
            self._keeper = Keeper(self._engine, directory)
        except BaseException:
            self._engine.close()
            raise
        self._drops = BlockDrops(self._engine)
        self._stores = BlockStores(
            self._keeper,
            plan,
            options,
            self._block_bytes,
            holds=self.holds,
            drops=self._drops,
            counters=self.counters,
            events=self._events,
            hear=self._hear,
        )
        threading.Thread(target=self._name_missing_ranks, name="kvtier-missing", daemon=True).start()

    # --- requests ---

    def on_new_request(self, request: Any) -> None:
        """A request has arrived: the earliest moment to read its prefix from disk."""
        self._alive.add(request.request_id)
        try:
            options = parse_request_options(request.kv_transfer_params)
        except ConfigError as error:  # whose cache it would be is not known: it is left alone
            _log.warning("request %s is not cached: %s", request.request_id, error)
            return
        try:
            lora = self._loras.of(request.lora_request)
        except (OSError, UnsupportedError) as error:
            if type(error) not in self._lora_refused:
                _log.warning(
                    "request %s is not cached: its adapter: %s. Said once", request.request_id, error
                )
            self._lora_refused.add(type(error))
            return
        if not self._options.client_priority:
            options = replace(options, priority=None)
        root = self._root(options.namespace, self._identity + lora)
        keys = BlockKeys(root, self._plan.block_tokens // self._plan.hash_tokens)
        state = RequestState(request, options, keys, may_store=not options.prefetch_only)
        self._requests[request.request_id] = state
        if self._config.trace is not None and not options.prefetch_only:
            self._engine.record(keys.rows(0, keys.update(request.block_hashes)))
        self._waiting.add(request.request_id, state)
        if self._options.disk and "disk" in options.tiers and self._keeper.complete:
            match = self._engine.lookup(keys.rows(0, keys.update(request.block_hashes)), record=False)
            state.found_on_disk = on_disk_alone(match, len(self._plan.groups))
            if state.found_on_disk.any():
                deadline = _PREFETCH_ONLY_SECONDS if options.prefetch_only else self._options.max_wait
                state.prefetch = self._engine.prefetch(match.keys, deadline=deadline)

    def match(self, request: Any, computed_tokens: int) -> int | None:
        """Tokens beyond `computed_tokens` that can be loaded; None to be asked again. Never waits.

        What it answers is leased until grant(), or the end of this step. Nothing can while a rank is missing.
        """
        state = self._requests.get(request.request_id)
        if state is None or request.skip_reading_prefix_cache:
            return 0
        state.end_lease()
        state.stored_blocks = 0  # it may have been preempted, and what it stored evicted
        block_tokens = self._plan.block_tokens
        first = computed_tokens // block_tokens
        # At least the last token is computed, for somebody must compute the logits.
        last = min((request.num_tokens - 1) // block_tokens, state.keys.update(request.block_hashes))
        if state.options.max_load_tokens is not None:
            last = min(last, first + state.options.max_load_tokens // block_tokens)
        if "host" not in state.options.tiers:  # what came from disk is served from host memory, nothing else
            last = min(last, first + state.run_on_disk(first))
        if not state.may_load or last <= first or computed_tokens % block_tokens:
            return 0
        if not self._keeper.complete:
            return 0
        last = first + self._drops.before_hidden(state.keys.rows(first, last))
        if last == first:
            return 0
        # Before the lookup: reads that end behind it are seen by the next one.
        reading = state.prefetch is not None and not state.prefetch.done()
        match = self._engine.lookup(state.keys.rows(first, last), record=False)
        ready = servable_blocks(match, self._plan.groups)
        pending = pending_after(match, ready, self._plan.groups)
        state.plan = self._plan_load(match, ready, state, request.num_tokens, computed_tokens)
        wanted = match.ready_blocks if state.plan is None else state.plan.decision.load_blocks
        left = match.ready_blocks - max(wanted, ready)  # of what is on disk
        if wanted > ready and (reading or self._fetch_again(match, ready, state)):
            pending = max(pending, match.ready_blocks - ready)
        if pending and self._worth_waiting(state, pending * block_tokens):
            self.counters.add("ask_again")
            return None
        left = left + max(0, ready - wanted)
        ready = min(ready, wanted)
        self._count_lookup(match, ready, pending, left, state, first)
        if ready == 0:
            return 0
        lease = match.pin(_LEASE_SECONDS)
        state.lease, state.first_block = lease, first
        self._leased.append(state)
        return min(ready, lease.num_blocks) * block_tokens

    def grant(self, request: Any, block_ids: tuple[list[int], ...], external_tokens: int) -> None:
        """What match() promised was taken by vLLM, or left, and pages were allocated.

        Args:
            request: The request.
            block_ids: For each of vLLM's groups the request's pages from its beginning.
            external_tokens: Tokens to load; 0 to load nothing.
        """
        state = self._requests.get(request.request_id)
        if state is None:
            return
        self._waiting.end(request.request_id)
        plan, state.plan = state.plan, None
        if plan is not None and (external_tokens or not plan.decision.load_blocks):
            self._planner.record(plan)
            self.counters.add(f"chose_{plan.decision.choice.value}")
        if external_tokens == 0:
            state.end_lease()
            return
        count = external_tokens // self._plan.block_tokens
        first = state.first_block
        keys = state.keys.rows(first, first + count).copy()
        copies: Copies = []
        parts: list[tuple[LoadOrder, PageIds, Keys]] = []
        num_bytes = 0
        for g, group in enumerate(self._plan.groups):
            pages = pages_of(block_ids[group.index], group, first, first + count)
            here = np.flatnonzero(pages.all(axis=1))  # a window's pages below it are null: nothing to load
            if len(here):
                begin = int(here[0])
                order = self._keeper.load(keys[here], g, first_block=first + begin)
                copies.append((order.instruction, pages[here].reshape(-1)))
                parts.append((order, copies[-1][1], keys[here]))
                num_bytes += len(here) * self._block_bytes[g]
                if self._events is not None:
                    on_disk = state.on_disk(first + begin, first + count)
                    self._hear()
                    self._events.loaded(request, first + begin, keys[begin:], on_disk, g)
        state.end_lease()  # the grants have pinned what they load
        if first == 0:
            state.stored_blocks = count
        self._new_loads.append((request.request_id, copies))
        self._loading[request.request_id] = RunningLoad(keys, parts, num_bytes, self._clock(), plan)

    def disk_tokens(self, request: Any, external_tokens: int) -> int:
        """How many of the tokens that match() promised were on disk alone when their request arrived."""
        state = self._requests.get(request.request_id)
        if state is None:
            return 0
        tokens = self._plan.block_tokens
        return state.disk_blocks(state.first_block, state.first_block + external_tokens // tokens) * tokens

    def finish(self, request: Any) -> None:
        """The request is over. Its pages under a store are held; a load of it goes on and is reported."""
        self._alive.discard(request.request_id)
        state = self._requests.pop(request.request_id, None)
        if state is not None:
            self._waiting.end(request.request_id)
            state.end_lease()
            if state.prefetch is not None and not state.options.prefetch_only:
                state.prefetch.cancel()
            if state.options.pin is not None and state.may_load:
                count = state.keys.update(request.block_hashes)
                self._pins.add(state.keys.rows(0, count), state.options.pin, self._clock())

    # --- steps ---

    def step(self, output: Any) -> tuple[list[tuple[str, Copies]], Copies, list[str]]:
        """Everything for the workers in this step.

        Args:
            output: vLLM's SchedulerOutput.

        Returns:
            New loads, new stores, and requests whose load is to be reported as failed.
        """
        for leased in self._leased:
            leased.end_lease()
        self._leased.clear()
        self._waiting.step(output.num_scheduled_tokens)
        now = self._clock()
        self._recompute.step(output.total_num_scheduled_tokens, now, self._pairs(output))
        self._stores.poll(now)
        stores: Copies = []
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            if state is not None and state.may_store:
                stores += self._stores.grant(state, num_tokens, output, now)
        loads, self._new_loads = self._new_loads, []
        stale, self._stale = self._stale, []
        return loads, stores, stale

    def received(self, finished: set[str], failed: set[str]) -> None:
        """Every rank has reported these loads.

        Never waits: blocks of failed ones are dropped later, and pages of theirs are held for as long as a
        rank may write to them.
        """
        now = self._clock()
        for request_id in finished:
            load = self._loading.pop(request_id, None)
            if load is None:
                continue
            if request_id not in failed:
                self.counters.add("load_requests")
                self.counters.add("load_blocks", len(load.keys))
                self.counters.add("load_bytes", load.num_bytes)
                self.counters.add("load_seconds", now - load.began)
                if load.plan is not None:
                    self.counters.add("load_predicted_seconds", load.plan.decision.load_seconds)
                    self._planner.settle(load.plan, now - load.began)
                continue
            self.counters.add("load_failures")
            for order, pages, keys in load.parts:
                self._keeper.cancel(order.instruction)  # a rank that could not begin it has told nobody
                if self.holds.bound:  # it may be written to even now
                    self.holds.add(order.ticket, pages.tolist(), 0, now)
                # Those of a reset are gone; and with blocks that no rank was given nothing is wrong.
                if order.instruction.grant and not load.stale:
                    self._drops.add(keys)
            state = self._requests.get(request_id)
            if state is not None:
                state.may_load, state.stored_blocks = False, 0
        self.settle()

    def take_events(self) -> Sequence[Event]:
        """KV events since the last call; none unless they were asked for."""
        if self._events is None:
            return ()
        self._hear()
        return self._events.take()

    def _hear(self) -> None:
        if self._events is not None:
            self._events.heard(self._engine.events())

    def step_ended(self) -> None:
        """VLLM has the output of its oldest running step."""
        self._recompute.ended(self._clock())

    def settle(self) -> None:
        """Lets go of pages whose stores are over; waits a little for the rest where nobody else is waiting.

        An engine without requests stops stepping, and would otherwise refuse to reset its prefix cache for
        the sake of pages that were free long ago.
        """
        now = self._clock()
        if self.holds.pending:
            idle = _IDLE_PATIENCE_SECONDS if self.holds.young(now) else _STUCK_PATIENCE_SECONDS
            self._stores.poll(now, patience=0.0 if self._alive else idle)
        self._pins.poll(now)

    def frees_soon(self) -> bool:
        """Whether pages will be free soon that a store or a failed load holds.

        Not for the sake of holds that last: who waited for them would never be scheduled. Nor of pages that
        somebody else has too, such as the request that is being stored.
        """
        return self.holds.frees_soon(self._clock())

    def reset(self) -> None:
        """Forgets every block of every tier: nothing stored before is ever served.

        What requests that are running now have computed may be as old as what is forgotten: they neither
        store nor load any more, and their running loads are reported as failed. Waits for the drives, a sync
        each.
        """
        self._pins.clear()
        self._waiting.clear()
        for state in self._requests.values():
            state.end_lease()
            state.may_load = state.may_store = False
        for request_id, load in self._loading.items():
            load.stale = True
            self._stale.append(request_id)
        try:
            self._engine.reset()
        finally:  # whatever a drive said, nothing of before is served
            self._drops.clear()
            self._drops.add_namespaces(self._stores.take_high())
            if self._events is not None:
                self._hear()  # what was not told yet of before
                self._events.cleared()
        self.counters.add("resets")

    def close(self) -> None:
        """Stops. Idempotent; waits some seconds at most for copies that run."""
        for state in self._requests.values():
            state.end_lease()
        self._requests.clear()
        self._pins.clear()
        self._waiting.clear()
        self.holds.poll(self._clock(), patience=_IDLE_PATIENCE_SECONDS)
        self._drops.close(_CLOSE_SECONDS)
        self._keeper.close(_CLOSE_SECONDS)
        with contextlib.suppress(OSError):  # somebody's own things stand there; or it is gone already
            Path(self._directory).rmdir()
        self._engine.close(_CLOSE_SECONDS)

    # --- inside ---

    def _name_missing_ranks(self) -> None:
        """The thread: says once that a rank does not come, as one on another host never would."""
        try:
            self._keeper.wait_for_workers(_JOIN_SECONDS)
        except TimeoutError as error:
            _log.warning(
                "kvtier caches nothing while a rank is missing: %s; one on another host cannot", error
            )
        except ClosedError:
            pass

    def _plan_load(
        self, match: Match, ready: int, state: RequestState, num_tokens: int, computed_tokens: int
    ) -> Plan | None:
        """How much of what was found to load: what is servable, and what is on disk behind it.

        None where there is nothing to decide: nothing was found, all of it is wanted in host memory, or a
        window makes another end of the load need other blocks.
        """
        on_disk = match.ready_blocks - ready if self._options.disk and "disk" in state.options.tiers else 0
        windows = any(group.layout.window_tokens is not None for group in self._plan.groups)
        if not ready + on_disk or state.options.prefetch_only or windows:
            return None
        block_bytes = sum(self._block_bytes)
        hit = Hit(
            runs=tuple(run for run in ((ready, False), (on_disk, True)) if run[0]),
            first_token=computed_tokens,
            prompt_tokens=num_tokens,
            block_tokens=self._plan.block_tokens,
            block_bytes=block_bytes,
            pipelined=False,  # a grant needs its blocks in host memory
        )
        fetched = state.prefetch is not None and not state.prefetch.done()
        return self._planner.plan(hit, on_disk * block_bytes if fetched else 0)

    def _pairs(self, output: Any) -> float:
        """Pairs of tokens that a step's attention computes (`kvtier.costs.pairs`)."""
        found = 0.0
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            state = self._requests.get(request_id)
            begin = 0 if state is None else state.request.num_computed_tokens
            found += pairs(begin, begin + num_tokens)
        return found

    def _fetch_again(self, match: Match, ready: int, state: RequestState) -> bool:
        """Fetches what no read is on its way for; whether that is worth another look.

        It had left the host tier again, or found no slot there: right after a start that still grows.
        """
        if not self._options.disk or "disk" not in state.options.tiers or ready >= match.ready_blocks:
            return False
        if state.fetches >= _MOST_FETCHES:
            return False
        now = self._clock()
        if not state.fetches or now - state.fetched_at >= _FETCH_PAUSE_SECONDS:
            state.fetches += 1
            state.fetched_at = now
            state.prefetch = self._engine.prefetch(match.keys[ready:], deadline=self._options.max_wait)
        return True

    def _worth_waiting(self, state: RequestState, tokens: int) -> bool:
        """Whether to ask again; decided by what was to be waited for at first, not by the last of it."""
        now = self._clock()
        if state.gives_up_at is None:
            longest = math.inf if state.options.prefetch_only else self._recompute.seconds(tokens)
            state.gives_up_at = now + min(self._options.max_wait, longest)
        return now < state.gives_up_at

    def _count_lookup(
        self, match: Match, ready: int, pending: int, left: int, state: RequestState, first: int
    ) -> None:
        tokens = self._plan.block_tokens
        self.counters.add("lookup_tokens", len(match.keys) * tokens)
        disk = state.disk_blocks(first, first + ready)
        self.counters.add("hit_tokens_host", (ready - disk) * tokens)
        self.counters.add("hit_tokens_disk", disk * tokens)
        self.counters.add("miss_tokens_pending", pending * tokens)
        self.counters.add("left_tokens", left * tokens)
        self.counters.add("miss_tokens_absent", (len(match.keys) - ready - pending - left) * tokens)
