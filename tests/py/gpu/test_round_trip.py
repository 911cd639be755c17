"""Every copy path x layout x direction on a GPU: whole tensors are compared, over poisoned destinations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import kvtier
from kvtier import Config, KVLayout

PATHS = ("auto", "plain", "merged", "batched", "kernel", "staged", "bulk")
LAYERS, HEADS, DIM, PAGES = 3, 2, 64, 96
POISON = 0x5BCD


def fresh(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).cuda()


# name: (page_order, axes, tensors for tokens per page)
LAYOUTS: dict[str, tuple[str, str | None, Callable[[int], list[torch.Tensor]]]] = {
    "nhd": ("KTHD", None, lambda t: [fresh(PAGES, 2, t, HEADS, DIM) for _ in range(LAYERS)]),
    "hnd": ("KHTD", "PKHTD", lambda t: [fresh(PAGES, 2, HEADS, t, DIM) for _ in range(LAYERS)]),
    "hnd tensor, nhd pages": (
        "KTHD",
        None,
        lambda t: [fresh(PAGES, 2, HEADS, t, DIM).transpose(2, 3) for _ in range(LAYERS)],
    ),
    "kpthd": ("KTHD", "KPTHD", lambda t: [fresh(2, PAGES, t, HEADS, DIM) for _ in range(LAYERS)]),
    "k and v apart": ("KTHD", "PTHD", lambda t: [fresh(PAGES, t, HEADS, DIM) for _ in range(2 * LAYERS)]),
    "padded heads": (
        "KTHD",
        None,
        lambda t: [fresh(PAGES, 2, t, HEADS + 3, DIM)[..., :HEADS, :] for _ in range(LAYERS)],
    ),
    "padded pages": (
        "KTHD",
        None,
        lambda t: [fresh(PAGES, 3, t, HEADS, DIM)[:, :2] for _ in range(LAYERS)],
    ),
    "all layers": ("KTHD", "LPKTHD", lambda t: [fresh(LAYERS, PAGES, 2, t, HEADS, DIM)]),
    "contiguous blocks": ("KTHD", "PLKTHD", lambda t: [fresh(PAGES, LAYERS, 2, t, HEADS, DIM)]),
}
# (page_tokens, block_tokens): a block is a page, several pages, part of a page
SIZES = [(16, 16), (4, 16), (64, 16)]


def round_trip(config: Config, tensors: list[torch.Tensor], axes: str | None) -> None:
    layout = config.groups[0]
    at = ("P" + layout.page_order if axes is None else axes).index("P")
    per_page = layout.blocks_per_page(config.block_tokens)
    distinct = PAGES // 2
    num_blocks = distinct * per_page // layout.pages_per_block(config.block_tokens)
    keys = kvtier.block_keys(np.arange(num_blocks * config.block_tokens), config)
    order = np.random.default_rng(1).permutation(PAGES)
    sources, targets = order[:distinct], order[distinct:]
    before = [tensor.clone() for tensor in tensors]
    with kvtier.open(config) as engine:
        pages = engine.attach(tensors, axes=axes)
        stored = engine.store(keys, pages, np.repeat(sources, per_page)).result()
        assert stored.stored == num_blocks, stored
        for tensor in tensors:
            tensor.fill_(POISON)
        loaded = engine.load(engine.lookup(keys), pages, np.repeat(targets, per_page)).result()
        assert loaded.error is None
        assert loaded.valid_blocks == num_blocks
        pages.detach()
    for tensor, old in zip(tensors, before, strict=True):
        wanted = torch.full_like(old, POISON)
        wanted.movedim(at, 0)[torch.from_numpy(targets)] = old.movedim(at, 0)[torch.from_numpy(sources)]
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_pages_come_back_byte_for_byte_by_every_path(path: str, name: str) -> None:
    page_order, axes, make = LAYOUTS[name]
    for page_tokens, block_tokens in SIZES:
        layout = KVLayout(LAYERS, HEADS, DIM, "int16", page_tokens, page_order)
        config = Config(
            groups=[layout], block_tokens=block_tokens, host="64MiB", model="m@1", gpu_copy_path=path
        )
        round_trip(config, make(page_tokens), axes)


@pytest.mark.parametrize("path", PATHS)
def test_latent_pages_come_back_byte_for_byte(path: str) -> None:
    config = Config(groups=[KVLayout.mla(LAYERS, 72, 2, 16)], host="64MiB", model="m@1", gpu_copy_path=path)
    round_trip(config, [fresh(PAGES, 16, 72) for _ in range(LAYERS)], None)


@pytest.mark.parametrize("path", PATHS)
def test_layers_can_be_waited_for_one_by_one(path: str) -> None:
    layout = KVLayout(8, HEADS, DIM, "int16", 16)
    config = Config(groups=[layout], host="64MiB", model="m@1", gpu_copy_path=path)
    tensors = [fresh(PAGES, 2, 16, HEADS, DIM) for _ in range(8)]
    keys = kvtier.block_keys(np.arange(16 * 32), config)
    with kvtier.open(config) as engine:
        pages = engine.attach(tensors)
        engine.store(keys, pages, np.arange(32)).wait()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            ticket = engine.load(keys, pages, np.arange(40, 72), stream=stream, layers_per_batch=3)
            seen = []
            for layer in range(8):
                ticket.wait_layer(layer, stream)
                seen.append(tensors[layer][40:72].clone())  # a kernel behind that layer's copies only
        stream.synchronize()
        assert ticket.result().valid_blocks == 32
        for layer in range(8):
            assert torch.equal(seen[layer], tensors[layer][:32])
        pages.detach()


def test_rates_are_limited_and_bytes_are_right() -> None:
    layout = KVLayout(16, 8, 128, "int16", 16)
    config = Config(groups=[layout], host="256MiB", model="m@1", gpu_load_rate="1GB", gpu_store_rate="1GB")
    tensors = [fresh(128, 2, 16, 8, 128) for _ in range(16)]
    keys = kvtier.block_keys(np.arange(16 * 64), config)
    with kvtier.open(config) as engine:
        pages = engine.attach(tensors)
        engine.store(keys, pages, np.arange(64)).wait()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        ticket: Any = engine.load(keys, pages, np.arange(64, 128))
        ticket.wait_stream(None)
        end.record()
        end.synchronize()
        moved = 64 * layout.block_bytes(16)
        assert begin.elapsed_time(end) / 1e3 > 0.8 * (moved - (8 << 20)) / 1e9
        assert ticket.result().valid_blocks == 64
        for tensor in tensors:
            assert torch.equal(tensor[64:], tensor[:64])
        pages.detach()
