"""PagedSequence: the handle of one sequence, and all that is known of it: tokens, keys, pages, its load.

Made by `kvtier.paged`. What has a private name here is for the cache that made the sequence (and for
`kvtier.page_moves`), which uses and changes it under its lock; the public methods go to the cache (`Owner`).
No tensors, and nothing of the engine but the ticket of a load.
"""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtier.config import Config
from kvtier.costs import Plan
from kvtier.engine import LoadTicket
from kvtier.errors import DeviceError
from kvtier.keys import KeyChain, token_array
from kvtier.page_pool import Appended, Column, Extent, OutOfPages, PagePool


@dataclass(frozen=True, slots=True)
class ExtentSize:
    """What an extent of a cache holds (see `kvtier.page_pool`).

    Attributes:
        tokens: those of a page or of a block, whichever has more.
        pages: 1 where a block is not larger than a page.
        blocks: 1 where a page is not larger than a block.
    """

    tokens: int
    pages: int
    blocks: int

    @classmethod
    def of(cls, page_tokens: int, block_tokens: int) -> "ExtentSize":
        """By the tokens of a page and of a block, one a multiple of the other."""
        tokens = max(page_tokens, block_tokens)
        return cls(tokens, tokens // page_tokens, tokens // block_tokens)


@dataclass(frozen=True, eq=False, slots=True)
class Load:
    """The load that `open` started.

    Attributes:
        ticket: the engine's.
        plan: what decided about it.
        blocks: that it is to bring, behind those that were found in device pages.
        began: `time.monotonic()` before it was started.
    """

    ticket: LoadTicket
    plan: Plan
    blocks: int
    began: float


class Owner(Protocol):
    """What a sequence needs of the cache that made it. The methods take the cache's lock."""

    _config: Config
    _extent: ExtentSize

    def _settle(self, seq: "PagedSequence", load: Load, seconds: float | None) -> None:
        """Takes over the outcome of a load that is over; `seconds`: how long it took, if that is known."""

    def _append(
        self, seq: "PagedSequence", tokens: NDArray[np.int32], stream: object
    ) -> Appended | OutOfPages:
        """`PagedSequence.append`, without the wait."""

    def _commit(self, seq: "PagedSequence", num_tokens: int, stream: object) -> None:
        """`PagedSequence.commit`, without the wait."""

    def _fork(self, seq: "PagedSequence") -> "PagedSequence":
        """`PagedSequence.fork`, without the wait."""

    def _close_sequence(self, seq: "PagedSequence") -> None:
        """`PagedSequence.close`, without the wait."""


class PagedSequence:
    """The pages of one sequence. Made by `PagedKVCache.open` and `fork`; a context manager that closes it.

    Attributes:
        cached_tokens: tokens at the beginning whose KV `open` found; final once `wait` has returned.
        committed_tokens: tokens at the beginning whose KV is in the pages.
    """

    def __init__(
        self,
        cache: Owner,
        tokens: NDArray[np.int32],
        namespace: str,
        chain: KeyChain,
        stream: object,
    ) -> None:
        self._cache = cache
        self._namespace = namespace
        self._chain = chain
        self._tokens = Column(tokens)
        self._keys = Column(np.empty((0, 32), np.uint8))
        self._pages = Column(np.empty(0, np.int32))
        self._extents: list[Extent] = []
        self._published = 0  # extents that were offered to others
        self._stored_blocks = 0  # blocks that were written through, or came from below
        self._load: Load | None = None
        self._broken: DeviceError | None = None
        self._stream = stream  # where the pages were last written
        self._dropped = False  # some of it was dropped from the engine: it is not offered or stored any more
        self._open = True
        self.cached_tokens = 0
        self.committed_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that have a place, computed or not."""
        return self._tokens.size

    @property
    def page_ids(self) -> NDArray[np.int32]:
        """The page of every page_tokens tokens, int32 `[num_pages]`, a copy."""
        ids: NDArray[np.int32] = self._pages.view().copy()
        return ids

    @property
    def ticket(self) -> LoadTicket | None:
        """The load that `open` started and that `wait` has not yet settled, else None."""
        load = self._load
        return None if load is None else load.ticket

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the load that `open` started, if it started one.

        Only then is it known which blocks came; those that did not are left to be computed.

        Args:
            timeout: seconds; None waits without limit. It ends the wait, never the load.

        Returns:
            cached_tokens.

        Raises:
            TimeoutError: the load still runs; call again.
            DeviceError: the device cannot prove that the load's copies are over. The sequence can only be
                closed; its pages are not used again.
        """
        load = self._load
        if load is not None:
            running = not load.ticket.done()
            load.ticket.wait(timeout)
            # Only of a load that ended while it was waited for is it known when it did.
            seconds = time.monotonic() - load.began if running else None
            self._cache._settle(self, load, seconds)
        if self._broken is not None:
            raise self._broken
        return self.cached_tokens

    def append(self, token_ids: ArrayLike, *, stream: object = None) -> Appended | OutOfPages:
        """Makes room for further tokens. Waits for the load of `open`, and for the copies of evicted pages.

        A last extent that is shared with a fork and not full is copied first, in the framework's memory.

        Args:
            token_ids: int32 `[num_tokens]`, or what converts to it.
            stream: where the caller's kernels run.

        Returns:
            The new positions and the pages copied; or OutOfPages, and nothing has changed.

        Raises:
            ConfigError: token ids that are not one row of 32-bit integers.
            ClosedError: the sequence or the cache is closed.
        """
        self.wait()
        return self._cache._append(self, token_array(token_ids), stream)

    def commit(self, num_tokens: int | None = None, *, stream: object = None) -> None:
        """Says that the KV of the first `num_tokens` tokens (None: all) has been written to the pages.

        Full extents become matchable; with write="through" full blocks are stored to the host. Waits only for
        the load of `open`. Where it raises, nothing has changed.

        Args:
            num_tokens: tokens, not fewer than before.
            stream: where the kernels that wrote them run; stores are ordered behind it, that of `close` too.

        Raises:
            ConfigError: fewer tokens than before, or more than there are; with write="through" also a stream
                that is none.
            ClosedError: the sequence or the cache is closed; with write="through" the engine.
        """
        self.wait()
        self._cache._commit(self, self.num_tokens if num_tokens is None else num_tokens, stream)

    def fork(self) -> "PagedSequence":
        """A second sequence with the same tokens in the same pages. Waits for the load of `open`.

        Raises:
            ConfigError: not all tokens are committed (both would write them).
            ClosedError: the sequence or the cache is closed.
        """
        self.wait()
        return self._cache._fork(self)

    def close(self) -> None:
        """Gives the pages back, the tail to be reused first. Waits for the load of `open`. Idempotent.

        Whole blocks of a last page that is not full are stored to the host, behind the stream of the last
        `commit` (or copy on write): it has to live until then.
        """
        if self._load is not None:
            with contextlib.suppress(DeviceError):  # wait() has noted it: the pages are quarantined
                self.wait()
        self._cache._close_sequence(self)

    def __enter__(self) -> "PagedSequence":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _extend_keys(self) -> None:
        """Makes the keys of whole blocks that have none yet."""
        keys, tokens = self._keys.view(), self._tokens.view()
        if len(tokens) // self._chain.block_tokens > len(keys):
            self._keys.replace(len(keys), self._chain.more(tokens, keys))

    def _known_keys(self) -> NDArray[np.uint8]:
        """Keys of the blocks whose KV is there or being loaded, uint8 `[num_blocks, 32]`, not a copy."""
        loading = 0 if self._load is None else self._load.blocks
        known = self.committed_tokens // self._cache._config.block_tokens + loading
        self._extend_keys()
        keys: NDArray[np.uint8] = self._keys.view()[:known]
        return keys

    def _block_pages(self, begin: int, end: int) -> NDArray[np.int64]:
        """Page ids of blocks `[begin, end)` as `Engine.store` takes them: pages_per_block of each, int64."""
        size = self._cache._extent
        pages = self._pages.view()
        if size.blocks == 1:
            pages = pages[begin * size.pages : end * size.pages]
        else:
            pages = pages[np.arange(begin, end) // size.blocks]
        return pages.astype(np.int64)

    def _block_extents(self, begin: int, end: int) -> list[Extent]:
        """The extents that blocks `[begin, end)` are in."""
        blocks = self._cache._extent.blocks
        return self._extents[begin // blocks : -(-end // blocks)]

    def _add_pages(self, shared: Sequence[Extent], fresh: Sequence[int]) -> None:
        """Puts shared extents, then fresh pages behind what the sequence has."""
        most = self._cache._extent.pages
        ids = [page for extent in shared for page in extent.pages]
        self._pages.replace(self._pages.size, [*ids, *fresh])
        self._extents.extend(shared)
        rest = list(fresh)
        if self._extents and len(last := self._extents[-1].pages) < most:
            room = most - len(last)
            last.extend(rest[:room])
            del rest[:room]
        for at in range(0, len(rest), most):
            self._extents.append(Extent(rest[at : at + most], namespace=self._namespace))

    def _publish(self, pool: PagePool) -> None:
        """Offers the extents that have become full of committed tokens."""
        if self._dropped:
            return
        size = self._cache._extent
        keys = self._keys.view()
        step = size.blocks
        for at in range(self._published, self.committed_tokens // size.tokens):
            extent = self._extents[at]
            if extent.key is None:
                pool.publish(extent, keys[(at + 1) * step - 1].tobytes())
                extent.block_keys = keys[at * step : (at + 1) * step].copy()
                extent.first_block = at * step
                extent.parent = keys[at * step - 1].tobytes() if at else None
            self._published = at + 1

    def _twin(self) -> "PagedSequence":
        """A second sequence like this one, which has no load, in the same extents; it does not hold them."""
        twin = PagedSequence(self._cache, self._tokens.view(), self._namespace, self._chain, self._stream)
        twin._keys = Column(self._keys.view())
        twin._pages = Column(self._pages.view())
        twin._extents = list(self._extents)
        twin._published = self._published
        twin._stored_blocks = self._stored_blocks
        twin._dropped = self._dropped
        twin.cached_tokens = self.cached_tokens
        twin.committed_tokens = self.committed_tokens
        return twin
