"""Shapes of models: how many bytes of KV a token has, and how much arithmetic its prefill takes.

A shape is what one rank holds. Counted are matrix products only, two operations for each multiplication with
its addition (norms, rotary positions and softmax are left out, as in arXiv:2001.08361, section 2.1). A
mixture of experts counts the experts that a token meets. No communication between ranks is counted.

    shape = find("llama-3.1-8b")          # or the path of a Hugging Face config.json, or of its folder
    shape.kv_bytes_per_token()            # 131072
    shape.prefill_flops(128 << 10)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvtier.errors import ConfigError, UnsupportedError
from kvtier.layout import KVLayout, check_extent

_MOST = 2**31 - 1  # of a layout's extents, too


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Attributes:
        rank: Items of the latent from which a token's keys and values of all heads are made.
        rope_dim: Items of the rotary key that all heads share; cached behind the latent.
        key_dim: Of a head's key, without the rotary part.
        value_dim: Of a head's value.
        query_rank: Of the latent of the queries; None: queries are made from the hidden state at once.
    """

    rank: int
    rope_dim: int
    key_dim: int
    value_dim: int
    query_rank: int | None

    @property
    def cached_dim(self) -> int:
        """Items that are cached of a token, in one layer."""
        return self.rank + self.rope_dim


@dataclass(frozen=True)
class Shape:
    """One rank of a decoder whose layers are all alike.

    Attributes:
        name: Part of results' names.
        about: A sentence for people.
        num_layers: Layers.
        hidden_size: Of the residual stream.
        num_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank; 1 with `latent`.
        head_dim: Of a head; with `latent` what is cached of a token.
        intermediate_size: Width of the gated feed-forward layer that a token meets, on this rank.
        vocab_size: Rows of the output matrix on this rank.
        latent: Set for multi-head latent attention.
        max_tokens: The longest context that the model is made for; 0 where not known.
    """

    name: str
    about: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    latent: Latent | None = None
    max_tokens: int = 0

    def layout(self, dtype: Any = "bfloat16", page_tokens: int = 16, page_order: str = "KTHD") -> KVLayout:
        """The layout of this rank's KV; `page_order` counts for separate keys and values only."""
        if self.latent is not None:
            return KVLayout.mla(self.num_layers, self.latent.cached_dim, dtype, page_tokens)
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, dtype, page_tokens, page_order)

    def kv_bytes_per_token(self, dtype: Any = "bfloat16") -> int:
        """Bytes of KV of one token, all layers of this rank."""
        return self.layout(dtype).block_bytes(1)

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer's matrices that a token meets."""
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        latent, heads, hidden = self.latent, self.num_heads, self.hidden_size
        if latent is None:
            return feed_forward + 2 * hidden * self.head_dim * (heads + self.num_kv_heads)
        query = heads * (latent.key_dim + latent.rope_dim)
        queries = hidden * query
        if latent.query_rank is not None:
            queries = latent.query_rank * (hidden + query)
        expand = latent.rank * heads * (latent.key_dim + latent.value_dim)
        return (
            feed_forward + queries + hidden * latent.cached_dim + expand + heads * latent.value_dim * hidden
        )

    @property
    def parameters(self) -> int:
        """Numbers in all matrices that a token meets, the embedding apart."""
        return self.num_layers * self.layer_parameters + self.hidden_size * self.vocab_size

    @property
    def pair_flops(self) -> int:
        """Operations of attention for one query token and one key token it sees, all heads and layers."""
        if self.latent is None:
            return 4 * self.num_layers * self.num_heads * self.head_dim
        dims = self.latent.key_dim + self.latent.rope_dim + self.latent.value_dim
        return 2 * self.num_layers * self.num_heads * dims

    def linear_flops(self, tokens: int) -> int:
        """Operations of a prefill that grow with its tokens; the output matrix once, for the last token."""
        return 2 * (self.num_layers * self.layer_parameters * tokens + self.hidden_size * self.vocab_size)

    def attention_flops(self, tokens: int, prefix: int = 0) -> int:
        """Operations of causal attention of `tokens` new tokens over themselves and `prefix` cached ones."""
        return self.pair_flops * (tokens * prefix + tokens * (tokens + 1) // 2)

    def prefill_flops(self, tokens: int, prefix: int = 0) -> int:
        """Operations of a prefill of `tokens` tokens behind `prefix` cached ones."""
        return self.linear_flops(tokens) + self.attention_flops(tokens, prefix)

    def rank_of(self, ranks: int) -> Shape:
        """One of `ranks` ranks in tensor parallelism, the KV heads repeated where there are fewer.

        Raises:
            ConfigError: Less than 1, or heads or widths cannot be divided by it.
        """
        if check_extent("ranks", ranks) == 1:
            return self
        kv_heads = max(1, self.num_kv_heads // ranks)
        divided = (self.num_heads, self.intermediate_size, self.vocab_size)
        if any(n % ranks for n in divided) or max(self.num_kv_heads, ranks) % kv_heads:
            raise ConfigError(
                f"{ranks} ranks of {self.name}: must divide {divided} (heads, width, vocabulary)"
            )
        return replace(
            self,
            name=f"{self.name}-tp{ranks}",
            about=f"{self.about}, one rank of {ranks}",
            num_heads=self.num_heads // ranks,
            num_kv_heads=kv_heads,
            intermediate_size=self.intermediate_size // ranks,
            vocab_size=self.vocab_size // ranks,
        )


_LLAMA_70B = Shape("llama-3.1-70b", "Llama-3.1-70B", 80, 8192, 64, 8, 128, 28672, 128256, None, 131072)
_DEEPSEEK = Latent(rank=512, rope_dim=64, key_dim=128, value_dim=128, query_rank=1536)

# From the models' config.json. DeepSeek-V3: a token meets 8 routed experts and a shared one, 2048 wide each,
# which is as wide as its first three layers, which have none.
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("100m", "Llama-like, 104 M parameters", 12, 768, 12, 4, 64, 3072, 256, None, 131072),
        Shape("llama-3.1-8b", "Llama-3.1-8B", 32, 4096, 32, 8, 128, 14336, 128256, None, 131072),
        _LLAMA_70B.rank_of(8),
        Shape("qwen2.5-7b-1m", "Qwen2.5-7B-1M", 28, 3584, 28, 4, 128, 18944, 152064, None, 1010000),
        Shape("deepseek-v3", "DeepSeek-V3", 61, 7168, 128, 1, 576, 18432, 129280, _DEEPSEEK, 163840),
        Shape("tiny", "for tests", 2, 64, 4, 2, 16, 128, 256, None, 131072),
        Shape("tiny-mla", "for tests", 2, 64, 4, 1, 40, 128, 256, Latent(32, 8, 16, 16, 24), 131072),
    )
}


