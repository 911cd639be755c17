"""Tickets: the handles of running stores and loads, and what becomes of them."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtier.arrays import stream_handle
from kvtier.errors import ConfigError, KVTierError
from kvtier.layout import check_extent


class BlockOutcome(IntEnum):
    """What became of one block of a store or load."""

    RUNNING = 0  # not known yet
    STORED = 1  # store: copied, visible
    PRESENT = 2  # store: was in the tier already
    PENDING = 3  # store: somebody else is filling it; load: not ready yet
    DECLINED = 4  # store: no slot could be freed
    LOADED = 5  # load: its bytes are in the pages
    MISSED = 6  # load: not in the tier
    FAILED = 7  # the copy failed: a store left nothing visible, a load left its pages undefined
    DROPPED = 8  # store: dropped by somebody while it was being copied


Outcomes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class LoadResult:
    """What a load did.

    Attributes:
        outcomes: A BlockOutcome for each key [n], uint8.
        valid_blocks: Blocks at the beginning whose bytes are in the pages.
        valid_tokens: The same in tokens.
        error: Why blocks failed, None if none did.
    """

    outcomes: Outcomes
    valid_blocks: int
    valid_tokens: int
    error: KVTierError | None


@dataclass(frozen=True, eq=False)
class StoreResult:
    """What a store did; the counts are blocks and add up to the keys.

    Attributes:
        outcomes: A BlockOutcome for each key [n], uint8.
        stored: Copied; others can hit them.
        present: Were there already.
        pending: Somebody else is storing them.
        declined: No slot could be freed for them.
        failed: The copy failed.
        dropped: Somebody dropped them meanwhile.
        error: Why blocks failed, None if none did.
    """

    outcomes: Outcomes
    stored: int
    present: int
    pending: int
    declined: int
    failed: int
    dropped: int
    error: KVTierError | None


@dataclass(frozen=True)
class FlushResult:
    """What flush() waited for.

    Attributes:
        settled: Stores that ended meanwhile.
        durable: Blocks that became durable since the last flush(); 0 without a disk tier.
        dropped: Blocks that since then were decided not to: declined by admission, write budget or a busy
            drive, evicted before their turn, or failed.
    """

    settled: int
    durable: int
    dropped: int


class NativeTicket(Protocol):
    """kvtier._core.Ticket. Waits release the GIL and end at Ctrl-C."""

    def settled(self, moment: Any) -> bool:
        """Whether a moment was reached or never will be."""

    def wait(self, moment: Any, timeout: float | None = None) -> None:
        """Waits until a moment is settled."""

    def failure(self) -> Any:
        """The first failure as an exception, or None."""

    def outcomes(self) -> Any:
        """A BlockOutcome for each key."""

    def valid_blocks(self) -> int:
        """Blocks at the beginning that are valid."""

    def durable_blocks(self) -> int:
        """Blocks of a store that survive a restart."""

    def wait_stream(self, stream: int) -> None:
        """Orders a stream behind the copies."""

    def wait_layer(self, layer: int, stream: int) -> None:
        """Orders a stream behind one layer's copies."""

    def done_fd(self) -> int:
        """A descriptor that is readable when the ticket is done."""


_FOREVER = 100_000_000  # seconds


def checked_timeout(timeout: object, name: str = "timeout") -> float | None:
    """Returns a timeout in seconds as a float; raises ConfigError if it is not None or 0 or more.

    More than three years are for ever, as None is: what waits below would not take inf.
    """
    if timeout is None:
        return None
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout >= 0:
        return None if timeout >= _FOREVER else float(timeout)
    raise ConfigError(f"{name} is {timeout!r}; allowed: None or seconds of 0 or more")


