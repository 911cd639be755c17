// CpuExecutor: the queues and the threads behind the `cpu` device (cpu_device.h has the drawing).
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/status.h"
#include "kvtier/platform/copy.h"
#include "kvtier/platform/device.h"

namespace kvtier {

// Owns: streams and threads. Threads: all but start() from any thread. One mutex guards everything, the
// fields of Stream, Record and EventState too; it is held for well under a microsecond, never during a copy.
// Blocks: synchronize(); wait() and copy() on StreamHandle{0}; the destructor, until all work has run.
class CpuExecutor {
 public:
  struct Record;
  // What an event holds. Null: never recorded.
  struct EventState {
    std::shared_ptr<Record> last;
  };

  CpuExecutor();
  ~CpuExecutor();
  CpuExecutor(const CpuExecutor&) = delete;
  CpuExecutor& operator=(const CpuExecutor&) = delete;

  // Called once, first. On failure some of the threads may have started.
  Status start(unsigned num_threads);

  StreamHandle create_stream();
  void destroy_stream(StreamHandle handle);
  Status record(EventState& event, StreamHandle handle);
  Status wait(StreamHandle handle, const EventState& event);
  Status copy(StreamHandle handle, std::span<const CopyRun> runs, Direction direction);
  bool query(const EventState& event);
  void synchronize(const EventState& event);

 private:
  struct Batch {
    std::vector<CopyRun> runs;  // none empty, each at most the smallest unit
    CopyMethod method = CopyMethod::cached;
    Direction direction = Direction::store;
    std::size_t num_claimed = 0;    // runs given to threads, from the front
    std::size_t bytes_left = 0;     // not given to threads
    std::size_t units_in_hand = 0;  // given to threads and not yet copied
    bool all_claimed() const { return num_claimed == runs.size(); }
    bool ended() const { return all_claimed() && units_in_hand == 0; }
  };
  struct Mark {
    std::shared_ptr<Record> record;
  };
  struct Wait {
    std::shared_ptr<Record> record;
  };
  using Item = std::variant<Batch, Mark, Wait>;

  // Shared by the table of handles and whoever works on it, so it may be destroyed at any time.
  struct Stream {
    std::deque<Item> items;  // the head is the one under way
    // Batches at the head that are all claimed and not all ended. The one behind them is under way too, if
    // it is of their direction (device.h).
    std::size_t num_claimed = 0;
    // The batch whose units are to be taken, or, with `further` 1, the one after it; null if there is none.
    Batch* batch_to_claim(std::size_t further = 0);
  };
  using StreamPtr = std::shared_ptr<Stream>;
  struct Unit {
    StreamPtr stream;  // null: none
    Batch* batch = nullptr;
    std::span<const CopyRun> runs;  // of `batch`, valid until the unit is finished
  };

  static Result<Batch> make_batch(std::span<const CopyRun> runs);
  Unit claim_unit(const MutexLock&) KVTIER_REQUIRES(mutex_);

  StreamPtr find(const MutexLock&, StreamHandle handle) KVTIER_REQUIRES(mutex_);
  void push(const MutexLock&, const StreamPtr& stream, Item item) KVTIER_REQUIRES(mutex_);
  void advance(const MutexLock&, const StreamPtr& stream) KVTIER_REQUIRES(mutex_);
  void offer(const MutexLock&, const StreamPtr& stream) KVTIER_REQUIRES(mutex_);
  void pop_head(const MutexLock&, Stream& stream) KVTIER_REQUIRES(mutex_);
  void finish_unit(const MutexLock&, const Unit& unit) KVTIER_REQUIRES(mutex_);
  void block_on(MutexLock& lock, const EventState& event) KVTIER_REQUIRES(mutex_);
  void run();

  Mutex mutex_;
  CondVar work_;       // ready_ has a stream, or the end has come
  CondVar completed_;  // some record is complete
  std::unordered_map<StreamHandle, StreamPtr> streams_ KVTIER_GUARDED_BY(mutex_);
  std::uintptr_t next_stream_ KVTIER_GUARDED_BY(mutex_);
  std::deque<StreamPtr> ready_ KVTIER_GUARDED_BY(mutex_);     // each has a batch to claim; once
  std::size_t num_unfinished_ KVTIER_GUARDED_BY(mutex_) = 0;  // items in all streams
  bool closing_ KVTIER_GUARDED_BY(mutex_) = false;
  unsigned num_threads_ KVTIER_GUARDED_BY(mutex_) = 1;
  std::vector<std::thread> threads_;
};

}  // namespace kvtier
