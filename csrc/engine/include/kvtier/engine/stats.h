// Stats: one consistent snapshot of an engine. Counters only grow; gauges are as of the snapshot.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace kvtier {

// One size class of the host tier: free + filling + ready + leaving = capacity (I1).
struct HostClassStats {
  std::uint64_t slot_bytes = 0;
  std::uint32_t capacity = 0;
  std::uint32_t usable = 0;  // prefaulted so far; the rest counts as free
  std::uint32_t free = 0;
  std::uint32_t filling = 0;
  std::uint32_t ready = 0;
  std::uint32_t leaving = 0;  // quarantined ones included
};

struct EngineStats {
  std::vector<HostClassStats> host;
  std::uint64_t host_bytes = 0;
  std::uint64_t host_prefaulted_bytes = 0;
  std::uint64_t registered_chunks = 0;
  std::uint64_t refused_chunks = 0;
  double index_bytes_per_block = 0;

  std::uint64_t pins = 0;
  std::uint32_t pinned_blocks = 0;
  std::uint32_t quarantined_blocks = 0;
  std::uint32_t leases = 0;
  std::uint32_t transfers_running = 0;

  // lookup(): lookup_blocks = lookup_hits_host + lookup_misses_absent + lookup_misses_pending +
  // lookup_misses_failed.
  std::uint64_t lookup_blocks = 0;
  std::uint64_t lookup_hits_host = 0;
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

  std::uint64_t bytes_stored = 0;
  std::uint64_t bytes_loaded = 0;
  std::uint64_t evictions = 0;
  std::uint64_t drops = 0;

  std::string arena_problem;  // why the host tier is smaller than configured; empty if it is not
  std::string health = "ok";  // or what went wrong, for good
};

}  // namespace kvtier
