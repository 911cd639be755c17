"""Keeper: the process that owns index, policy and arena, and grants slots to the ranks' workers."""

import contextlib
import logging
import os
from typing import Any, NamedTuple

import numpy as np

from kvtier.arrays import key_array
from kvtier.engine import (
    BlockOutcome,
    Engine,
    Lease,
    LoadTicket,
    Match,
    NativeMoment,
    StoreTicket,
    arena_of,
    finish_part,
    grant_load,
    grant_store,
    native_priority,
)
from kvtier.errors import ClosedError, ConfigError, KVTierError, TimeoutError  # noqa: A004 - kvtier.TimeoutError
from kvtier.handles import checked_ttl_us
from kvtier.keys import Keys, key_bytes
from kvtier.layout import check_extent
from kvtier.ranks.instruction import Instruction
from kvtier.ranks.server import Member, RankServer, Status
from kvtier.tickets import Outcomes, checked_timeout

_log = logging.getLogger(__name__)


class StoreOrder(NamedTuple):
    """What the ranks are to do, and when all of them have done it."""

    instruction: Instruction
    ticket: StoreTicket


class LoadOrder(NamedTuple):
    """What the ranks are to do, and when all of them have done it."""

    instruction: Instruction
    ticket: LoadTicket


class Keeper:
    """Serves the ranks of one host. Threads: any; it has one of its own, which sleeps till something happens.

    A grant (the slots of one store or load) is over when every rank has reported its part. A rank's pins and
    slots end when it reports, when it leaves, or when its process has ended: never by a timeout or because a
    socket was closed, since its copies might still run. In a forked child every call raises ClosedError.
    """

    def __init__(self, engine: Engine, directory: str | os.PathLike[str]) -> None:
        """Begins to serve.

        Args:
            engine: Whose blocks they are. The caller closes it, after the keeper.
            directory: Where workers find the keeper: of this user alone, mode 0700; made if it is missing. A
                socket that a killed keeper left there is replaced.

        Raises:
            ConfigError: Others can reach the directory, or a living keeper serves it.
        """
        self._engine = engine
        self._config = engine.config
        self._process = os.getpid()
        self._open: dict[int, set[int]] = {}  # of each grant, the ranks that have not reported
        self._server = RankServer(directory, engine.config, arena_of(engine._native), self._on_part)
        self._changed = self._server.changed

    @property
    def epoch(self) -> bytes:
        """Names this keeper among all that serve or served the directory."""
        return self._server.epoch

    @property
    def complete(self) -> bool:
        """Whether every rank has a worker, as far as the keeper has heard. Takes a microsecond.

        store() and load() ask the kernel: that a worker has ended is heard a moment later.
        """
        self._check_process()
        with self._changed:
            return self._server.complete

    def workers(self) -> list[int | None]:
        """For each rank the process that joined as it, None for those still missing."""
        self._check_process()
        with self._changed:
            missing = self._server.missing()
            return [
                None if rank in missing else self._server.members[rank].pid
                for rank in range(self._config.world_size)
            ]

    def wait_for_workers(self, timeout: float | None = None) -> None:
        """Waits until every rank has joined.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: The time is over; the message names the ranks that are missing.
            ClosedError: The keeper was closed.
        """
        seconds = checked_timeout(timeout)
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._server.closing or not self._server.missing(), seconds)
            self._check_open()
            if missing := self._server.missing():
                raise TimeoutError(f"ranks {missing} have not joined within {timeout} s")

    def store(
        self,
        keys: Any,
        group: int = 0,
        *,
        first_block: int = 0,
        parent: Any = None,
        namespace: str = "",
        priority: str | None = None,
        ttl: float | None = None,
    ) -> StoreOrder:
        """Reserves slots for blocks that are not there yet. Does not wait.

        While a rank has no living worker every block is declined: nobody could ever finish it.

        Args:
            keys: Keys [n, 32] in prompt order.
            group: Index of the cache group.
            first_block: Index of keys[0] in its sequence.
            parent: Key of the block before keys[0], where it is known.
            namespace: The tenant.
            priority: As of Engine.store().
            ttl: As of Engine.store().

        Returns:
            The instruction for every rank, and a ticket: the blocks are visible, and it is done, when every
            rank has stored its part.

        Raises:
            ConfigError: An argument is not allowed; nothing was done.
            ClosedError: Keeper or engine is closed.
        """
        array, spec = self._arguments(keys, group, first_block)
        above = None if parent is None else key_bytes(parent, "parent")
        if not isinstance(namespace, str):
            raise ConfigError(f"namespace is {namespace!r}; allowed: a str")
        rank, ttl_us = native_priority(priority), checked_ttl_us(ttl)
        parts = 1 if spec.replicated else self._config.world_size
        self._check_process()
        with self._changed:
            self._check_open()
            if self._server.missing():
                granted = _nothing(len(array), BlockOutcome.DECLINED)
            else:
                granted = grant_store(
                    self._engine._native, group, parts, array, first_block, above, namespace, rank, ttl_us
                )
            instruction = self._instruct(granted, group, parts, first_block, is_store=True)
        return StoreOrder(instruction, StoreTicket(granted[3], NativeMoment, self._config.block_tokens))

    def load(self, what: Any, group: int = 0, *, first_block: int = 0) -> LoadOrder:
        """Pins blocks that are there until every rank has loaded them. Does not wait.

        While a rank has no living worker every block is missed.

        Args:
            what: A Lease or a Match (its ready prefix), or keys [n, 32].
            group: Index of the cache group.
            first_block: Index of the first key in its sequence.

        Returns:
            The instruction for every rank, and a ticket that is done when every rank has loaded.

        Raises:
            ConfigError: An argument is not allowed; nothing was done.
            ClosedError: Keeper or engine is closed.
        """
        keys = what
        if isinstance(what, Lease):
            keys = what.keys
        elif isinstance(what, Match):
            keys = what.keys[: what.ready_blocks]
        array, _ = self._arguments(keys, group, first_block)
        parts = self._config.world_size
        self._check_process()
        with self._changed:
            self._check_open()
            if self._server.missing():
                granted = _nothing(len(array), BlockOutcome.MISSED)
            else:
                granted = grant_load(self._engine._native, group, parts, array, first_block)
            instruction = self._instruct(granted, group, parts, first_block, is_store=False)
        return LoadOrder(instruction, LoadTicket(granted[3], NativeMoment, self._config.block_tokens))

    def cancel(self, instruction: Instruction) -> None:
        """Asks the ranks not to begin an instruction that was not carried to all of them. Does not wait.

        A rank that has not begun it never will, and says so; one that has goes on and reports as ever. Only
        these answers end the grant: a rank that does not answer keeps its slots until its process ends.
        """
        self._check_process()
        with self._changed:
            if instruction.epoch == self.epoch:
                self._server.ask_to_cancel([instruction.grant])

    def close(self, timeout: float | None = None) -> None:
        """Refuses new work, cancels what was not begun, waits for the rest, and stops to serve. Idempotent.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: A rank has not reported yet; call again.
        """
        seconds = checked_timeout(timeout)
        self._check_process()
        with self._changed:
            self._server.closing = True
            self._changed.notify_all()
            if self._open:
                self._server.ask_to_cancel(list(self._open))
            if not self._changed.wait_for(lambda: not self._open, seconds):
                waiting = sorted(set().union(*self._open.values()))
                raise TimeoutError(f"close: ranks {waiting} have not reported within {timeout} s; call again")
        self._server.stop()

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_process(self) -> None:
        # Before any lock: one that the parent held as it forked is never released here.
        if os.getpid() != self._process:
            raise ClosedError("the keeper belongs to the parent of this forked process")

    # --- grants; all under self._changed ---

    def _check_open(self) -> None:
        if self._server.closing:
            raise ClosedError("the keeper is closed")

    def _arguments(self, keys: Any, group: int, first_block: int) -> tuple[Keys, Any]:
        array = key_array(keys)
        check_extent("group", group, 0, len(self._config.groups) - 1)
        check_extent("first_block", first_block, 0, 2**32 - 1 - len(array))
        return array, self._config.groups[group]

    def _instruct(
        self, granted: Any, group: int, parts: int, first_block: int, *, is_store: bool
    ) -> Instruction:
        grant, blocks, slots, ticket = granted
        outcomes: Outcomes = ticket.outcomes()
        outcomes[outcomes == BlockOutcome.RUNNING] = (
            BlockOutcome.DECLINED if is_store else BlockOutcome.MISSED
        )
        outcomes[blocks] = BlockOutcome.RUNNING
        members = self._server.members
        if grant:
            self._open[grant] = set(range(parts))
            for rank in range(parts):
                members[rank].grants.add(grant)
        numbers = tuple(members[r].number if r in members else 0 for r in range(self._config.world_size))
        floor = min(self._open, default=0)
        return Instruction(
            self.epoch, grant, floor, is_store, group, parts, first_block, numbers, outcomes, slots
        )

    def _on_part(self, member: Member, grant: int, status: Status, drained: bool) -> None:
        try:
            finish_part(self._engine._native, grant, status, drained)
        except (ClosedError, ConfigError):
            pass  # the engine was closed before its keeper
        except Exception as error:  # noqa: BLE001 - the part must be over whatever was wrong with its report
            _log.exception("the keeper could not hand on a report of rank %d", member.rank)
            failed = ("internal", 0, f"rank {member.rank}'s report: {type(error).__name__}")
            with contextlib.suppress(KVTierError):
                finish_part(self._engine._native, grant, failed, drained)
        # Not before: from now on instructions may say that this grant is over, and its slots are free.
        waiting = self._open.get(grant, set())
        waiting.discard(member.rank)
        if not waiting:
            self._open.pop(grant, None)


