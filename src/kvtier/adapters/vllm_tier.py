"""KVTierSecondaryTier: our disk tier below vLLM's own CPU offloading, for people who keep that.

In kv_connector_extra_config of vLLM's OffloadingConnector, whose spec_name is "TieringOffloadingSpec":

    "secondary_tiers": [{"type": "KVTierSecondaryTier", "module_path": "kvtier.adapters.vllm_tier",
                         "disk": [{"path": "/mnt/nvme0/kvtier", "capacity": "1TiB"}],
                         "identity": "weights revision 0e9e39f"}]

vLLM keeps its own host memory and asks this tier for what is not in there. What is read is proved by its
checksum first: a chunk that is not sound fails its load, and vLLM computes it. For vLLM 0.32 and later; see
docs/vllm.md.
"""

import contextlib
import json
import logging
import platform
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    RequestOffloadingContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from kvtier.adapters.vllm.identity import has_weights, weights_identity
from kvtier.adapters.vllm.options import parse_disk
from kvtier.config import Config, Disk
from kvtier.engine import BlockOutcome, BlockState, open_engine
from kvtier.errors import ConfigError, KVTierError
from kvtier.keys import KEY_BYTES, Keys, root_key
from kvtier.layout import KVLayout
from kvtier.tickets import Ticket

_log = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger, so that it is shown

_CLOSE_SECONDS = 30.0
_PARALLEL = ("tp_size", "pp_size", "pcp_size", "dcp_size")
_STORED = (BlockOutcome.STORED, BlockOutcome.PRESENT, BlockOutcome.PENDING)
_STATES = {BlockState.READY: LookupResult.HIT, BlockState.PENDING: LookupResult.RETRY}


@dataclass
class _Job:
    keys: list[Any]
    ticket: Ticket
    began: float
    is_load: bool


