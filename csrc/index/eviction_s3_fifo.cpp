// S3-FIFO (Yang, Zhang, Qiu, Yue and Rashmi, FIFO queues are all you need for cache eviction, SOSP'23): a
// small queue of a tenth of the tier filters what is used once; a block that was used while in it, or that
// comes back while its ghost is remembered, goes to the main queue, where blocks that were used go round
// again. The paper moves a block on after its second use in the small queue; here one use is enough, as in
// the reference figures of docs/policies.md. 16 bytes per block, and at most 37 for each
// of 0.9 ghosts.
#include <algorithm>

#include "queue_policy.h"

#include "kvtier/index/ghost_lists.h"

namespace kvtier::internal {
namespace {

constexpr std::uint32_t kSmall = 0;
constexpr std::uint32_t kMain = 1;
constexpr std::uint32_t kMostUses = 3;

class S3FifoPolicy final : public QueuePolicy {
 public:
  explicit S3FifoPolicy(const EvictionOptions& options)
      : QueuePolicy(options, 2),
        small_(std::max<std::size_t>(1, options.blocks / 10)),
        seed_(options.seed),
        ghost_capacity_(options.blocks - options.blocks / 10),
        ghosts_(ghost_capacity_, 1),
        records_(options.records) {}

  void insert(EntryId id, const BlockFacts& block) override {
    queues_.push(id, ghosts_.take(block_digest(block.key, block.group, seed_)) ? kMain : kSmall);
  }
  void touch(EntryId id) override { queues_.set_mark(id, std::min(queues_.mark(id) + 1, kMostUses)); }
  void erase(EntryId id, const BlockName& name, Departure why) override {
    if (why == Departure::evicted && queues_.queue(id) == kSmall)
      ghosts_.add(block_digest(name.key, name.group, seed_), 0);
    queues_.erase(id);
  }
  std::optional<EntryId> victim() override {
    while (true) {
      const std::optional<EntryId> small = queues_.oldest(kSmall);
      const std::optional<EntryId> main = queues_.oldest(kMain);
      if (!small && !main) return std::nullopt;
      const EntryId found = small && (!main || queues_.size(kSmall) >= small_) ? *small : *main;
      const std::uint32_t uses = queues_.mark(found);
      if (uses == 0) return found;
      queues_.set_mark(found, queues_.queue(found) == kSmall ? 0 : uses - 1);
      queues_.move(found, kMain);
    }
  }
  double bytes_per_record() const override {
    return AgeQueues::kBytesPerRecord +
           GhostLists::bytes_for(ghost_capacity_) / static_cast<double>(std::max<std::size_t>(1, records_));
  }

 private:
  std::size_t small_;
  std::uint64_t seed_;
  std::size_t ghost_capacity_;
  GhostLists ghosts_;
  std::size_t records_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_s3_fifo(const EvictionOptions& options) {
  return std::make_unique<S3FifoPolicy>(options);
}

}  // namespace kvtier::internal
