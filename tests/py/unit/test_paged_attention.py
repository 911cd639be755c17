"""Attention over pages that were shared, forked, evicted and loaded back equals attention over the originals.

The kernel is a plain reference: gather by page table, softmax(Q K^T) V in float64, bit for bit the same for
the same KV. Where the pages are differs; what is in them must not.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch

import kvtier
from kvtier.paged import PagedKVCache, PagedSequence

LAYERS, KV_HEADS, QUERY_HEADS, DIM, LATENT = 2, 2, 6, 8, 12
NUM_PAGES = 24


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The tensors are tiny; torch's threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model:
    """KV and queries of a token made from the tokens up to it, and attention over pages."""

    def __init__(self, cache: PagedKVCache, form: str) -> None:
        self.cache = cache
        self.form = form
        shape = (LATENT,) if form == "MLA" else (2, KV_HEADS, DIM)
        self.values = torch.randn(4093, *shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)

    def kv(self, tokens: list[int], layer: int) -> torch.Tensor:
        """[num_tokens, 2, KV_HEADS, DIM], or [num_tokens, LATENT]."""
        states = []
        state = layer + 1
        for token in tokens:
            state = (state * 1_000_003 + token) % (2**31 - 1)
            states.append(state % len(self.values))
        return self.values[states]

    def write(self, seq: PagedSequence, tokens: list[int]) -> None:
        """What vLLM's reshape_and_cache does with the slot mapping; then commits."""
        slots = torch.from_numpy(self.cache.slot_mapping([seq]))
        page, offset = slots // self.cache.page_tokens, slots % self.cache.page_tokens
        for layer in range(LAYERS):
            pages, new = self.cache.layer(layer), self.kv(tokens, layer)[len(tokens) - len(slots) :]
            if self.form == "HND":
                pages[page, :, :, offset] = new
            elif self.form == "NHD":
                pages[page, :, offset] = new
            else:
                pages[page, offset] = new
        seq.commit()

    def gather(self, layer: int, page_ids: torch.Tensor, count: int) -> torch.Tensor:
        """The KV of `count` tokens in order, token axis first."""
        pages = self.cache.layer(layer)[page_ids]
        if self.form == "HND":
            pages = pages.permute(0, 3, 1, 2, 4)
        elif self.form == "NHD":
            pages = pages.transpose(1, 2)
        return pages.flatten(0, 1)[:count]

    def attend(self, kv: torch.Tensor, query: torch.Tensor, window: int | None) -> torch.Tensor:
        """Decode attention of one query [QUERY_HEADS, dim]; query heads share KV heads in groups (GQA)."""
        kv = kv.double()
        kv = kv if window is None else kv[-window:]
        if self.form == "MLA":  # every head attends to the one latent, which is key and value
            keys = values = kv.unsqueeze(1).expand(-1, QUERY_HEADS, -1)
        else:
            keys, values = kv.repeat_interleave(QUERY_HEADS // KV_HEADS, dim=2).unbind(1)
        scores = torch.einsum("hd,thd->ht", query, keys) / math.sqrt(query.shape[-1])
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values)

    def by_block_table(self, seqs: list[PagedSequence], window: int | None = None) -> torch.Tensor:
        """vLLM's and FlashAttention's way: [num_seqs, LAYERS, QUERY_HEADS, dim]."""
        table = torch.from_numpy(self.cache.block_table(seqs, pad=NUM_PAGES - 1)).long()
        lens = self.cache.seq_lens(seqs).tolist()
        return self.batch([(row, count) for row, count in zip(table, lens, strict=True)], window)

    def by_csr(self, seqs: list[PagedSequence], window: int | None = None) -> torch.Tensor:
        """FlashInfer's way."""
        indptr, indices, last = self.cache.csr(seqs)
        rows = []
        for i in range(len(seqs)):
            ids = torch.from_numpy(indices[indptr[i] : indptr[i + 1]]).long()
            rows.append((ids, (len(ids) - 1) * self.cache.page_tokens + int(last[i])))
        return self.batch(rows, window)

    def batch(self, rows: list[tuple[torch.Tensor, int]], window: int | None) -> torch.Tensor:
        outputs = [
            self.attend(self.gather(layer, ids, count), self.query(layer), window)
            for ids, count in rows
            for layer in range(LAYERS)
        ]
        return torch.stack(outputs).unflatten(0, (len(rows), LAYERS))

    def query(self, layer: int) -> torch.Tensor:
        dim = LATENT if self.form == "MLA" else DIM
        generator = torch.Generator().manual_seed(77 + layer)
        return torch.randn(QUERY_HEADS, dim, generator=generator, dtype=torch.float64)

    def without_pages(self, tokens: list[int], window: int | None = None) -> torch.Tensor:
        """Attention over KV that was never in a page: [LAYERS, QUERY_HEADS, dim]."""
        kv = [self.kv(tokens, layer) for layer in range(LAYERS)]
        return torch.stack([self.attend(kv[i], self.query(i), window) for i in range(LAYERS)])


def text(count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 500, count).tolist()
    return tokens


FORMS = ["NHD", "HND", "MLA"]
SIZES = [(8, 8), (16, 8), (8, 16)]


@pytest.fixture(
    params=[(form, size) for form in FORMS for size in SIZES],
    ids=lambda p: f"{p[0]}-page{p[1][0]}-block{p[1][1]}",
)
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    form, (page, block) = request.param
    order = {"NHD": "KTHD", "HND": "KHTD"}
    if form == "MLA":
        layout = kvtier.KVLayout.mla(LAYERS, LATENT, "bfloat16", page)
    else:
        layout = kvtier.KVLayout(LAYERS, KV_HEADS, DIM, "bfloat16", page, page_order=order[form])
    config = kvtier.Config(groups=[layout], block_tokens=block, model="m@1", host="2MiB", chunk="2MiB")
    with ExitStack() as stack:
        engine = stack.enter_context(kvtier.open(config))
        yield Model(stack.enter_context(PagedKVCache(engine, num_pages=NUM_PAGES)), form)


