"""Groups: what vLLM's KV cache configuration means to kvtier. Pure: it reads attributes, imports no vLLM.

A page is opaque here: its bytes are copied as they stand, whatever the backend packs into them (the CPU
backend packs K by columns, quantised caches keep scales beside the values). Keys say which packing it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvtier.errors import UnsupportedError
from kvtier.layout import KVLayout

# In these layouts the heads of one page lie apart; nobody who can choose chooses them.
_SCATTERED_LAYOUTS = ("LHBNC", "BHLNC")
# By the names of vLLM's classes, base classes included; the first that fits decides.
_DECLINED = ("RSWASpec", "SinkFullAttentionSpec", "HiddenStateCacheSpec", "SlidingWindowMLASpec")
_FULL = "FullAttentionSpec"
_MLA = "MLAAttentionSpec"
_WINDOW = "SlidingWindowSpec"


@dataclass(frozen=True)
class CacheGroup:
    """One of vLLM's cache groups that kvtier keeps.

    Attributes:
        index: Its index among vLLM's groups.
        layout: Its pages, as rows of bytes.
        layers: Their names, in order.
        pages_per_block: Pages in one block of kvtier.
    """

    index: int
    layout: KVLayout
    layers: tuple[str, ...]
    pages_per_block: int


@dataclass(frozen=True)
class CachePlan:
    """All groups, and the block that they share.

    Attributes:
        groups: The groups, in kvtier's order.
        block_tokens: Tokens of a block: the least common multiple of the groups' page sizes.
        hash_tokens: Tokens of one of vLLM's block hashes; a divisor of block_tokens.
        volatile_blocks: Blocks at a request's end that are not stored yet: 1 where a drafter may still
            rewrite its KV of them.
    """

    groups: tuple[CacheGroup, ...]
    block_tokens: int
    hash_tokens: int
    volatile_blocks: int


def plan_cache(kv_cache_config: Any, tp_size: int, *, drafts: bool = False) -> CachePlan:
    """Reads vLLM's KVCacheConfig.

    Args:
        kv_cache_config: As vLLM gives it to a connector.
        tp_size: Ranks that share the cache.
        drafts: Whether a drafter reads the model's hidden states (EAGLE, MTP). vLLM flags the groups of one
            only where it can tell them; without a flag it takes all groups for such.

    Raises:
        UnsupportedError: A group has state that cannot be restored (yet): then no prefix of this model can.
    """
    layout_name = str(getattr(kv_cache_config, "kv_cache_layout", None) or "LBHNC")
    if layout_name in _SCATTERED_LAYOUTS:
        raise UnsupportedError(
            f"the KV cache layout is {layout_name}, which scatters the heads of a page; allowed: LBHNC, "
            "LBNHC, BLHNC, BLNHC (VLLM_KV_CACHE_LAYOUT)"
        )
    replicas = int(getattr(kv_cache_config, "kv_tp_replicas", 1) or 1)
    replicated = tp_size > 1 and replicas >= tp_size
    kept = [
        (index, group)
        for index, group in enumerate(kv_cache_config.kv_cache_groups)
        if getattr(group, "enable_kv_transfer", True)
    ]
    if not kept:
        raise UnsupportedError("the model has no KV cache")
    tensors = getattr(kv_cache_config, "kv_cache_tensors", None) or []
    checked = [(index, group, _check_group(index, group, tensors)) for index, group in kept]
    block_tokens = math.lcm(*(int(group_spec(group).block_size) for _, group in kept))
    # Unknown to the workers, which need no hashes, until vLLM has resolved it.
    hash_tokens = int(getattr(kv_cache_config, "hash_block_size", None) or block_tokens)
    if block_tokens % hash_tokens:
        raise UnsupportedError(
            f"vLLM hashes every {hash_tokens} tokens; allowed: a divisor of {block_tokens}, which all page "
            "sizes divide (prefix_match_unit)"
        )
    groups = tuple(
        _make_group(index, group, window, block_tokens, replicated=replicated)
        for index, group, window in checked
    )
    flagged = any(bool(getattr(group, "is_eagle_group", None)) for _, group, _ in checked)
    return CachePlan(groups, block_tokens, hash_tokens, 1 if drafts or flagged else 0)


def group_spec(group: Any) -> Any:
    """The spec of all layers of a group, as scheduler and workers know it.

    Where groups of several page sizes are packed side by side, vLLM gives each worker a spec for every layer,
    and the scheduler the first of them.
    """
    each = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    return next(iter(each.values())) if each else group.kv_cache_spec


def _names(spec: object) -> list[str]:
    return [base.__name__ for base in type(spec).__mro__]


def _check_group(index: int, group: Any, tensors: Sequence[Any]) -> int | None:
    """Returns the tokens that a sliding window reaches back, None for full attention."""
    spec = group_spec(group)
    names = _names(spec)
    name = f"cache group {index} ({names[0]})"
    if getattr(group, "host_resident", False):
        raise UnsupportedError(f"{name} lies in host memory already; allowed: groups in device memory")
    # vLLM makes a tensor for each spec of a group: so both sides see that there are several.
    layers = set(group.layer_names)
    if sum(not layers.isdisjoint(tensor.layers) for tensor in tensors) > 1:
        raise UnsupportedError(
            f"{name} has layers whose pages differ in size or kind; allowed: layers that are all alike"
        )
    if any(base in names for base in _DECLINED) or not any(base in names for base in (_FULL, _WINDOW)):
        raise UnsupportedError(
            f"{name} keeps what kvtier cannot restore yet; allowed: full attention, MLA, sliding windows"
        )
    if not getattr(spec, "prefix_cacheable", True) or bool(getattr(spec, "prefix_replay_tokens", None)):
        raise UnsupportedError(f"{name}: vLLM does not cache prefixes of its layers by block")
    if _WINDOW in names:
        return int(spec.sliding_window) + int(getattr(spec, "extra_retained_tokens", None) or 0)
    return None


def _make_group(
    index: int, group: Any, window: int | None, block_tokens: int, *, replicated: bool
) -> CacheGroup:
    spec = group_spec(group)
    page_tokens, page_bytes = int(spec.block_size), int(spec.page_size_bytes)
    if window is not None and page_tokens != block_tokens:
        raise UnsupportedError(
            f"cache group {index}: its window has pages of {page_tokens} tokens and another group of "
            f"{block_tokens}; allowed: pages of one size, for a window may begin inside a block"
        )
    if page_bytes % page_tokens:
        raise UnsupportedError(
            f"cache group {index}: pages of {page_bytes} bytes are no multiple of its {page_tokens} tokens"
        )
    layout = KVLayout(
        num_layers=len(group.layer_names),
        num_kv_heads=1,
        head_dim=page_bytes // page_tokens,
        dtype="uint8",
        page_tokens=page_tokens,
        page_order="TD",
        window_tokens=window,
        name=f"group {index}" + (" (MLA)" if _MLA in _names(spec) else ""),
        num_parts=1,
        replicated=replicated,
    )
    return CacheGroup(index, layout, tuple(group.layer_names), block_tokens // page_tokens)
