// QueuePolicy: what the policies made of AgeQueues have in common.
#pragma once

#include "eviction_policies.h"

#include "kvtier/index/age_queues.h"

namespace kvtier::internal {

class QueuePolicy : public EvictionPolicy {
 public:
  QueuePolicy(const EvictionOptions& options, std::uint32_t num_queues)
      : queues_(options.records, num_queues) {}
  void hold(EntryId id) override { queues_.hold(id); }
  void let_go(EntryId id) override { queues_.let_go(id); }
  void erase(EntryId id, const BlockName& /*name*/, Departure /*why*/) override { queues_.erase(id); }
  double bytes_per_record() const override { return AgeQueues::kBytesPerRecord; }

 protected:
  AgeQueues queues_;  // NOLINT: the policies are written in terms of it
};

}  // namespace kvtier::internal
