"""WorkerSide: what the connector does in each of vLLM's worker processes - copies between pages and slots."""

import contextlib
import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kvtier.adapters.vllm.affinity import unbound
from kvtier.adapters.vllm.groups import CacheGroup, CachePlan
from kvtier.adapters.vllm.loads import RankLoads
from kvtier.adapters.vllm.metadata import Copy
from kvtier.config import Config
from kvtier.errors import ClosedError, ConfigError, KVTierError
from kvtier.ranks import RankPages, Worker
from kvtier.tickets import Ticket

_log = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0


class WorkerSide:
    """One rank. Threads: vLLM's worker; and one that joins the keeper, which is built after the workers."""

    def __init__(self, config: Config, plan: CachePlan, directory: str, rank: int) -> None:
        """Connects to nothing yet.

        Args:
            config: As the scheduler side makes it.
            plan: The cache groups.
            directory: Where the keeper will be found.
            rank: This worker's.
        """
        self._plan = plan
        self._worker = Worker(directory, rank, config)
        self._pages: list[RankPages] = []
        self._cuda: Any = None
        self._loads = RankLoads()
        self._joiner = threading.Thread(target=self._join, name="kvtier-join", daemon=True)

    def register(self, kv_caches: Mapping[str, Any], kv_cache_config: Any) -> None:
        """Attaches vLLM's KV cache, and begins to look for the keeper.

        Args:
            kv_caches: A strided view for each layer, page first.
            kv_cache_config: Where the pages are.

        Raises:
            KVTierError: The tensors are not where the configuration says, or there were others before.
        """
        if self._pages:
            raise ConfigError("vLLM registers KV caches a second time; allowed: once")
        strides = {
            name: (int(tensor.block_stride), kv_cache_config.num_blocks)
            for tensor in kv_cache_config.kv_cache_tensors
            for name in tensor.layers
        }
        # Beside a GPU a binding is to the processors near it: our threads belong there too.
        with contextlib.nullcontext() if torch.cuda.is_available() else unbound():
            for g, group in enumerate(self._plan.groups):
                views = [_view(name, group, kv_caches, strides) for name in group.layers]
                if views[0].device.type == "cuda":
                    self._cuda = views[0].device
                self._pages.append(self._worker.attach(views, g, axes="PTD"))
            self._joiner.start()  # which maps the arena, with a thread of its own

    def start_loads(self, loads: Iterable[tuple[str, list[Copy]]], stale: Iterable[str]) -> None:
        """Begins the loads of a step, behind what the compute stream was given."""
        for request_id, copies in loads:
            self._loads.begin(request_id, map(self._execute, copies))
        self._loads.fail(stale)

    def start_stores(self, stores: Iterable[Copy]) -> None:
        """Begins the stores of a step, behind the kernels that write their pages; the keeper hears of it."""
        for copy in stores:
            self._execute(copy)

    def take_ended_loads(self, *, idle: bool) -> tuple[set[str], set[str]]:
        """Loads whose copies are over on this rank; each is reported once, whatever became of its request.

        Args:
            idle: Whether this step computed nothing: then it waits a moment for the copies to go on.

        Returns:
            Those that are over, and those of them that failed.
        """
        return self._loads.take_ended(idle=idle)

    def close(self) -> None:
        """Waits some seconds at most for copies that run, and leaves the keeper. Idempotent."""
        self._worker.close(_CLOSE_SECONDS)

    def _execute(self, copy: Copy) -> Ticket | None:
        """Does this rank's part; None if it cannot, which fails it."""
        stream = None if self._cuda is None else torch.cuda.current_stream(self._cuda)
        pages = self._pages[copy.instruction.group]
        try:
            return self._worker.execute(copy.instruction, pages, copy.page_ids, stream=stream)
        except KVTierError as error:
            _log.warning("blocks were not copied: %s", error)
            return None

    def _join(self) -> None:
        try:
            self._worker.join()
        except ClosedError:
            pass  # the server ended before its scheduler began
        except KVTierError as error:
            _log.error("kvtier caches nothing, for this worker cannot join: %s", error)


def _view(
    name: str, group: CacheGroup, kv_caches: Mapping[str, Any], strides: Mapping[str, tuple[int, int]]
) -> Any:
    """A layer's pages as a tensor of bytes, [num_blocks, page_tokens, bytes]."""
    if name not in kv_caches or name not in strides:
        raise ConfigError(f"vLLM registered no KV cache of layer {name!r}; registered: {sorted(kv_caches)}")
    cache = kv_caches[name]
    block_stride, num_blocks = strides[name]
    item_bytes = int(cache.element_size())
    # Where kernels use smaller blocks, several rows of the view make one of vLLM's blocks.
    rows_per_block = int(cache.shape[0]) // num_blocks
    if rows_per_block < 1 or int(cache.stride(0)) * item_bytes * rows_per_block != block_stride:
        raise ConfigError(
            f"layer {name!r} has shape {tuple(cache.shape)} and strides {tuple(cache.stride())} of "
            f"{item_bytes} bytes; its {num_blocks} blocks should be {block_stride} bytes apart"
        )
    storage = cache.untyped_storage()
    begin = int(cache.storage_offset()) * item_bytes
    page_bytes, tokens = group.layout.page_bytes(0), group.layout.page_tokens
    if begin + (num_blocks - 1) * block_stride + page_bytes > storage.nbytes():
        raise ConfigError(f"layer {name!r} has pages of {page_bytes} bytes, which reach beyond its memory")
    shape, stride = (num_blocks, tokens, page_bytes // tokens), (block_stride, page_bytes // tokens, 1)
    blank = torch.empty(0, dtype=torch.uint8, device=cache.device)
    return blank.set_(storage, begin, shape, stride)
