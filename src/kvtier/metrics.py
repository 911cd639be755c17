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
    is "fresh", "catalog" or "headers", the last with the reason. `queue` says how requests reach the
    drive, `queue_problem` why not by io_uring, `buffers_problem` why not with registered
    buffers. `key_problem` says that there are blocks under a `disk_key` that was not given, and how many.
    `unanswered` requests were given up and are with the drive still: their slots and memory are not used.
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
    unanswered: int
    opened_from: str
    queue: str
    queue_problem: str
    buffers_problem: str
    key_problem: str
    growth: str
    health: str
    catalog_health: str


@dataclass(frozen=True, kw_only=True)
class GhostPoint:
    """What one capacity would give.

    Attributes:
        factor: Of the tier's capacity: 0.5, 1, 2 or 4.
        capacity_blocks: Blocks of one cache group.
        hit_rate: Of GhostStats.asked_blocks, 0 before the first. Of an interval: the difference of two
            products of both, over that of the blocks.
    """

    factor: float
    capacity_blocks: int
    hit_rate: float


@dataclass(frozen=True, kw_only=True)
class GhostStats:
    """Estimates of a tier's hit rate at other capacities, from a sample of the blocks (docs/costs.md).

    They are those of LRU, whatever the tier's policy is: hold the point of factor 1 beside the tier's own hit
    rate. A block counts as found only where all sampled blocks before it in its lookup do.

    Attributes:
        sample_rate: Sampled blocks over all.
        asked_blocks: Blocks that the measured lookups asked for: all lookups at first, later one in eight.
        sampled_blocks: Of these.
        memory_bytes: What the estimate takes, at most 512 KiB.
        points: By rising capacity.
    """

    sample_rate: float
    asked_blocks: int
    sampled_blocks: int
    memory_bytes: int
    points: tuple[GhostPoint, ...]


@dataclass(frozen=True, kw_only=True)
class HopStats:
    """How fast bytes go over one hop, fitted to the transfers that ended well.

    A transfer of b bytes that begins now takes latency_seconds + (running_bytes + b) / bytes_per_second.

    Attributes:
        transfers: That ended well.
        bytes: Of these.
        seconds: Of each from its begin to its end, summed; those of several at once overlap.
        running_bytes: Under way now.
        latency_seconds: See above.
        bytes_per_second: See above; 0 before enough was measured.
    """

    transfers: int
    bytes: int
    seconds: float
    running_bytes: int
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Hops:
    """The hops of a load.

    Attributes:
        to_device: From host memory to the pages; loads alone.
        from_disk: From the drives to host memory; loads and prefetches, one transfer for each block.
    """

    to_device: HopStats
    from_disk: HopStats

    @classmethod
    def from_native(cls, values: Mapping[str, Any]) -> "Hops":
        """Makes Hops from the core's snapshot."""
        return cls(**{name: HopStats(**hop) for name, hop in values.items()})


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counters only grow; gauges are as of the snapshot.

    Tier hits plus misses by cause add up to lookups: lookup_blocks = lookup_hits_host +
    lookup_hits_disk + lookup_misses_absent + lookup_misses_pending + lookup_misses_failed.
    `health` is "ok", or says what went wrong for good; `arena_problem` says why the host tier is smaller
    than configured, and is empty where it is not. `ghost_host` is about blocks found in host memory,
    `ghost_disk` about those found in either tier with so much of disk; None without one or if Config.ghosts
    is false. `host_numa_node` is where the host tier's pages come from, None where the kernel chooses.
    """

    hops: Hops
    ghost_host: GhostStats | None
    ghost_disk: GhostStats | None
    host: tuple[SlotClassStats, ...]
    disks: tuple[DiskStats, ...]
    host_bytes: int
    host_prefaulted_bytes: int
    registered_chunks: int
    refused_chunks: int
    host_numa_node: int | None
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
    disk_declined_ttl: int
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
    expirations: int
    drops: int

    health: str
    arena_problem: str

    @classmethod
    def from_native(cls, values: Mapping[str, Any]) -> "Stats":
        """Makes Stats from the core's snapshot."""
        host = _classes(values["host"])
        disks = tuple(DiskStats(**{**disk, "classes": _classes(disk["classes"])}) for disk in values["disks"])
        ghosts = {name: _ghost(values[name]) for name in ("ghost_host", "ghost_disk")}
        hops = Hops.from_native(values["hops"])
        return cls(**{**values, **ghosts, "hops": hops, "host": host, "disks": disks})

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, ready for JSON."""
        return {
            **asdict(self),
            **{name: _ghost_dict(getattr(self, name)) for name in ("ghost_host", "ghost_disk")},
            "host": [asdict(of_class) for of_class in self.host],
            "disks": [{**asdict(disk), "classes": list(asdict(disk)["classes"])} for disk in self.disks],
        }


def _ghost_dict(ghost: GhostStats | None) -> dict[str, Any] | None:
    return None if ghost is None else {**asdict(ghost), "points": [asdict(point) for point in ghost.points]}


def _ghost(values: Mapping[str, Any] | None) -> GhostStats | None:
    if values is None:
        return None
    return GhostStats(**{**values, "points": tuple(GhostPoint(**point) for point in values["points"])})


def _classes(values: Sequence[Mapping[str, Any]]) -> tuple[SlotClassStats, ...]:
    return tuple(SlotClassStats(**of_class) for of_class in values)
