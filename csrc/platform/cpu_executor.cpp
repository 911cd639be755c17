#include "cpu_executor.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <system_error>
#include <utility>

namespace kvtier {
namespace {

// A unit is what a thread takes at a time. Large units keep copy_runs() looking ahead (each starts cold: with
// 256 KiB throughout, scattered runs lost a tenth); small ones at a batch's end let the threads end together.
constexpr std::size_t kMinUnitBytes = std::size_t{256} << 10;
constexpr std::size_t kMaxUnitBytes = std::size_t{4} << 20;
constexpr std::size_t kUnitsLeftPerThread = 4;
constexpr std::size_t kFewProcessorsPerThread = 2;
constexpr StreamHandle kCaller{0};
// Streams are numbered from here, and never twice: 1 and 2 are what CUDA calls two of its default streams.
constexpr std::uintptr_t kFirstStream = 16;

Status unknown_stream(const char* call, StreamHandle handle) {
  return Status::invalid_argument(std::string(call) + ": stream " +
                                  std::to_string(static_cast<std::uintptr_t>(handle)) +
                                  " is neither 0 (the calling thread) nor a stream of this cpu device");
}

// SCHED_BATCH: a copy thread that wakes does not preempt whoever woke it. Where all processors are busy, a
// submission otherwise took as long as the new thread's whole time slice, 5 ms. Refused: nothing is lost.
void configure(std::thread& thread) {
  const sched_param priority{};
  static_cast<void>(pthread_setschedparam(thread.native_handle(), SCHED_BATCH, &priority));
  static_cast<void>(pthread_setname_np(thread.native_handle(), "kvtier-copy"));
}

// Where processors are few, gives each thread a share of its own of those that the process may use. Otherwise
// both of two threads were often woken on one of two processors, since the submitting thread held the other,
// and stayed there: a copy of 25 ms took 20 ms longer while a processor was idle. Where they are many, the
// kernel finds an idle one. Refused: nothing is lost.
void spread(std::span<std::thread> threads) {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;  // more processors than a set holds
  const auto count = static_cast<std::size_t>(CPU_COUNT(&allowed));
  if (threads.size() < 2 || count < threads.size() || count > kFewProcessorsPerThread * threads.size()) {
    return;
  }
  std::size_t place = 0;  // of a processor among those allowed
  std::vector<cpu_set_t> shares(threads.size());
  for (cpu_set_t& share : shares) CPU_ZERO(&share);
  for (std::size_t processor = 0; processor < CPU_SETSIZE; ++processor) {
    if (CPU_ISSET(processor, &allowed)) CPU_SET(processor, &shares[place++ * threads.size() / count]);
  }
  for (std::size_t i = 0; i < threads.size(); ++i) {
    static_cast<void>(pthread_setaffinity_np(threads[i].native_handle(), sizeof(shares[i]), &shares[i]));
  }
}

}  // namespace

// One record of an event: the point in a stream that a wait or a query means, however often the event is
// recorded afterwards.
struct CpuExecutor::Record {
  bool complete = false;
  std::vector<StreamPtr> blocked;  // at the head of each: a wait for this
};

CpuExecutor::CpuExecutor() : next_stream_(kFirstStream) {}

// Every wait is for a record submitted before it, so the queues always drain.
CpuExecutor::~CpuExecutor() {
  {
    const MutexLock lock(mutex_);
    closing_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Status CpuExecutor::start(unsigned num_threads) {
  {
    const MutexLock lock(mutex_);
    num_threads_ = num_threads;
  }
  try {
    for (unsigned i = 0; i < num_threads; ++i) {
      threads_.emplace_back([this] { run(); });
      configure(threads_.back());
    }
    spread(threads_);
  } catch (const std::system_error& error) {
    return Status::resource("cpu device: " + std::to_string(threads_.size()) + " of " +
                                std::to_string(num_threads) + " copy threads started: " + error.what(),
                            error.code().value());
  }
  return Status::ok();
}

StreamHandle CpuExecutor::create_stream() {
  const MutexLock lock(mutex_);
  const StreamHandle handle{next_stream_++};
  streams_.emplace(handle, std::make_shared<Stream>());
  return handle;
}

void CpuExecutor::destroy_stream(StreamHandle handle) {
  const MutexLock lock(mutex_);
  streams_.erase(handle);
}

Status CpuExecutor::record(EventState& event, StreamHandle handle) {
  auto record = std::make_shared<Record>();
  const MutexLock lock(mutex_);
  if (handle == kCaller) {
    record->complete = true;
  } else {
    const StreamPtr stream = find(lock, handle);
    if (stream == nullptr) return unknown_stream("record", handle);
    push(lock, stream, Mark{record});
  }
  event.last = std::move(record);
  return Status::ok();
}

Status CpuExecutor::wait(StreamHandle handle, const EventState& event) {
  MutexLock lock(mutex_);
  if (handle == kCaller) {
    block_on(lock, event);
    return Status::ok();
  }
  const StreamPtr stream = find(lock, handle);
  if (stream == nullptr) return unknown_stream("wait", handle);
  if (event.last != nullptr && !event.last->complete) push(lock, stream, Wait{event.last});
  return Status::ok();
}

Status CpuExecutor::copy(StreamHandle handle, std::span<const CopyRun> runs, Direction direction) {
  Result<Batch> batch = make_batch(runs);
  if (!batch) return batch.status();
  batch->direction = direction;
  if (handle == kCaller) {
    copy_runs(batch->runs, batch->method);
    return Status::ok();
  }
  const MutexLock lock(mutex_);
  const StreamPtr stream = find(lock, handle);
  if (stream == nullptr) return unknown_stream("copy", handle);
  if (!batch->runs.empty()) push(lock, stream, std::move(*batch));
  return Status::ok();
}

bool CpuExecutor::query(const EventState& event) {
  const MutexLock lock(mutex_);
  return event.last == nullptr || event.last->complete;
}

void CpuExecutor::synchronize(const EventState& event) {
  MutexLock lock(mutex_);
  block_on(lock, event);
}

// Cuts `runs` into pieces of at most the smallest unit, so that a unit is always some whole pieces.
Result<CpuExecutor::Batch> CpuExecutor::make_batch(std::span<const CopyRun> runs) {
  Batch batch;
  batch.runs.reserve(runs.size());
  for (const CopyRun& run : runs) {
    if (run.bytes == 0) continue;
    if (run.destination == nullptr || run.source == nullptr) {
      return Status::invalid_argument("copy: a run of " + std::to_string(run.bytes) + " bytes has a null " +
                                      (run.source == nullptr ? "source" : "destination"));
    }
    batch.bytes_left += run.bytes;
    for (std::size_t offset = 0; offset < run.bytes; offset += kMinUnitBytes) {
      batch.runs.push_back({static_cast<std::byte*>(run.destination) + offset,
                            static_cast<const std::byte*>(run.source) + offset,
                            std::min(kMinUnitBytes, run.bytes - offset)});
    }
  }
  batch.method = choose_copy_method(batch.bytes_left);
  return batch;
}

CpuExecutor::Batch* CpuExecutor::Stream::batch_to_claim(std::size_t further) {
  const std::size_t place = num_claimed + further;
  Batch* const batch = place < items.size() ? std::get_if<Batch>(&items[place]) : nullptr;
  if (batch == nullptr || place == 0) return batch;
  const Batch* const before = std::get_if<Batch>(&items[place - 1]);
  return before != nullptr && before->direction == batch->direction ? batch : nullptr;
}

// Requires a stream in ready_. Streams with work share the threads: the one that gave a unit goes behind.
CpuExecutor::Unit CpuExecutor::claim_unit(const MutexLock& lock) {
  const StreamPtr stream = std::move(ready_.front());
  ready_.pop_front();
  Batch& batch = *stream->batch_to_claim();
  const std::size_t first = batch.num_claimed;
  const std::size_t share = stream->batch_to_claim(1) != nullptr
                                ? kMaxUnitBytes  // this batch's end is not where the threads end
                                : batch.bytes_left / (kUnitsLeftPerThread * num_threads_);
  const std::size_t unit_bytes = std::clamp(share, kMinUnitBytes, kMaxUnitBytes);
  for (std::size_t bytes = 0; bytes < unit_bytes && !batch.all_claimed(); ++batch.num_claimed) {
    bytes += batch.runs[batch.num_claimed].bytes;
    batch.bytes_left -= batch.runs[batch.num_claimed].bytes;
  }
  ++batch.units_in_hand;
  if (batch.all_claimed()) ++stream->num_claimed;
  if (stream->batch_to_claim() != nullptr) offer(lock, stream);
  return {stream, &batch, {batch.runs.data() + first, batch.num_claimed - first}};
}

CpuExecutor::StreamPtr CpuExecutor::find(const MutexLock&, StreamHandle handle) {
  const auto found = streams_.find(handle);
  return found == streams_.end() ? nullptr : found->second;
}

void CpuExecutor::push(const MutexLock& lock, const StreamPtr& stream, Item item) {
  ++num_unfinished_;
  stream->items.push_back(std::move(item));
  if (stream->items.size() == 1) {
    advance(lock, stream);
  } else if (stream->num_claimed + 1 == stream->items.size() && stream->batch_to_claim() != nullptr) {
    offer(lock, stream);
  }
}

void CpuExecutor::offer(const MutexLock&, const StreamPtr& stream) {
  ready_.push_back(stream);
  work_.notify_one();  // who takes a unit and leaves some behind offers again
}

void CpuExecutor::pop_head(const MutexLock&, Stream& stream) {
  stream.items.pop_front();
  if (--num_unfinished_ == 0 && closing_) work_.notify_all();
}

// Works off what needs no thread, in `stream` and in the streams that this unblocks, until each stands at a
// batch, at an incomplete record or at its end. A loop, since a chain of waits may be of any length. Requires
// that no batch at the head of `stream` is offered yet.
void CpuExecutor::advance(const MutexLock& lock, const StreamPtr& stream) {
  std::vector<StreamPtr> moving{stream};
  while (!moving.empty()) {
    const StreamPtr current = std::move(moving.back());
    moving.pop_back();
    while (!current->items.empty()) {
      Item& head = current->items.front();
      if (std::holds_alternative<Batch>(head)) {
        offer(lock, current);
        break;
      }
      if (const Mark* mark = std::get_if<Mark>(&head)) {
        mark->record->complete = true;
        completed_.notify_all();
        std::ranges::move(std::exchange(mark->record->blocked, {}), std::back_inserter(moving));
      } else if (Record& record = *std::get<Wait>(head).record; !record.complete) {
        record.blocked.push_back(current);
        break;
      }
      pop_head(lock, *current);
    }
  }
}

// Batches end in any order and leave in theirs.
void CpuExecutor::finish_unit(const MutexLock& lock, const Unit& unit) {
  --unit.batch->units_in_hand;
  Stream& stream = *unit.stream;
  while (stream.num_claimed > 0 && std::get<Batch>(stream.items.front()).ended()) {
    const bool offered = stream.batch_to_claim() != nullptr;
    pop_head(lock, stream);
    --stream.num_claimed;
    if (stream.num_claimed == 0 && !offered) advance(lock, unit.stream);
  }
}

void CpuExecutor::block_on(MutexLock& lock, const EventState& event) {
  const std::shared_ptr<Record> record = event.last;  // meanwhile the event may be recorded again
  while (record != nullptr && !record->complete) completed_.wait(lock);
}

void CpuExecutor::run() {
  Unit unit;  // which this thread has just copied
  for (;;) {
    CopyMethod method;
    {
      MutexLock lock(mutex_);
      if (unit.stream != nullptr) finish_unit(lock, std::exchange(unit, {}));
      while (ready_.empty() && !(closing_ && num_unfinished_ == 0)) work_.wait(lock);
      if (ready_.empty()) return;
      unit = claim_unit(lock);
      method = unit.batch->method;
    }
    copy_runs(unit.runs, method);
  }
}

}  // namespace kvtier
