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
  attention_changed_.notify_all();
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
  if (!queue_status_) {
    if (completed_.empty()) fail_unfinished(queue_status_);  // what has arrived is settled first
    return;
  }
  const TimePoint now = TimePoint::clock::now();
  probe_if_due(now);
  if (scan_ != nullptr && scan_->all_judged() && scans_in_flight_ == 0) finish_scan();
  start_batch_if_due(now);
  grow_if_due(now);
  register_next_buffer();
  give_up_what_cannot_begin();
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
  ops_[index].begun = TimePoint::clock::now();
  ops_[index].failed_syncs = failed_syncs_;
  if (!overdue_at_) overdue_at_ = ops_[index].begun + options_.answer_within;
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
  if (const auto at = health_.probe_at(); at && !ending_) deadline = std::min(deadline, *at);
  if (growth_retry_at_ && !growing_ && !ending_) deadline = std::min(deadline, *growth_retry_at_);
  if (overdue_at_) deadline = std::min(deadline, *overdue_at_);
  return deadline;
}

void StoreCore::wait_for_completions() {
  if (!queue_status_) return wait_beside_broken_queue();
  // As of before the wait, which gathers whatever has been answered by then: a process that was stopped for a
  // while finds its answers first.
  const TimePoint now = TimePoint::clock::now();
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
  take_arrivals();
  if (!status) return queue_broke(status);
  if (overdue_at_ && *overdue_at_ <= now) give_up_overdue(now);
}

void StoreCore::take_arrivals() {
  for (const IoCompletion& arrival : arrivals_) ops_[arrival.tag].arrived = true;
  completed_.insert(completed_.end(), arrivals_.begin(), arrivals_.end());
  requests_ -= static_cast<std::uint32_t>(arrivals_.size());
  arrivals_.clear();
}

// Nothing begins any more, but what is in flight may still end, and owners still ask.
void StoreCore::wait_beside_broken_queue() {
  constexpr std::chrono::seconds kPause{1};
  if (requests_ > 0) {
    static_cast<void>(queue_->wait(arrivals_, TimePoint::clock::now()));
    take_arrivals();
  }
  MutexLock lock(mutex_);
  if (attention_ || !completed_.empty()) return;
  if (requests_ > 0) {
    attention_changed_.wait_until(lock, TimePoint::clock::now() + kPause);
  } else {
    attention_changed_.wait(lock);
  }
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
  Op op = std::exchange(ops_[index], Op{});
  free_ops_.push_back(index);
  in_flight_.fetch_sub(1);
  if (op.given_up) unanswered_.fetch_sub(1);
  if (op.is_sync) {
    --unanswered_syncs_;
    if (completion.error != 0) sync_failed();
  }
  // Of a file that is being made ready the end was not told: the segment waits for it.
  if (op.given_up && op.purpose != Purpose::prewrite) return let_go(op);
  dispatch(op, completion.error);
}

void StoreCore::dispatch(Op& op, int error) {
  switch (op.purpose) {
    case Purpose::read: settle_read(op, error); break;
    case Purpose::write: settle_write(op, error); break;
    case Purpose::wipe: settle_wipe(op, error); break;
    case Purpose::scan: settle_scan(op, error); break;
    case Purpose::sync: settle_sync(op, error); break;
    case Purpose::prewrite: settle_prewrite(op, error); break;
    case Purpose::probe: settle_probe(error); break;
  }
}

// --- a drive that does not answer ---

void StoreCore::give_up_overdue(TimePoint now) {
  overdue_at_.reset();
  for (std::uint32_t index = 0; index < ops_.size(); ++index) {
    const Op& op = ops_[index];
    if (op.begun == TimePoint{} || op.arrived || op.given_up) continue;
    const TimePoint at = op.begun + options_.answer_within;
    if (at <= now) {
      give_up(index);
    } else {
      overdue_at_ = std::min(overdue_at_.value_or(at), at);
    }
  }
}

// Tells whoever waits that there will be no answer. The request keeps its place in the queue, its buffer and,
// if it writes, its slot until the drive lets go of it.
void StoreCore::give_up(std::uint32_t index) {
  unanswered_.fetch_add(1);
  Op& op = ops_[index];
  op.given_up = true;
  if (op.purpose == Purpose::prewrite) {
    const Status status = failure("prewriting slots." + std::to_string(op.place.class_index), kNoAnswer);
    write_trouble(status);
    if (!growth_stopped_) growth_stopped(status);
    return;
  }
  Op told = std::exchange(op, Op{});
  op.purpose = told.purpose;
  op.place = told.place;
  op.begun = told.begun;
  op.buffer = std::move(told.buffer);
  op.given_up = true;
  op.holds_slot = told.purpose == Purpose::write || told.purpose == Purpose::wipe ||
                  (told.purpose == Purpose::probe && probe_->stage == Probe::Stage::write);
  if (told.purpose == Purpose::read) op.on_let_go = std::move(told.read.read.on_let_go);
  if (told.purpose == Purpose::write) op.on_let_go = std::move(told.write.write.on_let_go);
  op.is_sync = told.purpose == Purpose::sync ||
               (told.purpose == Purpose::probe && probe_->stage == Probe::Stage::sync);
  if (op.is_sync) ++unanswered_syncs_;
  const bool holds_slot = op.holds_slot;
  const SlotPlace place = op.place;
  dispatch(told, kNoAnswer);
  if (!holds_slot) return;
  table_.at(place).busy = table_.at(place).held = true;
  ++held_slots_;
}

