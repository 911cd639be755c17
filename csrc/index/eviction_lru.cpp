// Least recently used, exactly: the victim is the evictable entry whose last use is longest ago.
// 16 bytes per block.
#include "queue_policy.h"

namespace kvtier::internal {
namespace {

class LruPolicy final : public QueuePolicy {
 public:
  explicit LruPolicy(const EvictionOptions& options) : QueuePolicy(options, 1) {}
  void insert(EntryId id, const BlockFacts& /*block*/) override { queues_.push(id, 0); }
  void touch(EntryId id) override { queues_.move(id, 0); }
  std::optional<EntryId> victim() override { return queues_.oldest(0); }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_lru(const EvictionOptions& options) {
  return std::make_unique<LruPolicy>(options);
}

}  // namespace kvtier::internal