def find(name: str, ranks: int = 1) -> Shape:
    """A shape by its name in `SHAPES`, or of the model at a path.

    Args:
        name: A name; or the path of a Hugging Face config.json, or of the folder that holds it.
        ranks: Of tensor parallelism: the shape is one of them.

    Raises:
        ConfigError: Neither a name nor such a path, or a config that lacks something.
        UnsupportedError: A model whose layers do not all have the same KV.
    """
    if name in SHAPES:
        return SHAPES[name].rank_of(ranks)
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        allowed = f"{', '.join(SHAPES)}, or the path of a config.json or its folder"
        raise ConfigError(f"shape is {name!r}; allowed: {allowed}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    given = str(
        config.get("_name_or_path") or (path.parent.name if path.name == "config.json" else path.stem)
    )
    slug = "-".join("".join(c if c.isalnum() or c == "." else " " for c in given.lower()).split())
    return from_config(config, slug or "model", str(path)).rank_of(ranks)


def from_config(config: Mapping[str, Any], name: str, source: str = "config") -> Shape:
    """The shape that a Hugging Face config describes.

    Args:
        config: The parsed config.json.
        name: Of the shape.
        source: Where the config is from, for messages.

    Raises:
        ConfigError: A key is missing or not a positive integer.
        UnsupportedError: A model whose layers do not all have the same KV.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):  # a model that also sees or hears
        config = text
    _refuse_mixed(config, source)

    def number(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST:
            return value
        raise ConfigError(f"{source}: {key} is {value!r}; allowed: a positive integer")

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    latent = None
    kv_heads, head_dim = number("num_key_value_heads", heads), number("head_dim", max(1, hidden // heads))
    if config.get("kv_lora_rank"):
        query_rank = number("q_lora_rank") if config.get("q_lora_rank") else None
        latent = Latent(
            rank=number("kv_lora_rank"),
            rope_dim=number("qk_rope_head_dim"),
            key_dim=number("qk_nope_head_dim"),
            value_dim=number("v_head_dim"),
            query_rank=query_rank,
        )
        kv_heads, head_dim = 1, latent.cached_dim
    return Shape(
        name=name,
        about=f"{name} ({source})",
        num_layers=number("num_hidden_layers"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_width(config, number),
        vocab_size=number("vocab_size"),
        latent=latent,
        max_tokens=number("max_position_embeddings", 1),
    )


def _width(config: Mapping[str, Any], number: Any) -> int:
    """Of the feed-forward layer that a token meets."""
    active = config.get("num_experts_per_tok")
    if not active:
        return int(number("intermediate_size"))
    width = number("moe_intermediate_size", config.get("intermediate_size"))
    shared = number("n_shared_experts") if config.get("n_shared_experts") else 0
    shared_width = shared * width
    if config.get("shared_expert_intermediate_size"):
        shared_width = number("shared_expert_intermediate_size")
    return int(number("num_experts_per_tok") * width + shared_width)


def _refuse_mixed(config: Mapping[str, Any], source: str) -> None:
    types = config.get("layer_types") or ["full_attention"]
    if not isinstance(types, list):
        raise ConfigError(f"{source}: layer_types is {types!r}; allowed: a list")
    kinds = {str(kind) for kind in types}
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if kinds != {"full_attention"} or (window and "layer_types" not in config):
        what = f"layer_types {sorted(kinds)}" if kinds != {"full_attention"} else f"sliding_window {window}"
        raise UnsupportedError(f"{source}: {what}; allowed: full attention in every layer")
