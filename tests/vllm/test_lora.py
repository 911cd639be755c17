"""Adapters: the blocks of each are its own in every tier; they go by its weights, not by its name."""

from pathlib import Path
from typing import Any

import models
from harness import BLOCK, Result, Server, prompt, serving
from test_identity import damage

PROMPTS = [prompt(seed, 300 + 50 * seed) for seed in range(3)]
HITS = [(len(p) - 1) // BLOCK * BLOCK for p in PROMPTS]
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


def answers(server: Server, paths: dict[str, Path]) -> dict[str, list[Result]]:
    """Of the base and of each adapter to the same prompts."""
    from vllm.lora.request import LoRARequest

    requests = {name: LoRARequest(name, n, str(path)) for n, (name, path) in enumerate(paths.items(), 1)}
    return {name: server.generate(PROMPTS, lora=requests.get(name)) for name in ("base", *paths)}


def tokens(found: dict[str, list[Result]]) -> dict[str, list[list[int]]]:
    return {name: [r.tokens for r in results] for name, results in found.items()}


def cached(found: dict[str, list[Result]]) -> dict[str, list[int]]:
    return {name: [r.cached for r in results] for name, results in found.items()}


def test_two_adapters_and_the_base_share_no_block_and_each_is_restored(llama: Path, tmp_path: Path) -> None:
    paths = {name: models.adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))}
    with serving(llama, connector=False, enable_prefix_caching=False, **LORA) as plain:
        computed = tokens(answers(plain, paths))
    for n in range(len(PROMPTS)):
        assert len({tuple(each[n]) for each in computed.values()}) == 3  # else sharing would not show
    nothing, everything = dict.fromkeys(computed, [0] * 3), dict.fromkeys(computed, HITS)
    disk = [{"path": str(tmp_path / "disk"), "capacity": "128MiB"}]
    extra = {"host": "48MiB", "disk": disk, "max_wait": 30}
    with serving(llama, extra=extra, **LORA) as server:
        cold = answers(server, paths)
        assert (tokens(cold), cached(cold)) == (computed, nothing)
        server.forget_device()
        restored = answers(server, paths)
        assert (tokens(restored), cached(restored)) == (computed, everything)
        assert server.scheduler._engine.flush(60).dropped == 0
        server.drain()
        server.check_empty()
    with serving(llama, extra=extra, **LORA) as server:
        restored = answers(server, paths)
        assert (tokens(restored), cached(restored)) == (computed, everything)
        assert server.count("hit_tokens_disk") == 3 * sum(HITS)
        server.drain()
        server.check_empty()
        server.forget_device()
        damage(server)
        damaged = answers(server, paths)
        assert cached(damaged) == everything
        for name, each in tokens(damaged).items():
            assert each != computed[name]


def test_an_adapter_that_is_trained_on_finds_nothing_of_before(llama: Path, tmp_path: Path) -> None:
    """Same name, same path, other weights: vLLM's own hash of a block would be the same."""
    path = tmp_path / "tuned"
    disk = [{"path": str(tmp_path / "disk"), "capacity": "128MiB"}]
    extra = {"host": "48MiB", "disk": disk, "max_wait": 30}
    models.adapter(path, seed=0)
    with serving(llama, extra=extra, **LORA) as server:
        before = answers(server, {"tuned": path})
        assert server.scheduler._engine.flush(60).dropped == 0
    models.adapter(path, seed=1)
    with serving(llama, connector=False, enable_prefix_caching=False, **LORA) as plain:
        computed = tokens(answers(plain, {"tuned": path}))
    assert computed["tuned"] != tokens(before)["tuned"]
    with serving(llama, extra=extra, **LORA) as server:
        after = answers(server, {"tuned": path})
        assert tokens(after) == computed
        assert cached(after) == {"base": HITS, "tuned": [0] * 3}