// The queue is full of requests that were given up: what has not begun waits for them, and so nobody waits
// for it. (What is queued was ended as the store went out of service.)
void StoreCore::give_up_what_cannot_begin() {
  if (unanswered_.load() < usual_depth_ || !completed_.empty()) return;
  if (probe_ != nullptr && !probe_->in_flight) {
    settle_probe(kNoAnswer);
    revisit_ = true;
  }
  if (batch_ != nullptr && !batch_->to_sync.empty()) {
    revisit_ = true;
    if (batch_->sync_status) batch_->sync_status = failure("syncing the slots of " + name_, kNoAnswer);
    sync_failed();  // a later batch would not sync these files again
    batch_->to_sync.clear();
    if (!batch_->is_syncing()) commit_batch();
  }
  for (const auto& barrier : barriers_) {
    if (barrier->to_wipe.empty() && !barrier->waits_for_scan) continue;
    revisit_ = true;
    if (barrier->status) barrier->status = Status::io("the drive of " + name_ + " does not answer");
    barrier->to_wipe.clear();
    barrier->waits_for_scan = false;
  }
  if (ending_) own_wipes_.clear();  // what stands there is looked at by the next opening
}

// The drive has answered after all.
void StoreCore::let_go(Op& op) {
  if (op.purpose == Purpose::scan) {
    headers_.give_back(std::move(op.buffer));
  } else {
    bounce_.give_back(std::move(op.buffer));
  }
  if (op.holds_slot) {
    --held_slots_;
    table_.at(op.place).held = false;
    release_slot(op.place);
  }
  if (op.on_let_go) op.on_let_go();
}

// Completions may never come: what is in flight may stay where it is for ever, and nothing else begins.
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
  health_.write_failed(Status::timeout(status.message()), TimePoint::clock::now());  // told above, for good
  overdue_at_.reset();
  for (std::uint32_t index = 0; index < ops_.size(); ++index) {
    const Op& op = ops_[index];
    if (op.begun != TimePoint{} && !op.arrived && !op.given_up) give_up(index);
  }
  fail_queued_jobs(status);
  growth_stopped(status);
}

// --- the end ---

void StoreCore::cancel_what_has_not_begun() {
  fail_queued_jobs(Status::closed("the store was closed before this began"));
  if (scan_ != nullptr && barriers_.empty() && scans_in_flight_ == 0) scan_.reset();  // and not done: unclean
}

bool StoreCore::is_idle() const {
  if (!queue_status_) return completed_.empty();  // never again
  if (in_flight_.load() > unanswered_.load() || !completed_.empty() || batch_ != nullptr ||
      !barriers_.empty())
    return false;
  if (begun_ == Begun::pending || growing_ || !last_batch_done_ || scan_ != nullptr) return false;
  if (!own_wipes_.empty() || probe_ != nullptr) return false;
  MutexLock lock(mutex_);
  return messages_.empty() && jobs_.num_reads() == 0 && jobs_.num_writes() == 0 && deferred_.empty();
}

// What a broken queue leaves behind.
void StoreCore::fail_unfinished(const Status& status) {
  if (batch_ == nullptr && unsynced_.empty() && barriers_.empty()) return;
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
  const bool unanswered = in_flight_.load() > 0;
  Status status = close_status_;
  if (!queue_status_) status = Status::io("closed with a broken I/O queue: " + queue_status_.message());
  if (unanswered) {
    status = Status::io("closed with " + std::to_string(in_flight_.load()) +
                        " requests that the drive has not answered");
  }
  const bool complete = queue_status_ && close_status_ && !unanswered && !catalog_lost_ &&
                        scan_done_.load() && !table_.has_uncatalogued();
  // A drive that does not answer would not answer to this either, and after a write it does not say clean.
  if (superblock_.clean != complete && !unanswered) {
    superblock_.clean = complete;
    const Status written = lease_->write_superblock(superblock_);
    if (!written && status) status = written;
  }
  if (!complete && status && !catalog_lost_ && scan_done_.load()) {
    status = Status::io("closed, but not clean: some slots may hold what the catalog does not know");
  }
  catalog_.close();
  if (unanswered) keep_for_ever();
  MutexLock lock(mutex_);
  queue_.reset();
  files_.clear();
  lease_.reset();
  ended_ = status;
  ended_changed_.notify_all();
}

// Files, buffers and the queue, since the drive may still read and write them; and the lock, so that nobody
// else begins with the files meanwhile. In reach of a global, so that a leak checker tells it from a leak.
void StoreCore::keep_for_ever() {
  struct Kept {
    std::unique_ptr<StoreLease> lease;
    std::unique_ptr<IoQueue> queue;
    std::vector<std::unique_ptr<BlockFile>> files;
    std::vector<Op> ops;
    AlignedBuffer zeros, probe_buffer;
  };
  static Mutex& mutex = *new Mutex;
  static auto& all = *new std::vector<std::unique_ptr<Kept>>;
  auto kept = std::make_unique<Kept>();
  kept->files.swap(files_);
  kept->ops.swap(ops_);
  kept->zeros = std::move(zeros_);
  kept->probe_buffer = std::move(probe_buffer_);
  {
    MutexLock lock(mutex_);  // others wake the queue under it
    kept->lease = std::move(lease_);
    kept->queue = std::move(queue_);
  }
  MutexLock lock(mutex);
  all.push_back(std::move(kept));
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
