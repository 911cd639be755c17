// ReturnAdmission: whether a block will be wanted from the drive, by how such blocks return.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "kvtier/core/types.h"
#include "kvtier/index/eviction.h"
#include "kvtier/index/return_book.h"
#include "kvtier/index/use_observer.h"

namespace kvtier {

// A block that could be written to the drive.
struct Offer {
  BlockName block;
  std::optional<BlockName> victim;  // what it would replace; nullopt: there is room
  std::uint64_t bytes = 1;          // that are written
  double budget = 1;                // how full the write budget is: WriteBudget::fullness()
};

// How long a block stays where so many are, by Little's law: blocks / blocks that enter in a tick. Counts of
// some turnovers ago fade. Threads: none of its own.
class Residence {
 public:
  explicit Residence(std::size_t blocks) : blocks_(static_cast<double>(blocks)) {}
  void entered(Tick now);
  Tick ticks(Tick now) const;

 private:
  double blocks_;
  double entered_ = 0;
  double since_ = 0;  // ticks; the begin of what entered_ counts
};

// The admission return-hazard. A block's worth is the chance that it is used while the drive has it, after
// the host tier has let it go: what returns sooner is found there. It must be worth at least what the last
// victims were, and by a price more where writes are limited:
//
//   worth - usual worth of a victim >= usual worth * (1 / fullness of the budget - 1) / 4     per byte
//
// A full bucket asks for nothing, a fifth of one for what blocks are usually worth, an empty one for more
// than any has. So the bucket settles where what is worth writing takes what fills it, and no constant says
// how much that is. It is the usual victim, not the very one that would go: a single one of high worth at the
// end of the queue would keep everybody out. What is refused lowers that bar a little, so that the drive
// follows traffic that got worse.
//
// Memory: ReturnBook's, for the blocks of both tiers. Threads: none of its own. Deterministic.
class ReturnAdmission final : public UseObserver {
 public:
  ReturnAdmission(std::size_t host_blocks, std::size_t disk_blocks, std::uint64_t seed);

  void advance(std::int64_t now_us) override { book_.advance(now_us); }
  void appears(const BlockKey& key, GroupId group, const BlockKey* parent, Arrival arrival) override;
  void fetch(std::span<const BlockKey> keys, GroupId group) const override { book_.fetch(keys, group); }
  void used(const BlockKey& key, GroupId group) override { book_.used(key, group); }

  bool admit(const Offer& offer);
  void note(const Offer& offer) { weigh(offer); }

  // 0 to 1.
  double worth(const BlockName& block);

 private:
  double weigh(const Offer& offer);

  ReturnBook book_;
  Residence in_host_;
  Residence on_disk_;
  double usual_worth_ = 0;  // per byte, of what was offered lately
  double usual_cost_ = 0;   // worth of the last victims, when they went
  bool any_offer_ = false;
  bool any_victim_ = false;
};

}  // namespace kvtier
