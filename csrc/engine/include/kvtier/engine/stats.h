// Stats: one consistent snapshot of an engine. Counters only grow; gauges are as of the snapshot.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace kvtier {

// One size class of a tier (of the disk tier: on one drive): free + filling + ready + leaving = capacity
// (I1).
struct SlotClassStats {
  std::uint64_t slot_bytes = 0;
  std::uint32_t capacity = 0;
  std::uint32_t usable = 0;  // prefaulted (host) or written once (disk) so far; the rest counts as free
  std::uint32_t free = 0;
  std::uint32_t filling = 0;
  std::uint32_t ready = 0;
  std::uint32_t leaving = 0;  // quarantined ones included
};

// One drive of the disk tier.
struct DiskStats {
  std::string path;
  std::string store;  // its directory below path/stores; empty for a drive that is left out
  std::vector<SlotClassStats> classes;
  std::uint64_t capacity_bytes = 0;   // granted of what was asked for
  std::uint64_t allocated_bytes = 0;  // on the drive, when it was last looked at
  std::uint64_t bytes_read = 0;
  std::uint64_t bytes_written = 0;     // of blocks
  std::uint64_t bytes_prewritten = 0;  // zeros, once, so that later writes are plain overwrites
  std::uint64_t reads = 0;
  std::uint64_t reads_good = 0;
  std::uint64_t reads_failed = 0;  // the drive said no
  // Images that were read and did not prove to be what was looked for; all of them were misses.
  std::uint64_t bad_blank = 0;
  std::uint64_t bad_foreign = 0;
  std::uint64_t bad_newer_version = 0;
  std::uint64_t bad_corrupt_header = 0;
  std::uint64_t bad_corrupt_payload = 0;
  std::uint64_t bad_stale = 0;
  std::uint64_t bad_unknown_key = 0;
  std::uint64_t writes = 0;
  std::uint64_t writes_failed = 0;
  std::uint64_t syncs = 0;
  std::uint64_t commits = 0;
  std::uint64_t catalog_resets = 0;
  std::uint32_t unanswered = 0;  // requests given up that the drive still has, with their slots and memory
  std::string opened_from;       // "fresh", "catalog" or "headers", with the reason
  std::string queue;             // how requests reach the drive
  std::string queue_problem;     // why it is not io_uring; empty if it is
  std::string buffers_problem;   // why not all of the host tier is registered with it; empty if it is
  std::string key_problem;       // how many blocks are under a key that was not given; empty if none was met
  std::string growth = "ok";     // or why its files have stopped growing; tried again by and by
  std::string health = "ok";     // or why it is out of service; it comes back by itself
  std::string catalog_health = "ok";
};

// What a tier of another capacity would give, estimated by index/ghost_cache.h: LRU whatever the tier's own
// policy is, of blocks of one group (the first without a window). Prefetches are no use.
struct GhostPoint {
  double factor = 0;  // of the tier's capacity: 0.5, 1, 2, 4
  std::uint64_t capacity_blocks = 0;
  double hit_rate = 0;  // of asked_blocks; 0 before the first
};

// For the host tier: found in host memory of that capacity. For the disk tier: found in either tier with so
// much of disk, if it admitted every block.
struct GhostStats {
  double sample_rate = 0;            // of all blocks; 0: there is no such ghost
  std::uint64_t asked_blocks = 0;    // by lookups that were measured
  std::uint64_t sampled_blocks = 0;  // of these
  std::uint64_t memory_bytes = 0;
  std::vector<GhostPoint> points;
};

// One hop, host -> device or disk -> host; see engine/hop_meter.h.
struct HopStats {
  std::uint64_t transfers = 0;  // that ended well
  std::uint64_t bytes = 0;      // of these
  double seconds = 0;           // of each from its begin to its end, summed
  std::uint64_t running_bytes = 0;
  double latency_seconds = 0;   // a transfer of b bytes takes latency_seconds +
  double bytes_per_second = 0;  // (running_bytes + b) / bytes_per_second; 0: not measured yet
};
struct Hops {
  HopStats to_device;  // of loads, from host memory to their pages
  HopStats from_disk;  // of blocks read into host memory
};

