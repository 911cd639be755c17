// JobQueue: reads and writes that have not begun, by priority. Pure bookkeeping: no thread, no I/O.
#pragma once

#include <cstdint>
#include <list>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvtier/storage/slot_store.h"

namespace kvtier {

struct ReadJob {
  StoreJob id{0};
  SlotRead read;
};
struct WriteJob {
  StoreJob id{0};
  SlotWrite write;
};

// Guarded by the store's mutex. Order within a priority is that of arrival.
class JobQueue {
 public:
  StoreJob next_id() { return StoreJob{++last_id_}; }

  StoreJob push(SlotRead read);
  StoreJob push(SlotWrite write);
  // Puts back a job that was taken, before all others.
  void put_back(WriteJob job);

  std::optional<ReadJob> take_read(ReadPriority priority);
  std::optional<WriteJob> take_write();
  std::optional<ReadJob> cancel_read(StoreJob id);
  std::optional<WriteJob> cancel_write(StoreJob id);
  void hurry(StoreJob id);

  // A write is open from push() until it was told on_written.
  void write_ended(StoreJob id) { open_writes_.erase(id); }
  // Whether a write that was pushed before `id` is open.
  bool has_open_write_before(StoreJob id) const {
    return !open_writes_.empty() && *open_writes_.begin() < id;
  }

  std::size_t num_reads() const { return reads_[0].size() + reads_[1].size(); }
  std::size_t num_reads(ReadPriority priority) const { return reads_[static_cast<int>(priority)].size(); }
  std::size_t num_writes() const { return writes_.size(); }

 private:
  struct Where {
    ReadPriority priority;
    std::list<ReadJob>::iterator job;
  };
  std::uint64_t last_id_ = 0;
  std::list<ReadJob> reads_[2];  // by ReadPriority
  std::list<WriteJob> writes_;
  std::unordered_map<StoreJob, Where> find_read_;
  std::unordered_map<StoreJob, std::list<WriteJob>::iterator> find_write_;
  std::set<StoreJob> open_writes_;
};

}  // namespace kvtier
