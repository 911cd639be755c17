"""RankLoads: the loads that run on one rank, until each has been reported. Imports neither vLLM nor torch."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from kvtier.errors import KVTierError
from kvtier.tickets import BlockOutcome, Ticket

_IDLE_WAIT_SECONDS = 0.001


def is_idle(forward_context: Any, given: Mapping[str, Any]) -> bool:
    """Whether the step of a start_load_kv() computes nothing.

    Args:
        forward_context: What it was given: vLLM's, and in a step with nothing to compute an empty one.
        given: Its other arguments. vLLM's second model runner calls it after the forward pass, when the
            context is empty again, but says there what the step computed.
    """
    return getattr(forward_context, "attn_metadata", None) is None and "scheduler_output" not in given


class _Load(NamedTuple):
    tickets: list[Ticket]
    whole: bool  # whether every copy of it was begun


class RankLoads:
    """Each load is reported once, and not before the last of its copies is over. Only for one thread."""

    def __init__(self) -> None:
        self._loads: dict[str, _Load] = {}
        self._stale: set[str] = set()

    def __len__(self) -> int:
        """Those that are not reported yet."""
        return len(self._loads)

    def begin(self, request_id: str, tickets: Iterable[Ticket | None]) -> None:
        """A load has begun: a ticket for each of its copies, None for one that could not begin."""
        begun = list(tickets)
        running = [ticket for ticket in begun if ticket is not None]
        self._loads[request_id] = _Load(running, len(running) == len(begun))

    def fail(self, request_ids: Iterable[str]) -> None:
        """Those of them that are not reported yet will be reported as failed, whatever their copies do."""
        self._stale.update(request_id for request_id in request_ids if request_id in self._loads)

    def take_ended(self, *, idle: bool) -> tuple[set[str], set[str]]:
        """Loads whose copies are over; each is reported once, whatever became of its request.

        Args:
            idle: Whether to wait a moment for copies that run.

        Returns:
            Those that are over, and those of them that failed.
        """
        ended: set[str] = set()
        failed: set[str] = set()
        for request_id, (tickets, whole) in list(self._loads.items()):
            if idle and not _over(tickets):
                _wait_a_moment(tickets)
                idle = False
            if not _over(tickets):
                continue
            ended.add(request_id)
            if not whole or request_id in self._stale or not all(map(_loaded, tickets)):
                failed.add(request_id)
            del self._loads[request_id]
            self._stale.discard(request_id)
        return ended, failed


def _over(tickets: list[Ticket]) -> bool:
    return all(ticket.done() for ticket in tickets)


def _loaded(ticket: Ticket) -> bool:
    outcomes = ticket.result().outcomes
    return bool(np.all(outcomes == BlockOutcome.LOADED))


def _wait_a_moment(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        if not ticket.done():
            try:
                ticket.wait(_IDLE_WAIT_SECONDS)
            except KVTierError:  # not yet; or not well, which the outcomes say
                return