def begin(model: Model, tokens: list[int]) -> PagedSequence:
    seq = model.cache.open(tokens)
    assert isinstance(seq, PagedSequence)
    seq.wait()
    model.write(seq, tokens)
    return seq


def evict_all(model: Model) -> None:
    """Every page is taken by somebody else, who fills it with noise."""
    noise = begin(model, text(NUM_PAGES * model.cache.page_tokens, 999))
    noise.close()
    model.cache._engine.flush()


@pytest.mark.parametrize("window", [None, 11], ids=["full", "window"])
def test_attention_over_restored_pages_is_that_over_the_originals(model: Model, window: int | None) -> None:
    tokens = text(53, 1)
    seq = begin(model, tokens)
    original = model.by_block_table([seq], window)
    before = seq.page_ids.tolist()
    torch.testing.assert_close(original[0], model.without_pages(tokens, window), rtol=0, atol=0)
    seq.close()

    evict_all(model)
    front = begin(model, text(3, 5))  # takes a page, so that the others come back elsewhere
    restored = model.cache.open(tokens)
    assert isinstance(restored, PagedSequence)
    step = model.cache.block_tokens
    assert restored.wait() == 52 // step * step
    assert model.cache.stats().host_tokens == restored.cached_tokens
    model.write(restored, tokens)
    assert restored.page_ids.tolist() != before
    batch = [front, restored]
    for attention in (model.by_block_table, model.by_csr):
        assert torch.equal(attention(batch, window)[1], original[0])
    assert torch.equal(model.by_csr(batch, window), model.by_block_table(batch, window))


@pytest.mark.parametrize("where", ["head", "middle", "tail"])
def test_one_damaged_page_is_seen(model: Model, where: str) -> None:
    """The control: the comparison above can fail."""
    seq = begin(model, text(53, 1))
    original = model.by_block_table([seq])
    ids = seq.page_ids.tolist()
    page = {"head": ids[0], "middle": ids[len(ids) // 2], "tail": ids[-1]}[where]
    model.cache.layer(1)[page].view(torch.int16)[..., 0] ^= 1  # the last bit of a few items
    damaged = model.by_block_table([seq])
    assert torch.equal(damaged[0, 0], original[0, 0])
    assert not torch.equal(damaged[0, 1], original[0, 1])
    assert not torch.equal(model.by_csr([seq])[0, 1], original[0, 1])


def test_pages_in_the_wrong_order_are_seen(model: Model) -> None:
    """A control for positions: with a window, exchanged pages change the result."""
    seq = begin(model, text(48, 1))
    ids = torch.from_numpy(seq.page_ids).long()
    right = model.batch([(ids, 48)], 11)
    assert not torch.equal(model.batch([(ids.flip(0), 48)], 11), right)


def test_attention_over_shared_pages(model: Model) -> None:
    head = text(32, 2)
    prompts = [head + text(n, 10 + n) for n in (1, 9, 20)]
    seqs = [begin(model, prompt) for prompt in prompts]
    shared = 32 // model.cache.page_tokens
    assert all(seq.cached_tokens == 32 for seq in seqs[1:])
    assert len({tuple(seq.page_ids[:shared]) for seq in seqs}) == 1
    expected = torch.stack([model.without_pages(prompt) for prompt in prompts])
    assert torch.equal(model.by_block_table(seqs), expected)
    assert torch.equal(model.by_csr(seqs), expected)


def test_attention_over_forks_that_went_different_ways(model: Model) -> None:
    tokens = text(29, 3)
    seq = begin(model, tokens)
    forks = [seq, seq.fork(), seq.fork()]
    assert torch.equal(model.by_csr(forks), model.without_pages(tokens).expand(3, -1, -1, -1))
    texts = [tokens + text(n, 20 + n) for n in (1, 5, 14)]
    for step in range(14):
        for fork, full in zip(forks, texts, strict=True):
            if 29 + step < len(full):
                assert fork.append(full[29 + step : 30 + step])
                model.write(fork, full[: 30 + step])
    expected = torch.stack([model.without_pages(full) for full in texts])
    assert torch.equal(model.by_csr(forks), expected)
    assert torch.equal(model.by_block_table(forks), expected)
    assert model.cache.stats().copied_pages > 0


def test_decode_goes_on_after_a_return_from_the_host(model: Model) -> None:
    tokens = text(40, 4)
    begin(model, tokens).close()
    evict_all(model)
    seq = begin(model, tokens)
    assert seq.cached_tokens > 0
    for token in text(12, 6):
        tokens = [*tokens, token]
        assert seq.append([token])
        model.write(seq, tokens)
        assert torch.equal(model.by_csr([seq])[0], model.without_pages(tokens))


def test_the_references_agree_with_torchs_own_attention(model: Model) -> None:
    """The reference is not wrong on both sides."""
    tokens = text(30, 8)
    seq = begin(model, tokens)
    kv = model.kv(tokens, 0).double()
    if model.form == "MLA":
        keys = values = kv.expand(1, -1, -1)
    else:
        keys, values = kv.permute(1, 2, 0, 3)
    query = model.query(0).unsqueeze(1)
    sdpa: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(query[None], keys[None], values[None], enable_gqa=True)[0, :, 0]
    torch.testing.assert_close(model.by_csr([seq])[0, 0], expected)
