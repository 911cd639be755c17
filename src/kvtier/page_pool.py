r"""Who holds which device page: the bookkeeping of `kvtier.paged`, without engine and tensors.

Pages are handled in *extents*: the pages of `max(page_tokens, block_tokens)` consecutive tokens, the smallest
run that is both whole pages and whole blocks. Sharing, eviction and copy-on-write are by extent; where
`page_tokens >= block_tokens` an extent is one page. A page is in at most one extent, and in one state:

    free --take--> used (refs > 0) --release--> cached (refs == 0, waits in the LRU order) --reclaim--> free
                        \--release of a private extent--> free                 \--reclaim--> quarantined

An extent gets a key when the KV of all its tokens is known to be there; only then can others find it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtier.costs import CostStats
from kvtier.errors import DeviceError


@dataclass(frozen=True, slots=True)
class OutOfPages:
    """Not enough pages. False in a condition. Whoever returns it has changed nothing.

    Attributes:
        needed: pages the call would have had to take.
        available: pages that are free or only cached.
    """

    needed: int
    available: int

    def __bool__(self) -> Literal[False]:
        return False


@dataclass(frozen=True, slots=True)
class Appended:
    """Room for further tokens.

    Attributes:
        begin, end: the token positions `[begin, end)` that were added.
        copied: (from page, to page) of the copy-on-write that this took, usually none.
    """

    begin: int
    end: int
    copied: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PagedStats:
    """One consistent snapshot. Pages: free + used + cached + quarantined = num_pages.

    Tokens: prompt = device + host + missed + loading.

    Attributes:
        num_pages: all pages.
        free_pages: hold nothing.
        used_pages: held by an open sequence.
        cached_pages: held by none; they can be matched, or wait for the end of a store.
        quarantined_pages: never used again, because a copy may still write or read them.
        sequences: open sequences.
        prompt_tokens: tokens of all `open` calls that got pages.
        device_tokens: of these, found in device pages.
        host_tokens: of these, loaded from the host.
        missed_tokens: of these, left to be computed.
        loading_tokens: of these, in loads that nobody has waited for yet.
        evicted_pages: cached pages that were given to somebody else.
        copied_pages: pages copied on write.
        costs: what was decided about hits: to load them, or to leave them to be computed.
    """

    num_pages: int
    free_pages: int
    used_pages: int
    cached_pages: int
    quarantined_pages: int
    sequences: int
    prompt_tokens: int
    device_tokens: int
    host_tokens: int
    missed_tokens: int
    loading_tokens: int
    evicted_pages: int
    copied_pages: int
    costs: CostStats


class Column:
    """An array that grows at its end in amortised constant time.

    Threads: one at a time may `replace`; others may read meanwhile and see only what has been filled in.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._buffer = values.copy()
        self._held: NDArray[Any] = self._buffer  # the part that is filled

    @property
    def size(self) -> int:
        """Rows that it holds."""
        return len(self._held)

    def view(self) -> NDArray[Any]:
        """What it holds, valid until the next `replace`."""
        return self._held

    def replace(self, begin: int, values: ArrayLike) -> None:
        """Everything from `begin` on becomes `values`."""
        rows = np.asarray(values, dtype=self._buffer.dtype).reshape(-1, *self._buffer.shape[1:])
        end = begin + len(rows)
        if end > len(self._buffer):
            grown = np.empty((max(2 * len(self._buffer), end), *self._buffer.shape[1:]), rows.dtype)
            grown[:begin] = self._buffer[:begin]
            self._buffer = grown
        self._buffer[begin:end] = rows
        self._held = self._buffer[:end]  # last, and at once: readers take no lock


class Released(Protocol):
    """The `released` moment of a store ticket: after it the pages may be written again."""

    def done(self) -> bool:
        """Whether the moment is settled. Does not wait."""
        ...

    def wait(self, timeout: float | None = None) -> object:
        """Waits until it is settled; raises DeviceError when it cannot be proved that the copies are over."""
        ...


@dataclass(eq=False, slots=True)
class Extent:
    """Pages that are shared, evicted and copied as one. Equal only to itself.

    Attributes:
        pages: page ids, in token order.
        refs: sequences that hold it.
        key: the name others find it by; None while it is private.
        block_keys: uint8 `[num_blocks, 32]`, its whole blocks whose KV is there; None while not known.
        first_block: depth of block_keys[0] in its sequence.
        parent: the key of the block before; None at the beginning of a sequence.
        namespace: of its sequences.
        stores: running stores that read the pages.
        lost: a copy into the pages, or out of them, may still run; they must never be used again.
    """

    pages: list[int]
    refs: int = 1
    key: bytes | None = None
    block_keys: NDArray[np.uint8] | None = None
    first_block: int = 0
    parent: bytes | None = None
    namespace: str = ""
    stores: list[Released] = field(default_factory=list)
    lost: bool = False

    def settle_stores(self, *, running: Literal["wait", "keep"]) -> None:
        """Forgets the stores that no longer read the pages; marks the extent lost where one cannot tell.

        Args:
            running: "wait" waits for those still running, "keep" leaves them be.
        """
        kept = []
        for moment in self.stores:
            if running == "keep" and not moment.done():
                kept.append(moment)
                continue
            try:
                moment.wait()
            except DeviceError:
                self.lost = True
        self.stores = kept


