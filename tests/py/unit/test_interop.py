"""Tensors of other libraries, in every layout that serving frameworks use, byte for byte."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import kvtier
from kvtier import Config, ConfigError, GpuMemory, KVLayout, RawTensor, UnsupportedError
from kvtier.arrays import describe
from kvtier.gpus import cuda_facts
from kvtier.testing import SimulatedDevice

Array = npt.NDArray[np.uint16]
LAYERS, HEADS, DIM, PAGES = 3, 2, 8, 24
GOOD_SHAPE = (PAGES, 2, 4, HEADS, DIM)


def config_of(layout: KVLayout, block_tokens: int) -> Config:
    return Config(groups=[layout], block_tokens=block_tokens, host="8MiB", model="m@1")


def fresh(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)


def padded(shape: tuple[int, ...]) -> Array:
    """A view whose pages (the first axis) have unused bytes behind them."""
    return fresh((shape[0], *shape[1:-2], shape[-2] + 3, shape[-1]))[..., : shape[-2], :]


def kthd(shape: tuple[int, ...]) -> Array:
    """Like vLLM: [2, pages, ...]."""
    return fresh((shape[1], shape[0], *shape[2:])).transpose(1, 0, *range(2, len(shape)))


# name: (page_order, axes, list of tensors for tokens per page)
LAYOUTS: dict[str, tuple[str, str | None, Callable[[int], list[Array]]]] = {
    "nhd": ("KTHD", None, lambda t: [fresh((PAGES, 2, t, HEADS, DIM), i) for i in range(LAYERS)]),
    "hnd": ("KHTD", "PKHTD", lambda t: [fresh((PAGES, 2, HEADS, t, DIM), i) for i in range(LAYERS)]),
    "hnd tensor, nhd pages": (
        "KTHD",
        None,
        lambda t: [fresh((PAGES, 2, HEADS, t, DIM), i).transpose(0, 1, 3, 2, 4) for i in range(LAYERS)],
    ),
    "kpthd": ("KTHD", "KPTHD", lambda t: [fresh((2, PAGES, t, HEADS, DIM), i) for i in range(LAYERS)]),
    "k and v apart": (
        "KTHD",
        "PTHD",
        lambda t: [fresh((PAGES, t, HEADS, DIM), i) for i in range(2 * LAYERS)],
    ),
    "padded heads": ("KTHD", None, lambda t: [padded((PAGES, 2, t, HEADS, DIM)) for _ in range(LAYERS)]),
    "strided kpthd": ("KTHD", "PKTHD", lambda t: [kthd((PAGES, 2, t, HEADS, DIM)) for _ in range(LAYERS)]),
    "all layers": ("KTHD", "LPKTHD", lambda t: [fresh((LAYERS, PAGES, 2, t, HEADS, DIM))]),
    "layers inside pages": ("KTHD", "PLKTHD", lambda t: [fresh((PAGES, LAYERS, 2, t, HEADS, DIM))]),
}
# (page_tokens, block_tokens): a block is a page, several pages, part of a page
SIZES = [(4, 4), (4, 16), (16, 4)]


def page_axis(page_order: str, axes: str | None) -> int:
    return ("P" + page_order if axes is None else axes).index("P")


def store_wipe_and_load(config: Config, tensors: list[Any], views: list[Any], axes: str | None) -> None:
    """Stores some pages, wipes everything, loads into other pages and compares whole tensors."""
    layout = config.groups[0]
    at = page_axis(layout.page_order, axes)
    tokens = 6 * layout.page_tokens * (2 if layout.page_tokens > config.block_tokens else 4)
    keys = kvtier.block_keys(np.arange(tokens), config)
    per_page = layout.blocks_per_page(config.block_tokens)
    distinct = len(keys) * layout.pages_per_block(config.block_tokens) // per_page
    sources = np.random.default_rng(1).permutation(PAGES)[:distinct]
    targets = np.random.default_rng(2).permutation(PAGES)[:distinct]
    before = [view.copy() for view in views]
    with kvtier.open(config) as engine:
        pages = engine.attach(tensors, axes=axes)
        assert pages.num_pages == PAGES
        stored = engine.store(keys, pages, np.repeat(sources, per_page)).result()
        assert stored.stored == len(keys)
        for view in views:
            view[...] = np.array(0xABCD).astype(view.dtype)
        match = engine.lookup(keys)
        assert match.ready_blocks == len(keys)
        loaded = engine.load(match, pages, np.repeat(targets, per_page)).result()
        assert loaded.error is None
        assert loaded.valid_tokens == tokens
        pages.detach()
    for view, old in zip(views, before, strict=True):
        wanted = np.full_like(old, np.array(0xABCD).astype(old.dtype))
        new, source = np.moveaxis(wanted, at, 0), np.moveaxis(old, at, 0)
        new[targets] = source[sources]
        assert (view == wanted).all()


@pytest.mark.parametrize(("page_tokens", "block_tokens"), SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_numpy_pages_come_back_byte_for_byte(name: str, page_tokens: int, block_tokens: int) -> None:
    order, axes, make = LAYOUTS[name]
    tensors = make(page_tokens)
    config = config_of(KVLayout(LAYERS, HEADS, DIM, "bfloat16", page_tokens, order), block_tokens)
    store_wipe_and_load(config, tensors, tensors, axes)


@pytest.mark.parametrize(("page_tokens", "block_tokens"), SIZES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_torch_bfloat16_pages_come_back_byte_for_byte(name: str, page_tokens: int, block_tokens: int) -> None:
    order, axes, make = LAYOUTS[name]
    views = make(page_tokens)
    tensors = [torch.from_numpy(view.view(np.int16)).view(torch.bfloat16) for view in views]
    config = config_of(KVLayout(LAYERS, HEADS, DIM, torch.bfloat16, page_tokens, order), block_tokens)
    store_wipe_and_load(config, tensors, views, axes)


@pytest.mark.parametrize(("page_tokens", "block_tokens"), SIZES)
@pytest.mark.parametrize("axes", ["PKTHD", "PKHTD"])
@pytest.mark.parametrize(("dtype", "tensor_dtype"), [(3, "V3"), (8, "u8"), ("float64", "f8"), (16, "V16")])
def test_items_of_any_width_come_back_byte_for_byte(
    dtype: int | str, tensor_dtype: str, axes: str, page_tokens: int, block_tokens: int
) -> None:
    layout = KVLayout(LAYERS, HEADS, 5, dtype, page_tokens)
    extents = {"P": PAGES, "K": 2, "T": page_tokens, "H": HEADS, "D": 5}
    shape = (*(extents[axis] for axis in axes), layout.item_bytes)
    views = [np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i in range(LAYERS)]
    tensors = [view.view(tensor_dtype)[..., 0] for view in views]
    store_wipe_and_load(config_of(layout, block_tokens), tensors, views, axes)


def test_latent_pages_come_back_byte_for_byte() -> None:
    views = [fresh((PAGES, 4, 24), i) for i in range(LAYERS)]
    store_wipe_and_load(config_of(KVLayout.mla(LAYERS, 24, 2, 4), 8), views, views, None)


def test_torch_float8_is_attached_by_its_width() -> None:
    layout = KVLayout(1, HEADS, DIM, torch.float8_e4m3fn, 4)
    tensor = torch.zeros((PAGES, 2, 4, HEADS, DIM), dtype=torch.float8_e4m3fn)
    with kvtier.open(config_of(layout, 4)) as engine:
        assert engine.attach(tensor).num_pages == PAGES


@pytest.mark.parametrize(
    ("dtype", "make", "kind"),
    [
        ("bfloat16", lambda: torch.zeros(GOOD_SHAPE, dtype=torch.float16), "float16"),
        ("bfloat16", lambda: np.zeros(GOOD_SHAPE, np.float16), "float16"),
        ("bfloat16", lambda: Cuda(np.zeros(GOOD_SHAPE, np.float16)), "float16"),
        ("bfloat16", lambda: OnlyDLPack(np.zeros(GOOD_SHAPE, np.float16)), "float16"),
        ("bfloat16", lambda: CudaDLPack(np.zeros(GOOD_SHAPE, np.float16)), "float16"),
        ("bfloat16", lambda: SimulatedDevice(1).empty(GOOD_SHAPE, np.float16), "float16"),
        ("float16", lambda: torch.zeros(GOOD_SHAPE, dtype=torch.bfloat16), "bfloat16"),
        ("float8_e5m2", lambda: torch.zeros(GOOD_SHAPE, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        ("float64", lambda: np.zeros(GOOD_SHAPE, np.complex64), "complex64"),
    ],
)
def test_another_floating_type_of_the_same_width_is_refused(dtype: str, make: Any, kind: str) -> None:
    layout = KVLayout(2, HEADS, DIM, dtype, 4)
    wanted = rf"^tensors\[1\] has items of type {kind}; allowed: {dtype}, .* integers of {layout.item_bytes} "
    with kvtier.open(config_of(layout, 4)) as engine, pytest.raises(ConfigError, match=wanted):
        engine.attach([np.zeros(GOOD_SHAPE, f"u{layout.item_bytes}"), make()])


@pytest.mark.parametrize(
    ("dtype", "tensor"),
    [
        ("bfloat16", lambda: np.zeros(GOOD_SHAPE, np.uint16)),
        ("bfloat16", lambda: np.zeros(GOOD_SHAPE, np.int16)),
        ("bfloat16", lambda: np.zeros(GOOD_SHAPE, "V2")),
        ("bfloat16", lambda: torch.zeros(GOOD_SHAPE, dtype=torch.int16)),
        ("float8_e4m3fn", lambda: torch.zeros(GOOD_SHAPE, dtype=torch.uint8)),
        ("uint8", lambda: torch.zeros(GOOD_SHAPE, dtype=torch.float8_e5m2)),
        ("bytes2", lambda: np.zeros(GOOD_SHAPE, np.float16)),
        (torch.half, lambda: torch.zeros(GOOD_SHAPE, dtype=torch.half)),
    ],
)
def test_integers_and_bare_bytes_stand_for_any_type_of_their_width(dtype: Any, tensor: Any) -> None:
    with kvtier.open(config_of(KVLayout(1, HEADS, DIM, dtype, 4), 4)) as engine:
        assert engine.attach(tensor()).num_pages == PAGES


class OnlyDLPack:
    """An array of which nothing is known but DLPack."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __dlpack__(self, **options: Any) -> Any:
        return self.inner.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.inner.__dlpack_device__()


