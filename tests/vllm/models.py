"""Small models with seeded weights in float32, written as vLLM reads them: no hub, no network."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCAB = 512
HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM = 128, 256, 4, 2, 32

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}


def _write(path: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (path / "generation_config.json").write_text(json.dumps(ids))
    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    return path


class _Random:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float | None = None) -> torch.Tensor:
        scale = shape[-1] ** -0.5 if scale is None else scale  # logits well apart: greedy picks vary
        return torch.randn(*shape, generator=self._generator) * scale


def llama(path: Path, seed: int = 0, layers: int = 3) -> Path:
    config = COMMON | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    random = _Random(seed)
    weights = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN, scale=1.0),
        "lm_head.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for i in range(layers):
        weights |= _attention_and_mlp(f"model.layers.{i}.", random)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = torch.ones(HIDDEN)
    _tokenizer(_write(path, config, weights))
    return path


def adapter(path: Path, seed: int, layers: int = 3, rank: int = 8) -> Path:
    """A LoRA of llama(), as PEFT writes it, large enough to change the answers. Replaces what is there."""
    names = {"q_proj": HEADS * HEAD_DIM, "k_proj": KV_HEADS * HEAD_DIM, "v_proj": KV_HEADS * HEAD_DIM}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "llama",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(names),
    }
    random = _Random(1000 + seed)
    weights = {}
    for i in range(layers):
        for name, size in names.items():
            prefix = f"base_model.model.model.layers.{i}.self_attn.{name}.lora_"
            weights |= {
                prefix + "A.weight": random(rank, HIDDEN),
                prefix + "B.weight": random(size, rank),
            }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, str(path / "adapter_model.safetensors"), metadata={"format": "pt"})
    return path


def gemma3(path: Path, seed: int = 0, layers: int = 6, window: int = 64) -> Path:
    """Sliding windows and full attention in turn: two groups of layers or more."""
    config = COMMON | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": window,
        "sliding_window_pattern": 3,
        "layer_types": ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    }
    random = _Random(seed)
    weights = {
        # Small: what attention adds must outweigh it, or the last token alone would decide the next.
        "model.embed_tokens.weight": random(VOCAB, HIDDEN, scale=0.05),
        "model.norm.weight": torch.zeros(HIDDEN),
    }
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    for i in range(layers):
        prefix = f"model.layers.{i}."
        weights |= _attention_and_mlp(prefix, random)
        for norm in norms:
            weights[f"{prefix}{norm}.weight"] = torch.zeros(HIDDEN)
        for norm in ("q_norm", "k_norm"):
            weights[f"{prefix}self_attn.{norm}.weight"] = torch.zeros(HEAD_DIM)
    return _write(path, config, weights)


def deepseek(path: Path, seed: int = 0, layers: int = 2) -> Path:
    """Multi-head latent attention, dense feed-forward layers."""
    rope, nope, value, latent = 64, 64, 64, 512
    config = COMMON | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "moe_intermediate_size": INTER,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "kv_lora_rank": latent,
        "q_lora_rank": None,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "num_key_value_heads": HEADS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    del config["head_dim"]
    random = _Random(seed)
    weights = {
        "model.embed_tokens.weight": random(VOCAB, HIDDEN, scale=1.0),
        "lm_head.weight": random(VOCAB, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for i in range(layers):
        prefix = f"model.layers.{i}."
        attention = prefix + "self_attn."
        weights |= {
            attention + "q_proj.weight": random(HEADS * (nope + rope), HIDDEN),
            attention + "kv_a_proj_with_mqa.weight": random(latent + rope, HIDDEN),
            attention + "kv_a_layernorm.weight": torch.ones(latent),
            attention + "kv_b_proj.weight": random(HEADS * (nope + value), latent),
            attention + "o_proj.weight": random(HIDDEN, HEADS * value),
            prefix + "input_layernorm.weight": torch.ones(HIDDEN),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
        }
        weights |= _mlp(prefix, random)
    return _write(path, config, weights)


def _attention_and_mlp(prefix: str, random: _Random) -> dict[str, torch.Tensor]:
    attention = prefix + "self_attn."
    return {
        attention + "q_proj.weight": random(HEADS * HEAD_DIM, HIDDEN),
        attention + "k_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
        attention + "v_proj.weight": random(KV_HEADS * HEAD_DIM, HIDDEN),
        attention + "o_proj.weight": random(HIDDEN, HEADS * HEAD_DIM),
        **_mlp(prefix, random),
    }


def _mlp(prefix: str, random: _Random) -> dict[str, torch.Tensor]:
    return {
        prefix + "mlp.gate_proj.weight": random(INTER, HIDDEN),
        prefix + "mlp.up_proj.weight": random(INTER, HIDDEN),
        prefix + "mlp.down_proj.weight": random(HIDDEN, INTER),
    }


def _tokenizer(path: Path) -> None:
    """A word for each token, as the server needs."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"t{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 8192,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(described))
