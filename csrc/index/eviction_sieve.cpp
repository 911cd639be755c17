// SIEVE (Zhang, Yang, Yue, Vigfusson and Rashmi, SIEVE is Simpler than LRU, NSDI'24): a hand goes through the
// blocks from the oldest to the youngest; one that was used since the hand last came by is spared and keeps
// its place, the first that was not is the victim. 16 bytes per block.
//
// Here the blocks before and behind the hand stand in two queues: the hand takes from the front of one and
// puts what it spares to the end of the other; at the youngest it turns round, and the two change roles.
#include "queue_policy.h"

namespace kvtier::internal {
namespace {

class SievePolicy final : public QueuePolicy {
 public:
  explicit SievePolicy(const EvictionOptions& options) : QueuePolicy(options, 2) {}

  void insert(EntryId id, const BlockFacts& /*block*/) override {
    if (queues_.size(ahead_) == 0)
      ahead_ = 1 - ahead_;  // past the youngest it does not wait for a younger one
    queues_.push(id, ahead_);
  }
  void touch(EntryId id) override { queues_.set_mark(id, 1); }
  std::optional<EntryId> victim() override {
    for (int turns = 0; turns < 3;) {  // after two no block is marked
      const std::optional<EntryId> found = queues_.oldest(ahead_);
      if (!found) {
        ahead_ = 1 - ahead_;
        ++turns;
      } else if (queues_.mark(*found) == 0) {
        return found;
      } else {
        queues_.set_mark(*found, 0);
        queues_.move(*found, 1 - ahead_);
      }
    }
    return std::nullopt;
  }

 private:
  std::uint32_t ahead_ = 0;  // the queue of those that the hand comes to
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_sieve(const EvictionOptions& options) {
  return std::make_unique<SievePolicy>(options);
}

}  // namespace kvtier::internal
