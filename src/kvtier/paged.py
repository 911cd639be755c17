"""PagedKVCache: the device tier, for servers that have no block manager of their own.

It owns the pages of one cache group (which sequence holds which, what is cached in them), and hands out what
paged-attention kernels take. What falls out of the device goes to the engine's host tier and comes back from
there; a sequence only computes what neither has.

    seq = cache.open(prompt)              # shares pages, starts to load what only the host has
    if not seq: ...                       # OutOfPages: a value, and nothing has changed
    done = seq.wait()                     # tokens whose KV is there; compute prompt[done:]
    slots = cache.slot_mapping([seq])     # where their KV goes
    seq.commit()                          # it is there now: full blocks become shareable
    seq.append([token])                   # a page for the next one
    seq.close()                           # pages stay matchable until they are needed

Prefix sharing follows PagedAttention (arXiv:2309.06180, section 4.3). Departures: sharing is by extent (see
`kvtier.page_pool`), eviction demotes to the engine, and a page is reused only after the demotion's copy has
been proved to be over.

Threads: every method from any thread; one lock guards a cache and all its sequences. It is held while an
eviction's copy to the host runs, never while a load is waited for. In a forked child every call that needs
a lock raises ClosedError.

Drops: what `Engine.drop` and `reset` take away (the control socket's purge too) is not matched in device
pages either, nor stored from there. Sequences that are open then run on with what they hold; nothing of them
is shared or stored any more if their namespace was dropped, or a block that they had, or all was reset.

Streams: `stream` is the framework's stream on which the caller reads and writes the pages (None: its default
stream); copy-on-write runs on the framework's *current* stream, so call under the stream that you name.
Evicted pages are copied behind the stream of the call that needs them: whoever writes pages on several
streams orders these himself.

Rooms: `kvtier.page_pool` knows who has which page; `kvtier.paged_sequence` is a sequence's handle and what is
known of it; `kvtier.page_moves` loads, stores, copies and applies drops; `kvtier.page_tables` makes the
arrays for kernels. This one brings them together, under the lock.
"""

import contextlib
import os
import threading
from collections.abc import Sequence as Seq
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvtier.costs import LoadPlanner, LoadPolicy, Regret, pairs
from kvtier.engine import Engine
from kvtier.errors import ClosedError, ConfigError, KVTierError
from kvtier.keys import KeyChain, check_namespace, token_array
from kvtier.layout import KVLayout, check_extent
from kvtier.page_moves import (
    apply_drops,
    attach_tensors,
    copy_pages,
    end_load,
    plan_load,
    start_load,
    store_blocks,
    store_extents,
)
from kvtier.page_pool import Appended, Extent, OutOfPages, PagedStats, PagePool
from kvtier.page_tables import block_table, csr, slot_mapping
from kvtier.paged_sequence import ExtentSize, Load, PagedSequence

__all__ = ["Appended", "OutOfPages", "PagedKVCache", "PagedSequence", "PagedStats"]


