// Batches: what was written becomes durable together.
//
//   writes complete --> unsynced_ --batch--> sync each file --> Catalog::commit --> on_durable, in order
//
// One batch at a time, at most commit_interval after its first write, or at once when somebody waits (a wipe,
// a flush, the end). docs/durability.md says what each order is for.
#include <algorithm>
#include <cerrno>
#include <system_error>

#include "store_core.h"

#include "kvtier/core/ordering.h"

namespace kvtier {
namespace {

constexpr std::chrono::seconds kUsesInterval{10};
constexpr std::chrono::seconds kCatalogRetry{30};

}  // namespace

void StoreCore::forget(const SlotPlace& place) {
  CatalogChange change;
  change.kind = CatalogChange::Kind::forget;
  change.record.place = place;
  changes_.push_back(change);
}

// --- barriers ---

void StoreCore::barrier(BarrierKind kind, std::vector<SlotPlace> places, OnStatus on_done) {
  for (const SlotPlace& place : places) KVTIER_CHECK(is_usable(place));
  auto barrier = std::make_shared<Barrier>();
  barrier->waits_for_scan = kind == BarrierKind::wipe;
  barrier->alone = !places.empty();
  barrier->to_wipe.assign(places.begin(), places.end());
  barrier->on_done = std::move(on_done);
  Status refused;
  {
    MutexLock lock(mutex_);
    // A flush of a drive that is out of service says so through the writes that failed.
    if (closing_ || (!accepts_writes_ && (kind == BarrierKind::wipe || queue_broken_))) {
      refused = refusal(lock);
    } else {
      for (const SlotPlace& place : places) claim(place, lock);
      barrier->id = jobs_.next_id();
      messages_.emplace_back([this, barrier] {
        if (barrier->waits_for_scan && health_.service() != Service::in_service) {  // since the call
          barrier->status = Status::io("the store " + name_ + " is out of service: " + health_.reason());
          barrier->to_wipe.clear();
        } else if (barrier->waits_for_scan && !barrier->alone && held_slots_ > 0) {
          // What was overwritten or dropped may still come to the drive.
          barrier->status = Status::io("the drive of " + name_ + " may still write to " +
                                       std::to_string(held_slots_) + " slots, for requests not answered yet");
        }
        barriers_.push_back(barrier);
      });
      attend(lock);
      return;
    }
  }
  if (barrier->on_done) barrier->on_done(refused);
}

bool StoreCore::start_wipe() {
  if (!own_wipes_.empty()) {
    const SlotPlace place = own_wipes_.front();
    own_wipes_.pop_front();
    ++own_wipes_in_flight_;
    const std::uint32_t op = begin_op(Purpose::wipe, place);
    submit_op(op, IoOp::write, offset_of(place), zeros_.get(), kSlotHeaderBytes);
    return true;
  }
  for (const auto& barrier : barriers_) {
    if (barrier->waits_for_scan && !scan_done_.load()) continue;
    while (!barrier->to_wipe.empty()) {
      const SlotPlace place = barrier->to_wipe.front();
      SlotState& state = table_.at(place);
      if (state.busy && !state.held) break;  // by the store itself, for a moment
      barrier->to_wipe.pop_front();
      if (state.held) {
        if (barrier->status) barrier->status = held_failure("wiping", place);
        revisit_ = true;
        continue;
      }
      if (state.content == SlotContent::untouchable) {
        revisit_ = true;  // it may have been the last that the barrier waited for
        continue;
      }
      state.generation = Generation{0};
      table_.set_content(place, SlotContent::writing);
      const std::uint32_t op = begin_op(Purpose::wipe, place);
      ops_[op].barrier = barrier;
      ++barrier->wipes_in_flight;
      submit_op(op, IoOp::write, offset_of(place), zeros_.get(), kSlotHeaderBytes);
      return true;
    }
  }
  return false;
}

void StoreCore::settle_wipe(Op& op, int error) {
  const bool own = op.barrier == nullptr;
  const bool may_be_lost = op.failed_syncs != failed_syncs_;
  table_.at(op.place).generation = Generation{0};
  table_.set_content(op.place, error == 0 && !may_be_lost ? SlotContent::unknown : SlotContent::doubtful);
  Status status;
  if (error == 0) {
    if (may_be_lost) status = after_failed_sync();
    dirty_[op.place.class_index] = true;
    forget(op.place);
    MutexLock lock(mutex_);
    ++stats_.wipes;
    stats_.bytes_written += kSlotHeaderBytes;
  } else {
    status = io_failure("wiping", op.place, error);
  }
  if (own) {
    --own_wipes_in_flight_;
    release_slot(op.place);
    if (!status) fail_barriers(status);
  } else {
    --op.barrier->wipes_in_flight;
    if (op.barrier->status) op.barrier->status = status;
  }
  if (error != 0) write_trouble(status);
}

// Slots of which nobody knows what they hold may hold what is being dropped: the store wipes them itself,
// before a wipe is done. (A doubtful slot with a generation is its owner's to wipe: he has been told, or the
// barrier fails.)
void StoreCore::sweep() {
  if (!scan_done_.load()) return;
  bool wanted = false;
  for (const auto& barrier : barriers_) {
    wanted = wanted || (barrier->waits_for_scan && !barrier->swept);
    barrier->swept = true;
  }
  const std::uint64_t doubts = table_.num_doubts() + released_doubts_;
  if (!wanted || doubts == swept_doubts_) return;
  swept_doubts_ = doubts;
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    for (std::uint32_t slot = 0; slot < table_.num_slots(c); ++slot) {
      const SlotPlace place{c, SlotId{slot}};
      SlotState& state = table_.at(place);
      if (state.content != SlotContent::doubtful || state.generation != Generation{0} || state.busy) continue;
      state.busy = true;
      table_.set_content(place, SlotContent::writing);
      own_wipes_.push_back(place);
    }
  }
}

