// First in, first out: a use changes nothing. 16 bytes per block.
#include "queue_policy.h"

namespace kvtier::internal {
namespace {

class FifoPolicy final : public QueuePolicy {
 public:
  explicit FifoPolicy(const EvictionOptions& options) : QueuePolicy(options, 1) {}
  void insert(EntryId id, const BlockFacts& /*block*/) override { queues_.push(id, 0); }
  void touch(EntryId /*id*/) override {}
  std::optional<EntryId> victim() override { return queues_.oldest(0); }
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_fifo(const EvictionOptions& options) {
  return std::make_unique<FifoPolicy>(options);
}

}  // namespace kvtier::internal
