"""What an engine hands out beside tickets: Pages, Match, Lease, Events. Thin faces of the core's objects."""

from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvtier.config import Config
from kvtier.errors import ConfigError
from kvtier.keys import Keys
from kvtier.layout import KVLayout, check_extent
from kvtier.tickets import checked_timeout

States = npt.NDArray[np.uint8]


class BlockState(IntEnum):
    """State of one key in one group."""

    MISS = 0
    PENDING = 1
    READY = 2


class Tier(IntEnum):
    """Where a block is."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    NONE = 255


_ON_DISK = 3
# The core's states: miss, pending, ready in the host tier, ready on disk.
_TIER_OF_STATE: States = np.array([Tier.NONE, Tier.NONE, Tier.HOST, Tier.DISK], dtype=np.uint8)


def checked_ttl_us(ttl: float | None) -> int | None:
    """Microseconds of a time to live in seconds; None is for ever.

    Raises:
        ConfigError: Not a number of 0 or more.
    """
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not ttl >= 0):
        raise ConfigError(f"ttl is {ttl!r}; allowed: None or seconds of 0 or more")
    return None if ttl is None else int(min(ttl, 2.0**42) * 1e6)


class EventKind(IntEnum):
    """What became of a block in one tier."""

    STORED = 0  # a lookup can hit it there from now on: stored, written to a drive, or read from one
    EVICTED = 1  # it made room for another
    DROPPED = 2  # Engine.drop()
    FAILED = 3  # what was read of it did not prove to be it
    EXPIRED = 4  # its time to live was over
    RESET = 5  # Engine.reset(): no call finds what was announced before; names no block


@dataclass(frozen=True, eq=False)
class Events:
    """Which blocks came into and left the tiers, oldest first; row i of each array is one event.

    Attributes:
        keys: Key of the block, uint8 [n, 32].
        groups: Index into Config.groups, uint16 [n].
        tiers: Tier.HOST or Tier.DISK, uint8 [n].
        kinds: EventKind, uint8 [n].
        lost: Events before the first of these that nobody came for in time. If there are any, what was
            learned from events is no longer all: only lookup() knows.
    """

    keys: Keys
    groups: npt.NDArray[np.uint16]
    tiers: npt.NDArray[np.uint8]
    kinds: npt.NDArray[np.uint8]
    lost: int

    def __len__(self) -> int:
        return len(self.kinds)


class NativeLease(Protocol):
    """kvtier._core.Lease."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the pinned prefix."""

    @property
    def active(self) -> bool:
        """Whether the pins hold."""

    def release(self) -> None:
        """Lets go of the pins."""


class NativeEngine(Protocol):
    """What is needed of kvtier._core.Engine here. Calls release the GIL."""

    def detach(self, pages: Any, timeout: float | None) -> None:
        """Waits until no copy touches the pages."""

    def pin(self, keys: Keys, match: Any, ttl_us: int | None) -> NativeLease:
        """Pins what is still ready of the prefix."""

    def cancel_prefetch(self, ticket: Any) -> int:
        """Gives up reads that have not begun."""


class Pages:
    """Tensors of a framework, attached to an engine as the pages of one group. Made by Engine.attach().

    The engine keeps the tensors alive until detach() or Engine.close() has returned, whatever Python drops.

    Attributes:
        num_pages: Pages there are; ids are below.
        layout: Layout of the group.
        group: Index into Config.groups.
    """

    def __init__(self, engine: NativeEngine, native: Any, layout: KVLayout, group: int) -> None:
        self._engine = engine
        self._native = native
        self.num_pages: int = native.num_pages
        self.layout = layout
        self.group = group

    @property
    def attached(self) -> bool:
        """Whether transfers are still accepted."""
        return bool(self._native.attached)

    def detach(self, timeout: float | None = None) -> None:
        """Refuses further transfers and waits, without the GIL, until none touches the pages. Idempotent.

        Args:
            timeout: Seconds, None for as long as it takes.

        Raises:
            TimeoutError: Copies still run: the tensors must not be freed yet; call again.
            DeviceError: The device cannot prove that its copies are over: the tensors must never be freed.
        """
        self._engine.detach(self._native, checked_timeout(timeout))


