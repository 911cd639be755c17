"""PagedKVCache against a model of it: random sequences that open, grow, fork, close and run out of pages.

After every step: free + used + cached + quarantined pages are all pages, reference counts are what the
open sequences hold, no page that somebody may still write has two holders, and the KV of every token that the
cache vouches for, in a sequence or only cached, is made from exactly the tokens up to it.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvtier
from kvtier.paged import Appended, OutOfPages, PagedKVCache, PagedSequence

NUM_PAGES = 12
SEEDS = st.integers(0, 2)  # few, so that prompts share beginnings
PICK = st.integers(0, 1000)


def kv_of(tokens: list[int]) -> np.ndarray[Any, Any]:
    """int32 [num_tokens, 2, 1, 2]: a chain over the tokens."""
    state = 1
    rows = []
    for token in tokens:
        state = (state * 1_000_003 + token + 17) % (2**31 - 1)
        rows.append(state)
    chain = np.array(rows, np.int64).reshape(-1, 1, 1, 1) + np.arange(4).reshape(2, 1, 2) * 7919
    return (chain % (2**31 - 1)).astype(np.int32)


def text(seed: int, count: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 50, count).tolist()
    return tokens


class PagedMachine(RuleBasedStateMachine):
    page = 4
    block = 4
    write: Any = "evict"

    @initialize()
    def start(self) -> None:
        layout = kvtier.KVLayout(1, 1, 2, "int32", self.page)
        self.config = kvtier.Config(
            groups=[layout], block_tokens=self.block, model="m@1", host="1MiB", chunk="1MiB"
        )
        self.engine = kvtier.open(self.config)
        self.tensor = np.zeros((NUM_PAGES, 2, self.page, 1, 2), np.int32)
        self.cache = PagedKVCache(self.engine, pages=[self.tensor], write=self.write)
        self.seqs: list[tuple[PagedSequence, list[int]]] = []
        self.chain_of: dict[bytes, list[int]] = {}  # the tokens that a key stands for
        self.committed: set[bytes] = set()  # keys of blocks that were ever committed
        self.dropped = False

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            for seq, _ in self.seqs:
                seq.close()
            assert self.cache.stats().used_pages == 0
            self.cache.close()
            self.engine.close()

    @property
    def extent(self) -> int:
        return max(self.page, self.block)

    def keys(self, tokens: list[int]) -> list[bytes]:
        keys = [key.tobytes() for key in kvtier.block_keys(tokens, self.config)]
        for i, key in enumerate(keys):
            self.chain_of[key] = tokens[: (i + 1) * self.block]
        return keys

    def snapshot(self) -> Any:
        pool = self.cache._pool
        cached = [(extent.key, tuple(extent.pages)) for extent in pool.cached]
        held = [(seq.page_ids.tolist(), seq.num_tokens, seq.committed_tokens) for seq, _ in self.seqs]
        shared = sorted((key, extent.refs) for key, extent in pool._by_key.items())
        still = self.tensor.copy()
        for seq, _ in self.seqs:
            if seq.ticket is not None:  # its load goes on meanwhile
                still[seq.page_ids] = 0
        return self.cache.stats(), cached, held, shared, sorted(pool._free), still.tobytes()

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    # --- rules ----------------------------------------------------------------------------------------

    @rule(seed=SEEDS, count=st.integers(1, 44), turn=st.integers(0, 40))
    def open(self, seed: int, count: int, turn: int) -> None:
        tokens = text(seed, min(turn, count)) + text(seed + 10, count)[min(turn, count) :]
        keys = self.keys(tokens)
        before = self.snapshot()
        never_evicted = self.cache.stats().evicted_pages == 0 and not self.dropped
        outcome = self.cache.open(tokens)
        if isinstance(outcome, OutOfPages):
            assert self.snapshot() == before
            assert outcome.needed > outcome.available
            assert self.pages_for(count) > NUM_PAGES - before[0].used_pages or outcome.needed <= NUM_PAGES
            return
        assert outcome.num_tokens == count
        assert outcome.cached_tokens < count
        assert len(outcome.page_ids) == self.pages_for(count)
        if never_evicted:
            found = 0
            while (found + 1) * self.extent < count and keys[
                (found + 1) * self.extent // self.block - 1
            ] in self.committed:
                found += 1
            assert outcome.cached_tokens == found * self.extent
        self.seqs.append((outcome, tokens))

    @precondition(lambda self: self.seqs)
    @rule(pick=PICK, share=st.floats(0, 1))
    def compute(self, pick: int, share: float) -> None:
        seq, tokens = self.seqs[pick % len(self.seqs)]
        begin = max(seq.wait(), seq.committed_tokens)
        end = begin + round((len(tokens) - begin) * share)
        slots = self.cache.slot_mapping([seq])[: end - begin]
        self.tensor[slots // self.page, :, slots % self.page] = kv_of(tokens)[begin:end]
        seq.commit(end)
        self.committed.update(self.keys(tokens[:end]))

    @precondition(lambda self: self.seqs)
    @rule(pick=PICK, seed=SEEDS, count=st.integers(0, 9))
    def append(self, pick: int, seed: int, count: int) -> None:
        at = pick % len(self.seqs)
        seq, tokens = self.seqs[at]
        seq.wait()
        before = self.snapshot()
        free = before[0].num_pages - before[0].used_pages
        more = text(seed + 20, count)
        outcome = seq.append(more)
        if isinstance(outcome, OutOfPages):
            assert self.snapshot() == before
            assert outcome.needed > outcome.available == free
        else:
            assert outcome == Appended(len(tokens), len(tokens) + count, outcome.copied)
            self.seqs[at] = (seq, tokens + more)

    @precondition(lambda self: self.seqs)
    @rule(pick=PICK)
    def fork(self, pick: int) -> None:
        seq, tokens = self.seqs[pick % len(self.seqs)]
        seq.wait()
        if seq.committed_tokens < seq.num_tokens:
            with pytest.raises(kvtier.ConfigError):
                seq.fork()
        else:
            used = self.cache.stats().used_pages
            self.seqs.append((seq.fork(), tokens))
            assert self.cache.stats().used_pages == used

    @precondition(lambda self: self.seqs)
    @rule(pick=PICK)
    def close(self, pick: int) -> None:
        seq, _ = self.seqs.pop(pick % len(self.seqs))
        seq.close()

    @precondition(lambda self: not self.seqs)
    @rule()
    def evict_all(self) -> None:
        seq = self.cache.open([49] * (NUM_PAGES * self.page))
        assert isinstance(seq, PagedSequence)
        seq.close()
        assert not list(self.cache._pool.shareable)
        self.tensor[:] = -1

    @rule(pick=PICK)
    def drop(self, pick: int) -> None:
        if self.chain_of:
            key = list(self.chain_of)[pick % len(self.chain_of)]
            self.engine.drop(np.frombuffer(key, np.uint8).reshape(1, 32))
            self.dropped = True
            self.cache._apply_drops()  # else the next call does, whatever comes of it

    @rule()
    def flush(self) -> None:
        self.cache.flush()

    # --- what holds after each ------------------------------------------------------------------------

    @invariant()
    def pages_add_up_and_counts_are_right(self) -> None:
        if not hasattr(self, "cache"):
            return
        stats, pool = self.cache.stats(), self.cache._pool
        held = {page for seq, _ in self.seqs for page in seq.page_ids.tolist()}
        assert stats.used_pages == len(held)
        assert stats.quarantined_pages == 0
        assert stats.free_pages + stats.used_pages + stats.cached_pages == NUM_PAGES
        cached = [page for extent in pool.cached for page in extent.pages]
        assert sorted([*cached, *pool._free, *held]) == list(range(NUM_PAGES))
        counted = Counter(extent for seq, _ in self.seqs for extent in seq._extents)
        assert all(extent.refs == count for extent, count in counted.items())
        assert all(extent.refs == counted[extent] for extent in pool.shareable)
        known = stats.device_tokens + stats.host_tokens + stats.missed_tokens + stats.loading_tokens
        assert known == stats.prompt_tokens

    @invariant()
    def no_page_that_may_be_written_has_two_holders(self) -> None:
        holders: Counter[int] = Counter()
        for seq, _ in getattr(self, "seqs", []):
            holders.update(seq.page_ids.tolist())
        for seq, _ in getattr(self, "seqs", []):
            slots = self.cache.slot_mapping([seq])  # the tokens that are not committed yet
            assert all(holders[page] == 1 for page in set((slots // self.page).tolist()))

    @invariant()
    def every_token_that_is_vouched_for_has_its_own_kv(self) -> None:
        for seq, tokens in getattr(self, "seqs", []):
            slots = self.cache.slot_mapping([seq], begin=[0])[: seq.committed_tokens]
            found = self.tensor[slots // self.page, :, slots % self.page]
            np.testing.assert_array_equal(found, kv_of(tokens)[: seq.committed_tokens])
        if hasattr(self, "cache"):
            for key, extent in self.cache._pool._by_key.items():
                found = self.tensor[extent.pages].swapaxes(1, 2).reshape(-1, 2, 1, 2)
                np.testing.assert_array_equal(found, kv_of(self.chain_of[key])[-self.extent :])


class BigPages(PagedMachine):
    page, block = 8, 4


class BigBlocks(PagedMachine):
    page, block = 4, 8


class WriteThrough(PagedMachine):
    page, block, write = 8, 4, "through"


@pytest.mark.parametrize("machine", [PagedMachine, BigPages, BigBlocks, WriteThrough])
def test_paged_cache_follows_its_model(machine: type[PagedMachine]) -> None:
    test = machine.TestCase()
    test.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    test.runTest()
