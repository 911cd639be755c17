"""Stats: one consistent snapshot of an engine, with the names of kvtier/engine/stats.h."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SlotClassStats:
    """One size class of a tier (of the disk tier: on one drive), in slots.

    free + filling + ready + leaving = capacity (I1).

    Attributes:
        slot_bytes: Bytes of a slot, header included.
        capacity: Slots of the class.
        usable: Slots that are prefaulted (host) or were written once (disk) so far; the rest counts as free.
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
class DiskStats:
    """One drive of the disk tier.

    Every `bad_` counts images that were read and did not prove to be what was looked for; all were misses.
    `store` is the directory below path/stores. `growth`, `health` and `catalog_health` are "ok", or say why
    its files do not grow, it is out of service or its catalog is; a drive comes back by itself. `opened_from`
    is "fresh", "catalog" or "headers", the last with the reason. `queue` says how requests reach the drive.
    """

    path: str
    store: str
    classes: tuple[SlotClassStats, ...]
    capacity_bytes: int
    allocated_bytes: int
    bytes_read: int
    bytes_written: int
    bytes_prewritten: int
    reads: int
    reads_good: int
    reads_failed: int
    bad_blank: int
    bad_foreign: int
    bad_newer_version: int
    bad_corrupt_header: int
    bad_corrupt_payload: int
    bad_stale: int
    bad_unknown_key: int
    writes: int
    writes_failed: int
    syncs: int
    commits: int
    catalog_resets: int
    opened_from: str
    queue: str
    queue_problem: str
    growth: str
    health: str
    catalog_health: str


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters only grow; gauges are as of the snapshot.

    Tier hits plus misses by cause add up to lookups: lookup_blocks = lookup_hits_host +
    lookup_hits_disk + lookup_misses_absent + lookup_misses_pending + lookup_misses_failed.
    `health` is "ok", or says what went wrong for good; `arena_problem` says why the host tier is smaller
    than configured, and is empty where it is not.
    """

    host: tuple[SlotClassStats, ...]
    disks: tuple[DiskStats, ...]
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
    lookup_hits_disk: int
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

    promote_good: int
    promote_bad: int
    promote_failed: int
    promote_cancelled: int
    promote_declined: int

    disk_durable: int
    disk_declined_admission: int
    disk_declined_budget: int
    disk_declined_busy: int
    disk_declined_full: int
    disk_declined_parent: int
    disk_gone: int
    disk_failed: int
    disk_evictions: int
    disk_orphans: int
    disk_waiting: int
    promotions_running: int
    write_budget_left_bytes: int

    bytes_stored: int
    bytes_loaded: int
    evictions: int
    orphans: int
    drops: int

    health: str
    arena_problem: str

    @classmethod
    def from_native(cls, values: Mapping[str, Any]) -> "Stats":
        """Makes Stats from the core's snapshot."""
        host = _classes(values["host"])
        disks = tuple(DiskStats(**{**disk, "classes": _classes(disk["classes"])}) for disk in values["disks"])
        return cls(**{**values, "host": host, "disks": disks})

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, ready for JSON."""
        return {
            **asdict(self),
            "host": [asdict(of_class) for of_class in self.host],
            "disks": [{**asdict(disk), "classes": list(asdict(disk)["classes"])} for disk in self.disks],
        }


def _classes(values: Sequence[Mapping[str, Any]]) -> tuple[SlotClassStats, ...]:
    return tuple(SlotClassStats(**of_class) for of_class in values)