void StoreCore::fail_wipes(const Status& status) {
  for (const auto& barrier : barriers_) {
    if (barrier->waits_for_scan && barrier->status) barrier->status = status;
  }
}

// Wipes that promise more than their own slots.
void StoreCore::fail_barriers(const Status& status) {
  for (const auto& barrier : barriers_) {
    if (barrier->waits_for_scan && !barrier->alone && barrier->status) barrier->status = status;
  }
}

void StoreCore::fail_barriers_after(StoreJob write, const Status& status) {
  const auto fail = [&](const auto& barriers) {
    for (const auto& barrier : barriers) {
      if (barrier->id > write && !barrier->alone && barrier->status) barrier->status = status;
    }
  };
  fail(barriers_);
  if (batch_ != nullptr) fail(batch_->barriers);
}

bool StoreCore::is_ready(const Barrier& barrier) const {
  if (!barrier.to_wipe.empty() || barrier.wipes_in_flight > 0) return false;
  if (barrier.waits_for_scan) {
    const bool probes_slot = probe_ != nullptr && probe_->has_slot;
    if (!barrier.swept || !own_wipes_.empty() || own_wipes_in_flight_ > 0 || probes_slot) return false;
  }
  MutexLock lock(mutex_);
  return !jobs_.has_open_write_before(barrier.id);
}

// --- a batch ---

std::optional<StoreCore::TimePoint> StoreCore::commit_due() const {
  if (batch_ != nullptr) return std::nullopt;
  std::optional<TimePoint> due;
  if (!unsynced_.empty()) {
    due = first_unsynced_at_ + options_.commit_interval;
  } else if (!changes_.empty()) {
    due = last_batch_at_ + options_.commit_interval;
  }
  if (table_.has_uses()) due = std::min(due.value_or(TimePoint::max()), last_batch_at_ + kUsesInterval);
  return due;
}

