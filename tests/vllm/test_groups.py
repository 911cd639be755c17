"""Models with several cache groups, windows, latent attention, and quantised or compiled ones."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import BLOCK, prompt, same, serving
from test_identity import damage
from vllm.config import VllmConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MLAAttentionSpec, UniformTypeKVCacheSpecs

from kvtier.adapters.vllm.connector import _check_parallel
from kvtier.adapters.vllm.groups import group_spec, plan_cache
from kvtier.errors import UnsupportedError

PROMPTS = [prompt(seed, 400 + 50 * seed) for seed in range(3)]


def check_restored(model: Path, groups: int, block: int = BLOCK, **options: Any) -> None:
    with serving(model, connector=False, enable_prefix_caching=False, **options) as plain:
        computed = plain.generate(PROMPTS)
    with serving(model, extra={"host": "48MiB"}, **options) as server:
        assert len(server.scheduler._plan.groups) == groups
        cold = server.generate(PROMPTS)
        server.forget_device()
        restored = server.generate(PROMPTS)
        assert [r.cached for r in restored] == [(len(p) - 1) // block * block for p in PROMPTS]
        assert same(cold, computed) == [True] * len(PROMPTS)
        assert same(restored, computed) == [True] * len(PROMPTS)
        assert server.count("load_failures") == 0
        server.check_empty()
        server.forget_device()
        damage(server)
        damaged = server.generate(PROMPTS)
        assert not any(a.logprobs == b.logprobs for a, b in zip(damaged, restored, strict=True))
        assert not all(same(damaged, computed))


@pytest.mark.smoke
def test_sliding_windows_and_full_attention(gemma3: Path) -> None:
    check_restored(gemma3, groups=3)


def test_latent_attention(deepseek: Path) -> None:
    check_restored(deepseek, groups=1, block=16, block_size=16, trust_remote_code=False)


def test_sliding_windows_under_pressure(gemma3: Path) -> None:
    prompts = [prompt(seed, 500) for seed in range(6)]
    with serving(gemma3, connector=False, enable_prefix_caching=False) as plain:
        computed = plain.generate(prompts, 40)
    options = {"num_gpu_blocks_override": 70, "max_model_len": 640, "max_num_batched_tokens": 128}
    with serving(gemma3, **options) as server:
        for _ in range(2):
            assert same(server.generate(prompts, 40), computed) == [True] * len(prompts)
        assert server.count("load_requests") > 0
        assert server.count("load_failures") == 0
        server.check_empty()


def test_a_model_with_other_state_is_declined_and_served(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kvtier.adapters.vllm import connector
    from kvtier.errors import UnsupportedError

    def decline(*_: object) -> None:
        raise UnsupportedError("cache group 0 (MambaSpec): not yet")

    monkeypatch.setattr(connector, "plan_cache", decline)
    with serving(llama) as server:
        (first,) = server.generate(PROMPTS[:1])
        server.forget_device()
        (second,) = server.generate(PROMPTS[:1])
        assert second.cached == 0
        assert second.tokens == first.tokens


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize(("sizes", "kept"), [((576, 576), True), ((576, 128), False)])
def test_both_sides_decide_alike_on_layers_that_have_a_spec_each(
    layout: str, sizes: tuple[int, ...], kept: bool
) -> None:
    """vLLM tells its scheduler of the first layer alone."""
    config = VllmConfig()
    config.cache_config.kv_cache_layout = layout
    specs = {
        f"layer {n}": MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=size, dtype=torch.bfloat16)
        for n, size in enumerate(sizes)
    }
    group = KVCacheGroupSpec(list(specs), UniformTypeKVCacheSpecs.from_specs(specs))
    worker = kv_cache_utils.get_kv_cache_config_from_groups(config, [group], 1 << 24)
    scheduler = kv_cache_utils.generate_scheduler_kv_cache_config([worker])
    assert isinstance(worker.kv_cache_groups[0].kv_cache_spec, UniformTypeKVCacheSpecs)
    assert scheduler.kv_cache_groups[0].kv_cache_spec == specs["layer 0"]
    if kept:
        assert plan_cache(worker, 1) == plan_cache(scheduler, 1)
        assert group_spec(worker.kv_cache_groups[0]) == group_spec(scheduler.kv_cache_groups[0])
        return
    for side in (worker, scheduler):
        with pytest.raises(UnsupportedError, match="layers whose pages differ in size or kind"):
            plan_cache(side, 1)


def test_as_a_child_of_multi_connector(llama: Path) -> None:
    with serving(llama, multi=True) as server:
        cold = server.generate(PROMPTS)
        server.forget_device()
        restored = server.generate(PROMPTS)
        assert [r.cached for r in restored] == [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]
        assert same(restored, cold) == [True] * len(PROMPTS)
        server.check_empty()


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "fp8"},
        {"dtype": "bfloat16"},
        {"enforce_eager": False},
        {"async_scheduling": False},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
    ],
    ids=["fp8", "bfloat16", "compiled", "synchronous", "speculating"],
)
def test_other_pages_come_back_as_the_device_would_have_kept_them(
    llama: Path, options: dict[str, Any]
) -> None:
    with serving(llama, **options) as server:
        server.generate(PROMPTS)
        device = [server.generate([p])[0] for p in PROMPTS]  # one by one: the same batches, the same sums
        server.forget_device()
        restored = [server.generate([p])[0] for p in PROMPTS]
        assert [r.cached for r in restored] == [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]
        assert server.count("load_bytes") > 0
        assert [(r.tokens, r.logprobs) for r in restored] == [(r.tokens, r.logprobs) for r in device]


@pytest.mark.parametrize(
    "name",
    ["pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size", "nnodes"],
)
def test_parts_of_a_model_elsewhere_are_refused(name: str) -> None:
    sizes = dict.fromkeys(("pipeline_parallel_size", "nnodes"), 1) | {"tensor_parallel_size": 2}
    _check_parallel(SimpleNamespace(**sizes))
    with pytest.raises(UnsupportedError, match=f"{name} is 2; allowed with kvtier: 1"):
        _check_parallel(SimpleNamespace(**sizes | {name: 2}))
