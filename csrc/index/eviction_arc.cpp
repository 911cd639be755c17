// ARC, adaptive replacement cache (Megiddo and Modha, ARC: a self-tuning, low overhead replacement cache,
// FAST'03): one list of blocks used once and one of blocks used more often, each with a list of ghosts; a
// miss on a ghost of either list shifts the share of the tier towards that list. In whole blocks, as in the
// paper's integers; the shift is made when the block is ready, after its slot was found, so that one eviction
// sees the share from before. 16 bytes per block, and at most 37 for each of as many ghosts as blocks.
#include <algorithm>

#include "queue_policy.h"

#include "kvtier/index/ghost_lists.h"

namespace kvtier::internal {
namespace {

constexpr std::uint32_t kOnce = 0;   // T1, and B1 of the ghosts
constexpr std::uint32_t kOften = 1;  // T2 and B2

class ArcPolicy final : public QueuePolicy {
 public:
  explicit ArcPolicy(const EvictionOptions& options)
      : QueuePolicy(options, 2),
        blocks_(std::max<std::size_t>(1, options.blocks)),
        seed_(options.seed),
        ghosts_(blocks_ + 1, 2),  // one more until trim_ghosts()
        records_(options.records) {}

  void insert(EntryId id, const BlockFacts& block) override {
    const std::size_t once = ghosts_.size(kOnce);
    const std::size_t often = ghosts_.size(kOften);
    const std::optional<std::uint32_t> ghost = ghosts_.take(block_digest(block.key, block.group, seed_));
    if (ghost == kOnce) {
      target_ = std::min(blocks_, target_ + std::max<std::size_t>(1, often / once));
    } else if (ghost == kOften) {
      target_ -= std::min(target_, std::max<std::size_t>(1, once / often));
    }
    queues_.push(id, ghost ? kOften : kOnce);
    trim_ghosts();
  }
  void touch(EntryId id) override { queues_.move(id, kOften); }
  void erase(EntryId id, const BlockName& name, Departure why) override {
    if (why == Departure::evicted) ghosts_.add(block_digest(name.key, name.group, seed_), queues_.queue(id));
    queues_.erase(id);
  }
  std::optional<EntryId> victim() override {
    const std::optional<EntryId> once = queues_.oldest(kOnce);
    const std::optional<EntryId> often = queues_.oldest(kOften);
    if (once && (!often || queues_.size(kOnce) > target_)) return once;
    return often ? often : once;
  }
  double bytes_per_record() const override {
    return AgeQueues::kBytesPerRecord +
           GhostLists::bytes_for(blocks_ + 1) / static_cast<double>(std::max<std::size_t>(1, records_));
  }

 private:
  // |T1| + |B1| <= blocks and, the tier being full, |B1| + |B2| <= blocks.
  void trim_ghosts() {
    while (ghosts_.size(kOnce) > 0 && queues_.size(kOnce) + ghosts_.size(kOnce) > blocks_) {
      ghosts_.drop_oldest(kOnce);
    }
    while (ghosts_.size(kOnce) + ghosts_.size(kOften) > blocks_) {
      ghosts_.drop_oldest(ghosts_.size(kOften) > 0 ? kOften : kOnce);
    }
  }

  std::size_t blocks_;
  std::size_t target_ = 0;  // of T1: "p" in the paper
  std::uint64_t seed_;
  GhostLists ghosts_;
  std::size_t records_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_arc(const EvictionOptions& options) {
  return std::make_unique<ArcPolicy>(options);
}

}  // namespace kvtier::internal