def test_dlpack_arrays_and_raw_pointers_are_the_same_memory() -> None:
    view = fresh((PAGES, 2, 4, HEADS, DIM))
    layout = KVLayout(1, HEADS, DIM, "uint16", 4)
    raw = (view.ctypes.data, view.shape, view.strides, 2)
    for tensor in (OnlyDLPack(view), raw, RawTensor(*raw)):
        store_wipe_and_load(config_of(layout, 4), [tensor], [view], None)


def has_gpu() -> bool:
    try:
        cuda_facts()
    except UnsupportedError:
        return False
    return True


class Cuda:
    """What a CUDA array without a GPU's number looks like from outside; the memory is not a GPU's."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.__cuda_array_interface__ = {**array.__array_interface__, "stream": None}


class CudaDLPack:
    """What a GPU array that only speaks DLPack looks like; the memory is not a GPU's."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream == -1  # asks for no ordering: store() and load() name their stream
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 3)


def read_only() -> Array:
    view = fresh((PAGES, 2, 4, HEADS, DIM))
    view.flags.writeable = False
    return view


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ([torch.zeros(GOOD_SHAPE, device="meta")], {}, UnsupportedError, "'meta'"),
        ([read_only()], {}, ConfigError, r"tensors\[0\] is read-only"),
        ([fresh(GOOD_SHAPE).astype(np.float32)], {}, ConfigError, "items of 4 bytes; allowed: 2"),
        ([fresh(GOOD_SHAPE)[0]], {}, ConfigError, r"allowed: 5 axes, 'PKTHD'"),
        ([fresh((PAGES, 2, 5, HEADS, DIM))], {}, ConfigError, "axis T has extent 5; the layout says 4"),
        ([fresh((PAGES, 2, 4, HEADS, 2 * DIM))[..., ::2]], {}, ConfigError, "axis D has a stride of 4 bytes"),
        ([fresh(GOOD_SHAPE)[::-1]], {}, ConfigError, "negative stride"),
        ([np.broadcast_to(fresh(GOOD_SHAPE[1:]), GOOD_SHAPE).copy()[:0]], {}, ConfigError, "page axis P"),
        ([], {}, ConfigError, "0 tensors given"),
        ([fresh(GOOD_SHAPE)] * 2, {}, ConfigError, "2 tensors given; allowed: 1"),
        ([object()], {}, ConfigError, r"tensors\[0\] is a object"),
        ([(0, (1,), (1,), 2)], {}, ConfigError, "a pointer and an itemsize above 0"),
        ([(8, (1, 2), (1,), 2)], {}, ConfigError, "2 extents and 1 strides"),
        ([(8, 1)], {}, ConfigError, "allowed as a tuple"),
        ([fresh(GOOD_SHAPE)], {"axes": "PKTHX"}, ConfigError, "allowed letters"),
        ([fresh(GOOD_SHAPE)], {"axes": 5}, ConfigError, "axes is 5"),
        ([fresh(GOOD_SHAPE)], {"group": 1}, ConfigError, "group is 1; allowed: an integer from 0 to 0"),
        ([fresh(GOOD_SHAPE)], {"device": "cuda"}, ConfigError, "device is 'cuda'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tensors: list[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with (
        kvtier.open(config_of(KVLayout(1, HEADS, DIM, "float16", 4), 4)) as engine,
        pytest.raises(error, match=message),
    ):
        engine.attach(tensors, **options)


