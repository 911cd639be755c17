// Segmented LRU (Karedla, Love and Wherry, Caching strategies to improve disk system performance, IEEE
// Computer 27(3), 1994): a block that is used again moves to a protected segment of half the tier; what
// leaves that for want of room is the youngest on probation again. Victims come from probation.
// 16 bytes per block.
#include "queue_policy.h"

namespace kvtier::internal {
namespace {

constexpr std::uint32_t kProbation = 0;
constexpr std::uint32_t kProtected = 1;

class SlruPolicy final : public QueuePolicy {
 public:
  explicit SlruPolicy(const EvictionOptions& options)
      : QueuePolicy(options, 2), most_protected_(options.blocks / 2) {}

  void insert(EntryId id, const BlockFacts& /*block*/) override { queues_.push(id, kProbation); }
  void touch(EntryId id) override {
    queues_.move(id, kProtected);
    while (queues_.size(kProtected) > most_protected_) {
      const std::optional<EntryId> demoted = queues_.oldest(kProtected);
      if (!demoted) return;  // all held
      queues_.move(*demoted, kProbation);
    }
  }
  std::optional<EntryId> victim() override {
    const std::optional<EntryId> found = queues_.oldest(kProbation);
    return found ? found : queues_.oldest(kProtected);
  }

 private:
  std::size_t most_protected_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_slru(const EvictionOptions& options) {
  return std::make_unique<SlruPolicy>(options);
}

}  // namespace kvtier::internal
