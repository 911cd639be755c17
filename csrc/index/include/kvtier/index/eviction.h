// EvictionPolicy: decides which block goes when a slot is needed. It decides and never acts.
//
// The same policies run in the engine's tiers and in the simulation of csrc/replay; all of them pass the one
// conformance suite (tests/cpp/conformance/eviction_conformance.h). docs/policies.md compares them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "kvtier/core/types.h"

namespace kvtier {

// A record of the Index. Reused after erase(); see Entry::generation.
enum class EntryId : std::uint32_t {};
constexpr std::uint32_t raw(EntryId id) { return static_cast<std::uint32_t>(id); }

// The caller's word on which blocks go before others, above every policy. The numbers are part of the Python
// API.
enum class Priority : std::uint8_t { low = 0, normal = 1, high = 2 };

// Why a block comes: a request that runs uses it now, or it is fetched ahead of one that waits.
enum class Arrival : std::uint8_t { used, ahead };

// What a policy is told of a block when it became ready.
struct BlockFacts {
  const BlockKey& key;  // valid during the call
  GroupId group{0};
  std::uint32_t depth = 0;                       // blocks before it in its sequence
  std::optional<EntryId> parent = std::nullopt;  // the block that it hangs on, if this policy knows it
  bool expected = false;                         // as after EvictionPolicy::expect()
  Arrival arrival = Arrival::used;               // ahead: the next touch() is the use that it came for
};

struct BlockName {
  const BlockKey& key;  // valid during the call; keep block_digest() of it
  GroupId group{0};
};

enum class Departure : std::uint8_t {
  evicted,  // it was the victim(): a policy may remember it
  dropped,  // by the caller: it is not coming back under this key
  failed,   // its bytes did not prove to be it
  expired,  // its time to live was over
};

// 64 bits that stand for a block that is not resident. `seed` keeps a caller from choosing collisions.
inline std::uint64_t block_digest(const BlockKey& key, GroupId group, std::uint64_t seed) {
  std::uint64_t words[4];
  std::memcpy(words, key.bytes.data(), sizeof words);
  std::uint64_t digest = seed ^ raw(group);
  for (const std::uint64_t word : words) {
    digest = (digest ^ word) * 0x9e3779b97f4a7c15ULL;
    digest ^= digest >> 32;
  }
  return digest;
}

// Every tracked entry is *evictable* or *held* (pinned, or with leaf-first a younger block hangs on it).
// Holding and letting go is no use of the entry: its age stays.
//
// Threads: none of its own; guarded by its owner. Memory: allocated for EvictionOptions at the start, but for
// the heap of AgeQueues.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // A block became ready, just now; evictable.
  virtual void insert(EntryId id, const BlockFacts& block) = 0;
  // It was used.
  virtual void touch(EntryId id) = 0;
  // Requires an entry that is evictable, or held, respectively.
  virtual void hold(EntryId id) = 0;
  virtual void let_go(EntryId id) = 0;
  // It left, which had this name.
  virtual void erase(EntryId id, const BlockName& name, Departure why) = 0;
  // The block to evict next; asked again at once it is the same. nullopt when every entry is held.
  virtual std::optional<EntryId> victim() = 0;

  // The time of what follows, in microseconds since an arbitrary origin; never goes back. The engine says its
  // Clock's, a simulation its trace's.
  virtual void advance(std::int64_t /*now_us*/) {}
  // Requests that wait will want this block; or none of them will any more. Told in turn, the first by
  // insert() where the block comes later than the request. A hint.
  virtual void expect(EntryId /*id*/) {}
  virtual void expect_no_more(EntryId /*id*/) {}

  // These blocks are about to be inserted or touched. A hint, for what will be read of memory.
  virtual void fetch(std::span<const BlockKey> /*keys*/, GroupId /*group*/) const {}

  // Bytes of bookkeeping per record, everything allocated at the start counted in.
  virtual double bytes_per_record() const = 0;
};

struct EvictionOptions {
  std::size_t records = 0;        // every EntryId is below it
  std::size_t blocks = 0;         // most that are resident at once: slots of the size class
  std::uint64_t block_bytes = 0;  // of each of them; 0: not known
  std::uint64_t seed = 0;         // for block_digest()
};

struct EvictionChoice {
  std::string_view name;
  // Whether the policy is run leaf first: no block is evicted while a block that hangs on it is resident.
  // The others may leave orphans, which TierIndex counts.
  bool leaf_first;
  std::unique_ptr<EvictionPolicy> (*make)(const EvictionOptions& options);
};

// All there are, the default first.
std::span<const EvictionChoice> eviction_choices();
// Null when there is none of this name.
const EvictionChoice* find_eviction(std::string_view name);
// Of the host tier; and of the drives, whose order survives a restart
// (docs/decisions/0043-what-is-kept-by-default.md).
inline constexpr std::string_view kDefaultEviction = "return-hazard";
inline constexpr std::string_view kDefaultDiskEviction = "lru";

}  // namespace kvtier
