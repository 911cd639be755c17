"""What the scheduler side remembers: requests, running loads, and pages under a store."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvtier.adapters.vllm.keys import BlockKeys
from kvtier.adapters.vllm.options import RequestOptions
from kvtier.costs import Plan
from kvtier.errors import KVTierError, TimeoutError  # noqa: A004 - kvtier.TimeoutError, as asyncio's
from kvtier.handles import Lease
from kvtier.keys import Keys
from kvtier.ranks import LoadOrder
from kvtier.tickets import LoadTicket, StoreTicket

_log = logging.getLogger(__name__)

_SOON_SECONDS = 5.0  # a hold that is older may never end


@dataclass(eq=False)
class RequestState:
    """One request, from on_new_request() until it has finished.

    Attributes:
        request: vLLM's.
        options: What it asked for.
        keys: Of its blocks.
        stored_blocks: Blocks at its beginning that need no store any more.
        may_load: False once a load of it has failed, so that it cannot fail for ever.
        may_store: False once nothing behind what is stored could be found, or after a reset.
        lease: On what was promised to vLLM in this step, None if nothing is.
        first_block: Index of the lease's first block.
        plan: How much of what was found is loaded, from match() to grant(); None if there is nothing to it.
        gives_up_at: When it is no longer told to ask again, monotonic seconds; None if it never was told to.
        prefetch: Handle of its prefetch, None without.
        found_on_disk: For each of its blocks whether it was on disk alone when it arrived, bool [n].
        fetches: How often blocks were fetched from disk that had found no slot, or had left the host tier.
        fetched_at: When the last of them began.
    """

    request: Any
    options: RequestOptions
    keys: BlockKeys
    stored_blocks: int = 0
    may_load: bool = True
    may_store: bool = True
    lease: Lease | None = None
    first_block: int = 0
    plan: Plan | None = None
    gives_up_at: float | None = None
    prefetch: Any = None
    fetches: int = 0
    fetched_at: float = 0.0
    found_on_disk: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    def on_disk(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Which of its blocks [first, last) were on disk alone when it arrived, bool [last - first]."""
        found = self.found_on_disk[first:last]
        return np.pad(found, (0, last - first - len(found)))

    def disk_blocks(self, first: int, last: int) -> int:
        """How many those are."""
        return int(np.count_nonzero(self.found_on_disk[first:last]))

    def run_on_disk(self, first: int) -> int:
        """How many blocks that follow each other from `first` on were on disk alone when it arrived."""
        found = self.found_on_disk[first:]
        return len(found) if found.all() else int(found.argmin())

    def end_lease(self) -> None:
        """Lets go of what was promised and not taken. Idempotent."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None


@dataclass(eq=False)
class RunningLoad:
    """A load that vLLM has been promised, until every rank has reported it.

    Attributes:
        keys: Of its blocks.
        parts: For each group the keeper's order, the pages that are written to, and the keys of its blocks.
        num_bytes: What it copies, all ranks together.
        began: Monotonic seconds.
        plan: What was decided, None if there was nothing to decide.
        stale: Whether the cache was reset since.
    """

    keys: Keys
    parts: list[tuple[LoadOrder, npt.NDArray[np.uint32], Keys]]
    num_bytes: int
    began: float
    plan: Plan | None = None
    stale: bool = False


class _Hold(NamedTuple):
    ticket: StoreTicket | LoadTicket
    blocks: list[Any]
    num_bytes: int
    began: float
    about: Any


class Ended(NamedTuple):
    """What is over: its ticket, its bytes, the seconds it took, and what add() was told of it."""

    ticket: StoreTicket | LoadTicket
    num_bytes: int
    seconds: float
    about: Any


class PageHolds:
    """Keeps pages under a store from being reused, whatever frees them: preemption, finish, abort, a window.

    And those of a load that failed on a rank, for others may still write to them.
    A hold is one more reference in vLLM's block pool. Only for the scheduler's thread.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._holds: deque[_Hold] = deque()
        self._quarantined = 0

    def bind(self, pool: Any) -> None:
        """Takes vLLM's BlockPool."""
        self._pool = pool

    @property
    def bound(self) -> bool:
        """Whether there is a pool; nothing may be stored without one."""
        return self._pool is not None

    @property
    def pending(self) -> bool:
        """Whether pages are held that will be let go."""
        return bool(self._holds)

    def young(self, now: float) -> bool:
        """Whether pages will be let go soon: the youngest hold is at most 5 s old."""
        return bool(self._holds) and now - self._holds[-1].began <= _SOON_SECONDS

    def frees_soon(self, now: float) -> bool:
        """Whether a page will be free soon: nobody has it but a hold that is at most 5 s old."""
        return any(
            now - hold.began <= _SOON_SECONDS and any(block.ref_cnt == 1 for block in hold.blocks)
            for hold in reversed(self._holds)
        )

    @property
    def quarantined_pages(self) -> int:
        """Pages that are held for good: a device cannot prove that its copies are over."""
        return self._quarantined

    def add(
        self,
        ticket: StoreTicket | LoadTicket,
        page_ids: Sequence[int],
        num_bytes: int,
        now: float,
        about: Any = None,
    ) -> None:
        """Holds pages until a store or load has let go of them.

        Args:
            ticket: The keeper's, which all ranks' parts settle.
            page_ids: vLLM's block ids.
            num_bytes: What is copied.
            now: Monotonic seconds.
            about: Whatever is wanted back when it is over.
        """
        blocks = [self._pool.blocks[page] for page in page_ids]
        self._pool.touch(blocks)
        self._holds.append(_Hold(ticket, blocks, num_bytes, now, about))

    def poll(self, now: float, *, patience: float = 0.0) -> list[Ended]:
        """Lets go of pages whose stores and loads are over.

        Args:
            now: Monotonic seconds.
            patience: Seconds to wait for those that are not, all together.

        Returns:
            What is over.
        """
        if not self._holds:
            return []
        ended: list[Ended] = []
        left: deque[_Hold] = deque()
        deadline = time.monotonic() + patience
        for hold in self._holds:
            released = hold.ticket.released
            try:
                seconds = max(0.0, deadline - time.monotonic()) if patience else 0.0
                if not released.done() and not seconds:
                    left.append(hold)
                    continue
                released.wait(seconds)
            except TimeoutError:
                left.append(hold)
                continue
            except KVTierError as error:
                self._quarantined += len(hold.blocks)
                _log.error("%d pages of vLLM are never used again: %s", len(hold.blocks), error)
                continue
            self._pool.free_blocks(reversed(hold.blocks))  # the tail is evicted first, as vLLM does
            ended.append(Ended(hold.ticket, hold.num_bytes, now - hold.began, hold.about))
        self._holds = left
        return ended
