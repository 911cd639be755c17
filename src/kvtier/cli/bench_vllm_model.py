"""Models for benchmarks of real servers: Llamas with seeded random weights in bfloat16, as vLLM reads them.

Written without torch: safetensors (huggingface.co/docs/safetensors) is a length, a JSON header and bytes.
The small one's KV is 16 KiB a token: two cores can compute prompts of some length.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MAX_TOKENS = 32768


@dataclass(frozen=True)
class Size:
    """What a model's shapes are made of, and the KV of a token in bytes."""

    vocab: int
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 64

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all layers, bfloat16."""
        return 4 * self.layers * self.kv_heads * self.head_dim


SIZES = {
    "20m": Size(vocab=512, hidden=512, inter=1024, layers=8, heads=8, kv_heads=8),
    "300m": Size(vocab=8192, hidden=1024, inter=2816, layers=24, heads=16, kv_heads=8),
}


def write_model(path: Path, seed: int, size: Size) -> None:
    """Writes config, weights and a tokenizer with one word for each token into a new folder."""
    path.mkdir()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.inter,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": _MAX_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **ids,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps(ids))
    _write_tokenizer(path, size.vocab)
    _write_weights(path / "model.safetensors", _shapes(size), np.random.default_rng(seed))


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    hidden, inter = size.hidden, size.inter
    wide = {"q": size.heads * size.head_dim, "k": size.kv_heads * size.head_dim}
    wide["v"] = wide["k"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (size.vocab, hidden),
        "lm_head.weight": (size.vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(size.layers):
        layer = f"model.layers.{i}."
        shapes |= {
            **{f"{layer}self_attn.{name}_proj.weight": (wide[name], hidden) for name in "qkv"},
            f"{layer}self_attn.o_proj.weight": (hidden, wide["q"]),
            f"{layer}mlp.gate_proj.weight": (inter, hidden),
            f"{layer}mlp.up_proj.weight": (inter, hidden),
            f"{layer}mlp.down_proj.weight": (hidden, inter),
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}post_attention_layernorm.weight": (hidden,),
        }
    return shapes


def _write_weights(file: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    at = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = np.ones(shape, np.float32)
        else:
            scale = 1.0 if "embed" in name else shape[-1] ** -0.5  # logits well apart: greedy picks vary
            values = random.standard_normal(shape, np.float32) * np.float32(scale)
        part = (values.view(np.uint32) >> 16).astype("<u2").tobytes()  # bfloat16 is float32's upper half
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + len(part)]}
        parts.append(part)
        at += len(part)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(head)) + head)
        handle.writelines(parts)


def _write_tokenizer(path: Path, vocab: int) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"t{i}" for i in range(len(special), vocab))])}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": _MAX_TOKENS,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(described))
