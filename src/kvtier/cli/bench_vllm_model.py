"""A model for benchmarks of real servers: a Llama with seeded random weights in bfloat16, as vLLM reads it.

Written without torch: safetensors (huggingface.co/docs/safetensors) is a length, a JSON header and bytes.
Its KV is 16 KiB a token: a prompt has as many bytes as a larger model's, and two cores can still compute it.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, HIDDEN, INTER, LAYERS, HEADS, HEAD_DIM = 512, 512, 1024, 8, 8, 64
_MAX_TOKENS = 32768


def write_model(path: Path, seed: int) -> None:
    """Writes config, weights and a tokenizer with one word for each token into a new folder."""
    path.mkdir()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
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
    _write_tokenizer(path)
    _write_weights(path / "model.safetensors", np.random.default_rng(seed))


def _shapes() -> dict[str, tuple[int, ...]]:
    wide = HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            **{f"{layer}self_attn.{name}_proj.weight": (wide, HIDDEN) for name in "qkv"},
            f"{layer}self_attn.o_proj.weight": (HIDDEN, wide),
            f"{layer}mlp.gate_proj.weight": (INTER, HIDDEN),
            f"{layer}mlp.up_proj.weight": (INTER, HIDDEN),
            f"{layer}mlp.down_proj.weight": (HIDDEN, INTER),
            f"{layer}input_layernorm.weight": (HIDDEN,),
            f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        }
    return shapes


def _write_weights(file: Path, random: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    at = 0
    for name, shape in _shapes().items():
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


def _write_tokenizer(path: Path) -> None:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"t{i}" for i in range(len(special), VOCAB))])}
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