struct EngineStats {
  Hops hops;
  GhostStats ghost_host;
  GhostStats ghost_disk;
  std::vector<SlotClassStats> host;
  std::vector<DiskStats> disks;
  std::uint64_t host_bytes = 0;
  std::uint64_t host_prefaulted_bytes = 0;
  std::uint64_t registered_chunks = 0;
  std::uint64_t refused_chunks = 0;
  std::optional<int> host_numa_node;  // that the arena's pages come from; nullopt: the kernel's choice
  double index_bytes_per_block = 0;

  std::uint64_t pins = 0;
  std::uint32_t pinned_blocks = 0;
  std::uint32_t quarantined_blocks = 0;
  std::uint32_t leases = 0;
  std::uint32_t transfers_running = 0;

  // lookup(): lookup_blocks = lookup_hits_host + lookup_hits_disk + lookup_misses_absent +
  // lookup_misses_pending + lookup_misses_failed.
  std::uint64_t lookup_blocks = 0;
  std::uint64_t lookup_hits_host = 0;
  std::uint64_t lookup_hits_disk = 0;
  std::uint64_t lookup_misses_absent = 0;
  std::uint64_t lookup_misses_pending = 0;
  std::uint64_t lookup_misses_failed = 0;  // the engine is in its failed state

  // store(): blocks by outcome. Their sum is the blocks handed in, less those still running.
  std::uint64_t store_stored = 0;
  std::uint64_t store_present = 0;
  std::uint64_t store_pending = 0;
  std::uint64_t store_declined = 0;
  std::uint64_t store_failed = 0;
  std::uint64_t store_dropped = 0;

  // load(): likewise.
  std::uint64_t load_loaded = 0;
  std::uint64_t load_missed = 0;
  std::uint64_t load_pending = 0;
  std::uint64_t load_failed = 0;

  // disk -> host: reads begun = promote_good + promote_bad + promote_failed + promote_cancelled + running.
  std::uint64_t promote_good = 0;
  std::uint64_t promote_bad = 0;        // did not verify; see DiskStats
  std::uint64_t promote_failed = 0;     // the drive said no
  std::uint64_t promote_cancelled = 0;  // a prefetch was given up
  std::uint64_t promote_declined = 0;   // no host slot could be freed; nothing was read

  // host -> disk: each block that was stored ends as one of these.
  std::uint64_t disk_durable = 0;
  std::uint64_t disk_declined_admission = 0;
  std::uint64_t disk_declined_budget = 0;
  std::uint64_t disk_declined_busy = 0;    // no drive takes writes now
  std::uint64_t disk_declined_full = 0;    // no slot could be freed
  std::uint64_t disk_declined_parent = 0;  // the block before it is not on disk
  std::uint64_t disk_declined_ttl = 0;     // it has a time to live
  std::uint64_t disk_gone = 0;             // evicted or dropped before it was written
  std::uint64_t disk_failed = 0;           // the drive said no
  std::uint64_t disk_evictions = 0;
  std::uint64_t disk_orphans = 0;
  std::uint32_t disk_waiting = 0;  // blocks that wait for their write, or for its sync
  std::uint32_t promotions_running = 0;
  std::uint64_t write_budget_left_bytes = 0;

  std::uint64_t bytes_stored = 0;
  std::uint64_t bytes_loaded = 0;
  std::uint64_t evictions = 0;
  std::uint64_t orphans = 0;  // blocks that lost their parent to an eviction; never with leaf-first policies
  std::uint64_t expirations = 0;  // blocks whose time to live was over
  std::uint64_t drops = 0;

  std::string arena_problem;  // why the host tier is smaller than configured; empty if it is not
  std::string health = "ok";  // or what went wrong, for good
};

}  // namespace kvtier