void StoreCore::start_batch_if_due(TimePoint now) {
  if (batch_ != nullptr || !queue_status_) return;
  sweep();
  auto batch = std::make_unique<Batch>();
  // In order: a barrier that is not ready holds those behind it, which are rarely ready themselves.
  while (!barriers_.empty() && is_ready(*barriers_.front())) {
    batch->barriers.push_back(std::move(barriers_.front()));
    barriers_.pop_front();
  }
  const auto due = commit_due();
  bool last = false;
  if (ending_ && !last_batch_done_) {
    MutexLock lock(mutex_);
    last = in_flight_.load() == unanswered_.load() && completed_.empty() && jobs_.num_writes() == 0 &&
           deferred_.empty() && barriers_.empty() && batch->barriers.empty() && own_wipes_.empty() &&
           messages_.empty();
  }
  if (batch->barriers.empty() && !(due && *due <= now) && !last) return;
  last_batch_done_ = last;
  last_batch_at_ = now;
  batch->writes.swap(unsynced_);
  batch->changes.swap(changes_);
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    if (dirty_[c] && ordering_enabled(OrderingPoint::disk_sync_before_commit)) batch->to_sync.push_back(c);
    dirty_[c] = false;
  }
  batch->has_synced = !batch->to_sync.empty();
  batch_ = std::move(batch);
  if (batch_->to_sync.empty()) commit_batch();
}

bool StoreCore::start_sync() {
  if (batch_ == nullptr || batch_->to_sync.empty()) return false;
  if (probe_ != nullptr && probe_->is_syncing())
    return false;  // of two at once only one is told of a failure
  const SlotPlace place{batch_->to_sync.front(), SlotId{0}};
  batch_->to_sync.pop_front();
  ++batch_->syncs_in_flight;
  const std::uint32_t op = begin_op(Purpose::sync, place);
  submit_op(op, IoOp::sync, 0, nullptr, 0);
  return true;
}

void StoreCore::settle_sync(const Op& op, int error) {
  if (error != 0) {
    if (batch_->sync_status) {
      batch_->sync_status =
          failure("syncing slots." + std::to_string(op.place.class_index) + " in " + name_, error);
    }
    sync_failed();
  }
  --batch_->syncs_in_flight;
  {
    MutexLock lock(mutex_);
    ++stats_.syncs;
  }
  if (!batch_->is_syncing()) commit_batch();
}

// A sync of some slot file has failed, whoever asked for it and whenever it is answered. The drive may have
// lost whatever it had acknowledged by then, in any of its files (with direct I/O what a sync flushes is the
// drive's own cache), and another sync that succeeds says nothing of that.
void StoreCore::sync_failed() {
  disown_unsynced();
  if (batch_ == nullptr) return;
  const Status status = after_failed_sync();
  if (batch_->is_syncing()) {  // commit_batch() disowns what it has
    if (batch_->sync_status) batch_->sync_status = status;
    return;
  }
  // Its transaction is under way: the next one forgets what this one names.
  for (const CatalogChange& change : batch_->changes) {
    if (change.kind != CatalogChange::Kind::touch) forget(change.record.place);
  }
  disown(batch_->writes, batch_->changes, status);
  for (const auto& barrier : batch_->barriers) {
    if (barrier->status) barrier->status = status;
  }
}

// What completed behind the cut of the last batch, and what is still to be settled (settle_write(),
// settle_wipe(): it may have completed before).
void StoreCore::disown_unsynced() {
  ++failed_syncs_;
  const Status status = after_failed_sync();
  disown(unsynced_, changes_, status);
  fail_wipes(status);  // maybe half done
}

Status StoreCore::after_failed_sync() const {
  return Status::io("a sync in " + name_ + " failed: what was written before may be lost");
}

// What was written is not durable and will not become so.
void StoreCore::disown(std::vector<Written>& writes, std::vector<CatalogChange>& changes,
                       const Status& status) {
  for (Written& written : writes) {
    written.status = status;
    fail_barriers_after(written.id, status);
  }
  for (CatalogChange& change : changes) {
    if (change.kind == CatalogChange::Kind::touch) continue;
    // Unless somebody has written to the slot since.
    const SlotPlace& place = change.record.place;
    const SlotState& state = table_.at(place);
    const bool is_put = state.content == SlotContent::written && state.generation == change.record.generation;
    if (is_put || state.content == SlotContent::unknown) table_.set_content(place, SlotContent::doubtful);
    change.kind = CatalogChange::Kind::forget;
  }
}