class _SettledTicket:
    """A NativeTicket of something that was over before it began."""

    def __init__(self, outcomes: Outcomes) -> None:
        self._outcomes = outcomes

    def settled(self, moment: Any) -> bool:  # noqa: ARG002
        """See NativeTicket."""
        return True

    def wait(self, moment: Any, timeout: float | None = None) -> None:
        """See NativeTicket."""

    def failure(self) -> None:
        """See NativeTicket."""

    def outcomes(self) -> Outcomes:
        """See NativeTicket."""
        return np.array(self._outcomes)

    def valid_blocks(self) -> int:
        """See NativeTicket."""
        return 0

    def durable_blocks(self) -> int:
        """See NativeTicket."""
        return 0

    def wait_stream(self, stream: int) -> None:
        """See NativeTicket."""

    def wait_layer(self, layer: int, stream: int) -> None:
        """See NativeTicket."""

    def done_fd(self) -> int:
        """See NativeTicket; nobody waits for what is done."""
        raise ClosedError("this ticket was done from the beginning")


def _nothing(num_blocks: int, outcome: BlockOutcome) -> tuple[int, Any, Any, _SettledTicket]:
    """What a grant looks like when no rank could carry it out."""
    empty = np.empty(0, np.uint32)
    return 0, empty, empty, _SettledTicket(np.full(num_blocks, outcome, np.uint8))
