"""Model shapes against what their publishers and papers say."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli.shapes import SHAPES, find, from_config
from kvtier.errors import ConfigError, UnsupportedError

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("100m", 12 * 2 * 4 * 64 * 2),
        ("llama-3.1-8b", 131072),
        ("llama-3.1-70b-tp8", 40960),
        ("qwen2.5-7b-1m", 57344),
        ("deepseek-v3", 61 * 576 * 2),
    ],
)
def test_kv_bytes_per_token(name: str, bytes_per_token: int) -> None:
    assert find(name).kv_bytes_per_token() == bytes_per_token
    assert find(name).kv_bytes_per_token("float8_e4m3fn") == bytes_per_token // 2


# Active parameters as published; the embedding is not counted by us.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.03 - 0.525), ("qwen2.5-7b-1m", 7.61 - 0.545), ("deepseek-v3", 37.0 - 0.927)],
)
def test_parameters_are_those_published(name: str, billions: float) -> None:
    assert find(name).parameters / 1e9 == pytest.approx(billions, rel=0.03)


def test_a_prefill_in_two_parts_has_the_operations_of_the_whole() -> None:
    shape = SHAPES["llama-3.1-8b"]
    whole = shape.attention_flops(5000)
    assert shape.attention_flops(3000) + shape.attention_flops(2000, prefix=3000) == whole
    # By hand for the smallest: 2 layers, 4 heads of 16, one token that sees itself.
    assert SHAPES["tiny"].attention_flops(1) == 2 * 4 * 4 * 16
    assert SHAPES["tiny"].linear_flops(1) == 2 * SHAPES["tiny"].parameters
    assert shape.prefill_flops(1, 9) == shape.linear_flops(1) + 10 * shape.pair_flops


def test_a_rank_has_its_part() -> None:
    assert find("llama-3.1-70b-tp8").num_kv_heads == 1
    eighth = find("llama-3.1-8b", ranks=16)  # fewer KV heads than ranks: they are repeated
    assert (eighth.num_heads, eighth.num_kv_heads) == (2, 1)
    with pytest.raises(ConfigError, match=r"3 ranks of llama-3.1-8b: must divide"):
        find("llama-3.1-8b", ranks=3)
    for ranks in (0, -2):
        with pytest.raises(ConfigError, match=f"ranks is {ranks}; allowed: an integer from 1 to"):
            find("llama-3.1-8b", ranks=ranks)


@pytest.mark.parametrize(
    ("config", "name"), [(LLAMA_8B, "llama-3.1-8b"), (DEEPSEEK, "deepseek-v3")], ids=["llama", "deepseek"]
)
def test_a_config_gives_the_shape_that_is_built_in(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    known = SHAPES[name]
    for path in (folder, folder / "config.json"):
        found = find(str(path))
        assert (found.name, found.layout(), found.parameters) == (name, known.layout(), known.parameters)
        assert found.prefill_flops(1000) == known.prefill_flops(1000)


def test_experts_count_as_far_as_a_token_meets_them() -> None:
    mixtral = LLAMA_8B | {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert from_config(mixtral, "mixtral").intermediate_size == 2 * 14336
    inside = {"text_config": LLAMA_8B | {"head_dim": 64}}
    assert from_config(inside, "sees").head_dim == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None; allowed: a positive integer"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ({"layer_types": 5}, "layer_types is 5; allowed: a list"),
        ({"num_experts_per_tok": 2, "n_shared_experts": "x"}, "n_shared_experts is 'x'"),
        ({"num_experts_per_tok": 2, "shared_expert_intermediate_size": [1]}, r"intermediate_size is \[1\]"),
        ({"num_experts_per_tok": "x"}, "num_experts_per_tok is 'x'"),
    ],
)
def test_a_config_that_lacks_something_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config(LLAMA_8B | change, "x", "x/config.json")


def test_layers_that_differ_are_refused() -> None:
    for change in ({"layer_types": ["full_attention", "sliding_attention"]}, {"sliding_window": 4096}):
        with pytest.raises(UnsupportedError, match="full attention in every layer"):
            from_config(LLAMA_8B | change, "x")
    off = {"sliding_window": 4096, "use_sliding_window": False}
    assert from_config(LLAMA_8B | off, "x").num_layers == 32


def test_what_is_no_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"shape is 'gpt-9'; allowed: 100m, "):
        find("gpt-9")
    broken = tmp_path / "config.json"
    for text in ("{", "[]", "[" * 100_000):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.json"):
            find(str(broken))