class KVTierSecondaryTier(SecondaryTierManager):  # type: ignore[misc]
    """One engine whose pages are the rows of vLLM's own host memory. Only for the scheduler's thread."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        disk: Any = None,
        host: str = "1GiB",
        identity: str | None = None,
        backpressure_detector: Any = None,
    ) -> None:
        """Opens the engine.

        Args:
            offloading_spec: vLLM's.
            primary_kv_view: vLLM's host memory, [num_chunks, bytes of a chunk].
            tier_type: vLLM's name of this tier.
            disk: As the connector's: [{"path": ..., "capacity": ...}].
            host: Host memory that reads and writes pass through.
            identity: Names what vLLM does not tell a tier: the weights' commit (not needed for a local
                folder that holds them), adapters' weights, and every option that changes what the model
                computes. Servers that differ in them must differ in it; docs/vllm.md has the list.
            backpressure_detector: vLLM's.

        Raises:
            ConfigError: A value is not allowed, or nothing names the weights.
            KVTierError: As kvtier.open().
        """
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        disks = parse_disk(disk)
        if not disks:
            raise ConfigError('disk is missing; allowed: a list of {"path": ..., "capacity": ...}')
        rows = np.frombuffer(primary_kv_view, np.uint8).reshape(offloading_spec.num_chunks, 1, -1)
        row_bytes = int(rows.shape[2])
        self._config = Config(
            groups=[KVLayout(1, 1, row_bytes, "uint8", 1, "TD", num_parts=1)],
            host=host,
            model=_identity(offloading_spec.config, identity),
            block_tokens=1,
            disk=[Disk(each.path, each.capacity) for each in disks],
        )
        self._engine = open_engine(self._config)
        try:
            self._pages = self._engine.attach([rows], 0, axes="PTD")
        except BaseException:
            self._engine.close()
            raise
        self._roots: dict[int, bytes] = {}
        self._jobs: dict[int, _Job] = {}
        self._declined: list[Any] = []
        self._row_bytes = row_bytes
        self._said = False

    def on_new_request(self, req_context: Any) -> Any:
        """See SecondaryTierManager: chunk by chunk."""
        return RequestOffloadingContext()

    def lookup(self, key: Any, req_context: Any) -> Any:
        """See SecondaryTierManager. Does no I/O; a chunk that is being stored is asked for again."""
        keys = self._keys([key])
        if keys is None:
            return LookupResult.MISS
        state = BlockState(int(self._engine.lookup(keys, record=False).states(0)[0]))
        return _STATES.get(state, LookupResult.MISS)

    def submit_store(self, job_metadata: Any) -> None:
        """See SecondaryTierManager."""
        self._submit(job_metadata, is_load=False)

    def submit_load(self, job_metadata: Any) -> None:
        """See SecondaryTierManager."""
        self._submit(job_metadata, is_load=True)

    def get_finished_jobs(self) -> Iterable[Any]:
        """See SecondaryTierManager. Of a load that failed in part the chunks that are there are named."""
        finished, self._declined = self._declined, []
        for job_id, job in list(self._jobs.items()):
            if job.ticket.done():
                del self._jobs[job_id]
                finished.append(self._result(job_id, job))
        return finished

    def has_pending_work(self) -> bool:
        """See SecondaryTierManager."""
        return bool(self._jobs)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        """See SecondaryTierManager."""
        if (rows := self._keys(keys)) is not None:
            self._engine.touch(rows)

    def drain_jobs(self) -> None:
        """See SecondaryTierManager. vLLM calls it to reset its caches, and for nothing else.

        Nothing that was stored before is found any more. It tells a tier no more than this of a reset, as
        after an update of the weights; and what raises here would leave vLLM's own memory as it was.
        """
        self._drain()
        try:
            self._engine.reset()
        except KVTierError as error:
            _log.error("what was stored before the reset may be found again after a restart: %s", error)

    def _drain(self) -> None:
        for job in self._jobs.values():
            with contextlib.suppress(KVTierError):  # what failed is told by its result
                job.ticket.wait()

    def shutdown(self) -> None:
        """Waits some seconds at most for what runs, makes it durable, and lets go of vLLM's memory."""
        if self._engine.closed:
            return
        self._drain()
        self._pages.detach(_CLOSE_SECONDS)
        self._engine.close(_CLOSE_SECONDS)

    def _submit(self, job: Any, *, is_load: bool) -> None:
        named = list(job.keys)
        keys = self._keys(named)
        if keys is None:
            self._declined.append(JobResult(job_id=job.job_id, success=False))
            return
        ids = np.asarray(job.chunk_ids, np.uint32)
        move = self._engine.load if is_load else self._engine.store
        ticket = move(keys, self._pages, ids)
        self._jobs[job.job_id] = _Job(named, ticket, time.monotonic(), is_load)

    def _result(self, job_id: int, job: _Job) -> Any:
        outcomes = job.ticket.result().outcomes
        good = outcomes == BlockOutcome.LOADED if job.is_load else np.isin(outcomes, _STORED)
        moved = int(np.count_nonzero(good))
        whole = moved == len(job.keys)
        there = tuple(key for key, fine in zip(job.keys, good, strict=True) if fine)
        return JobResult(
            job_id=job_id,
            success=whole,
            successful_keys=there if job.is_load and there and not whole else None,
            transfer_time=time.monotonic() - job.began,
            transfer_bytes=moved * self._row_bytes,
        )

    def _keys(self, keys: Collection[Any]) -> Keys | None:
        """Keys [n, 32] of vLLM's keys: its block hash, xor a root of our own; None if that is no SHA-256."""
        rows = np.empty((len(keys), KEY_BYTES), np.uint8)
        for row, key in zip(rows, keys, strict=True):
            block_hash = get_offload_block_hash(key)
            if len(block_hash) != KEY_BYTES:
                if not self._said:
                    _log.warning("nothing is kept: prefix_caching_hash_algo is none of sha256, sha256_cbor")
                self._said = True
                return None
            row[:] = np.frombuffer(block_hash, np.uint8) ^ self._root(get_offload_group_idx(key))
        return rows

    def _root(self, group: int) -> Any:
        if group not in self._roots:
            self._roots[group] = root_key(self._config, "", f"group {group}".encode())
        return np.frombuffer(self._roots[group], np.uint8)


def _identity(config: Any, given: str | None) -> str:
    """Names model, weights and everything that vLLM tells a tier of what a chunk's bytes mean."""
    name = str(config.model.name)
    if given is None and not (Path(name).exists() and has_weights(name)):
        raise ConfigError(
            f"identity is missing; allowed for {name!r}, which is no local folder with weights: "
            "a string that names the weights' commit"
        )
    facts: Mapping[str, Any] = {
        "model": asdict(config.model),
        "weights": weights_identity(name, given),
        "given": given,
        "groups": [asdict(group) for group in config.groups],
        "cache": asdict(config.cache),
        "parallel": {key: getattr(config.parallel, key) for key in _PARALLEL},
        "bytes": config.worker_kv_bytes_per_block,
        "layout": [str(config.kv_cache_layout), config.canonical_layout, config.replicated_layout],
        "vllm": vllm.__version__,
        "machine": [platform.machine(), torch.cuda.is_available(), torch.backends.cpu.get_cpu_capability()],
    }
    digest = sha256(json.dumps(facts, sort_keys=True, default=repr).encode()).hexdigest()
    return f"{Path(name).name}@{digest}"
