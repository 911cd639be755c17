"""KVTierConnector: the face that vLLM sees. It only passes on; needs vLLM."""

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.platforms import current_platform

from kvtier.adapters.vllm.groups import CachePlan, plan_cache
from kvtier.adapters.vllm.identity import check_persistent, computed_as, model_identity
from kvtier.adapters.vllm.loads import is_idle
from kvtier.adapters.vllm.meeting import meeting_place, sweep
from kvtier.adapters.vllm.metadata import Copy, KVTierMetadata
from kvtier.adapters.vllm.options import Options, parse_options
from kvtier.adapters.vllm.scheduler import SchedulerSide
from kvtier.adapters.vllm.stats import KVTierPromMetrics, KVTierStats
from kvtier.adapters.vllm.vllm_events import extra_keys, group_fields, vllm_event
from kvtier.adapters.vllm.worker import WorkerSide
from kvtier.config import Config, Disk
from kvtier.errors import KVTierError, UnsupportedError

_log = logging.getLogger(f"vllm.{__name__}")  # below vLLM's logger, so that it is shown


class KVTierConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Keeps vLLM's KV blocks in kvtier's tiers, and brings them back. See docs/vllm.md.

    vLLM makes one in its scheduler process and one in each worker. Where a model has state that cannot be
    restored, it says so once and does nothing.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._idle_step = False
        self._event_groups: dict[int, dict[str, Any]] = {}
        options = parse_options(vllm_config.kv_transfer_config.kv_connector_extra_config)
        _check_parallel(vllm_config.parallel_config)
        _check_sleep(vllm_config.model_config)
        tp_size = vllm_config.parallel_config.tensor_parallel_size
        try:
            plan = plan_cache(kv_cache_config, tp_size, drafts=_drafts(vllm_config.speculative_config))
        except UnsupportedError as error:
            # Every worker finds the same: one line is enough.
            level = logging.WARNING if role == KVConnectorRole.SCHEDULER else logging.DEBUG
            _log.log(level, "kvtier caches nothing of this model: %s", error)
            return
        config = _engine_config(vllm_config, kv_cache_config, plan, options, tp_size)
        place = meeting_place(options.directory, str(vllm_config.kv_transfer_config.engine_id))
        directory = str(place)
        if role == KVConnectorRole.WORKER:
            self._worker = WorkerSide(config, plan, directory, vllm_config.parallel_config.rank)
            return
        sweep(place)
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            _log.warning(
                'kv_load_failure_policy is "fail": a block that cannot be loaded fails its request; '
                '"recompute" only costs time'
            )
        self._event_groups = group_fields(kv_cache_config.kv_cache_groups)
        self._scheduler = SchedulerSide(
            config,
            plan,
            options,
            directory,
            identity=computed_as(vllm_config, _capability()),
            events=_wants_events(vllm_config),
            extra_keys=extra_keys,
        )

    # --- what it is ---

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache: a store that is lost is a miss."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """No: pages stay registered for as long as the server lives."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """One run of bytes for each block, where the backends can (those of the CPU cannot)."""
        return "BLHNC" if torch.cuda.is_available() else None

    # --- the scheduler's side ---

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """See SchedulerSide.holds."""
        if self._scheduler is not None:
            self._scheduler.holds.bind(gpu_block_pool)

    def on_new_request(self, request: Any) -> None:
        """See SchedulerSide.on_new_request()."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """See SchedulerSide.match(). Loads are always asynchronous ones."""
        if self._scheduler is None:
            return 0, False
        tokens = self._scheduler.match(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See SchedulerSide.grant()."""
        if self._scheduler is not None:
            ids = blocks.get_block_ids() if num_external_tokens else ()
            self._scheduler.grant(request, ids, num_external_tokens)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[Any, int]:
        """Disk is what was on disk alone when the request arrived; the rest was in host memory."""
        from vllm.v1.metrics.cache_hit_source import CacheHitSource  # came with 0.32, the first that asks

        if self._scheduler is None or not num_external_tokens:
            return {}
        disk = self._scheduler.disk_tokens(request, num_external_tokens)
        sources = {CacheHitSource.DISK: disk, CacheHitSource.HOST: num_external_tokens - disk}
        return {source: tokens for source, tokens in sources.items() if tokens}

    def build_connector_meta(self, scheduler_output: Any) -> KVTierMetadata:
        """See SchedulerSide.step()."""
        if self._scheduler is None:
            return KVTierMetadata()
        loads, stores, stale = self._scheduler.step(scheduler_output)
        return KVTierMetadata(
            loads=[(request_id, [Copy(*copy) for copy in copies]) for request_id, copies in loads],
            stores=[Copy(*copy) for copy in stores],
            stale=stale,
        )

    def update_connector_output(self, connector_output: Any) -> None:
        """See SchedulerSide.received()."""
        if self._scheduler is not None:
            self._scheduler.received(
                connector_output.finished_recving or set(), connector_output.failed_recving or set()
            )

    def take_events(self) -> Iterable[Any]:
        """What events.py says of our tiers; the last thing that vLLM calls in a step."""
        if self._scheduler is None:
            return ()
        self._scheduler.step_ended()
        self._scheduler.settle()
        return [vllm_event(event, self._event_groups) for event in self._scheduler.take_events()]

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """As request_finished_all_groups()."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Lets vLLM free the pages at once: those under a store are held."""
        if self._scheduler is not None:
            self._scheduler.finish(request)
        return False, None

    def has_pending_block_frees(self) -> bool:
        """See SchedulerSide.frees_soon(): then nobody need be preempted for want of pages."""
        return self._scheduler is not None and self._scheduler.frees_soon()

    def has_pending_push_work(self) -> bool:
        """Whether steps are needed, even without requests, to let go of pages."""
        return self._scheduler is not None and self._scheduler.holds.pending

    def reset_cache(self) -> bool:
        """See SchedulerSide.reset()."""
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    # --- the workers' side ---

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """See WorkerSide.register()."""
        if self._worker is not None:
            self._worker.register(kv_caches, self._kv_cache_config)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See WorkerSide.start_loads()."""
        if self._worker is not None:
            self._idle_step = is_idle(forward_context, kwargs)
            metadata = self._get_connector_metadata()
            self._worker.start_loads(metadata.loads, metadata.stale)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads are asynchronous, and whole."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: stores begin when the whole step has been submitted."""

    def wait_for_save(self) -> None:
        """Begins this step's stores; waits for none: their pages are held."""
        if self._worker is not None:
            self._worker.start_stores(self._get_connector_metadata().stores)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """See WorkerSide.take_ended_loads()."""
        if self._worker is None:
            return KVConnectorTransferResults()
        ended, failed = self._worker.take_ended_loads(idle=self._idle_step)
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    # --- both ---

    def get_kv_connector_stats(self) -> KVTierStats | None:
        """What was counted since the last call."""
        if self._scheduler is None:
            return None
        counted = self._scheduler.counters.take()
        return KVTierStats(data=counted) if counted else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVTierStats:
        """What travelled as a dict."""
        return KVTierStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVTierPromMetrics:
        """The counters of counters.py."""
        return KVTierPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Closes this side. Idempotent."""
        for side in (self._worker, self._scheduler):
            if side is not None:
                with contextlib.suppress(KVTierError):  # copies still run: their memory stays till the end
                    side.close()


def _wants_events(vllm_config: Any) -> bool:
    events = vllm_config.kv_events_config
    return events is not None and bool(events.enable_kv_cache_events)


def _drafts(speculative: Any) -> bool:
    """Whether a drafter may still change the last block of a request; vLLM 0.31 has no say in it."""
    if speculative is None:
        return False
    asked = getattr(speculative, "use_eagle_block_drop", speculative.use_eagle)
    return bool(asked())


def _capability() -> str:
    """Of the GPUs; asked without a context on any."""
    return str(current_platform.get_device_capability() or "")


def _check_parallel(parallel: Any) -> None:
    """Refuses what is known here; that Ray places ranks on other hosts is not: SchedulerSide warns of it."""
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "nnodes",
    ):
        value = getattr(parallel, name, 1) or 1
        if value != 1:
            raise UnsupportedError(
                f"{name} is {value}; allowed with kvtier: 1. Tensor and data parallelism on one host are"
            )


def _check_sleep(model: Any) -> None:
    """VLLM 0.33 asks supports_sleep_mode(); those before it ask nobody."""
    if getattr(model, "enable_sleep_mode", False):
        raise UnsupportedError(
            "enable_sleep_mode is true; allowed with kvtier: false, for a sleep would take the memory of "
            "pages from under copies that run"
        )


def _engine_config(
    vllm_config: Any, kv_cache_config: Any, plan: CachePlan, options: Options, tp_size: int
) -> Config:
    extra: dict[str, Any] = {}
    if options.disk:
        check_persistent(vllm_config)
        extra["disk"] = [Disk(entry.path, entry.capacity) for entry in options.disk]
    device = vllm_config.device_config.device_type
    backend = torch.backends.cpu.get_cpu_capability() if device == "cpu" else device
    return Config(
        groups=[group.layout for group in plan.groups],
        host=options.host,
        model=model_identity(vllm_config, kv_cache_config, vllm.__version__, f"{device} {backend}"),
        block_tokens=plan.block_tokens,
        world_size=tp_size,
        copy_threads=options.copy_threads,
        **extra,
    )
