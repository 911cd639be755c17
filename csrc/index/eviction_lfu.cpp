// Least frequently used, of equals the one whose last use is longest ago. Uses are counted while the block is
// resident, up to 256; the count is lost with the block. 16 bytes per block.
#include <algorithm>

#include "queue_policy.h"

namespace kvtier::internal {
namespace {

class LfuPolicy final : public QueuePolicy {
 public:
  explicit LfuPolicy(const EvictionOptions& options) : QueuePolicy(options, AgeQueues::kMostQueues) {}

  void insert(EntryId id, const BlockFacts& /*block*/) override {
    queues_.push(id, 0);
    lowest_ = 0;
  }
  void touch(EntryId id) override {
    queues_.move(id, std::min(queues_.queue(id) + 1, AgeQueues::kMostQueues - 1));
  }
  void let_go(EntryId id) override {
    queues_.let_go(id);
    lowest_ = std::min(lowest_, queues_.queue(id));
  }
  std::optional<EntryId> victim() override {
    for (; lowest_ < AgeQueues::kMostQueues; ++lowest_) {
      if (const std::optional<EntryId> found = queues_.oldest(lowest_)) return found;
    }
    lowest_ = AgeQueues::kMostQueues - 1;
    return std::nullopt;
  }

 private:
  // Queue n holds the blocks used n + 1 times. No evictable block is in a queue below this one.
  std::uint32_t lowest_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lfu(const EvictionOptions& options) {
  return std::make_unique<LfuPolicy>(options);
}

}  // namespace kvtier::internal