@pytest.mark.parametrize("kind", [Cuda, CudaDLPack])
def test_gpu_tensors_without_a_gpu_are_refused_and_the_message_says_what_is_missing(kind: Any) -> None:
    if has_gpu():
        pytest.skip("there is a GPU")
    with (
        kvtier.open(config_of(KVLayout(1, HEADS, DIM, "float16", 4), 4)) as engine,
        pytest.raises(UnsupportedError, match="tensors are in GPU memory, but no CUDA device: "),
    ):
        engine.attach([kind(fresh(GOOD_SHAPE))])


@pytest.mark.parametrize(("kind", "ordinal"), [(Cuda, None), (CudaDLPack, 3)])
def test_gpu_arrays_are_described_as_they_lie_in_memory(kind: Any, ordinal: int | None) -> None:
    array = fresh((4, 6, 8)).transpose(0, 2, 1)[:, 2:]
    raw = describe(kind(array), "it")
    assert raw == RawTensor(array.ctypes.data, array.shape, array.strides, 2, GpuMemory(ordinal))
    assert describe(kind(array), "it", device_given=True).device is None


def test_tensors_of_two_devices_are_refused() -> None:
    layout = KVLayout(2, HEADS, DIM, "float16", 4)
    simulated = [SimulatedDevice(seed).empty(GOOD_SHAPE, np.float16) for seed in (1, 2)]
    with kvtier.open(config_of(layout, 4)) as engine:
        with pytest.raises(ConfigError, match="different devices"):
            engine.attach(simulated)
        with pytest.raises(ConfigError, match="different devices"):
            engine.attach([fresh(GOOD_SHAPE), simulated[0]])


