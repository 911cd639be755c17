"""PagedKVCache: sharing, eviction and return, copy-on-write, out of pages, and what kernels are given.

The KV of a token is made from all tokens before it, so that a page in the wrong place is seen in its bytes.
"""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kvtier
from kvtier import page_tables
from kvtier.engine import Dropped, DroppedLog
from kvtier.keys import KeyChain
from kvtier.metrics import Hops, HopStats
from kvtier.page_pool import Column, Extent, PagePool
from kvtier.paged import OutOfPages, PagedKVCache, PagedSequence

LAYERS, HEADS, DIM = 2, 2, 4
Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Server:
    """A model that writes KV where the cache says, and reads it back from there."""

    def __init__(
        self,
        page: int = 4,
        block: int = 4,
        pages: int = 8,
        host: str = "1MiB",
        axes: str | None = None,
        **options: Any,
    ) -> None:
        layout = kvtier.KVLayout(LAYERS, HEADS, DIM, "int32", page)
        self.config = kvtier.Config(groups=[layout], block_tokens=block, model="m@1", host=host, chunk="1MiB")
        self.engine = kvtier.open(self.config)
        given: Any = [np.zeros((pages, 2, page, HEADS, DIM), np.int32) for _ in range(LAYERS)]
        if axes is not None:  # one tensor for all layers
            extent = {"P": pages, "L": LAYERS, "K": 2, "T": page, "H": HEADS, "D": DIM}
            given = np.zeros([extent[axis] for axis in axes], np.int32)
        self.page = page
        self.cache = PagedKVCache(self.engine, pages=given, axes=axes, **options)
        self.tensors = [self.cache.layer(i) for i in range(LAYERS)]

    def close(self) -> None:
        self.cache.close()
        self.engine.close()

    def open(self, tokens: Tokens, **options: Any) -> PagedSequence:
        seq = self.cache.open(tokens, **options)
        assert isinstance(seq, PagedSequence)
        return seq

    def compute(self, seq: PagedSequence, tokens: Tokens) -> None:
        """Writes the KV of what is not committed, and commits."""
        slots = self.cache.slot_mapping([seq])
        values = kv_of(tokens)[:, seq.num_tokens - len(slots) :]
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor[slots // self.page, :, slots % self.page] = value
        seq.commit()

    def run(self, tokens: Tokens, **options: Any) -> int:
        """A whole request. Returns its cached tokens."""
        with self.open(tokens, **options) as seq:
            cached = seq.wait()
            self.compute(seq, tokens)
            self.check(seq, tokens)
        return cached

    def read(self, seq: PagedSequence) -> np.ndarray[Any, Any]:
        indptr, indices, last = self.cache.csr([seq])
        assert list(indptr) == [0, len(indices)]
        count = (len(indices) - 1) * self.page + last[0]
        rows = [t[indices].swapaxes(1, 2).reshape(-1, 2, HEADS, DIM)[:count] for t in self.tensors]
        return np.stack(rows)

    def check(self, seq: PagedSequence, tokens: Tokens, count: int | None = None) -> None:
        count = len(tokens) if count is None else count
        np.testing.assert_array_equal(self.read(seq)[:, :count], kv_of(tokens)[:, :count])

    def fill(self, seed: int = 900) -> None:
        """A foreign request that needs every page: all that is cached is evicted."""
        self.run(prompt(len(self.tensors[0]) * self.page, seed))
        self.engine.flush()


def prompt(count: int, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, 1000, count).astype(np.int32)


def kv_of(tokens: Tokens) -> np.ndarray[Any, Any]:
    """int32 [LAYERS, num_tokens, 2, HEADS, DIM]: depends on all tokens up to each."""
    state = 1
    chain = []
    for token in tokens.tolist():
        state = (state * 1_000_003 + token + 17) % (2**31 - 1)
        chain.append(state)
    parts = np.arange(LAYERS * 2 * HEADS * DIM).reshape(LAYERS, 1, 2, HEADS, DIM)
    mixed = (np.array(chain, np.int64).reshape(1, -1, 1, 1, 1) + parts * 7919) % (2**31 - 1)
    return mixed.astype(np.int32)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(closing(Server(**options)))


def pages_add_up(cache: PagedKVCache) -> None:
    s = cache.stats()
    assert s.free_pages + s.used_pages + s.cached_pages + s.quarantined_pages == s.num_pages
    assert s.device_tokens + s.host_tokens + s.missed_tokens + s.loading_tokens == s.prompt_tokens


SIZES = pytest.mark.parametrize(
    ("page", "block"), [(4, 4), (16, 4), (4, 16)], ids=["equal", "big pages", "big blocks"]
)


# --- matching and sharing -----------------------------------------------------------------------------


@SIZES
def test_a_closed_prompt_is_found_in_the_same_device_pages(
    serve: Callable[..., Server], page: int, block: int
) -> None:
    server = serve(page=page, block=block, pages=64)
    tokens = prompt(70)
    with server.open(tokens) as first:
        assert first.wait() == 0
        assert first.ticket is None
        server.compute(first, tokens)
        ids = first.page_ids
    with server.open(tokens) as second:
        found = 69 // max(page, block) * max(page, block)
        assert second.cached_tokens == found
        np.testing.assert_array_equal(second.page_ids[: found // page], ids[: found // page])
        server.check(second, tokens, found)
    pages_add_up(server.cache)


@SIZES
def test_at_least_one_token_is_left_to_compute(serve: Callable[..., Server], page: int, block: int) -> None:
    server = serve(page=page, block=block, pages=64)
    tokens = prompt(64)
    server.run(tokens)
    for count in (64, 63, 49, 48, 17, 16, 5, 4, 1):
        with server.open(tokens[:count]) as seq:
            assert seq.wait() <= count - 1
            assert seq.cached_tokens >= count - 1 - max(page, block)
            assert len(server.cache.slot_mapping([seq])) == count - seq.cached_tokens >= 1


def test_running_sequences_share_full_pages_and_only_those(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(10)
    first = server.open(tokens)
    early = server.open(tokens)  # nothing is committed yet
    assert early.cached_tokens == 0
    assert not set(early.page_ids) & set(first.page_ids)
    early.close()
    server.compute(first, tokens)
    second = server.open(tokens)
    assert second.cached_tokens == 8
    assert list(second.page_ids[:2]) == list(first.page_ids[:2])
    assert second.page_ids[2] != first.page_ids[2]
    assert server.cache.stats().used_pages == 4
    first.close()
    server.check(second, tokens, 8)
    assert server.cache.stats().used_pages == 3


def test_equal_prompts_that_ran_side_by_side_keep_one_copy(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(8)
    pair = [server.open(tokens), server.open(tokens)]
    for seq in pair:
        server.compute(seq, tokens)
    for seq in pair:
        seq.close()
    stats = server.cache.stats()
    assert (stats.cached_pages, stats.free_pages) == (2, 6)
    assert server.run(np.append(tokens, 1).astype(np.int32)) == 8


def test_namespaces_and_extras_share_nothing(serve: Callable[..., Server]) -> None:
    server = serve(pages=32)
    tokens = prompt(9)
    kinds: list[dict[str, Any]] = [
        {},
        {"namespace": "a"},
        {"extra": b"lora"},
        {"extra": [(0, 3, b"cat")]},
        {"extra": kvtier.KeyExtra(prompt=b"lora", spans=[(0, 3, b"cat")])},
    ]
    assert [server.run(tokens, **kind) for kind in kinds] == [0] * 5
    assert [server.run(tokens, **kind) for kind in kinds] == [8] * 5
    with closing(PagedKVCache(server.engine, num_pages=4, namespace="b")) as other:
        assert other._namespace == "b"


@pytest.mark.parametrize("extra", [bytearray(b"lora"), memoryview(b"lora"), ((0, 3, bytearray(b"cat")),)])
def test_an_extra_is_read_as_block_keys_reads_it(serve: Callable[..., Server], extra: Any) -> None:
    server = serve(pages=16)
    tokens = prompt(9)
    for kind in (b"lora", [(0, 3, b"cat")]):
        server.run(tokens, extra=kind)
    assert server.run(tokens, extra=extra) == 8


@pytest.mark.parametrize(
    "extra", [None, b"lora", [(1, 3, b"x"), (6, 7, b"y")], [(5, 30, b"x"), (5, 9, b"y"), (20, 28, b"z")]]
)
def test_keys_of_a_grown_sequence_are_those_of_the_whole(serve: Callable[..., Server], extra: Any) -> None:
    server = serve(pages=16)
    tokens = prompt(30)
    with server.open(tokens[:7], extra=extra) as seq:
        for at in range(7, 30):
            seq.append(tokens[at : at + 1])
            seq.commit()
        whole = kvtier.block_keys(tokens, server.config, extra=extra)
        np.testing.assert_array_equal(seq._keys.view(), whole)


def test_an_extra_may_reach_over_tokens_to_come(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(14)
    seq = server.open(tokens[:2], extra=[(0, 100, b"cat"), (10**30, 10**31, b"dog")])
    seq.append(tokens[2:])
    server.engine.drop(namespace="zzz")  # heard of by whoever calls next
    server.run(prompt(9, 1))
    server.cache.flush()
    server.compute(seq, tokens)
    whole = kvtier.block_keys(tokens, server.config, extra=[(0, 14, b"cat")])
    np.testing.assert_array_equal(seq._keys.view(), whole)
    seq.close()
    server.fill()
    assert server.run(tokens, extra=[(0, 14, b"cat")]) == 12


# --- eviction and return ------------------------------------------------------------------------------


@SIZES
def test_evicted_blocks_come_back_from_the_host_into_other_pages(
    serve: Callable[..., Server], page: int, block: int
) -> None:
    server = serve(page=page, block=block, pages=64 // min(page, 16) + 4)
    tokens = prompt(62)
    with server.open(tokens) as seq:
        server.compute(seq, tokens)
        before = seq.page_ids
    server.fill()
    for tensor in server.tensors:
        tensor[:] = -1  # what is found now comes from the host
    with occupied(server, before[0]), server.open(tokens) as seq:
        assert seq.ticket is not None
        expected = 60 if page == 16 else 61 // block * block
        assert seq.wait() == expected
        assert seq.ticket is None
        server.check(seq, tokens, expected)
        assert before[0] not in seq.page_ids
        server.compute(seq, tokens)
        server.check(seq, tokens)
    stats = server.cache.stats()
    assert stats.host_tokens == expected
    pages_add_up(server.cache)


def occupied(server: Server, page: int) -> PagedSequence:
    """A sequence of one token that holds that page."""
    found = None
    others = []
    while found is None:
        seq = server.open(prompt(1, 50))
        if seq.page_ids[0] == page:
            found = seq
        else:
            others.append(seq)
    for seq in others:
        seq.close()
    return found


def test_restored_pages_are_shareable_again(serve: Callable[..., Server]) -> None:
    server = serve(pages=12)
    tokens = prompt(17)
    server.run(tokens)
    server.fill()
    with server.open(tokens) as first, server.open(tokens) as early:
        assert early.ticket is not None  # both load: the first one's bytes are not there yet
        first.wait()
        early.wait()
    with server.open(tokens) as third:
        assert third.ticket is None
        assert third.cached_tokens == 16
        server.check(third, tokens, 16)


def test_the_least_recently_used_sequence_goes_first_and_its_tail_before_its_head(
    serve: Callable[..., Server],
) -> None:
    server = serve(pages=6, host="1MiB")
    old, new = prompt(8, 1), prompt(8, 2)
    server.run(old)
    server.run(new)
    server.run(np.append(old, 5).astype(np.int32))  # used again: now the other is the oldest
    assert server.cache.stats().evicted_pages == 0
    with server.open(prompt(12, 3)):  # 2 are free; one page has to go
        assert server.cache.stats().evicted_pages == 1
        server.engine.drop(namespace="")
        grown = [np.append(t, 5).astype(np.int32) for t in (old, new)]
        assert [len(server.cache._match_device(keys_of(server, t))) for t in grown] == [2, 1]


def keys_of(server: Server, tokens: Tokens) -> np.ndarray[Any, Any]:
    return kvtier.block_keys(tokens, server.config)


def test_a_sub_page_tail_is_kept_at_block_granularity(serve: Callable[..., Server]) -> None:
    server = serve(page=16, block=4, pages=6)
    tokens = prompt(30)
    server.run(tokens)  # one full page and three and a half blocks
    server.engine.flush()
    assert server.engine.stats().store_stored == 3  # the full page stays on the device alone
    with server.open(tokens) as seq:
        assert seq.cached_tokens == 16
        assert seq.wait() == 28
        server.check(seq, tokens, 28)
    stats = server.cache.stats()
    assert (stats.device_tokens, stats.host_tokens, stats.missed_tokens) == (16, 12, 32)


def test_write_through_stores_at_commit(serve: Callable[..., Server]) -> None:
    server = serve(write="through", pages=8)
    tokens = prompt(10)
    with server.open(tokens) as seq:
        server.compute(seq, tokens)
        server.engine.flush()
        assert server.engine.lookup(keys_of(server, tokens)).ready_blocks == 2
        tokens = np.append(tokens, [1, 2]).astype(np.int32)
        seq.append(tokens[10:])
        server.compute(seq, tokens)
        server.engine.flush()
        assert server.engine.stats().store_stored == 3
    server.fill()
    assert server.run(np.append(tokens, 1).astype(np.int32)) == 12


@SIZES
def test_write_through_of_a_growing_sequence_comes_back_whole(
    serve: Callable[..., Server], page: int, block: int
) -> None:
    server = serve(page=page, block=block, pages=80 // page, write="through")
    tokens = prompt(62)
    with server.open(tokens[:3]) as seq:
        server.compute(seq, tokens[:3])
        for at in range(3, 62, 6):
            seq.append(tokens[at : at + 6])
            server.compute(seq, tokens[: at + 6])
    server.fill()
    with server.open(tokens) as seq:
        found = 61 // block * block
        assert (seq.cached_tokens, seq.wait()) == (0, found)
        server.check(seq, tokens, found)


def test_write_on_eviction_stores_nothing_before(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    server.run(prompt(16))
    server.engine.flush()
    assert server.engine.stats().store_stored == 0
    server.cache.flush()
    assert server.engine.stats().store_stored == 4
    server.cache.flush()
    assert server.engine.stats().store_stored == 4


def test_flushing_again_and_again_keeps_nothing_of_the_last_time(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    server.run(prompt(16))
    for _ in range(20):
        server.cache.flush()
    assert [len(extent.stores) for extent in server.cache._pool.shareable] == [1] * 4


def test_a_page_is_reused_only_after_its_store_has_released_it(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pages=4)
    tokens = prompt(16)
    server.run(tokens)
    gate, asked = threading.Event(), threading.Event()
    store = server.engine.store

    def slow_store(*args: Any, **options: Any) -> Any:
        ticket = store(*args, **options)

        def wait(timeout: float | None = None) -> None:
            asked.set()
            assert gate.wait(30)

        return SimpleNamespace(released=SimpleNamespace(done=gate.is_set, wait=wait), ticket=ticket)

    monkeypatch.setattr(server.cache, "_engine", Proxy(server.engine, store=slow_store))
    opened: list[Any] = []
    thread = threading.Thread(target=lambda: opened.append(server.cache.open(prompt(4, 1))))
    thread.start()
    assert asked.wait(30)
    assert not opened
    gate.set()
    thread.join(30)
    assert isinstance(opened[0], PagedSequence)


class Proxy:
    """An engine with some of its methods replaced."""

    def __init__(self, engine: Any, **methods: Any) -> None:
        self._engine = engine
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def failing_moment() -> Any:
    def wait(timeout: float | None = None) -> None:
        raise kvtier.DeviceError("cannot tell")

    return SimpleNamespace(done=lambda: True, wait=wait)


def test_pages_that_a_copy_may_still_read_are_never_used_again(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pages=4)
    server.run(prompt(16))
    lost = Proxy(server.engine, store=lambda *a, **o: SimpleNamespace(released=failing_moment()))
    monkeypatch.setattr(server.cache, "_engine", lost)
    assert server.cache.open(prompt(8, 1)) == OutOfPages(2, 0)
    assert server.cache.stats().quarantined_pages == 4
    pages_add_up(server.cache)


def test_pages_that_a_copy_may_still_write_are_never_used_again(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pages=4)
    tokens = prompt(16)
    server.run(tokens)
    server.fill()
    result = SimpleNamespace(valid_blocks=0)
    ticket = SimpleNamespace(
        done=lambda: True, wait=lambda timeout: None, result=lambda: result, released=failing_moment()
    )
    monkeypatch.setattr(server.cache, "_engine", Proxy(server.engine, load=lambda *a, **o: ticket))
    seq = server.open(tokens)
    with pytest.raises(kvtier.DeviceError):
        seq.wait()
    with pytest.raises(kvtier.DeviceError):
        seq.append([1])
    assert seq.cached_tokens == 0
    seq.close()
    assert server.cache.stats().quarantined_pages == 4
    pages_add_up(server.cache)


def test_blocks_that_vanish_before_the_load_are_left_to_be_computed(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pages=8)
    tokens = prompt(20)
    server.run(tokens)
    server.fill()
    load = server.engine.load

    def late_load(keys: Any, *args: Any, **options: Any) -> Any:
        assert server.engine.drop(keys[2:3]) == 1
        return load(keys, *args, **options)

    monkeypatch.setattr(server.cache, "_engine", Proxy(server.engine, load=late_load))
    with server.open(tokens) as seq:
        assert seq.cached_tokens == 0  # nothing is claimed before it is known
        assert seq.wait() == 8
        server.check(seq, tokens, 8)
        server.compute(seq, tokens)
    stats = server.cache.stats()
    assert stats.host_tokens == 8
    pages_add_up(server.cache)
    assert server.run(tokens) == 16


# --- out of pages -------------------------------------------------------------------------------------


def test_open_without_enough_pages_is_a_value_and_changes_nothing(serve: Callable[..., Server]) -> None:
    server = serve(pages=6)
    kept, cached = prompt(8, 1), prompt(12, 2)
    held = server.open(kept)
    server.compute(held, kept)
    server.run(cached)
    before = server.cache.stats(), list(server.cache._pool.cached), server.engine.stats()
    outcome = server.cache.open(np.append(cached, prompt(9, 3)).astype(np.int32))
    assert outcome == OutOfPages(needed=3, available=1)
    assert not outcome
    assert (server.cache.stats(), list(server.cache._pool.cached), server.engine.stats()) == before
    server.check(held, kept)
    assert server.run(np.append(cached, prompt(4, 3)).astype(np.int32)) == 12


def test_append_without_enough_pages_is_a_value_and_changes_nothing(serve: Callable[..., Server]) -> None:
    server = serve(pages=3)
    tokens = prompt(10)
    seq = server.open(tokens)
    server.compute(seq, tokens)
    twin = seq.fork()
    before = server.cache.stats(), list(seq.page_ids)
    assert twin.append(prompt(1)) == OutOfPages(needed=1, available=0)  # the copy needs one
    assert (server.cache.stats(), list(twin.page_ids)) == before
    twin.close()
    appended = seq.append(prompt(2))  # now nobody shares the page
    assert appended == kvtier.paged.Appended(10, 12, ())
    assert not seq.append(prompt(1))
    assert seq.num_tokens == 12


# --- fork ---------------------------------------------------------------------------------------------


@SIZES
def test_a_fork_copies_the_last_part_when_either_appends(
    serve: Callable[..., Server], page: int, block: int
) -> None:
    server = serve(page=page, block=block, pages=40)
    tokens = prompt(38)
    seq = server.open(tokens)
    server.compute(seq, tokens)
    twin = seq.fork()
    used = server.cache.stats().used_pages
    assert list(twin.page_ids) == list(seq.page_ids)
    assert used == -(-38 // page)
    left, right = (np.append(tokens, prompt(30, s)).astype(np.int32) for s in (1, 2))

    copied = twin.append(right[38:])
    assert isinstance(copied, kvtier.paged.Appended)
    whole = 38 // max(page, block) * max(page, block) // page  # what is full stays shared
    assert [pair[0] for pair in copied.copied] == list(seq.page_ids[whole:])
    assert list(twin.page_ids[:whole]) == list(seq.page_ids[:whole])
    assert not set(twin.page_ids[whole:]) & set(seq.page_ids)
    server.compute(twin, right)
    assert seq.append(left[38:]).copied == ()  # the twin has left the page
    server.compute(seq, left)
    server.check(seq, left)
    server.check(twin, right)
    seq.close()
    server.check(twin, right)
    twin.close()
    assert server.cache.stats().used_pages == 0
    assert server.run(left) >= 48
    assert server.run(right) >= 48
    pages_add_up(server.cache)


def test_copy_on_write_follows_the_axes_of_the_callers_tensors() -> None:
    layout = kvtier.KVLayout(1, 1, 2, "int32", 4)
    config = kvtier.Config(groups=[layout], block_tokens=4, model="m@1", host="1MiB")
    keys_values = np.zeros((2, 4, 4, 1, 2), np.int32)  # K P T H D
    with kvtier.open(config) as engine, PagedKVCache(engine, pages=[keys_values], axes="KPTHD") as cache:
        seq = cache.open([1, 2])
        assert isinstance(seq, PagedSequence)
        keys_values[:, seq.page_ids[0]] = np.arange(16).reshape(2, 4, 1, 2)
        seq.commit()
        twin = seq.fork()
        twin.append([3])
        assert twin.page_ids[0] != seq.page_ids[0]
        np.testing.assert_array_equal(keys_values[:, twin.page_ids[0]], keys_values[:, seq.page_ids[0]])


@pytest.mark.parametrize("axes", ["LPKTHD", "PLKTHD"])
def test_one_tensor_can_hold_all_layers(serve: Callable[..., Server], axes: str) -> None:
    server = serve(axes=axes)
    tokens = prompt(18)
    server.run(tokens)
    server.fill()
    with server.open(tokens) as seq:
        assert seq.wait() == 16
        server.compute(seq, tokens)
        with seq.fork() as twin:
            longer = np.append(tokens, prompt(3, 1)).astype(np.int32)
            assert len(twin.append(longer[18:]).copied) == 1
            server.compute(twin, longer)
            server.check(twin, longer)
        server.check(seq, tokens)


def test_layers_of_keys_and_values_apart_take_turns(serve: Callable[..., Server]) -> None:
    engine = serve().engine
    keys, values = np.zeros((2, LAYERS, 8, 4, HEADS, DIM), np.int32)
    with closing(PagedKVCache(engine, pages=[keys, values], axes="LPTHD")) as cache:
        for i, part in enumerate((keys[0], values[0], keys[1], values[1])):
            assert cache.layer(i).shape == part.shape
            assert cache.layer(i).ctypes.data == part.ctypes.data


class Opaque:
    """An array that says where it is, and no more."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.__array_interface__ = array.__array_interface__


def test_pages_that_cannot_be_copied_are_refused_and_detached(serve: Callable[..., Server]) -> None:
    engine = serve().engine
    arrays = [np.zeros((8, 2, 4, HEADS, DIM), np.int32) for _ in range(LAYERS)]
    raw = [(a.ctypes.data, a.shape, a.strides, a.itemsize) for a in arrays]
    opaque = Opaque(arrays[1])
    wrong: list[tuple[list[Any], str]] = [
        (raw, r"pages\[0\] is a tuple; allowed: tensors whose pages can be copied"),
        ([kvtier.RawTensor(*spec) for spec in raw], r"pages\[0\] is a RawTensor; allowed"),
        ([arrays[0], opaque], r"pages\[1\] is a Opaque; allowed"),
    ]
    for pages, message in wrong:
        with pytest.raises(kvtier.ConfigError, match=message):
            PagedKVCache(engine, pages=pages)
    seen = weakref.ref(opaque)
    del wrong, pages, opaque
    gc.collect()
    assert seen() is None


def test_only_committed_sequences_fork(serve: Callable[..., Server]) -> None:
    seq = serve().open(prompt(5))
    with pytest.raises(kvtier.ConfigError, match="5 tokens are not committed"):
        seq.fork()


# --- use and misuse -----------------------------------------------------------------------------------


def test_commit_moves_forward_only(serve: Callable[..., Server]) -> None:
    seq = serve().open(prompt(8))
    seq.commit(5)
    for wrong in (4, 9):
        with pytest.raises(kvtier.ConfigError, match="allowed: 5 to 8"):
            seq.commit(wrong)
    assert seq.committed_tokens == 5


@pytest.mark.parametrize(
    ("what", "write"), [("keys", "evict"), ("keys", "through"), ("stream", "through"), ("engine", "through")]
)
def test_a_commit_that_raises_has_changed_nothing(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, what: str, write: str
) -> None:
    server = serve(write=write)
    tokens = prompt(10)
    seq = server.open(tokens[:3])
    seq.append(tokens[3:])

    def refuse(*args: Any, **options: Any) -> None:
        raise kvtier.DeviceError("no")

    with monkeypatch.context() as patch:
        if what == "keys":
            patch.setattr(KeyChain, "more", refuse)
        if what == "engine":
            patch.setattr(server.cache, "_engine", Proxy(server.engine, store=refuse))
        with pytest.raises((kvtier.ConfigError, kvtier.DeviceError)):
            seq.commit(stream="none" if what == "stream" else None)
    assert seq.committed_tokens == 0
    assert not list(server.cache._pool.shareable)
    assert len(server.cache.slot_mapping([seq])) == 10
    server.compute(seq, tokens)
    server.engine.flush()
    assert server.engine.stats().store_stored == (2 if write == "through" else 0)
    assert server.run(tokens) == 8


@pytest.mark.parametrize("tokens", [[[1, 2]], [1.5], [-1], [2**31], [[1], [2, 3]], np.empty((0, 3)), 5])
def test_bad_tokens_are_refused(serve: Callable[..., Server], tokens: Any) -> None:
    server = serve()
    with pytest.raises(kvtier.ConfigError, match="token_ids"):
        server.cache.open(tokens)
    seq = server.open(prompt(1))
    with pytest.raises(kvtier.ConfigError, match="token_ids"):
        seq.append(tokens)
    assert seq.num_tokens == 1


def test_no_tokens_are_no_prompt_but_can_be_appended(serve: Callable[..., Server]) -> None:
    server = serve()
    with pytest.raises(kvtier.ConfigError, match="token_ids is empty"):
        server.cache.open([])
    assert server.open(prompt(1)).append([]) == kvtier.paged.Appended(1, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"namespace": 5}, "namespace is 5; allowed: a str"),
        ({"namespace": "\ud800"}, "namespace is '.*'; allowed: a str that UTF-8 can hold"),
        ({"extra": 5}, "extra is 5; allowed: bytes, a list"),
        ({"extra": np.array(5)}, r"extra is array\(5\); allowed: bytes, a list"),
        ({"extra": "lora"}, "extra is 'lora'; allowed: bytes, a list"),
        ({"extra": [(0, 4)]}, r"extra\[0\] is \(0, 4\); allowed"),
        ({"extra": [(0, "4", b"cat")]}, r"extra\[0\] is \(0, '4', b'cat'\); allowed"),
        (
            {"extra": [(-1, 4, b"cat")]},
            r"extra\[0\] covers tokens \[-1, 4\); allowed: .* begin at 0 or later$",
        ),
        (
            {"extra": [(4, 4, b"cat")]},
            r"extra\[0\] covers tokens \[4, 4\); allowed: ranges that are not empty",
        ),
        ({"extra": kvtier.KeyExtra(prompt=5)}, "extra.prompt is 5; allowed: bytes"),  # type: ignore[arg-type]
        ({"extra": kvtier.KeyExtra(spans=5)}, "extra.spans is 5; allowed: a list"),  # type: ignore[arg-type]
    ],
)
def test_a_namespace_or_extra_that_makes_no_keys_is_refused_before_there_is_a_block(
    serve: Callable[..., Server], wrong: dict[str, Any], message: str
) -> None:
    server = serve()
    with pytest.raises(kvtier.ConfigError, match=message):
        server.cache.open([1, 2], **wrong)
    assert server.cache.stats().used_pages == server.cache.stats().sequences == 0


def test_bad_arguments_are_refused(serve: Callable[..., Server]) -> None:
    engine = serve().engine
    options: list[tuple[dict[str, Any], str]] = [
        ({}, "num_pages, pages: exactly one"),
        ({"num_pages": 2, "pages": []}, "num_pages, pages: exactly one"),
        ({"num_pages": 2, "write": "sometimes"}, "write: 'sometimes'; allowed"),
        ({"num_pages": 2, "group": 1}, "group is 1; allowed: an integer from 0 to 0"),
        ({"num_pages": 0}, "num_pages is 0; allowed"),
        ({"num_pages": 2, "namespace": 5}, "namespace is 5; allowed"),
        ({"num_pages": 2, "device": object()}, "device: <object"),
        ({"num_pages": 2, "device": "nope"}, "device: 'nope'; allowed: one that torch has"),
        ({"num_pages": 2, "device": "cuda:99"}, "device: 'cuda:99'; allowed: one that torch has"),
    ]
    for wrong, message in options:
        with pytest.raises(kvtier.ConfigError, match=message):
            PagedKVCache(engine, **wrong)


def test_closed_things_say_so(serve: Callable[..., Server]) -> None:
    server = serve()
    seq = server.open(prompt(5))
    seq.close()
    seq.close()
    other = server.open(prompt(5))
    server.cache.close()
    server.cache.close()
    for call in (
        seq.commit,
        other.commit,
        other.fork,
        lambda: other.append([1]),
        lambda: server.cache.open([1]),
        lambda: server.cache.csr([other]),
    ):
        with pytest.raises(kvtier.ClosedError):
            call()
    other.close()


def test_a_closed_sequence_has_no_place_in_a_batch(serve: Callable[..., Server]) -> None:
    server = serve()
    closed, open_ = server.open(prompt(5)), server.open(prompt(6))
    closed.close()
    cache = server.cache
    for call in (cache.block_table, cache.csr, cache.slot_mapping):
        with pytest.raises(kvtier.ClosedError, match="the sequence is closed"):
            call([open_, closed])


def test_a_sequence_can_be_closed_after_its_engine(serve: Callable[..., Server]) -> None:
    server = serve(page=16, block=4)
    seq = server.open(prompt(10))
    server.compute(seq, prompt(10))
    server.engine.close()
    seq.close()
    assert server.cache.stats().used_pages == 0


def test_closing_with_a_load_under_way(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(20)
    server.run(tokens)
    server.fill()
    server.open(tokens).close()
    assert server.run(tokens) == 16
    pages_add_up(server.cache)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (kvtier.KVLayout(3, 2, 8, "bfloat16", 16), (5, 2, 16, 2, 8)),
        (kvtier.KVLayout(3, 2, 8, "float16", 16, page_order="KHTD"), (5, 2, 2, 16, 8)),
        (kvtier.KVLayout.mla(3, 24, "float8_e4m3fn", 16), (5, 16, 24)),
    ],
    ids=["NHD", "HND", "MLA"],
)
def test_allocates_one_torch_tensor_per_layer(layout: kvtier.KVLayout, shape: tuple[int, ...]) -> None:
    config = kvtier.Config(groups=[layout], model="m@1", host="1MiB")
    with kvtier.open(config) as engine, PagedKVCache(engine, num_pages=5) as cache:
        for i in range(3):
            assert tuple(cache.layer(i).shape) == shape
            assert cache.layer(i).dtype == getattr(torch, layout.dtype)
            assert not cache.layer(i).view(torch.uint8).any()
        assert cache.stats().free_pages == 5


def test_needs_no_torch_for_the_callers_pages() -> None:
    program = """
import sys
sys.modules["torch"] = None
import numpy as np
import kvtier
from kvtier.paged import PagedKVCache
layout = kvtier.KVLayout(1, 1, 4, "float32", 4)
config = kvtier.Config(groups=[layout], block_tokens=4, model="m@1", host="1MiB")
with kvtier.open(config) as engine:
    with PagedKVCache(engine, pages=[np.zeros((8, 2, 4, 1, 4), np.float32)]) as cache:
        seq = cache.open(range(6))
        seq.commit()
        seq.fork().append([1])
        print(cache.stats().copied_pages)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("1", 0), done.stderr


def test_forked_child_gets_closed_errors_whatever_was_locked() -> None:
    # In a process of its own: pytest has threads, and fork() is not for programs that have.
    program = """
import os, signal, threading, warnings
import numpy as np
import kvtier
from kvtier.paged import PagedKVCache
warnings.simplefilter("ignore", DeprecationWarning)
layout = kvtier.KVLayout(1, 1, 4, "float32", 4)
config = kvtier.Config(groups=[layout], block_tokens=4, model="m@1", host="1MiB")
with kvtier.open(config) as engine:
    with PagedKVCache(engine, pages=[np.zeros((8, 2, 4, 1, 4), np.float32)]) as cache:
        seq = cache.open(range(6))
        taken, over = threading.Event(), threading.Event()
        def hold():
            with cache._lock, cache._planner._lock:
                taken.set()
                over.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        taken.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            calls = [lambda: cache.open(range(6)), lambda: seq.append([1]), seq.commit, seq.fork, seq.close,
                     lambda: cache.block_table([seq]), lambda: cache.csr([seq]),
                     lambda: cache.slot_mapping([seq]), lambda: cache.observe_prefill(0, 64, 1.0),
                     cache.regret, cache.flush, cache.stats, cache.close]
            for i, call in enumerate(calls):
                try:
                    call()
                except kvtier.ClosedError as error:
                    if "forked" in str(error):
                        continue
                os._exit(i + 1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        over.set()
        thread.join()
        seq.commit()
        print(status, cache.stats().sequences)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("0 1", 0), done.stderr


def test_threads_share_one_cache(serve: Callable[..., Server]) -> None:
    server = serve(pages=24)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(40):
                tokens = np.append(prompt(16, int(random.integers(3))), prompt(5, int(random.integers(9))))
                server.run(tokens.astype(np.int32))
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    stats = server.cache.stats()
    assert stats.used_pages == stats.sequences == 0
    assert stats.evicted_pages > 0
    assert stats.host_tokens > 0
    assert stats.device_tokens > 0
    pages_add_up(server.cache)


# --- what kernels are given ---------------------------------------------------------------------------


def test_batch_arrays_equal_a_plain_loop(serve: Callable[..., Server]) -> None:
    server = serve(pages=64)
    lens = [1, 4, 5, 17, 8]
    seqs = [server.open(prompt(n, n)) for n in lens]
    seqs[3].commit(6)
    cache = server.cache

    table = cache.block_table(seqs, pad=99, width=7)
    assert (table.dtype, table.shape) == (np.int32, (5, 7))
    for row, seq in zip(table.tolist(), seqs, strict=True):
        ids = seq.page_ids.tolist()
        assert row == ids + [99] * (7 - len(ids))
    assert cache.block_table(seqs).shape == (5, 5)
    with pytest.raises(kvtier.ConfigError, match="width"):
        cache.block_table(seqs, width=4)

    indptr, indices, last = cache.csr(seqs)
    assert {a.dtype for a in (indptr, indices, last)} == {np.dtype(np.int32)}
    assert indptr.tolist() == [0, 1, 2, 4, 9, 11]
    assert indices.tolist() == [page for seq in seqs for page in seq.page_ids]
    assert last.tolist() == [1, 4, 1, 1, 4]
    assert (cache.seq_lens(seqs).tolist(), cache.seq_lens(seqs).dtype) == (lens, np.int32)

    def loop(begins: list[int]) -> list[int]:
        return [
            int(seq.page_ids[at // 4]) * 4 + at % 4
            for seq, begin, end in zip(seqs, begins, lens, strict=True)
            for at in range(begin, end)
        ]

    assert cache.slot_mapping(seqs).tolist() == loop([0, 0, 0, 6, 0])
    assert cache.slot_mapping(seqs).dtype == np.int64
    assert cache.slot_mapping(seqs, begin=[1, 3, 4, 11, 0]).tolist() == loop([1, 3, 4, 11, 0])
    for wrong in ([0, 0, 0, 18, 0], [0, 0, 0, -1, 0], [0], 0):
        with pytest.raises(kvtier.ConfigError, match="begin"):
            cache.slot_mapping(seqs, begin=wrong)


def test_batch_arrays_of_nothing(serve: Callable[..., Server]) -> None:
    cache = serve().cache
    assert cache.block_table([]).shape == (0, 0)
    assert [a.tolist() for a in cache.csr([])] == [[0], [], []]
    assert cache.slot_mapping([]).tolist() == []


def test_a_large_batch_needs_no_loop_over_pages() -> None:
    pages = [np.arange(8192, dtype=np.int32) + i for i in range(256)]
    lens = np.full(256, 8192 * 16 - 3, np.int32)
    table = page_tables.block_table(pages)
    np.testing.assert_array_equal(table[255], pages[255])
    indptr, indices, last = page_tables.csr(pages, lens, 16)
    assert (indptr[-1], len(indices), set(last.tolist())) == (256 * 8192, 256 * 8192, {13})
    slots = page_tables.slot_mapping(pages, lens - 1, lens, 16)
    np.testing.assert_array_equal(slots, (8191 + np.arange(256)) * 16 + 12)


# --- what the engine drops ----------------------------------------------------------------------------


@SIZES
def test_after_a_reset_nothing_of_before_is_matched_or_stored(
    serve: Callable[..., Server], page: int, block: int
) -> None:
    server = serve(page=page, block=block, pages=64 // page)
    tokens = prompt(62)
    server.run(tokens)
    server.engine.flush()
    server.engine.reset("v2")
    with server.open(tokens) as seq:
        assert (seq.ticket, seq.cached_tokens) == (None, 0)
    server.fill()
    assert server.engine.lookup(keys_of(server, tokens)).ready_blocks == 0
    pages_add_up(server.cache)
    assert server.run(tokens) == 0
    assert server.run(tokens) > 0


def test_eviction_right_after_a_reset_stores_nothing_of_before(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(17)
    seq = server.open(prompt(1, 5))
    server.run(tokens)
    server.engine.reset()
    seq.append(prompt(31, 6))  # the first that the cache hears of it
    server.cache.flush()
    assert server.engine.lookup(keys_of(server, tokens)).ready_blocks == 0
    assert server.engine.stats().store_stored == 0
    assert server.cache.stats().evicted_pages == 0


def test_a_dropped_namespace_is_not_matched_or_stored_and_others_stay(serve: Callable[..., Server]) -> None:
    server = serve(pages=16)
    tokens = prompt(9)
    for name in ("a", "b"):
        server.run(tokens, namespace=name)
    assert server.engine.drop(namespace="a") == 0  # the device alone has it
    assert server.run(tokens, namespace="b") == 8
    server.fill()
    assert server.engine.drop(namespace="a") == 0
    assert server.engine.drop(namespace="b") == 2


def test_dropped_keys_are_not_matched_or_stored_and_others_stay(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(17)
    keys = keys_of(server, tokens)
    server.run(tokens)
    server.engine.drop(keys[2:3])
    with server.open(tokens) as seq:
        assert seq.cached_tokens == 8
    server.cache.flush()
    assert server.engine.lookup(keys).states().tolist() == [2, 2, 0, 2]
    assert server.run(tokens) == 8
    assert server.run(tokens) == 16


@pytest.mark.parametrize("write", ["evict", "through"])
@pytest.mark.parametrize("page", [4, 16])
@pytest.mark.parametrize("how", ["reset", "namespace", "keys"])
def test_sequences_that_are_open_at_a_drop_run_on_and_share_nothing_of_it(
    serve: Callable[..., Server], page: int, write: str, how: str
) -> None:
    server = serve(page=page, pages=64 // page, write=write)
    tokens = prompt(30)
    seq = server.open(tokens[:10])
    server.compute(seq, tokens[:10])
    server.engine.flush()
    before = server.engine.stats().store_stored
    if how == "reset":
        server.engine.reset()
    elif how == "namespace":
        server.engine.drop(namespace="")
    else:
        server.engine.drop(keys_of(server, tokens[:4]))
    twin = seq.fork()
    for grown in (seq, twin):
        grown.append(tokens[10:])
        server.compute(grown, tokens)
        server.check(grown, tokens)
        grown.close()
    server.cache.flush()
    assert server.engine.stats().store_stored == before + (1 if (how, write, page) == KEPT else 0)
    assert server.run(tokens) == 0
    pages_add_up(server.cache)


KEPT = ("keys", "evict", 4)  # the second block: it was shared before, and not dropped


def test_the_tail_of_a_sequence_that_closes_right_after_a_reset_is_not_stored(
    serve: Callable[..., Server],
) -> None:
    server = serve(page=16)
    with server.open(prompt(12)) as seq:
        server.compute(seq, prompt(12))
        server.engine.reset()
    server.engine.flush()
    assert server.engine.stats().store_stored == 0


def test_what_a_load_brings_from_before_a_reset_is_not_shared(serve: Callable[..., Server]) -> None:
    server = serve(pages=8)
    tokens = prompt(17)
    server.run(tokens)
    server.fill()
    with server.open(tokens) as seq:
        assert seq.ticket is not None
        server.engine.reset()
        server.check(seq, tokens, seq.wait())
    assert server.run(tokens) == 0


def test_a_drop_beside_an_eviction_has_the_last_word(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pages=4)
    tokens = prompt(16)
    server.run(tokens)
    store = server.engine.store
    drop = threading.Thread(target=lambda: server.engine.drop(namespace=""))

    def late_store(*args: Any, **options: Any) -> Any:
        drop.start()
        drop.join(0.2)  # it would be over by now
        return store(*args, **options)

    monkeypatch.setattr(server.cache, "_engine", Proxy(server.engine, store=late_store))
    server.open(prompt(16, 1))
    drop.join(30)
    server.engine.flush()
    assert server.engine.lookup(keys_of(server, tokens)).ready_blocks == 0


def test_what_is_loaded_while_a_drop_runs_is_not_shared(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(pages=8)
    tokens = prompt(17)
    server.run(tokens)
    server.fill()
    native = server.engine._native

    def slow_drop(namespace: str) -> int:
        monkeypatch.undo()
        assert server.run(tokens) == 16  # the drop has not come to it yet
        dropped: int = native.drop_namespace(namespace)
        server.cache.flush()  # and now waits for a drive
        return dropped

    monkeypatch.setattr(server.engine, "_native", Proxy(native, drop_namespace=slow_drop))
    assert server.engine.drop(namespace="") > 0
    server.engine.flush()
    assert server.engine.lookup(keys_of(server, tokens)).ready_blocks == 0
    assert server.run(tokens) == 0
    assert server.run(tokens) == 16
    assert server.cache._dropped_log.drops() == []


def test_a_log_of_drops_that_nobody_reads_stays_small() -> None:
    log = DroppedLog()
    drops = [Dropped(namespace=str(i), running=i == 7) for i in range(64)]
    for drop in drops:
        log.add(drop)
    assert log.drops() == drops
    log.add(more := Dropped(namespace="more"))
    everything, *rest = log.drops()
    assert (everything.keys, everything.namespace, everything.running) == (None, None, False)
    assert rest == [drops[7], more]
    log.applied(drops[0])  # somebody was at it
    log.applied(more)
    assert log.drops() == [everything, drops[7]]


def test_an_unpublished_extent_with_a_running_store_is_kept_until_it_is_over() -> None:
    pool = PagePool(3)
    running = SimpleNamespace(done=lambda: False, wait=lambda timeout=None: None)
    extents = [Extent(pool.take(1)), Extent(pool.take(1), stores=[running]), Extent(pool.take(1))]
    for extent, key in zip(extents, (b"a", b"b", b"c"), strict=True):
        pool.publish(extent, key)
    for extent in extents[:2]:
        pool.release(extent)
    for extent in extents:
        pool.unpublish(extent)
    assert list(pool.shareable) == []
    assert list(pool.cached) == [extents[1]]
    assert (pool.num_free, pool.num_cached, pool.num_used) == (1, 1, 1)
    pool.release(extents[2])
    pool.reclaim(extents[1])
    assert pool.num_free == 3


# --- the bookkeeping alone ----------------------------------------------------------------------------


def test_a_column_shows_only_rows_that_are_filled_in() -> None:
    seen = []

    class Watched(np.ndarray[Any, Any]):
        def __setitem__(self, at: Any, rows: Any) -> None:
            seen.append((column.size, column.view().tolist()))
            super().__setitem__(at, rows)

    column = Column(np.arange(4).view(Watched))
    column.replace(2, ())
    seen.clear()
    column.replace(2, [7, 8])
    assert seen == [(2, [0, 1])]
    assert column.view().tolist() == [0, 1, 7, 8]
    column.replace(4, range(9))
    assert (column.size, column.view().tolist()) == (13, [0, 1, 7, 8, *range(9)])


def test_pool_takes_all_or_nothing() -> None:
    pool = PagePool(3)
    pages = pool.take(2)
    with pytest.raises(IndexError):
        pool.take(2)
    assert (pool.num_free, pool.num_used) == (1, 2)
    pool.give(pages)
    assert sorted(pool.take(3)) == [0, 1, 2]


def test_a_private_extent_with_a_running_store_is_kept_until_it_is_over() -> None:
    pool = PagePool(2)
    running = SimpleNamespace(done=lambda: False, wait=lambda timeout=None: None)
    shared, private = Extent(pool.take(1)), Extent(pool.take(1), stores=[running])
    pool.publish(shared, b"k")
    pool.release(shared)
    pool.release(private)
    assert (pool.num_free, pool.num_cached) == (0, 2)
    assert list(pool.cached) == [private, shared]  # it is reused first


# --- load or recompute ---


def slow_hops(bytes_per_second: float) -> Hops:
    hop = HopStats(
        transfers=9,
        bytes=9,
        seconds=1.0,
        running_bytes=0,
        latency_seconds=0.0,
        bytes_per_second=bytes_per_second,
    )
    return Hops(to_device=hop, from_disk=hop)


def test_a_hit_that_is_faster_to_compute_is_left_to_be_computed() -> None:
    with closing(Server(pages=64)) as server:
        tokens = prompt(200)
        server.run(tokens)
        server.fill()
        server.cache._planner._hops = lambda: slow_hops(1e4)
        for begin in range(0, 1000, 100):
            server.cache.observe_prefill(begin, begin + 100, 1e-3)
        assert server.run(tokens) == 0  # and its bytes are right
        costs = server.cache.stats().costs
        assert (costs.chose_none, costs.blocks_left) == (1, 49)
        lost = server.cache.regret()
        assert lost is not None
        assert (lost.decisions, lost.seconds) == (1, pytest.approx(0, abs=1e-9))


def test_load_always_loads_whatever_is_found() -> None:
    with closing(Server(pages=64, load="always")) as server:
        tokens = prompt(200)
        server.run(tokens)
        server.fill()
        for begin in range(0, 1000, 100):
            server.cache.observe_prefill(begin, begin + 100, 1e-9)
        assert server.run(tokens) == 49 * 4
        assert server.cache.stats().costs.chose_all == 1
        assert server.cache.regret() is None or server.cache.regret().decisions == 0  # type: ignore[union-attr]


def test_before_anything_was_measured_everything_is_loaded_and_loads_are_measured() -> None:
    with closing(Server(pages=64)) as server:
        for seed in range(6):
            tokens = prompt(200, seed)
            server.run(tokens)
            server.fill()
            assert server.run(tokens) == 49 * 4
        costs = server.cache.stats().costs  # of these, and of foreign requests that came back too
        assert costs.unmeasured == costs.decisions == 11
        hop = server.engine.hops().to_device
        assert hop.transfers == 11
        assert hop.bytes == costs.blocks_loaded * 2 * LAYERS * HEADS * DIM * 4 * 4
        assert hop.bytes_per_second > 0
        assert hop.running_bytes == 0
        assert server.engine.stats().hops.to_device.transfers == 11


def test_a_prefill_must_be_a_range() -> None:
    with closing(Server()) as server, pytest.raises(kvtier.ConfigError, match="begin, end: 5, 3; allowed"):
        server.cache.observe_prefill(5, 3, 1.0)