class Moment:
    """One moment in a ticket's life: `released`, `ready` or `durable`."""

    def __init__(self, native: NativeTicket, moment: Any) -> None:
        self._native = native
        self._moment = moment

    def done(self) -> bool:
        """Whether the moment was reached or never will be; the outcomes say which. Never waits."""
        return self._native.settled(self._moment)

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the moment; releases the GIL, and Ctrl-C ends the wait.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: The time is over. The transfer goes on.
            DeviceError: `released` only: the device cannot prove that its copies are over, so the pages
                must not be reused.
            UnsupportedError: `durable` without a disk tier.
        """
        self._native.wait(self._moment, checked_timeout(timeout))


class Ticket(ABC):
    """A running store or load. Dropping it cancels nothing and releases nothing early.

    Threads: any. It keeps its engine open for as long as it lives, unless that is closed by name.

    Attributes:
        released: No copy of it touches the pages any more; they may be reused.
        ready: A store's blocks can be hit by others, a load's are in the pages. done() and wait() of the
            ticket are about this one.
    """

    def __init__(self, native: NativeTicket, moments: Any, block_tokens: int) -> None:
        self._native = native
        self._block_tokens = block_tokens
        self.released = Moment(native, moments.released)
        self.ready = Moment(native, moments.ready)

    def done(self) -> bool:
        """Whether the transfer is over: copied, failed, or nothing to do. Never waits."""
        return self.ready.done()

    def wait(self, timeout: float | None = None) -> "Ticket":
        """Waits until the transfer is over; releases the GIL, and Ctrl-C ends the wait.

        Args:
            timeout: Seconds, None for as long as it takes.

        Returns:
            The ticket.

        Raises:
            TimeoutError: The time is over. The transfer goes on.
        """
        self.ready.wait(timeout)
        return self

    @abstractmethod
    def result(self) -> LoadResult | StoreResult:
        """Waits as wait(), then says what became of each block; a failed copy is a value, not raised."""

    @abstractmethod
    def __await__(self) -> Generator[Any, None, LoadResult | StoreResult]:
        """Waits in the running event loop, without polling; gives what result() gives.

        Cancelling ends the wait, never the transfer. A ticket may be awaited any number of times.
        """

    async def _until_done(self) -> None:
        if not self.done():
            loop = asyncio.get_running_loop()
            over: asyncio.Future[None] = loop.create_future()
            # A loop has one reader for a descriptor, and a ticket may have several awaits: each has its own.
            fd = os.dup(self._native.done_fd())
            try:
                loop.add_reader(fd, _set_done, over)
                try:
                    await over
                finally:
                    loop.remove_reader(fd)
            finally:
                os.close(fd)

    def wait_stream(self, stream: Any = None) -> None:
        """Makes later work of a framework stream wait for the copies.

        On a device with streams the caller does not wait. On the CPU, where the only stream is the calling
        thread, this waits until the copies have run, without the GIL.

        Args:
            stream: As in Engine.store().

        Raises:
            DeviceError: Nothing was ordered.
            UnsupportedError: A load of which a block still comes from disk: nobody knows yet when its copies
                are given to the device. wait() for it.
        """
        self._native.wait_stream(stream_handle(stream))


def _set_done(over: "asyncio.Future[None]") -> None:
    if not over.done():
        over.set_result(None)


class StoreTicket(Ticket):
    """A running store: pages -> tier.

    Attributes:
        durable: The blocks survive a restart; needs a disk tier.
    """

    def __init__(self, native: NativeTicket, moments: Any, block_tokens: int) -> None:
        super().__init__(native, moments, block_tokens)
        self.durable = Moment(native, moments.durable)

    @property
    def durable_blocks(self) -> int:
        """Blocks that survive a restart, those included that were durable before; final once `durable` is."""
        return self._native.durable_blocks()

    def result(self) -> StoreResult:
        """Waits as wait(), then says what became of each block; a failed copy is a value, not raised."""
        self.wait()
        return self._read()

    def __await__(self) -> Generator[Any, None, StoreResult]:
        """As Ticket.__await__()."""
        yield from self._until_done().__await__()
        return self._read()

    def _read(self) -> StoreResult:
        outcomes: Outcomes = self._native.outcomes()
        counts = np.bincount(outcomes, minlength=len(BlockOutcome)).tolist()
        return StoreResult(
            outcomes=outcomes,
            stored=counts[BlockOutcome.STORED],
            present=counts[BlockOutcome.PRESENT],
            pending=counts[BlockOutcome.PENDING],
            declined=counts[BlockOutcome.DECLINED],
            failed=counts[BlockOutcome.FAILED],
            dropped=counts[BlockOutcome.DROPPED],
            error=self._native.failure(),
        )


class LoadTicket(Ticket):
    """A running load: tier -> pages."""

    def result(self) -> LoadResult:
        """Waits as wait(), then says what became of each block; a failed copy is a value, not raised."""
        self.wait()
        return self._read()

    def __await__(self) -> Generator[Any, None, LoadResult]:
        """As Ticket.__await__()."""
        yield from self._until_done().__await__()
        return self._read()

    def wait_layer(self, layer: int, stream: Any = None) -> None:
        """Makes later work of a framework stream wait for the copies of one layer, as wait_stream().

        Args:
            layer: Index of the layer in its group.
            stream: As in Engine.store().

        Raises:
            ConfigError: There is no such layer.
            UnsupportedError: The load was not asked for as layer-wise.
            DeviceError: Nothing was ordered.
        """
        index = check_extent("layer", layer, 0)
        self._native.wait_layer(index, stream_handle(stream))

    def _read(self) -> LoadResult:
        valid = self._native.valid_blocks()
        return LoadResult(self._native.outcomes(), valid, valid * self._block_tokens, self._native.failure())
