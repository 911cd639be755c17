// ReturnBook: which blocks were used when, and how such blocks return.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "kvtier/core/types.h"
#include "kvtier/index/age_cohorts.h"
#include "kvtier/index/departed_blocks.h"
#include "kvtier/index/eviction.h"
#include "kvtier/index/return_hazards.h"
#include "kvtier/index/tick_clock.h"

namespace kvtier {

// What the policy return-hazard learns of the blocks of its tier (docs/policies.md), learned from all uses,
// wherever the block is by then.
//
// Memory: 16 bytes for each of `blocks` and 32,768 more uses, and 0.2 MiB, allocated at the start. Threads:
// none of its own. A use is O(1), a tick O(log of the longest time that is known).
class ReturnBook {
 public:
  // A block is forgotten once about `blocks` + 32,768 others were used. `seed`: of block_digest().
  ReturnBook(std::size_t blocks, std::uint64_t seed);

  // As UseObserver's.
  void advance(std::int64_t now_us) { pass(clock_.advance(now_us)); }
  void appears(const BlockKey& key, GroupId group, const BlockKey* parent, Arrival arrival);
  void fetch(std::span<const BlockKey> keys, GroupId group) const { known_.fetch(keys, group, seed_); }
  void used(const BlockKey& key, GroupId group);

  Tick now() const { return cohorts_.now(); }
  // How likely a block that is not used for `unused` ticks yet, counted from its last use, is used within
  // `ticks` more; 0 to 1. One that has waited longer already is asked about from now on. Of one that is not
  // known all that is known is that it was not used lately.
  double returning(const BlockKey& key, GroupId group, Tick unused, Tick ticks);

 private:
  void pass(Tick ticks);
  bool use(std::uint64_t digest);
  void count_return(BlockPast& past);
  void remember(std::uint64_t digest, const BlockPast& past);
  std::uint8_t chain_behind(const std::optional<BlockPast>& above) const;
  void give_child(std::uint64_t digest, const BlockPast& past);

  std::uint64_t seed_;
  AgeCohorts cohorts_;  // for its counts
  ReturnHazards hazards_;
  DepartedBlocks known_;
  TickClock clock_;
  Tick learned_at_ = 0;
  std::optional<Tick> began_;  // when the first block appeared
  std::uint64_t last_ = 0;     // digest of what appeared last
};

}  // namespace kvtier
