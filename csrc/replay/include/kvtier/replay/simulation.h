// Simulation: a trace through a host tier and, if there is one, a disk tier.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "kvtier/index/admission.h"
#include "kvtier/index/eviction.h"
#include "kvtier/replay/trace.h"

namespace kvtier::replay {

// What happens to the blocks of a request.
enum class Form : std::uint8_t {
  // As in the engine, whose server loads the longest prefix that is there and then stores the whole prompt:
  // what is there is held and touched tail first; slots are reserved head first; new blocks become ready tail
  // first and are then offered to the drive head first. Leaf first where the policy wants it.
  engine,
  // As in the literature: after a request its blocks are touched or inserted one by one, tail first. Never
  // leaf first.
  plain,
};

struct SimulationOptions {
  std::uint32_t host_blocks = 0;
  std::uint32_t disk_blocks = 0;  // 0: no disk tier
  std::string_view host_eviction = kDefaultEviction;
  std::string_view disk_eviction = kDefaultDiskEviction;
  // Policies that are none of eviction_choices(), instead of these. What they throw ends the simulation.
  struct Custom {
    std::function<std::unique_ptr<EvictionPolicy>(const EvictionOptions&)> make;
    bool leaf_first = true;
  };
  std::optional<Custom> host_custom = std::nullopt;
  std::optional<Custom> disk_custom = std::nullopt;
  Form form = Form::engine;
  Admission admission = kDefaultAdmission;
  std::optional<std::uint64_t> write_bytes_per_day;  // to the drive; nullopt: no limit
  std::uint64_t block_bytes = 0;
  std::uint64_t seed = 0;  // of Index and AdmissionPolicy, as an engine's hash_seed
  // Write-backs that hold a reserved slot at the same time; 0: an eighth of the host blocks, as in the
  // engine.
  std::uint32_t writes_at_once = 0;
  // So many requests behind the one that runs wait and are known: what they want is expected (EvictionPolicy)
  // and what of it is on disk alone is read. A read is over before the next request. Form::engine only.
  std::uint32_t look_ahead = 0;
  // Called now and then with the number of requests done; false ends the simulation there.
  std::function<bool(std::size_t)> progress;
};

struct SimulationResult {
  std::uint64_t references = 0;
  // Blocks of the longest prefix that was there, by where they were: of the whole trace and of each request.
  std::uint64_t hits_host = 0;
  std::uint64_t hits_disk = 0;
  std::vector<std::uint32_t> host_of_request;
  std::vector<std::uint32_t> disk_of_request;

  std::uint64_t evictions_host = 0;
  std::uint64_t evictions_disk = 0;
  std::uint64_t orphans_host = 0;  // see TierIndex::orphans()
  std::uint64_t orphans_disk = 0;
  std::uint64_t promotions = 0;           // disk -> host
  std::uint64_t reads_hidden = 0;         // loaded from the host tier, on disk alone when they became known
  std::uint64_t disk_blocks_written = 0;  // host -> disk
  std::uint64_t declined_admission = 0;
  std::uint64_t declined_budget = 0;
  std::uint64_t declined_parent = 0;
};

// Runs the trace through tiers that are empty at first. Requires names of eviction_choices(), at least one
// host block and no look-ahead in the plain form. Blocks of the calling thread; O(references).
SimulationResult simulate(const TraceView& trace, const SimulationOptions& options);

}  // namespace kvtier::replay
