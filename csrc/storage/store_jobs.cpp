// Reads and writes, from the owner's call to the owner's callback.
#include <cerrno>
#include <cstring>
#include <ctime>
#include <system_error>

#include "store_core.h"

#include "kvtier/core/ordering.h"

namespace kvtier {

Status StoreCore::failure(const std::string& what, int error) const {
  if (error != kNoAnswer) {
    return Status::io(what + " failed: " + std::generic_category().message(error) + " (errno " +
                          std::to_string(error) + ")",
                      error);
  }
  if (!queue_status_) return Status::timeout(what + ": " + queue_status_.message());
  return Status::timeout(what + ": the drive has not answered for " +
                         std::to_string(options_.answer_within.count()) + " ms");
}

Status StoreCore::held_failure(const char* what, const SlotPlace& place) const {
  return Status::io(std::string(what) + " slot " + std::to_string(raw(place.slot)) + " of slots." +
                    std::to_string(place.class_index) + " in " + name_ +
                    ": the drive may still write to it for a request that it has not answered");
}

Status StoreCore::io_failure(const char* what, const SlotPlace& place, int error) const {
  return failure(std::string(what) + " slot " + std::to_string(raw(place.slot)) + " of slots." +
                     std::to_string(place.class_index) + " in " + name_,
                 error);
}

// --- the owner's side ---

Status StoreCore::refusal(const MutexLock&) const {
  if (closing_) return Status::closed("the store " + name_ + " is closed");
  return Status::io("the store " + name_ + " is out of service: " + stats_.health);
}

void StoreCore::claim(const SlotPlace& place, const MutexLock&) {
  if (!claimed_.empty()) claimed_[place.class_index][raw(place.slot)] = true;
}

bool StoreCore::is_claimed(const SlotPlace& place, const MutexLock&) const {
  return claimed_[place.class_index][raw(place.slot)];
}

bool StoreCore::is_usable(const SlotPlace& place) const {
  return place.class_index < usable_.size() && raw(place.slot) < usable_slots(place.class_index);
}

StoreJob StoreCore::write(SlotWrite write) {
  KVTIER_CHECK(is_usable(write.place));
  KVTIER_CHECK(reinterpret_cast<std::uintptr_t>(write.image) % kSlotAlignment == 0 && write.image != nullptr);
  KVTIER_CHECK(write.payload_bytes <=
               options_.classes[write.place.class_index].slot_stride_bytes - kSlotHeaderBytes);
  Status refused;
  {
    MutexLock lock(mutex_);
    if (accepts_writes_) {
      claim(write.place, lock);
      const StoreJob id = jobs_.push(std::move(write));
      attend(lock);
      return id;
    }
    refused = refusal(lock);
    if (!closing_) ++stats_.writes_failed;
  }
  if (write.on_written) write.on_written(refused);
  return StoreJob{0};
}

StoreJob StoreCore::read(SlotRead read) {
  KVTIER_CHECK(is_usable(read.place));
  KVTIER_CHECK(reinterpret_cast<std::uintptr_t>(read.image) % kSlotAlignment == 0 && read.image != nullptr);
  Status refused;
  {
    MutexLock lock(mutex_);
    if (accepts_reads_) {
      const StoreJob id = jobs_.push(std::move(read));
      attend(lock);
      return id;
    }
    refused = refusal(lock);
    stats_.reads += closing_ ? 0 : 1;
    stats_.reads_failed += closing_ ? 0 : 1;
  }
  if (read.on_done) read.on_done(ReadOutcome{refused, Verdict::blank});
  return StoreJob{0};
}

void StoreCore::note_use(const SlotPlace& place) { table_.note_use(place, std::time(nullptr)); }

bool StoreCore::cancel(StoreJob job) {
  MutexLock lock(mutex_);
  const Status cancelled = Status::closed("cancelled before it began");
  if (std::optional<ReadJob> read = jobs_.cancel_read(job)) {
    messages_.emplace_back([read = std::move(*read), cancelled] {
      if (read.read.on_done) read.read.on_done(ReadOutcome{cancelled, Verdict::blank});
    });
  } else if (std::optional<WriteJob> write = jobs_.cancel_write(job)) {
    jobs_.write_ended(job);
    messages_.emplace_back([write = std::move(*write), cancelled] {
      if (write.write.on_written) write.write.on_written(cancelled);
    });
  } else {
    return false;
  }
  attend(lock);
  return true;
}

void StoreCore::hurry(StoreJob job) {
  MutexLock lock(mutex_);
  jobs_.hurry(job);
}

bool StoreCore::can_write() const {
  MutexLock lock(mutex_);
  return accepts_writes_ && jobs_.num_writes() < options_.max_queued_writes;
}

bool StoreCore::can_read() const {
  MutexLock lock(mutex_);
  return accepts_reads_;
}

// --- reads ---

bool StoreCore::start_read(ReadPriority priority) {
  std::optional<ReadJob> job;
  {
    MutexLock lock(mutex_);
    job = jobs_.take_read(priority);
  }
  if (!job) return false;
  const SlotState& state = table_.at(job->read.place);
  if (state.generation == Generation{0} || state.content == SlotContent::untouchable) {
    end_read(*job, ReadOutcome{Status::ok(), Verdict::blank}, 0);  // nothing that could be served
    return true;
  }
  AlignedBuffer bounce;
  if (images_.encrypts()) {
    bounce = take_bounce();
    if (bounce == nullptr) {
      end_read(*job, ReadOutcome{Status::resource("no memory for a buffer to decrypt from"), Verdict::blank},
               0);
      return true;
    }
  }
  const std::uint32_t op = begin_op(Purpose::read, job->read.place);
  ++reads_in_flight_;
  ops_[op].generation = state.generation;
  ops_[op].read = std::move(*job);
  ops_[op].buffer = std::move(bounce);
  std::byte* into = images_.encrypts() ? ops_[op].buffer.get() : ops_[op].read.read.image;
  submit_op(op, IoOp::read, offset_of(ops_[op].place), into, image_bytes(state.payload_bytes));
  return true;
}

void StoreCore::settle_read(Op& op, int error) {
  --reads_in_flight_;
  ReadOutcome outcome;
  if (error == 0) {
    outcome.verdict = verify(op);
    note_verdict(outcome.verdict);
    health_.read_worked();
  } else if (error != ENODATA) {  // the file ends before it, cut off from outside: nothing is there
    outcome.status = io_failure("reading", op.place, error);
  }
  bounce_.give_back(std::move(op.buffer));
  if (!outcome.status) read_trouble(op.place, outcome.status);
  end_read(op.read, outcome, error == 0 ? op.bytes : 0);
}

// A wrong key looks like a cache that forgets: it is said once.
void StoreCore::note_verdict(Verdict verdict) {
  if (verdict == Verdict::unknown_key && !unknown_key_told_) tell_unknown_key("");
}

void StoreCore::tell_unknown_key(const std::string& how_many) {
  unknown_key_told_ = true;
  const std::string what =
      "holds " + how_many +
      "blocks that are encrypted under a key that was not given (disk_key); they are misses, and their "
      "slots are used for others";
  log(what);
  MutexLock lock(mutex_);
  stats_.key_problem = what;
}

Verdict StoreCore::verify(const Op& op) const {
  const SlotRead& read = op.read.read;
  const std::byte* image = images_.encrypts() ? op.buffer.get() : read.image;
  const Verdict verdict =
      images_.open(read.image, image, op.bytes, op.place, &read.key, read.group, op.generation, nullptr);
  if (verdict == Verdict::good || !any_ordering_disabled()) return verdict;
  // A test has disabled one of the proofs.
  if (verdict == Verdict::stale && !ordering_enabled(OrderingPoint::disk_verify_generation)) {
    SlotHeader header;
    const Verdict of_any =
        images_.open(read.image, image, op.bytes, op.place, nullptr, read.group, op.generation, &header);
    const bool same =
        of_any == Verdict::good && header.block.key == read.key && header.block.group == read.group;
    return same ? Verdict::good : verdict;
  }
  const bool corrupt = verdict == Verdict::corrupt_payload || verdict == Verdict::corrupt_header;
  return corrupt && !ordering_enabled(OrderingPoint::disk_verify_checksum) ? Verdict::good : verdict;
}

void StoreCore::end_read(const ReadJob& job, const ReadOutcome& outcome, std::uint64_t bytes) {
  {
    MutexLock lock(mutex_);
    ++stats_.reads;
    stats_.bytes_read += bytes;
    if (!outcome.status) {
      ++stats_.reads_failed;
    } else {
      ++stats_.verdicts[static_cast<std::size_t>(outcome.verdict)];
      if (outcome.verdict == Verdict::good) ++stats_.reads_good;
    }
  }
  if (job.read.on_done) job.read.on_done(outcome);
}

// --- writes ---

// The open counter must be durable before the first image that carries it, and the store must not look clean
// from then on.
bool StoreCore::begin_writing() {
  if (begun_ != Begun::no) return begun_ == Begun::yes;
  begun_ = Begun::pending;
  Superblock begun = superblock_;
  begun.open_counter = open_counter_;
  begun.clean = false;
  committer_.run([this, begun] {
    const Status status = lease_->write_superblock(begun);
    post([this, begun, status] {
      begun_ = status ? Begun::yes : Begun::no;
      if (status) {
        superblock_ = begun;
      } else {
        note_side_sync(status);
        write_trouble(status);
      }
    });
  });
  return false;
}

// Of what is synced beside the slots: the drive's cache is one, and may be told of as lost there.
void StoreCore::note_side_sync(const Status& status) {
  if (status.native_code() == EIO) sync_failed();
}

bool StoreCore::start_write() {
  if (writes_in_flight_ >= usual_depth_) return false;
  std::optional<WriteJob> job;
  {
    MutexLock lock(mutex_);
    if (jobs_.num_writes() == 0) return false;
    if (begun_ == Begun::yes) job = jobs_.take_write();
  }
  if (!job) return begin_writing() && start_write();
  const SlotWrite& write = job->write;
  SlotState& state = table_.at(write.place);
  if (state.held) {
    fail_write(*job, held_failure("writing", write.place));
    return true;
  }
  if (state.busy) {
    deferred_.push_back(std::move(*job));
    return true;
  }
  if (state.content == SlotContent::untouchable) {
    fail_write(*job, Status::unsupported("slot " + std::to_string(raw(write.place.slot)) + " of " + name_ +
                                         " holds an image of a newer version and is left alone"));
    return true;
  }
  SlotHeader header{write.block, write.place, make_generation(open_counter_, ++sequence_),
                    write.payload_bytes};
  AlignedBuffer bounce;
  std::byte* image = write.image;
  const std::uint64_t bytes = image_bytes(write.payload_bytes);
  Status sealed;
  if (images_.encrypts()) {
    bounce = take_bounce();
    image = bounce.get();
    if (image == nullptr) sealed = Status::resource("no memory for a buffer to encrypt into");
  }
  if (sealed) sealed = images_.seal(image, write.image, header);
  if (!sealed) {
    bounce_.give_back(std::move(bounce));
    fail_write(*job, sealed);
    return true;
  }
  // A used buffer's rest may be of another block, and the drive is to hold nothing in clear.
  if (bounce)
    std::memset(image + kSlotHeaderBytes + write.payload_bytes, 0,
                bytes - kSlotHeaderBytes - write.payload_bytes);
  state.generation = Generation{0};
  table_.set_content(write.place, SlotContent::writing);
  const std::uint32_t op = begin_op(Purpose::write, write.place);
  ops_[op].generation = header.generation;
  ops_[op].write = std::move(*job);
  ops_[op].buffer = std::move(bounce);
  ++writes_in_flight_;
  staged_work_bytes_ += bytes;
  submit_op(op, IoOp::write, offset_of(ops_[op].place), image, bytes);
  return true;
}

void StoreCore::settle_write(Op& op, int error) {
  --writes_in_flight_;
  bounce_.give_back(std::move(op.buffer));
  const SlotWrite& write = op.write.write;
  if (error != 0) {
    table_.set_content(op.place, SlotContent::doubtful);
    forget(op.place);
    const Status status = io_failure("writing", op.place, error);
    write_trouble(status);  // first: who is called back sees can_write() as it is now
    fail_write(op.write, status);
    return;
  }
  const CatalogRecord record{write.block, op.place, op.generation, write.payload_bytes, std::time(nullptr)};
  table_.set_record(record, SlotContent::written);
  if (scan_ != nullptr) known_.insert({write.block.key, write.block.group});
  if (unsynced_.empty()) first_unsynced_at_ = TimePoint::clock::now();
  unsynced_.push_back({op.write.id, record, write.on_durable, Status::ok()});
  changes_.push_back({CatalogChange::Kind::put, record});
  dirty_[op.place.class_index] = true;
  if (op.failed_syncs != failed_syncs_) {
    unsynced_.back().status = after_failed_sync();
    changes_.back().kind = CatalogChange::Kind::forget;
    table_.set_content(op.place, SlotContent::doubtful);
    fail_barriers_after(op.write.id, unsynced_.back().status);
  }
  {
    MutexLock lock(mutex_);
    jobs_.write_ended(op.write.id);
    ++stats_.writes;
    ++stats_.undurable_writes;
    stats_.bytes_written += op.bytes;
  }
  if (write.on_written) write.on_written(Status::ok());
}

// The write has ended without an image that could be served.
void StoreCore::fail_write(const WriteJob& job, const Status& status) {
  {
    MutexLock lock(mutex_);
    jobs_.write_ended(job.id);
    if (status.code() != StatusCode::closed) ++stats_.writes_failed;
  }
  if (status.code() != StatusCode::closed) fail_barriers_after(job.id, status);
  if (job.write.on_written) job.write.on_written(status);
}

void StoreCore::fail_queued_jobs(const Status& status) {
  const bool reads_too =
      status.code() == StatusCode::closed || !queue_status_ || health_.service() == Service::out;
  for (;;) {
    std::optional<WriteJob> write;
    std::optional<ReadJob> read;
    {
      MutexLock lock(mutex_);
      write = jobs_.take_write();
      if (reads_too) read = jobs_.take_read(ReadPriority::demand);
      if (reads_too && !read) read = jobs_.take_read(ReadPriority::prefetch);
    }
    if (write) fail_write(*write, status);
    if (read && status.code() == StatusCode::closed) {
      if (read->read.on_done) read->read.on_done(ReadOutcome{status, Verdict::blank});
    } else if (read) {
      end_read(*read, ReadOutcome{status, Verdict::blank}, 0);
    }
    if (!write && !read) break;
  }
  while (!deferred_.empty()) {
    const WriteJob job = std::move(deferred_.front());
    deferred_.pop_front();
    fail_write(job, status);
  }
}

// The store is done with a slot that it wrote to itself.
void StoreCore::release_slot(const SlotPlace& place) {
  table_.at(place).busy = false;
  if (table_.at(place).content == SlotContent::doubtful) ++released_doubts_;
  for (auto job = deferred_.begin(); job != deferred_.end(); ++job) {
    if (job->write.place != place) continue;
    MutexLock lock(mutex_);
    jobs_.put_back(std::move(*job));
    deferred_.erase(job);
    return;
  }
}

}  // namespace kvtier
