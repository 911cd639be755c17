// The I/O thread's loop, and its end.
#include <pthread.h>

#include <algorithm>

#include "store_core.h"

namespace kvtier {
namespace {

// Between two looks at the drive: bytes that are sealed or verified. A mebibyte takes about 0.1 ms.
constexpr std::uint64_t kWorkBytes = std::uint64_t{1} << 20;
// While reads go on, the drive's queue is told of one buffer in so much time: a gibibyte takes 0.1 s.
constexpr std::chrono::seconds kBufferPause{1};
// One turn in so many goes to a wipe, or to the writes before it, while reads never pause.
constexpr unsigned kTurns = 8;

}  // namespace

void StoreCore::run() {
  ::pthread_setname_np(::pthread_self(), "kvtier-disk");
  register_files();
  for (;;) {
    take_messages();
    do_what_is_due();
    fill();
    if (ending_ && is_idle()) break;
    wait_for_completions();
    fill();  // before the processor is busy with what has arrived
    settle_some();
  }
  shut_down();
}

void StoreCore::post(std::function<void()> message) {
  MutexLock lock(mutex_);
  messages_.push_back(std::move(message));
  attend(lock);
}

void StoreCore::attend(const MutexLock&) {
  attention_ = true;
  if (!sleeping_) return;
  sleeping_ = false;
  // Under the lock: the queue is there as long as the thread has not ended, and it ends under the lock.
  queue_->wake();
}

void StoreCore::take_messages() {
  for (;;) {
    std::vector<std::function<void()>> messages;
    {
      MutexLock lock(mutex_);
      messages.swap(messages_);
      attention_ = false;
      ending_ = closing_;
    }
    if (messages.empty()) break;
    for (const auto& message : messages) message();
  }
}

void StoreCore::do_what_is_due() {
  if (ending_) cancel_what_has_not_begun();
  const TimePoint now = TimePoint::clock::now();
  probe_if_due(now);
  if (scan_ != nullptr && scan_->all_judged() && scans_in_flight_ == 0) finish_scan();
  start_batch_if_due(now);
  grow_if_due(now);
  register_next_buffer();
}

// --- what the drive's queue knows ---

void StoreCore::register_files() {
  for (const auto& file : files_) {
    if (!queue_->register_file(file->fd())) return;  // a little dearer, and no worse
  }
}

void StoreCore::add_buffers(std::vector<std::span<std::byte>> buffers) {
  if (buffers.empty() || images_.encrypts()) return;
  post([this, buffers = std::move(buffers)] {
    new_buffers_.insert(new_buffers_.end(), buffers.begin(), buffers.end());
  });
}

// Images go to the drive from these where they are encrypted, so the drive's queue is told of them instead.
AlignedBuffer StoreCore::take_bounce() {
  std::span<std::byte> made;
  AlignedBuffer buffer = bounce_.take(made);
  if (!made.empty()) new_buffers_.push_back(made);
  return buffer;
}

// One a round: its pages are pinned meanwhile, and nothing else is done. Reads go first, but not for ever.
void StoreCore::register_next_buffer() {
  if (new_buffers_.empty() || ending_ || !queue_status_) return;
  const TimePoint now = TimePoint::clock::now();
  if (now < next_buffer_at_ && is_reading()) return;
  next_buffer_at_ = now + kBufferPause;
  Status status;
  if (!buffers_refused_) status = queue_->register_buffer(new_buffers_.front());
  new_buffers_.pop_front();
  revisit_ = revisit_ || !new_buffers_.empty();
  if (buffers_refused_) return;
  buffers_refused_ = !status;
  MutexLock lock(mutex_);
  stats_.queue = queue_->description();
  stats_.buffers_problem = status.message();
}

bool StoreCore::is_reading() const {
  MutexLock lock(mutex_);
  return reads_in_flight_ > 0 || jobs_.num_reads() > 0;
}

// --- the drive's queue ---

void StoreCore::fill() {
  while (queue_status_.is_ok() && requests_ < depth_ && !free_ops_.empty() && start_next()) {
    if (staged_work_bytes_ >= kWorkBytes) submit_staged();
  }
  submit_staged();
}

// Starts the most urgent request there is.
bool StoreCore::start_next() {
  if (requests_ >= usual_depth_) return writes_in_flight_ > 0 && start_read(ReadPriority::demand);
  if (start_sync() || start_probe()) return true;
  if (!barriers_.empty() && ++turn_ % kTurns == 0 && (start_wipe() || start_write())) return true;
  if (scan_is_urgent() && start_scan()) return true;
  if (start_read(ReadPriority::demand) || start_read(ReadPriority::prefetch)) return true;
  return start_scan() || start_wipe() || start_write() || start_prewrite();
}

std::uint32_t StoreCore::begin_op(Purpose purpose, const SlotPlace& place) {
  KVTIER_CHECK(!free_ops_.empty());
  const std::uint32_t index = free_ops_.back();
  free_ops_.pop_back();
  ops_[index] = Op{};
  ops_[index].purpose = purpose;
  ops_[index].place = place;
  ++requests_;
  in_flight_.fetch_add(1);
  return index;
}

void StoreCore::submit_op(std::uint32_t op, IoOp io_op, std::uint64_t offset, std::byte* data,
                          std::uint64_t bytes) {
  ops_[op].bytes = bytes;
  IoRequest request;
  request.op = io_op;
  request.fd = files_[ops_[op].place.class_index]->fd();
  request.offset = offset;
  request.data = data;
  request.bytes = bytes;
  request.tag = op;
  staged_.push_back(request);
}

void StoreCore::submit_staged() {
  staged_work_bytes_ = 0;
  if (staged_.empty()) return;
  queue_->submit(staged_);
  staged_.clear();
}

StoreCore::TimePoint StoreCore::next_deadline() const {
  TimePoint deadline = TimePoint::max();
  if (const auto due = commit_due()) deadline = std::min(deadline, *due);
  if (const auto at = health_.probe_at()) deadline = std::min(deadline, *at);
  if (growth_retry_at_ && !growing_) deadline = std::min(deadline, *growth_retry_at_);
  return deadline;
}

void StoreCore::wait_for_completions() {
  std::optional<TimePoint> deadline = next_deadline();
  if (*deadline == TimePoint::max()) deadline.reset();
  if (!completed_.empty() || revisit_) deadline = TimePoint::clock::now();
  revisit_ = false;
  {
    MutexLock lock(mutex_);
    if (attention_) deadline = TimePoint::clock::now();
    sleeping_ = !attention_ && completed_.empty();
  }
  const Status status = queue_->wait(arrivals_, deadline);
  {
    MutexLock lock(mutex_);
    sleeping_ = false;
  }
  completed_.insert(completed_.end(), arrivals_.begin(), arrivals_.end());
  requests_ -= static_cast<std::uint32_t>(arrivals_.size());
  arrivals_.clear();
  if (!status && queue_status_) queue_broke(status);
}

void StoreCore::settle_some() {
  std::uint64_t work = 0;
  while (!completed_.empty() && work < kWorkBytes) {
    const IoCompletion completion = completed_.front();
    completed_.pop_front();
    work += ops_[completion.tag].bytes;
    settle(completion);
  }
}

void StoreCore::settle(const IoCompletion& completion) {
  const auto index = static_cast<std::uint32_t>(completion.tag);
  Op op = std::move(ops_[index]);
  free_ops_.push_back(index);
  in_flight_.fetch_sub(1);
  switch (op.purpose) {
    case Purpose::read: settle_read(op, completion.error); break;
    case Purpose::write: settle_write(op, completion.error); break;
    case Purpose::wipe: settle_wipe(op, completion.error); break;
    case Purpose::scan: settle_scan(op, completion.error); break;
    case Purpose::sync: settle_sync(op, completion.error); break;
    case Purpose::prewrite: settle_prewrite(op, completion.error); break;
    case Purpose::probe: settle_probe(completion.error); break;
  }
}

// Completions may never come: what is in flight stays where it is for ever, and nothing else begins.
void StoreCore::queue_broke(const Status& why) {
  queue_status_ = why;
  const Status status = Status::io("the I/O queue of " + name_ + " is broken: " + why.message());
  {
    MutexLock lock(mutex_);
    accepts_writes_ = accepts_reads_ = false;
    queue_broken_ = true;
    stats_.health = status.message();
  }
  log(status.message());
  fail_queued_jobs(status);
}

// --- the end ---

void StoreCore::cancel_what_has_not_begun() {
  fail_queued_jobs(Status::closed("the store was closed before this began"));
  if (scan_ != nullptr && barriers_.empty() && scans_in_flight_ == 0) scan_.reset();  // and not done: unclean
}

bool StoreCore::is_idle() const {
  if (!queue_status_) return true;  // never again
  if (in_flight_.load() > 0 || !completed_.empty() || batch_ != nullptr || !barriers_.empty()) return false;
  if (begun_ == Begun::pending || growing_ || !last_batch_done_ || scan_ != nullptr) return false;
  if (!own_wipes_.empty() || probe_ != nullptr) return false;
  MutexLock lock(mutex_);
  return messages_.empty() && jobs_.num_reads() == 0 && jobs_.num_writes() == 0 && deferred_.empty();
}

// What a broken queue leaves behind.
void StoreCore::fail_unfinished(const Status& status) {
  if (batch_ != nullptr) finish_batch(status);
  batch_ = std::make_unique<Batch>();
  batch_->writes.swap(unsynced_);
  batch_->barriers.assign(barriers_.begin(), barriers_.end());
  barriers_.clear();
  finish_batch(status);
}

void StoreCore::shut_down() {
  committer_.stop();
  grower_.stop();
  take_messages();
  if (!queue_status_) fail_unfinished(queue_status_);
  Status status = queue_status_
                      ? close_status_
                      : Status::io("closed with requests that may never end: " + queue_status_.message());
  const bool complete =
      queue_status_ && close_status_ && !catalog_lost_ && scan_done_.load() && !table_.has_uncatalogued();
  if (superblock_.clean != complete) {
    superblock_.clean = complete;
    const Status written = lease_->write_superblock(superblock_);
    if (!written && status) status = written;
  }
  if (!complete && status && !catalog_lost_ && scan_done_.load()) {
    status = Status::io("closed, but not clean: some slots may hold what the catalog does not know");
  }
  catalog_.close();
  if (!queue_status_ && in_flight_.load() > 0) {
    // Files, buffers and the queue stay for ever: a drive may still write into them.
    static_cast<void>(queue_.release());
    for (auto& file : files_) static_cast<void>(file.release());
    static_cast<void>(new std::vector<Op>(std::move(ops_)));  // NOLINT: kept on purpose
  }
  MutexLock lock(mutex_);
  queue_.reset();
  files_.clear();
  lease_.reset();
  ended_ = status;
  ended_changed_.notify_all();
}

Status StoreCore::close(std::optional<TimePoint> deadline) {
  MutexLock lock(mutex_);
  if (!ended_) {
    closing_ = true;
    accepts_writes_ = accepts_reads_ = false;
    attend(lock);
  }
  while (!ended_) {
    if (!deadline) {
      ended_changed_.wait(lock);
    } else if (!ended_changed_.wait_until(lock, *deadline) && !ended_) {
      return Status::timeout("closing " + name_ + ": " + std::to_string(in_flight_.load()) +
                             " requests are still in flight");
    }
  }
  return *ended_;
}

}  // namespace kvtier