class PagedKVCache:
    """Device pages of one cache group, matched by prefix, shared, and evicted to the host in LRU order.

    Args:
        engine: borrowed; close the cache before it.
        num_pages: pages to allocate with torch, zeroed. Per layer, by the layout's page_order: "KTHD" (NHD)
            `[num_pages, 2, page_tokens, num_kv_heads, head_dim]`, "KHTD" (HND) `[num_pages, 2, num_kv_heads,
            page_tokens, head_dim]`, "TD" (MLA) `[num_pages, page_tokens, latent_dim]`.
        pages: instead, the caller's tensors, as `Engine.attach` takes them (all their pages are used); but
            none that are only an address: copy-on-write indexes them as NumPy does, `t[:, [7]] = t[:, [3]]`.
        group: the cache group.
        axes: of `pages`, as in `Engine.attach`.
        device: torch's name of where to allocate, "cpu", "cuda", "cuda:1"; or a device of `kvtier.testing` on
            which `pages` lie.
        write: "evict" stores a block to the host when its page is needed, "through" when it is committed.
        load: "auto" leaves blocks to be computed where loading them is predicted to take longer
            (docs/costs.md); until `observe_prefill` was called a few times, and with "always", whatever is
            found is loaded.
        namespace: of sequences that are opened without one.

    Raises:
        ConfigError: neither or both of num_pages and pages; pages that do not fit, or that cannot be copied
            by index; a group that the engine does not have; a dtype or device that torch does not have; a
            namespace that is no str.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        num_pages: int | None = None,
        pages: Any = None,
        group: int = 0,
        axes: str | None = None,
        device: object = "cpu",
        write: Literal["evict", "through"] = "evict",
        load: LoadPolicy = "auto",
        namespace: str = "",
    ) -> None:
        if (num_pages is None) == (pages is None):
            raise ConfigError("num_pages, pages: exactly one of the two is wanted")
        if write not in ("evict", "through"):
            raise ConfigError(f"write: {write!r}; allowed: 'evict', 'through'")
        namespace = check_namespace(namespace)
        planner = LoadPlanner(engine.hops, load)
        groups = engine.config.groups
        group = check_extent("group", group, 0, len(groups) - 1)
        layout = groups[group]
        self._engine = engine
        self._config = engine.config
        self._write = write
        self._namespace = namespace
        self._axes = axes if axes is not None else "P" + layout.page_order
        self.page_tokens = layout.page_tokens
        self.block_tokens = engine.config.block_tokens
        self._extent = ExtentSize.of(self.page_tokens, self.block_tokens)
        tensors = _allocate(layout, num_pages, device) if pages is None else pages
        on = None if isinstance(device, str) else device
        self._tensors, self._attached = attach_tensors(engine, tensors, group, self._axes, on)
        self._dropped_log = engine.dropped_log()
        self._pool = PagePool(self._attached.num_pages)
        self._planner = planner
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._sequences: set[PagedSequence] = set()
        self._closed = False
        self._prompt_tokens = self._device_tokens = self._host_tokens = self._missed_tokens = 0
        self._evicted_pages = self._copied_pages = 0

    # --- sequences ------------------------------------------------------------------------------------

    def open(
        self, token_ids: ArrayLike, *, namespace: str | None = None, extra: Any = None, stream: object = None
    ) -> PagedSequence | OutOfPages:
        """Pages for a prompt, as many as possible with the KV already there.

        Looks for the longest prefix in device pages (whole extents, shared), behind it for blocks in the
        host, and starts to load these into fresh pages. At least one token is always left to compute. Waits
        for the copies of pages it has to evict, not for the load: `PagedSequence.wait`.

        Args:
            token_ids: int32 `[num_tokens]`, or what converts to it.
            namespace: as in `block_keys`; None is the cache's own.
            extra: as in `block_keys`; its ranges may reach beyond the prompt, over tokens appended later.
            stream: where the caller's kernels run.

        Returns:
            The sequence; or OutOfPages, and nothing has changed.

        Raises:
            ConfigError: no token, or token ids that are not one row of 32-bit integers; a namespace or an
                extra that `block_keys` would not take.
            ClosedError: the cache or the engine is closed.
        """
        tokens = token_array(token_ids)
        if len(tokens) == 0:
            raise ConfigError("token_ids is empty; allowed: at least one token")
        namespace = self._namespace if namespace is None else namespace
        seq = PagedSequence(self, tokens, namespace, KeyChain.of(self._config, namespace, extra), stream)
        seq._extend_keys()
        keys = seq._keys.view()
        usable = min(len(keys), (len(tokens) - 1) // self.block_tokens)
        with self._locked():
            self._check_open()
            self._apply_drops()
            shared = self._match_device(keys[:usable])
            first = len(shared) * self._extent.blocks
            needed = -(-len(tokens) // self.page_tokens) - len(shared) * self._extent.pages
            available = self._pool.num_available(shared)
            if needed > available:
                return OutOfPages(needed, available)
            match = self._engine.lookup(keys[first:usable], record=False) if first < usable else None
            for extent in shared:
                self._pool.hold(extent)
            seq.cached_tokens = seq.committed_tokens = first * self.block_tokens
            seq._published = len(shared)
            seq._stored_blocks = first
            fresh: list[int] = []
            loading = False
            self._sequences.add(seq)  # already: what is dropped meanwhile concerns it
            try:
                lease = match.pin() if match is not None else None  # lest our own evictions push them out
                try:
                    taken = self._take(needed, stream)
                    if isinstance(taken, OutOfPages):
                        self._sequences.discard(seq)
                        self._release(shared)
                        return taken
                    fresh = taken
                    seq._add_pages(shared, fresh)
                    plan = None if match is None else plan_load(self._planner, match, self._attached, seq)
                    if plan is not None:
                        loading = True
                        seq._load = start_load(self._engine, self._attached, seq, plan, stream)
                finally:
                    if lease is not None:
                        lease.release()
            except BaseException as error:
                self._sequences.discard(seq)
                if loading and (seq._load is not None or not isinstance(error, KVTierError)):
                    for extent in seq._extents[len(shared) :]:
                        extent.lost = True  # its copies may have begun, and there is nothing to wait for
                    self._release(seq._extents)
                else:
                    self._pool.give(fresh)
                    self._release(shared)
                raise
            self._prompt_tokens += len(tokens)
            self._device_tokens += seq.cached_tokens
            if seq._load is None:
                self._missed_tokens += len(tokens) - seq.cached_tokens
        self._engine.record(keys)
        return seq

    def _match_device(self, keys: NDArray[np.uint8]) -> list[Extent]:
        """Extents of the longest prefix that is in device pages."""
        found: list[Extent] = []
        for key in keys[self._extent.blocks - 1 :: self._extent.blocks]:
            extent = self._pool.find(key.tobytes())
            if extent is None:
                break
            found.append(extent)
        return found

    def _settle(self, seq: PagedSequence, load: Load, seconds: float | None) -> None:
        """Takes over the outcome of a load that is over; `seconds`: how long it took, if that is known."""
        with self._locked():
            if seq._load is not load:
                return  # another thread did
            valid = end_load(seq, load)
            if seconds is not None and valid == load.blocks:
                self._planner.settle(load.plan, seconds)
            if not seq._open:
                return
            there = seq.committed_tokens // self.block_tokens + valid
            seq.cached_tokens = seq.committed_tokens = there * self.block_tokens
            seq._stored_blocks = there
            self._host_tokens += valid * self.block_tokens
            self._missed_tokens += seq.num_tokens - seq.cached_tokens
            self._apply_drops()
            if seq._broken is None:
                seq._publish(self._pool)

    def _append(self, seq: PagedSequence, tokens: NDArray[np.int32], stream: object) -> Appended | OutOfPages:
        with self._locked():
            self._check_open(seq)
            begin, end = seq.num_tokens, seq.num_tokens + len(tokens)
            if begin == end:
                return Appended(begin, end)
            copy = begin % self._extent.tokens != 0 and seq._extents[-1].refs > 1
            kept = len(seq._extents) - 1 if copy else len(seq._extents)
            kept_pages = kept * self._extent.pages if copy else seq._pages.size
            needed = -(-end // self.page_tokens) - kept_pages
            taken = self._take(needed, stream)
            if isinstance(taken, OutOfPages):
                return taken
            copied: tuple[tuple[int, int], ...] = ()
            if copy:
                old = seq._extents[-1]
                copied = tuple(zip(old.pages, taken, strict=False))
                try:
                    copy_pages(self._tensors, self._axes, copied)
                except BaseException:
                    self._pool.give(taken)
                    raise
                seq._stream = stream
                del seq._extents[-1]
                seq._pages.replace(kept_pages, ())
                self._pool.release(old)
                self._copied_pages += len(copied)
            seq._add_pages([], taken)
            seq._tokens.replace(begin, tokens)
            return Appended(begin, end, copied)

    def _commit(self, seq: PagedSequence, num_tokens: int, stream: object) -> None:
        with self._locked():
            self._check_open(seq)
            if not seq.committed_tokens <= num_tokens <= seq.num_tokens:
                allowed = f"{seq.committed_tokens} to {seq.num_tokens}"
                raise ConfigError(f"num_tokens: {num_tokens}; allowed: {allowed}")
            self._apply_drops()
            seq._extend_keys()
            begin, end = seq._stored_blocks, num_tokens // self.block_tokens
            if self._write == "through" and begin < end:
                self._store_blocks(seq, begin, end, stream)  # what can fail comes before what changes
                seq._stored_blocks = end
            seq.committed_tokens = num_tokens
            seq._stream = stream
            seq._publish(self._pool)

    def _fork(self, seq: PagedSequence) -> PagedSequence:
        with self._locked():
            self._check_open(seq)
            if seq.committed_tokens != seq.num_tokens:
                left = seq.num_tokens - seq.committed_tokens
                raise ConfigError(f"fork: {left} tokens are not committed; commit them first")
            twin = seq._twin()
            for extent in twin._extents:
                self._pool.hold(extent)
            self._sequences.add(twin)
            return twin

    def _close_sequence(self, seq: PagedSequence) -> None:
        with self._locked():
            if not seq._open:
                return
            seq._open = False
            try:
                if not self._closed:
                    self._store_tail(seq)
            finally:
                self._sequences.discard(seq)  # not before: what was dropped concerns its tail
                if not self._closed:
                    self._release(seq._extents)

    def _store_tail(self, seq: PagedSequence) -> None:
        """Stores the whole blocks of a last page that is not full: nobody could share it."""
        begin = seq._published * self._extent.blocks
        end = seq.committed_tokens // self.block_tokens
        if begin < end and seq._extents[seq._published].refs == 1 and seq._broken is None:
            seq._extend_keys()
            with contextlib.suppress(ClosedError):  # then nobody wants them any more
                self._store_blocks(seq, begin, end, seq._stream)

    def _store_blocks(self, seq: PagedSequence, begin: int, end: int, stream: object) -> None:
        """Starts to store the sequence's blocks `[begin, end)`, unless they were dropped."""
        with self._engine.no_drop():
            self._apply_drops()
            if not seq._dropped:
                store_blocks(self._engine, self._attached, seq, begin, end, stream)

    def _apply_drops(self) -> None:
        """Hides what was dropped from the engine since the last time."""
        apply_drops(self._dropped_log, self._pool, self._sequences)

    def _release(self, extents: Seq[Extent]) -> None:
        for extent in reversed(extents):
            self._pool.release(extent)

    # --- pages ----------------------------------------------------------------------------------------

    def _take(self, count: int, stream: object) -> list[int] | OutOfPages:
        """Free pages, evicting cached ones where it must. Waits for the copies of what it evicts."""
        available = self._pool.num_available()
        if count > available:
            return OutOfPages(count, available)
        while count > self._pool.num_free:
            with self._engine.no_drop():
                self._apply_drops()  # which may free enough
                victims = self._pool.oldest(count - self._pool.num_free)
                keyed = [extent for extent in victims if extent.key is not None]
                store_extents(self._engine, self._attached, keyed, stream)
            if not victims and count > self._pool.num_free:  # some went to quarantine
                return OutOfPages(count, self._pool.num_available())
            for extent in victims:
                extent.settle_stores(running="wait")
                self._evicted_pages += len(extent.pages)
                self._pool.reclaim(extent)
        return self._pool.take(count)

    # --- what kernels take ----------------------------------------------------------------------------

    def layer(self, index: int) -> Any:
        """The tensor of one layer (of `pages`, the index-th), its shape as the class says.

        Where a tensor holds all layers it is a view into it (keys and values apart: first key, then value).
        """
        if "L" not in self._axes:
            return self._tensors[index]
        layer, part = divmod(index, len(self._tensors))
        return self._tensors[part][(slice(None),) * self._axes.index("L") + (layer,)]

    def seq_lens(self, seqs: Seq[PagedSequence]) -> NDArray[np.int32]:
        """Tokens of each sequence, int32 `[num_seqs]`: vLLM's seq_lens, FlashAttention's cache_seqlens."""
        return np.array([seq.num_tokens for seq in seqs], np.int32)

    def block_table(
        self, seqs: Seq[PagedSequence], *, pad: int = 0, width: int | None = None
    ) -> NDArray[np.int32]:
        """Page ids of each sequence, int32 `[num_seqs, width]`: vLLM's and FlashAttention's block_table.

        Args:
            seqs: the batch.
            pad: fills the rows behind a sequence's last page (kernels do not read it; seq_lens ends the row).
            width: None is the longest sequence's; give one for a CUDA graph's fixed shape.

        Raises:
            ConfigError: width is smaller than a sequence needs.
            ClosedError: a sequence or the cache is closed.
        """
        with self._locked():
            return block_table(self._pages_of(seqs), pad=pad, width=width)

    def csr(self, seqs: Seq[PagedSequence]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """FlashInfer's page table.

        Returns:
            indptr int32 `[num_seqs + 1]`; indices int32 `[total_pages]`, the pages of sequence i at
            `[indptr[i], indptr[i + 1])`; last_page_len int32 `[num_seqs]`, tokens in its last page, at least
            1.

        Raises:
            ClosedError: a sequence or the cache is closed.
        """
        with self._locked():
            return csr(self._pages_of(seqs), self.seq_lens(seqs), self.page_tokens)

    def slot_mapping(self, seqs: Seq[PagedSequence], *, begin: ArrayLike | None = None) -> NDArray[np.int64]:
        """Where the KV of new tokens goes, sequence after sequence: `page * page_tokens + offset`, in tokens.

        The argument of that name of vLLM's reshape_and_cache.

        Args:
            seqs: the batch.
            begin: first token of each sequence `[num_seqs]`; None: the first that is not committed. Committed
                tokens can be read through it; write them never: their pages may be shared.

        Returns:
            int64 `[total_new_tokens]`, up to each sequence's last token.

        Raises:
            ConfigError: a begin outside its sequence.
            ClosedError: a sequence or the cache is closed.
        """
        with self._locked():
            begins = [seq.committed_tokens for seq in seqs] if begin is None else begin
            return slot_mapping(self._pages_of(seqs), begins, self.seq_lens(seqs), self.page_tokens)

    def _pages_of(self, seqs: Seq[PagedSequence]) -> list[NDArray[np.int32]]:
        for seq in seqs:
            self._check_open(seq)  # the pages of a closed one are somebody else's
        return [seq._pages.view() for seq in seqs]

    # --- the whole ------------------------------------------------------------------------------------

    def observe_prefill(self, begin: int, end: int, seconds: float) -> None:
        """Says how long the server took to compute tokens [begin, end) of a prompt, and nothing beside them.

        From it the cache learns what recomputing costs. It has to come from where the time is known: kernels
        on a GPU still run when the call that started them returns.

        Args:
            begin: Tokens before them, which they attend to.
            end: Behind the last of them; fewer than 64 tokens are left out.
            seconds: From the beginning of the computation to its end.

        Raises:
            ConfigError: Not a range of tokens.
        """
        self._check_process()  # the planner has a lock of its own
        if not 0 <= begin <= end:
            raise ConfigError(f"begin, end: {begin}, {end}; allowed: 0 <= begin <= end")
        self._planner.observe_prefill(end - begin, pairs(begin, end), seconds)

    def regret(self) -> Regret | None:
        """What the last 512 decisions to load or to recompute cost against the best, by what is known now.

        Returns:
            None before a prefill rate was learned.
        """
        self._check_process()
        return self._planner.regret()

    def flush(self, timeout: float | None = None, *, stream: object = None) -> None:
        """Stores every shareable block that the host does not have, and waits until others can hit them.

        Raises:
            TimeoutError: some stores still run.
        """
        with self._locked():
            self._check_open()
            with self._engine.no_drop():
                self._apply_drops()
                store_extents(self._engine, self._attached, self._pool.shareable, stream)
        self._engine.flush(timeout)

    def stats(self) -> PagedStats:
        """Counts as of now. Does not wait, except for another thread's eviction."""
        with self._locked():
            pool = self._pool
            known = self._device_tokens + self._host_tokens + self._missed_tokens
            return PagedStats(
                num_pages=pool.num_pages,
                free_pages=pool.num_free,
                used_pages=pool.num_used,
                cached_pages=pool.num_cached,
                quarantined_pages=pool.num_quarantined,
                sequences=len(self._sequences),
                prompt_tokens=self._prompt_tokens,
                device_tokens=self._device_tokens,
                host_tokens=self._host_tokens,
                missed_tokens=self._missed_tokens,
                loading_tokens=self._prompt_tokens - known,
                evicted_pages=self._evicted_pages,
                copied_pages=self._copied_pages,
                costs=self._planner.stats(),
            )

    def close(self, timeout: float | None = None) -> None:
        """Ends all sequences and detaches the pages; what only the device had is lost (`flush` keeps it).

        Waits until no transfer touches the pages. Idempotent.

        Raises:
            TimeoutError: the pages must not be freed yet; call again.
        """
        with self._locked():
            self._closed = True
            for seq in self._sequences:
                seq._open = False
            self._sequences.clear()
        self._attached.detach(timeout)

    def __enter__(self) -> "PagedKVCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _locked(self) -> contextlib.AbstractContextManager[object]:
        """The lock, to be taken; in a forked child ClosedError: a thread of the parent may hold it there."""
        self._check_process()
        return self._lock

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ClosedError("the paged cache belongs to the parent of this forked process")

    def _check_open(self, seq: PagedSequence | None = None) -> None:
        if self._closed:
            raise ClosedError("the paged cache is closed")
        if seq is not None and not seq._open:
            raise ClosedError("the sequence is closed")


def _allocate(layout: KVLayout, num_pages: int | None, device: object) -> list[Any]:
    """Torch tensors, one per layer; zeroed: kernels may read a page's unused end, and 0 * NaN is NaN."""
    import torch

    if not isinstance(device, str):
        raise ConfigError(f"device: {device!r}; to allocate, the name of a torch device is wanted")
    try:
        torch.empty(0, device=device)  # a name that torch cannot read, or a device that is not there
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(f"device: {device!r}; allowed: one that torch has, such as 'cpu': {why}") from error
    dtype = getattr(torch, str(layout.dtype), None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype: torch has no {layout.dtype!r}; give the tensors themselves (pages=...)")
    extent = {
        "P": check_extent("num_pages", num_pages),
        "K": layout.num_parts,
        "T": layout.page_tokens,
        "H": layout.num_kv_heads,
        "D": layout.head_dim,
    }
    shape = [extent[axis] for axis in "P" + layout.page_order]
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layout.num_layers)]