def test_importing_kvtier_imports_neither_torch_nor_cupy() -> None:
    code = (
        "import sys, kvtier, kvtier.testing; print(sorted({'torch', 'cupy', 'ml_dtypes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_paged_cache_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, kvtier; assert 'PagedKVCache' in dir(kvtier); assert 'kvtier.paged' not in sys.modules; "
        "cache = kvtier.PagedKVCache; assert cache is sys.modules['kvtier.paged'].PagedKVCache; "
        "from kvtier import *; assert PagedKVCache is cache; assert 'torch' not in sys.modules; "
        "assert set(kvtier.__all__) <= set(dir(kvtier)); assert not hasattr(kvtier, 'PagedKV')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cuda_array_interface_is_read_where_the_device_is_named() -> None:
    """CuPy's protocol, version 3, over the simulated device's memory; without a device it is refused."""

    class Foreign:
        def __init__(self, array: Any) -> None:
            self.array = array  # keeps it alive
            self.__cuda_array_interface__ = {
                "shape": array.shape,
                "typestr": "|u1",
                "data": (array.ptr, False),
                "strides": array.strides,
                "version": 3,
            }

    device = SimulatedDevice(1)
    layout = KVLayout(1, HEADS, DIM, "uint8", 4)
    shape = (6, 2, 4, HEADS, DIM)
    array = device.empty(shape, np.uint8, row_padding_bytes=64)
    config = config_of(layout, 4)
    keys = kvtier.block_keys(np.arange(8), config)
    with kvtier.open(config) as engine:
        with pytest.raises(kvtier.UnsupportedError, match="no CUDA device"):
            engine.attach([Foreign(array)])
        pages = engine.attach([Foreign(array)], device=device)
        content = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        device.write(array, content)
        assert engine.store(keys, pages, [0, 1]).result().stored == 2
        assert engine.load(keys, pages, [5, 4]).result().valid_blocks == 2
        after = device.read(array).result()
        assert (after[5] == content[0]).all()
        assert (after[4] == content[1]).all()
        pages.detach()