// The files are synced, or have failed to be.
void StoreCore::drop_unsynced() {
  Batch& batch = *batch_;
  // One that is not answered may fail yet, and was told nothing of what came after it.
  if (batch.sync_status && batch.has_synced && unanswered_syncs_ > 0) batch.sync_status = after_failed_sync();
  if (batch.sync_status) return;
  disown(batch.writes, batch.changes, batch.sync_status);
  for (const auto& barrier : batch.barriers) {
    if (barrier->status) barrier->status = batch.sync_status;
  }
  if (ending_) close_status_ = batch.sync_status;
  write_trouble(batch.sync_status);
}

void StoreCore::commit_batch() {
  drop_unsynced();
  const std::vector<CatalogChange> uses = table_.take_uses();
  batch_->changes.insert(batch_->changes.end(), uses.begin(), uses.end());
  if (catalog_lost_) {
    if (ending_ || TimePoint::clock::now() >= catalog_retry_at_) return reset_catalog();
    return finish_batch(Status::ok());
  }
  if (batch_->changes.empty()) return finish_batch(Status::ok());
  committer_.run([this, changes = batch_->changes] {
    const Status status = catalog_.commit(changes);
    post([this, status] { committed(status); });
  });
}

void StoreCore::committed(const Status& status) {
  if (batch_ == nullptr) return;
  if (!status) {
    if (status.native_code() == EIO) disown_unsynced();  // the batch itself was synced before
    set_catalog_health(status.message());
    return reset_catalog();
  }
  {
    MutexLock lock(mutex_);
    ++stats_.commits;
  }
  finish_batch(Status::ok());
}

// Nothing is known of what the catalog has: it starts anew with everything that is synced.
void StoreCore::reset_catalog() {
  std::vector<CatalogRecord> records = table_.durable_records();
  for (const Written& written : batch_->writes) {
    const SlotState& state = table_.at(written.record.place);
    const bool stands =
        state.content == SlotContent::written && state.generation == written.record.generation;
    if (stands && written.status) records.push_back(written.record);
  }
  committer_.run([this, records = std::move(records)] {
    const Status reset = catalog_.reset_with(records);
    const Status marked = reset ? Status::ok() : catalog_.mark_lost();
    post([this, reset, marked] { catalog_was_reset(reset, marked); });
  });
}

void StoreCore::catalog_was_reset(const Status& reset, const Status& marked) {
  if (batch_ == nullptr) return;
  if (reset.native_code() == EIO || marked.native_code() == EIO) disown_unsynced();
  catalog_lost_ = !reset;
  catalog_retry_at_ = TimePoint::clock::now() + kCatalogRetry;
  set_catalog_health(reset ? "ok" : "there is no catalog until it can be made again: " + reset.message());
  if (reset) {
    MutexLock lock(mutex_);
    ++stats_.catalog_resets;
  }
  // Without a marker the old catalog may be believed by the next opening: not durable.
  finish_batch(marked);
}

void StoreCore::finish_batch(const Status& status) {
  for (const Written& written : batch_->writes) {
    const Status& outcome = written.status ? status : written.status;
    if (!outcome) fail_barriers_after(written.id, outcome);  // those too that came since
  }
  const std::unique_ptr<Batch> batch = std::move(batch_);
  revisit_ = true;  // the next batch may be due: at the end, the one that a barrier in this one kept back
  last_batch_at_ = TimePoint::clock::now();
  if (!status && ending_) close_status_ = status;
  {
    MutexLock lock(mutex_);
    stats_.undurable_writes -= static_cast<std::uint32_t>(batch->writes.size());
  }
  for (const Written& written : batch->writes) {
    const Status& outcome = written.status ? status : written.status;
    const SlotPlace& place = written.record.place;
    const SlotState& state = table_.at(place);
    if (state.content == SlotContent::written && state.generation == written.record.generation) {
      table_.set_content(place, outcome ? SlotContent::durable : SlotContent::doubtful);
    }
    if (written.on_durable) written.on_durable(outcome);
  }
  for (const auto& barrier : batch->barriers) {
    if (barrier->on_done) barrier->on_done(barrier->status ? status : barrier->status);
  }
}

void StoreCore::set_catalog_health(std::string health) {
  MutexLock lock(mutex_);
  stats_.catalog_health = std::move(health);
}

}  // namespace kvtier
