// After an unclean end: slots that the catalog does not know may hold blocks that were never committed to it,
// or what was evicted from it. Their headers are read in the background; demand reads come first, unless
// somebody waits to wipe.
#include <cerrno>
#include <utility>

#include "store_core.h"

namespace kvtier {

bool StoreCore::scan_is_urgent() const {
  if (scan_ == nullptr) return false;
  for (const auto& barrier : barriers_) {
    if (barrier->waits_for_scan) return true;
  }
  return false;
}

bool StoreCore::start_scan() {
  if (scan_ == nullptr || scans_in_flight_ >= usual_depth_) return false;
  if (ending_ && !scan_is_urgent()) return false;
  const std::optional<SlotPlace> place = scan_->next();
  if (!place) return false;
  AlignedBuffer buffer = headers_.take();
  if (buffer == nullptr) {
    scan_->unreadable();
    return true;
  }
  const std::uint32_t op = begin_op(Purpose::scan, *place);
  ops_[op].buffer = std::move(buffer);
  ++scans_in_flight_;
  submit_op(op, IoOp::read, offset_of(*place), ops_[op].buffer.get(), kSlotHeaderBytes);
  return true;
}

void StoreCore::settle_scan(Op& op, int error) {
  --scans_in_flight_;
  if (error == 0 || error == ENODATA) {
    SlotHeader header;
    const Verdict verdict = error == 0 ? read_header(op.buffer.get(), op.place, &header) : Verdict::blank;
    scan_->judge(op.place, verdict, header);
    note_verdict(verdict);
  } else {
    scan_->unreadable();
    // Whatever stands there is not known now and may be another time.
    if (table_.at(op.place).content == SlotContent::unknown) {
      table_.set_content(op.place, SlotContent::doubtful);
    }
    read_trouble(op.place, io_failure("scanning", op.place, error));
  }
  headers_.give_back(std::move(op.buffer));
}

// Slots that the owner has taken meanwhile are his: whatever was found there is overwritten or wiped by him.
void StoreCore::finish_scan() {
  const std::unique_ptr<HeaderScan> scan = std::move(scan_);
  HeaderScan::Outcome outcome = scan->finish([this](const BlockName& name) { return known_.contains(name); });
  known_.clear();
  std::vector<CatalogRecord> found;
  {
    MutexLock lock(mutex_);
    for (const CatalogRecord& record : outcome.found) {
      if (is_claimed(record.place, lock)) continue;
      if (image_bytes(record.payload_bytes) > options_.classes[record.place.class_index].slot_stride_bytes) {
        outcome.to_wipe.push_back(record.place);
        continue;
      }
      table_.set_record(record, SlotContent::written);
      found.push_back(record);
    }
    for (const SlotPlace& place : outcome.untouchable) {
      if (!is_claimed(place, lock)) table_.set_content(place, SlotContent::untouchable);
    }
    for (const SlotPlace& place : outcome.to_wipe) {
      if (is_claimed(place, lock)) continue;
      table_.at(place).busy = true;
      table_.set_content(place, SlotContent::writing);
      own_wipes_.push_back(place);
    }
    claimed_.clear();
  }
  // They may have been in the drive's cache only when the last opening ended: synced, then committed, as
  // if they had been written now.
  if (!found.empty() && unsynced_.empty()) first_unsynced_at_ = TimePoint::clock::now();
  for (const CatalogRecord& record : found) {
    unsynced_.push_back({StoreJob{0}, record, on_found_ ? on_found_(record) : nullptr, Status::ok()});
    changes_.push_back({CatalogChange::Kind::put, record});
    dirty_[record.place.class_index] = true;
    if (failed_syncs_ > 0) {  // perhaps since its header was read
      unsynced_.back().status = after_failed_sync();
      changes_.back().kind = CatalogChange::Kind::forget;
      table_.set_content(record.place, SlotContent::doubtful);
    }
  }
  {
    MutexLock lock(mutex_);
    stats_.undurable_writes += static_cast<std::uint32_t>(found.size());
  }
  scan_done_.store(true);
}

}  // namespace kvtier
