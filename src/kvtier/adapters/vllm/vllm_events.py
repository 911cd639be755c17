"""KV events in the installed vLLM's own classes."""

from typing import Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

from kvtier.adapters.vllm.events import Cleared, Event, Stored


def vllm_event(event: Event) -> Any:
    """The installed vLLM's event, with what that has fields for."""
    if isinstance(event, Cleared):
        return AllBlocksCleared()
    kind = BlockStored if isinstance(event, Stored) else BlockRemoved
    values = vars(event) | {"locality": "LOCAL"}
    values["block_hashes"] = [maybe_convert_block_hash(each) for each in event.block_hashes]
    if isinstance(event, Stored) and event.parent_block_hash is not None:
        values["parent_block_hash"] = maybe_convert_block_hash(event.parent_block_hash)
    return kind(**{name: value for name, value in values.items() if name in kind.__struct_fields__})