class Lease:
    """Pins on the ready prefix of a Match: while it is active its blocks are not evicted. Threads: any.

    Ends with release(), with the `with` block, when its time to live is over, when it is dropped, or with
    Engine.close().
    """

    def __init__(self, native: NativeLease, keys: Keys) -> None:
        self._native = native
        self.keys = keys[: native.num_blocks]

    @property
    def num_blocks(self) -> int:
        """Blocks of the prefix; fewer than Match.ready_blocks if some were evicted since."""
        return len(self.keys)

    @property
    def active(self) -> bool:
        """Whether the blocks are still pinned."""
        return self._native.active

    def release(self) -> None:
        """Lets the blocks be evicted again. Idempotent; running loads are not affected."""
        self._native.release()

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Match:
    """What lookup() found. Advisory: nothing holds the blocks until they are pinned or loaded.

    Attributes:
        keys: The keys [n, 32] that were looked up.
        ready_blocks: Longest prefix that every group can restore. A sliding window needs only the blocks
            that it reaches back to.
    """

    def __init__(self, engine: NativeEngine, config: Config, keys: Keys, native: Any) -> None:
        self._engine = engine
        self._native = native
        self._block_tokens = config.block_tokens
        self.keys = keys
        self.ready_blocks: int = native.ready_blocks
        self._states: list[States] = native.states

    @property
    def ready_tokens(self) -> int:
        """The ready prefix in tokens."""
        return self.ready_blocks * self._block_tokens

    def states(self, group: int = 0) -> States:
        """A BlockState for each key [n] in one group. READY says that a load will get it, from any tier."""
        states: States = np.minimum(self._native_states(group), np.uint8(BlockState.READY))
        return states

    def _native_states(self, group: int) -> States:
        return self._states[check_extent("group", group, 0, len(self._states) - 1)]

    def tiers(self, group: int = 0) -> States:
        """For each key [n] the fastest Tier that has it ready in one group, else Tier.NONE."""
        return _TIER_OF_STATE[self._native_states(group)]

    def on_disk(self, group: int = 0) -> npt.NDArray[np.bool_]:
        """For each key [n] whether it is ready in one group, and in no faster tier than the disk."""
        on_disk: npt.NDArray[np.bool_] = self._native_states(group) == _ON_DISK
        return on_disk

    def pin(self, ttl: float | None = None) -> Lease:
        """Pins what is still ready of the prefix, in every group, and refreshes it. Never waits for copies.

        Args:
            ttl: Seconds until the pins end by themselves, None for never.

        Raises:
            ConfigError: `ttl` is not a number of 0 or more.
            ClosedError: The engine is closed.
        """
        return Lease(self._engine.pin(self.keys, self._native, checked_ttl_us(ttl)), self.keys)


class Prefetch:
    """Blocks on their way from disk to the host tier. Made by Engine.prefetch(). Threads: any.

    Dropping it cancels nothing.
    """

    def __init__(self, engine: NativeEngine, native: Any, ready: Any, num_groups: int) -> None:
        self._engine = engine
        self._native = native
        self._ready = ready  # the core's Moment.ready
        self._num_groups = num_groups

    def done(self) -> bool:
        """Whether every block is in the host tier, or is not to be had. Never waits."""
        return bool(self._native.settled(self._ready))

    def wait(self, timeout: float | None = None) -> "Prefetch":
        """Waits, without the GIL, until done(); Ctrl-C ends the wait.

        Raises:
            TimeoutError: The time is over. The reads go on.
        """
        self._native.wait(self._ready, checked_timeout(timeout))
        return self

    def ready_blocks(self) -> int:
        """Blocks at the beginning that came into the host tier, in every group. 0 until done()."""
        return int(self._native.valid_blocks()) // self._num_groups

    def cancel(self) -> int:
        """Gives up what no drive has begun to read and nobody else waits for.

        Returns:
            Blocks, summed over groups, that are not read.
        """
        return self._engine.cancel_prefetch(self._native)


class Expected:
    """A request that waits, and the blocks that it will want. Made by Engine.expect(). Threads: any.

    Ends with end(), with the `with` block, or when it is dropped.

    Attributes:
        prefetch: What of it is on its way from disk; None where expect() was told not to read.
    """

    def __init__(self, native: Any, prefetch: Prefetch | None) -> None:
        self._native = native
        self.prefetch = prefetch

    def end(self) -> None:
        """The request runs, or was given up. Idempotent; what is being read goes on."""
        self._native.end()

    def __enter__(self) -> "Expected":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