class PagePool:
    """Free, used, cached and quarantined pages: `free + used + cached + quarantined = num_pages`.

    Threads: none of its own; the owner's lock guards it. Never waits.

    Args:
        num_pages: page ids are 0 to num_pages - 1.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_cached = 0
        self.num_quarantined = 0
        self._free = list(range(num_pages - 1, -1, -1))  # the last freed page is the next one used
        self._lru: OrderedDict[Extent, None] = OrderedDict()  # refs == 0, oldest first
        self._by_key: dict[bytes, Extent] = {}

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that a sequence holds."""
        return self.num_pages - self.num_free - self.num_cached - self.num_quarantined

    @property
    def cached(self) -> Iterable[Extent]:
        """Extents that nobody holds, least recently used first."""
        return self._lru.keys()

    @property
    def shareable(self) -> Iterable[Extent]:
        """Extents that have a key, held or not."""
        return self._by_key.values()

    def find(self, key: bytes) -> Extent | None:
        """The extent of that key. Changes no order."""
        return self._by_key.get(key)

    def num_available(self, wanted: Iterable[Extent] = ()) -> int:
        """Pages that `take` and `reclaim` can give while the extents of `wanted` stay."""
        return self.num_free + self.num_cached - sum(len(e.pages) for e in wanted if e.refs == 0)

    def hold(self, extent: Extent) -> None:
        """Adds a holder."""
        if extent.refs == 0:
            del self._lru[extent]
            self.num_cached -= len(extent.pages)
        extent.refs += 1

    def release(self, extent: Extent) -> None:
        """Takes a holder away. After the last one a shareable extent becomes the most recently used.

        A private one is free at once, except while a store reads it: then it waits at the oldest end.
        """
        extent.refs -= 1
        if extent.refs == 0:
            self._put_by(extent)

    def _put_by(self, extent: Extent) -> None:
        """Caches or frees an extent that has no holder."""
        extent.settle_stores(running="keep")
        keep = extent.key is not None and not extent.lost
        if keep or (extent.stores and not extent.lost):
            self._lru[extent] = None
            self._lru.move_to_end(extent, last=keep)
            self.num_cached += len(extent.pages)
        else:
            self._dispose(extent)

    def publish(self, extent: Extent, key: bytes) -> None:
        """Lets others find the extent, unless another one already has that key: then it stays private."""
        if key not in self._by_key:
            self._by_key[key] = extent
            extent.key = key

    def unpublish(self, extent: Extent) -> None:
        """Nobody finds the extent any more. Without a holder it goes the way of a private one."""
        if extent.key is not None:
            del self._by_key[extent.key]
            extent.key = None
        if extent.refs == 0:
            del self._lru[extent]
            self.num_cached -= len(extent.pages)
            self._put_by(extent)

    def take(self, count: int) -> list[int]:
        """`count` free pages.

        Raises:
            IndexError: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise IndexError(f"{count} pages wanted, {len(self._free)} free")
        cut = len(self._free) - count
        pages = self._free[cut:]
        del self._free[cut:]
        pages.reverse()
        return pages

    def give(self, pages: Sequence[int]) -> None:
        """Returns pages that `take` gave and that no extent has."""
        self._free.extend(reversed(pages))

    def oldest(self, count: int) -> list[Extent]:
        """The least recently used extents that have `count` pages together, or all there are."""
        victims: list[Extent] = []
        for extent in self._lru:
            if count <= 0:
                break
            victims.append(extent)
            count -= len(extent.pages)
        return victims

    def reclaim(self, extent: Extent) -> None:
        """Frees the pages of a cached extent, or quarantines them when it is lost; its key finds nothing."""
        del self._lru[extent]
        self.num_cached -= len(extent.pages)
        if extent.key is not None:
            del self._by_key[extent.key]
            extent.key = None
        self._dispose(extent)

    def _dispose(self, extent: Extent) -> None:
        if extent.key is not None:
            del self._by_key[extent.key]
            extent.key = None
        if extent.lost:
            self.num_quarantined += len(extent.pages)
        else:
            self._free.extend(reversed(extent.pages))
