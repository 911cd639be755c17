#include "job_queue.h"

namespace kvtier {

StoreJob JobQueue::push(SlotRead read) {
  const StoreJob id = next_id();
  const ReadPriority priority = read.priority;
  auto& list = reads_[static_cast<int>(priority)];
  find_read_.emplace(id, Where{priority, list.insert(list.end(), ReadJob{id, std::move(read)})});
  return id;
}

StoreJob JobQueue::push(SlotWrite write) {
  const StoreJob id = next_id();
  find_write_.emplace(id, writes_.insert(writes_.end(), WriteJob{id, std::move(write)}));
  open_writes_.insert(id);
  return id;
}

void JobQueue::put_back(WriteJob job) {
  const StoreJob id = job.id;
  find_write_.emplace(id, writes_.insert(writes_.begin(), std::move(job)));
}

std::optional<ReadJob> JobQueue::take_read(ReadPriority priority) {
  auto& list = reads_[static_cast<int>(priority)];
  return list.empty() ? std::nullopt : cancel_read(list.front().id);
}

std::optional<WriteJob> JobQueue::take_write() {
  return writes_.empty() ? std::nullopt : cancel_write(writes_.front().id);
}

std::optional<ReadJob> JobQueue::cancel_read(StoreJob id) {
  const auto found = find_read_.find(id);
  if (found == find_read_.end()) return std::nullopt;
  std::optional<ReadJob> job = std::move(*found->second.job);
  reads_[static_cast<int>(found->second.priority)].erase(found->second.job);
  find_read_.erase(found);
  return job;
}

std::optional<WriteJob> JobQueue::cancel_write(StoreJob id) {
  const auto found = find_write_.find(id);
  if (found == find_write_.end()) return std::nullopt;
  std::optional<WriteJob> job = std::move(*found->second);
  writes_.erase(found->second);
  find_write_.erase(found);
  return job;
}

void JobQueue::hurry(StoreJob id) {
  const auto found = find_read_.find(id);
  if (found == find_read_.end() || found->second.priority == ReadPriority::demand) return;
  auto& demand = reads_[static_cast<int>(ReadPriority::demand)];
  demand.splice(demand.end(), reads_[static_cast<int>(ReadPriority::prefetch)], found->second.job);
  found->second.priority = ReadPriority::demand;
}

}  // namespace kvtier
