"""KVLayout: what one page of a framework's KV cache holds, and how its bytes stand."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.errors import ConfigError

# Types that numpy does not know by name. The name is part of a block's identity, so two types of the
# same width are never mistaken for each other.
_ITEM_BYTES = {
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}
_ALIASES = {"half": "float16", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32"}
_MAX_EXTENT = 2**31 - 1
_MAX_ITEM_BYTES = 64


def dtype_name_and_bytes(dtype: Any) -> tuple[str, int]:
    """Reads a dtype however it was written.

    Args:
        dtype: A name ("bfloat16"), a numpy, ml_dtypes or torch dtype, or the bytes of one item.

    Returns:
        The name without its library ("bfloat16"; "bytes4" for a bare width) and the bytes of one item.

    Raises:
        ConfigError: The type is not known.
    """
    if isinstance(dtype, int) and not isinstance(dtype, bool):
        if not 1 <= dtype <= _MAX_ITEM_BYTES:
            raise ConfigError(f"dtype is {dtype} bytes; allowed: 1 to {_MAX_ITEM_BYTES}")
        return f"bytes{dtype}", dtype
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else np.dtype(dtype).name
    name = _ALIASES.get(name, name)
    if name in _ITEM_BYTES:
        return name, _ITEM_BYTES[name]
    if len(name) < 16 and name.startswith("bytes") and name[5:].isdecimal():
        return dtype_name_and_bytes(int(name[5:]))
    try:
        parsed = np.dtype(name)
    except (TypeError, ValueError, SyntaxError, OverflowError):  # NumPy reads whole structures out of a name
        parsed = np.dtype(object)
    if parsed.kind not in "iufcb":
        raise ConfigError(
            f"dtype is {dtype!r}; allowed: a name such as 'bfloat16', 'float16', 'float8_e4m3fn' or 'uint8', "
            "a numpy or torch dtype, or the bytes of one item"
        )
    return parsed.name, parsed.itemsize


def check_extent(name: str, value: object, low: int = 1, high: int = _MAX_EXTENT) -> int:
    """Returns `value` as an int of [low, high]; raises ConfigError with name, value and range."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and low <= value <= high:
        return int(value)
    raise ConfigError(f"{name} is {value!r}; allowed: an integer from {low} to {high}")


@dataclass(frozen=True)
class KVLayout:
    """The KV of one cache group: layers that are stored and evicted together.

    Attributes:
        num_layers: Layers of the group.
        num_kv_heads: KV heads that one rank holds.
        head_dim: Items of one head of one token.
        dtype: Name of the item type; given as a name, a numpy or torch dtype, or the bytes of an item.
        page_tokens: Tokens in one page of the framework's memory (vLLM calls it block size).
        page_order: Axes of a page of one layer, outermost first: K part (key, value), T token, H head,
            D dimension. "KTHD" is what vLLM and FlashInfer call NHD, "KHTD" is HND. Blocks keep this order
            in every tier; engine.attach() says where the bytes of a tensor are.
        window_tokens: Length of a sliding window, None for full attention.
        name: For messages only.
        num_parts: 2, key and value; 1 for the latent of MLA.
        replicated: Every rank holds the same bytes (MLA), so that a block has them once.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any
    page_tokens: int
    page_order: str = "KTHD"
    window_tokens: int | None = None
    name: str = ""
    num_parts: int = 2
    replicated: bool = False

    def __post_init__(self) -> None:
        dtype, _ = dtype_name_and_bytes(self.dtype)
        object.__setattr__(self, "dtype", dtype)
        for field in ("num_layers", "num_kv_heads", "head_dim", "page_tokens"):
            object.__setattr__(self, field, check_extent(field, getattr(self, field)))
        object.__setattr__(self, "num_parts", check_extent("num_parts", self.num_parts, 1, 2))
        if self.window_tokens is not None:
            object.__setattr__(self, "window_tokens", check_extent("window_tokens", self.window_tokens))
        replicated: object = self.replicated
        if not isinstance(replicated, bool):
            raise ConfigError(f"replicated is {replicated!r}; allowed: True or False")
        name: object = self.name
        if not isinstance(name, str):
            raise ConfigError(f"name is {self.name!r}; allowed: a str")
        needed = {"T", "D", *("K" if self.num_parts > 1 else ""), *("H" if self.num_kv_heads > 1 else "")}
        order: object = self.page_order
        letters = list(order) if isinstance(order, str) else []
        if len(set(letters)) != len(letters) or not needed <= set(letters) <= set("KTHD"):
            raise ConfigError(
                f"page_order is {order!r}; allowed: each of {', '.join(sorted(needed))} once, outermost axis "
                "first (K part, T token, H head, D dimension), such as 'KTHD' or 'KHTD'"
            )

    @classmethod
    def mla(
        cls,
        num_layers: int,
        latent_dim: int,
        dtype: Any,
        page_tokens: int,
        *,
        window_tokens: int | None = None,
        name: str = "",
    ) -> "KVLayout":
        """The layout of multi-head latent attention: one part and one head, the same on every rank.

        Args:
            num_layers: Layers of the group.
            latent_dim: Items of one token: the latent and its rotary part, 576 for DeepSeek-V3.
            dtype: As in KVLayout.
            page_tokens: Tokens in one page.
            window_tokens: Length of a sliding window, None for full attention.
            name: For messages only.

        Returns:
            A layout with page_order "TD".
        """
        return cls(
            num_layers,
            1,
            latent_dim,
            dtype,
            page_tokens,
            "TD",
            window_tokens,
            name,
            num_parts=1,
            replicated=True,
        )

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return dtype_name_and_bytes(self.dtype)[1]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, all parts and heads of one rank."""
        return self.num_parts * self.num_kv_heads * self.head_dim * self.item_bytes

    def page_bytes(self, layer: int | None = None) -> int:
        """Bytes of one page of one rank.

        Args:
            layer: The layer; all layers have equal pages. None sums over the layers.

        Raises:
            ConfigError: There is no such layer.
        """
        if layer is None:
            return self.token_bytes * self.page_tokens * self.num_layers
        check_extent("layer", layer, 0, self.num_layers - 1)
        return self.token_bytes * self.page_tokens

    def block_bytes(self, block_tokens: int) -> int:
        """Bytes of one block of one rank, all layers.

        Args:
            block_tokens: Tokens of a block.
        """
        return self.token_bytes * self.num_layers * check_extent("block_tokens", block_tokens)

    def pages_per_block(self, block_tokens: int) -> int:
        """Pages that a block covers: 1 also when a page holds several blocks."""
        return max(1, block_tokens // self.page_tokens)

    def blocks_per_page(self, block_tokens: int) -> int:
        """Blocks that a page holds: 1 also when a block covers several pages."""
        return max(1, self.page_tokens // block_tokens)

    def fingerprint(self) -> bytes:
        """SHA-256 (32 bytes) over all that decides what a block's bytes mean; `name` does not."""
        identity = {
            "num_layers": self.num_layers,
            "num_parts": self.num_parts,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "page_tokens": self.page_tokens,
            "page_order": self.page_order,
            "window_tokens": self.window_tokens,
            "replicated": self.replicated,
        }
        canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"kvtier.layout.v1\0" + canonical.encode()).digest()
