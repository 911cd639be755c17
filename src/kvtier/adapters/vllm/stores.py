"""BlockStores: which blocks of a step are stored, and what became of them."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvtier.adapters.vllm.counters import Counters
from kvtier.adapters.vllm.drops import BlockDrops
from kvtier.adapters.vllm.events import EventLog
from kvtier.adapters.vllm.groups import CachePlan
from kvtier.adapters.vllm.matching import pages_of
from kvtier.adapters.vllm.options import Options
from kvtier.adapters.vllm.state import PageHolds, RequestState
from kvtier.engine import BlockOutcome
from kvtier.ranks import Instruction, Keeper
from kvtier.tickets import StoreResult, StoreTicket

_log = logging.getLogger(__name__)

_MOST_HIGH = 64

Copies = list[tuple[Instruction, Any]]  # with the page ids, uint32 [num_blocks * pages_per_block]


class BlockStores:
    """Grants stores, holds their pages and counts them. Only for the scheduler's thread."""

    def __init__(
        self,
        keeper: Keeper,
        plan: CachePlan,
        options: Options,
        block_bytes: Sequence[int],
        *,
        holds: PageHolds,
        drops: BlockDrops,
        counters: Counters,
        events: EventLog | None,
        hear: Callable[[], None],
    ) -> None:
        """Has stored nothing yet; what it is given is the caller's.

        Args:
            keeper: Grants the slots.
            plan: The cache groups.
            options: The connector's.
            block_bytes: Of a block of each group, all ranks together.
            holds: Keeps the pages.
            drops: What must not be stored for a while.
            counters: Is told what became of stores.
            events: Is told of them too; None without events.
            hear: Has the engine's own events told to `events` first.
        """
        self._keeper = keeper
        self._plan = plan
        self._options = options
        self._block_bytes = block_bytes
        self._holds = holds
        self._drops = drops
        self._counters = counters
        self._events = events
        self._hear = hear
        # Blocks of high priority make room for no others: of an earlier epoch they would stay for ever.
        self._high: deque[str] = deque(maxlen=_MOST_HIGH)  # namespaces that have any

    def take_high(self) -> list[str]:
        """Namespaces that have blocks of high priority; forgets them."""
        high = list(self._high)
        self._high.clear()
        return high

    def grant(self, state: RequestState, num_tokens: int, output: Any, now: float) -> Copies:
        """Begins to store what a request completes in this step, and what was put off before.

        Args:
            state: The request; is told what it has stored.
            num_tokens: How many of its tokens are scheduled.
            output: vLLM's SchedulerOutput.
            now: Monotonic seconds.

        Returns:
            A copy for each group that has any. Their pages are held.
        """
        stores: Copies = []
        request = state.request
        # Tokens whose KV this step completes; drafts that may be rejected are not among num_tokens.
        tokens = min(request.num_computed_tokens + num_tokens, request.num_tokens)
        if self._options.store == "prompt":
            tokens = min(tokens, request.num_prompt_tokens)
        if state.options.max_store_tokens is not None:
            tokens = min(tokens, state.options.max_store_tokens)
        first, last = state.stored_blocks, tokens // self._plan.block_tokens - self._plan.volatile_blocks
        if last <= first:
            return stores
        last = min(last, state.keys.update(request.block_hashes))
        block_ids = output.kv_connector_block_state.get_block_ids(request.request_id)
        if last <= first or block_ids is None or not self._holds.bound:
            return stores
        # What is being dropped is stored in a later step: now it would be found, and then be gone.
        last = first + self._drops.before_hidden(state.keys.rows(first, last))
        if last == first:
            return stores
        state.stored_blocks = last
        if state.options.priority == "high" and state.options.namespace not in self._high:
            self._high.append(state.options.namespace)
        keys = state.keys.rows(first, last)
        for g, group in enumerate(self._plan.groups):
            pages = pages_of(block_ids[group.index], group, first, last)
            here = np.flatnonzero(pages.all(axis=1))
            if not len(here):
                continue
            begin = int(here[0])  # a window has let go of the pages before it
            above = first + begin
            instruction, ticket = self._keeper.store(
                keys[here],
                g,
                first_block=above,
                parent=state.keys.rows(above - 1, above)[0] if above else None,
                namespace=state.options.namespace,
                priority=state.options.priority,
                ttl=state.options.ttl,
            )
            running = instruction.outcomes == BlockOutcome.RUNNING
            if instruction.grant:
                stores.append((instruction, pages[here].reshape(-1)))
                about = None
                if self._events is not None:
                    coming = np.zeros(last - first - begin, np.bool_)
                    coming[here[running] - begin] = True
                    about = self._events.watch(request, first + begin, keys[begin:], coming, g), keys[here]
                self._holds.add(
                    ticket,
                    pages[here][running].reshape(-1).tolist(),
                    int(np.count_nonzero(running)) * self._block_bytes[g],
                    now,
                    about,
                )
            else:
                self._count(ticket.result(), 0, 0.0)
            declined = instruction.outcomes == BlockOutcome.DECLINED
            if group.layout.window_tokens is None and declined.any():
                state.may_store = False  # nothing behind a gap is ever found
        return stores

    def poll(self, now: float, *, patience: float = 0.0) -> None:
        """Counts what is over and lets go of its pages; waits so many seconds at most for the rest."""
        for ended in self._holds.poll(now, patience=patience):
            if not isinstance(ended.ticket, StoreTicket):
                continue
            result = ended.ticket.result()
            self._count(result, ended.num_bytes, ended.seconds)
            if self._events is not None:
                self._hear()
                self._events.forget(*ended.about)

    def _count(self, result: StoreResult, num_bytes: int, seconds: float) -> None:
        for name in ("stored", "present", "pending", "declined", "failed", "dropped"):
            self._counters.add(f"store_blocks_{name}", getattr(result, name))
        if result.stored:
            self._counters.add("store_bytes", num_bytes)
            self._counters.add("store_seconds", seconds)
        if result.error is not None:
            _log.warning("blocks were not stored: %s", result.error)
