"""Who owns the pages: torch, CuPy, raw pointers, PagedKVCache; several GPUs; what the doctor says."""

from typing import Any

import numpy as np
import pytest
import torch

import kvtier
from kvtier import Config, GpuMemory, KVLayout, RawTensor
from kvtier.cli import main
from kvtier.paged import PagedKVCache

SHAPE = (24, 2, 16, 2, 64)


def config_of(layers: int, **options: Any) -> Config:
    return Config(groups=[KVLayout(layers, 2, 64, "int16", 16)], host="32MiB", model="m@1", **options)


def move(config: Config, tensors: list[Any], stream: Any = None) -> None:
    """Pages 0 to 7 to 16 to 23."""
    keys = kvtier.block_keys(np.arange(16 * 8), config)
    with kvtier.open(config) as engine:
        pages = engine.attach(tensors)
        assert engine.store(keys, pages, np.arange(8), stream=stream).result().stored == 8
        assert engine.load(keys, pages, np.arange(16, 24), stream=stream).result().valid_blocks == 8
        pages.detach()


def random(device: str = "cuda") -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, SHAPE, dtype=torch.int16, device=device)


class OnlyDLPack:
    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return self.inner.__dlpack__(stream=stream)

    def __dlpack_device__(self) -> Any:
        return self.inner.__dlpack_device__()


class OnlyInterface:
    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner
        self.__cuda_array_interface__ = inner.__cuda_array_interface__


def test_arrays_of_every_protocol_are_the_same_memory() -> None:
    def raw(tensor: torch.Tensor) -> RawTensor:
        strides = tuple(2 * s for s in tensor.stride())
        return RawTensor(tensor.data_ptr(), tuple(tensor.shape), strides, 2, GpuMemory(0))

    for wrap in (OnlyDLPack, OnlyInterface, raw):
        tensor = random()
        torch.cuda.synchronize()
        move(config_of(1), [wrap(tensor)])
        assert torch.equal(tensor[16:], tensor[:8])


def test_cupy_arrays_and_streams() -> None:
    cupy = pytest.importorskip("cupy")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        array = cupy.random.randint(-(2**15), 2**15, SHAPE).astype(cupy.int16)
        move(config_of(1), [array], stream)
    stream.synchronize()
    assert bool((array[16:] == array[:8]).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_types_that_numpy_does_not_have(dtype: torch.dtype) -> None:
    config = Config(groups=[KVLayout(1, 2, 64, dtype, 16)], host="32MiB", model="m@1")
    tensor = torch.randint(0, 256, (*SHAPE[:-1], 64 * dtype.itemsize), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    move(config, [tensor.view(dtype)])
    assert torch.equal(tensor[16:], tensor[:8])


def tensors_of(cache: PagedKVCache) -> list[torch.Tensor]:
    return [cache.layer(i) for i in range(2)]


@pytest.mark.parametrize("write", ["evict", "through"])
def test_paged_cache_on_cuda_finds_in_the_host_what_left_the_device(write: Any) -> None:
    config = config_of(2)
    with (
        kvtier.open(config) as engine,
        PagedKVCache(engine, num_pages=16, device="cuda", write=write) as cache,
    ):
        first = np.arange(16 * 8, dtype=np.int32)
        kept: dict[int, torch.Tensor] = {}
        seq = cache.open(first)
        assert seq.wait() == 0
        for layer, tensor in enumerate(tensors_of(cache)):
            kept[layer] = torch.randint(0, 1000, (8, *SHAPE[1:]), dtype=torch.int16, device="cuda")
            tensor[torch.from_numpy(seq.page_ids).long().cuda()] = kept[layer]
        seq.commit()
        seq.close()
        for i in range(1, 4):  # others need the pages
            other = cache.open(first + 10_000 * i)
            other.wait()
            for tensor in tensors_of(cache):
                tensor[torch.from_numpy(other.page_ids).long().cuda()] = -1
            other.commit()
            other.close()
        again = cache.open(np.append(first, 1).astype(np.int32))
        assert again.wait() == 16 * 8
        ids = torch.from_numpy(again.page_ids[:8]).long().cuda()
        torch.cuda.synchronize()
        for layer, tensor in enumerate(tensors_of(cache)):
            assert torch.equal(tensor[ids], kept[layer])
        again.close()


def test_several_gpus_share_one_host_tier() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    config = config_of(1)
    keys = kvtier.block_keys(np.arange(16 * 8), config)
    with kvtier.open(config) as engine:
        tensors = [random(f"cuda:{i}") for i in range(2)]
        for i in range(2):
            torch.cuda.synchronize(i)
        current = torch.cuda.current_device()
        pages = [engine.attach([tensor]) for tensor in tensors]
        assert engine.store(keys, pages[0], np.arange(8)).result().stored == 8
        assert engine.load(keys, pages[1], np.arange(16, 24)).result().valid_blocks == 8
        assert torch.cuda.current_device() == current
        assert torch.equal(tensors[1][16:].cpu(), tensors[0][:8].cpu())
        for each in pages:
            each.detach()


def test_doctor_names_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert f"cuda:0 {torch.cuda.get_device_name(0)}" in capsys.readouterr().out
