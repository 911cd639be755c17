"""Statistics in vLLM's own classes: they travel to its API server, its log line and its /metrics."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvtier.adapters.vllm.counters import COUNTERS, add_up

_LOGGED = ("hit_tokens_host", "hit_tokens_disk", "load_bytes", "store_bytes", "load_failures")


class KVTierStats(KVConnectorStats):  # type: ignore[misc]
    """Sums by name, as in counters.py."""

    def reset(self) -> None:
        """See KVConnectorStats."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: Any) -> "KVTierStats":
        """See KVConnectorStats."""
        return KVTierStats(data=add_up(self.data, other.data))

    def reduce(self) -> dict[str, int | float]:
        """What the log line of an interval shows."""
        return {f"kvtier_{name}": self.data.get(name, 0) for name in _LOGGED}

    def is_empty(self) -> bool:
        """See KVConnectorStats."""
        return not self.data


class KVTierPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """One Prometheus counter for each of counters.py, by engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, meaning in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:kvtier_{name}", documentation=f"kvtier: {meaning}.", labelnames=labelnames
            )
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """See KVConnectorPromMetrics."""
        for name, amount in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(amount)
