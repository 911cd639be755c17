"""Stats: one consistent snapshot of an engine, with the names of kvtier/engine/stats.h."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class HostClassStats:
    """One size class of the host tier: free + filling + ready + leaving = capacity (I1), in slots.

    Attributes:
        slot_bytes: Bytes of a slot, header included.
        capacity: Slots of the class.
        usable: Slots that are prefaulted so far; the rest counts as free.
        free: Slots that hold nothing.
        filling: Slots that a store is copying into.
        ready: Slots whose block a lookup can hit.
        leaving: Slots whose block is gone while a copy still uses it, quarantined ones included.
    """

    slot_bytes: int
    capacity: int
    usable: int
    free: int
    filling: int
    ready: int
    leaving: int


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters only grow; gauges are as of the snapshot.

    Tier hits plus misses by cause add up to lookups: lookup_blocks = lookup_hits_host +
    lookup_misses_absent + lookup_misses_pending + lookup_misses_failed.
    `health` is "ok", or says what went wrong for good; `arena_problem` says why the host tier is smaller
    than configured, and is empty where it is not.
    """

    host: tuple[HostClassStats, ...]
    host_bytes: int
    host_prefaulted_bytes: int
    registered_chunks: int
    refused_chunks: int
    index_bytes_per_block: float

    pins: int
    pinned_blocks: int
    quarantined_blocks: int
    leases: int
    transfers_running: int

    lookup_blocks: int
    lookup_hits_host: int
    lookup_misses_absent: int
    lookup_misses_pending: int
    lookup_misses_failed: int

    store_stored: int
    store_present: int
    store_pending: int
    store_declined: int
    store_failed: int
    store_dropped: int

    load_loaded: int
    load_missed: int
    load_pending: int
    load_failed: int

    bytes_stored: int
    bytes_loaded: int
    evictions: int
    drops: int

    health: str
    arena_problem: str

    @classmethod
    def from_native(cls, values: Mapping[str, Any]) -> "Stats":
        """Makes Stats from the core's snapshot."""
        host = tuple(HostClassStats(**of_class) for of_class in values["host"])
        return cls(**{**values, "host": host})

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, ready for JSON."""
        return {**asdict(self), "host": [asdict(of_class) for of_class in self.host]}
