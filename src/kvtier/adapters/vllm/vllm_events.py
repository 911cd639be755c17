"""KV events in the installed vLLM's own classes, with what vLLM itself says of a block."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1 import kv_cache_interface
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvtier.adapters.vllm.events import Cleared, Event, ExtraKey, Stored

_HASHED_BESIDES = ("lora_request", "mm_features", "cache_salt")


def vllm_event(event: Event, groups: Mapping[int, Mapping[str, Any]]) -> Any:
    """The installed vLLM's event, with what that has fields for.

    Args:
        event: Of events.py.
        groups: group_fields().
    """
    if isinstance(event, Cleared):
        return AllBlocksCleared()
    kind = BlockStored if isinstance(event, Stored) else BlockRemoved
    values = {**vars(event), **groups.get(event.group_idx, {}), "locality": "LOCAL"}
    values["block_hashes"] = [maybe_convert_block_hash(each) for each in event.block_hashes]
    if isinstance(event, Stored) and event.parent_block_hash is not None:
        values["parent_block_hash"] = maybe_convert_block_hash(event.parent_block_hash)
    return kind(**{name: value for name, value in values.items() if name in kind.__struct_fields__})


def group_fields(groups: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """What a BlockStored says of its group, by the group's index: kind and window of vLLM's spec.

    Args:
        groups: KVCacheConfig.kv_cache_groups.
    """
    kind_of = getattr(kv_cache_interface, "get_kv_cache_spec_kind", None)
    window_of = getattr(kv_cache_interface, "get_kv_cache_spec_sliding_window", None)
    fields: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        fields[index] = {}
        if kind_of is not None:
            fields[index]["kv_cache_spec_kind"] = kind_of(group.kv_cache_spec).value
        if window_of is not None:
            fields[index]["kv_cache_spec_sliding_window"] = window_of(group.kv_cache_spec)
    return fields


def extra_keys(request: Any, first: int, last: int, block_tokens: int) -> list[ExtraKey] | None:
    """What vLLM hashes into blocks [first, last) besides tokens, as its own events say it.

    Returns:
        For each block LoRA name, images and their offset, salt and digest of embeddings; None if none has
        any.
    """
    embeds = getattr(request, "prompt_embeds", None)
    if embeds is None and not any(getattr(request, name, None) for name in _HASHED_BESIDES):
        return None
    keys: list[ExtraKey] = []
    feature = 0  # where the search for images goes on
    for begin in range(first * block_tokens, last * block_tokens, block_tokens):
        key, feature = kv_cache_utils.generate_block_hash_extra_keys(
            request, begin, begin + block_tokens, feature
        )
        keys.append(key)
    untagged = getattr(kv_cache_utils, "to_event_extra_keys", list)
    return list(untagged(keys)) if any(key is not None for key in keys) else None
