"""Counters: what the connector tells vLLM's statistics. Pure: names, meanings, sums."""

from collections.abc import Mapping

# Each is a sum since the last report; vLLM's Prometheus name is "vllm:kvtier_" and this.
COUNTERS = {
    "lookup_tokens": "Prompt tokens below which vLLM had nothing and kvtier was asked",
    "hit_tokens_host": "Of these, tokens found in host memory and promised to vLLM",
    "hit_tokens_disk": "Of these, tokens found on disk when their request arrived, and promised to vLLM",
    "miss_tokens_absent": "Of these, tokens that are in no tier",
    "miss_tokens_pending": "Of these, tokens that were being stored",
    "left_tokens": "Of these, tokens found and left to be computed, which was predicted to be faster",
    "chose_all": "Hits that were loaded whole: predicted to be fastest, or load is always",
    "chose_part": "Hits of which a prefix was loaded, and the rest computed",
    "chose_none": "Hits that were computed",
    "chose_unmeasured": "Hits that were loaded whole, for rates were not known yet",
    "chose_probe": "Hits that were loaded whole, to see whether loading is still as slow",
    "ask_again": "Lookups that vLLM was told to repeat",
    "load_blocks": "Blocks loaded into pages",
    "load_bytes": "Bytes loaded into pages",
    "load_seconds": "Seconds from the promise of a load until every rank had it, summed",
    "load_predicted_seconds": "Of these, what was predicted, where it was",
    "load_requests": "Loads that ended well",
    "load_failures": "Loads that failed and were recomputed (or failed, by kv_load_failure_policy)",
    "store_blocks_stored": "Blocks stored",
    "store_blocks_present": "Blocks not stored, for they were there",
    "store_blocks_pending": "Blocks not stored, for somebody else was storing them",
    "store_blocks_declined": "Blocks not stored, for no slot was free",
    "store_blocks_failed": "Blocks whose copy failed",
    "store_blocks_dropped": "Blocks dropped while they were stored",
    "store_bytes": "Bytes stored",
    "store_seconds": "Seconds from a store's grant until every rank had copied, summed",
    "resets": "Resets of the whole cache",
}


class Counters:
    """Sums by name, for one thread."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Adds to a counter; raises KeyError if there is none of that name."""
        if name not in COUNTERS:
            raise KeyError(name)
        if amount:
            self._sums[name] = self._sums.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        """The sums since the last call; only those above 0."""
        sums, self._sums = self._sums, {}
        return sums


def add_up(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    """The sum of two reports."""
    return {name: left.get(name, 0) + right.get(name, 0) for name in {**left, **right}}
