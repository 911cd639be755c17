"""What the scheduler side tells the workers each step. Small and picklable: numbers, never KV bytes."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvtier.ranks import Instruction

PageIds = npt.NDArray[np.uint32]


@dataclass
class Copy:
    """One group's part of a store or load.

    Attributes:
        instruction: From the keeper.
        page_ids: vLLM's block ids [num_blocks * pages_per_block].
    """

    instruction: Instruction
    page_ids: PageIds


@dataclass
class KVTierMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """One step.

    Attributes:
        loads: (request id, its copies, one for each group that has any).
        stores: Copies, in no order.
        stale: Requests whose running load must be reported as failed: the cache was reset meanwhile.
    """

    loads: list[tuple[str, list[Copy]]] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
