// Waiting until what was stored is settled and, with a disk tier, durable.
#include "engine_impl.h"

namespace kvtier {

std::uint64_t EngineImpl::disk_dropped() const {
  const EngineStats& c = counters_;
  return c.disk_declined_admission + c.disk_declined_budget + c.disk_declined_busy + c.disk_declined_full +
         c.disk_declined_parent + c.disk_declined_ttl + c.disk_gone + c.disk_failed;
}

std::uint64_t EngineImpl::running_before(std::uint64_t store_number) const {
  const auto end = running_stores_.lower_bound(store_number);
  return static_cast<std::uint64_t>(std::distance(running_stores_.begin(), end));
}

Result<FlushPoint> EngineImpl::flush_point() {
  MutexLock lock(mutex_);
  KVTIER_RETURN_IF_ERROR(check_open());
  return FlushPoint{stores_begun_, running_before(stores_begun_)};
}

Result<FlushResult> EngineImpl::flush(const FlushPoint& point, Deadline deadline) {
  FlushResult result;
  result.settled = point.running;
  {
    MutexLock lock(mutex_);
    while (running_before(point.up_to) > 0) {
      if (!deadline) {
        idle_.wait(lock);
      } else if (!idle_.wait_until(lock, *deadline) && running_before(point.up_to) > 0) {
        return Status::timeout("flush: " + std::to_string(running_before(point.up_to)) +
                               " stores are still running");
      }
    }
  }
  if (!disk_) return result;
  const Call call(*this);
  KVTIER_RETURN_IF_ERROR(wait_durable(point.up_to, deadline));
  MutexLock lock(mutex_);
  result.durable = counters_.disk_durable - std::exchange(reported_durable_, counters_.disk_durable);
  result.dropped = disk_dropped() - std::exchange(reported_dropped_, disk_dropped());
  return result;
}

}  // namespace kvtier
