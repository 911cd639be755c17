// Slot files grow in the background, a step ahead of what is stored: a store takes no more of the directory
// than it needs, and stores that nobody has open stay as long as there is room. A step is room from the
// ledger, blocks from the file system (the grower), then zeros over all of it through the drive's queue, last
// in line. Writes to extents that were never written reached 0.65 to 0.87 of the speed of overwrites, so a
// slot is usable only once its segment is written.
#include <algorithm>
#include <system_error>

#include "store_core.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kFirstSegmentBytes = std::uint64_t{16} << 20;  // ready in about 10 ms
constexpr std::uint64_t kLongestSegmentBytes = std::uint64_t{1} << 30;
constexpr std::uint32_t kMaxPieces = 4;  // in flight
constexpr std::chrono::milliseconds kFirstPause{1000};
constexpr std::chrono::milliseconds kLongestPause{60'000};

}  // namespace

// In slots. A quarter of what there is: what lies idle ahead of need stays a part of what is used.
std::uint32_t StoreCore::growth_step(std::uint32_t class_index) const {
  const std::uint64_t stride = options_.classes[class_index].slot_stride_bytes;
  const std::uint64_t all = stride * file_slots_[class_index];
  const std::uint64_t bytes = options_.growth == Growth::whole ? all : all / 4;
  return static_cast<std::uint32_t>(
      std::clamp<std::uint64_t>(std::clamp(bytes, kFirstSegmentBytes, kLongestSegmentBytes) / stride, 1,
                                options_.classes[class_index].num_slots));
}

// A step is kept free, so that writes find a prewritten slot while the next step is made ready.
bool StoreCore::wants_room(std::uint32_t class_index) const {
  if (file_slots_[class_index] >= options_.classes[class_index].num_slots) return false;
  return options_.growth == Growth::whole || table_.num_free(class_index) < growth_step(class_index);
}

void StoreCore::grow_if_due(TimePoint now) {
  if (growing_ || ending_ || !queue_status_) return;
  if (growth_retry_at_ && now < *growth_retry_at_) return;
  if (segment_ != nullptr) {
    growth_retry_at_.reset();
    return;
  }
  // Of those that want room, the class that is furthest from its bound.
  std::uint32_t chosen = 0;
  double least = 1.0;
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    const double part = static_cast<double>(file_slots_[c]) / std::max(1U, options_.classes[c].num_slots);
    if (wants_room(c) && part < least) {
      least = part;
      chosen = c;
    }
  }
  if (least >= 1.0) {
    growth_retry_at_.reset();
    return;
  }
  const StoreClass& grown_class = options_.classes[chosen];
  const std::uint64_t stride = grown_class.slot_stride_bytes;
  const std::uint32_t wanted = std::min(growth_step(chosen), grown_class.num_slots - file_slots_[chosen]);
  std::uint64_t held = kOverheadBytes + options_.catalog.max_bytes;
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    held += options_.classes[c].slot_stride_bytes * file_slots_[c];
  }
  growing_ = true;
  growth_retry_at_.reset();
  grower_.run([this, chosen, wanted, held, stride, first = file_slots_[chosen]] {
    const Result<std::uint64_t> granted = lease_->reserve(held + wanted * stride);
    std::uint32_t slots = 0;
    Status status = granted.status();
    if (status) {
      const std::uint64_t room = granted.value() > held ? granted.value() - held : 0;
      slots = std::min(wanted, static_cast<std::uint32_t>(std::min<std::uint64_t>(room / stride, wanted)));
      if (slots == 0) status = Status::resource("the directory's capacity is used up");
    }
    if (status) status = files_[chosen]->grow((std::uint64_t{first} + slots) * stride);
    const Result<std::uint64_t> allocated = lease_->directory().allocated_bytes();
    const std::uint64_t granted_bytes = lease_->reserved_bytes();
    post([this, chosen, slots, status, allocated, granted_bytes] {
      {
        MutexLock lock(mutex_);
        stats_.capacity_bytes = granted_bytes;
        if (allocated) stats_.allocated_bytes = allocated.value();
      }
      grown(chosen, slots, status);
    });
  });
}

void StoreCore::grown(std::uint32_t class_index, std::uint32_t slots, const Status& status) {
  growing_ = false;
  note_side_sync(status);
  if (!status) return growth_stopped(status);
  const std::uint64_t stride = options_.classes[class_index].slot_stride_bytes;
  segment_ = std::make_unique<Segment>();
  segment_->class_index = class_index;
  segment_->begin_offset = segment_->next_offset = stride * file_slots_[class_index];
  file_slots_[class_index] += slots;
  segment_->end_slot = file_slots_[class_index];
  segment_->end_offset = stride * segment_->end_slot;
}

bool StoreCore::start_prewrite() {
  if (segment_ == nullptr || growth_retry_at_ || ending_) return false;
  const std::uint32_t most = std::clamp(depth_ / 8, 1U, kMaxPieces);
  if (segment_->in_flight >= most || segment_->next_offset == segment_->end_offset) return false;
  const std::uint64_t bytes = std::min(kPrewriteBytes, segment_->end_offset - segment_->next_offset);
  const std::uint32_t op = begin_op(Purpose::prewrite, SlotPlace{segment_->class_index, SlotId{0}});
  submit_op(op, IoOp::write, segment_->next_offset, zeros_.get(), bytes);
  segment_->next_offset += bytes;
  ++segment_->in_flight;
  return true;
}

void StoreCore::settle_prewrite(const Op& op, int error) {
  --segment_->in_flight;
  if (error == 0) {
    MutexLock lock(mutex_);
    stats_.bytes_prewritten += op.bytes;
  } else {
    segment_->status =
        failure("prewriting slots." + std::to_string(segment_->class_index) + " in " + name_, error);
    segment_->next_offset = segment_->end_offset;
  }
  if (segment_->in_flight > 0 || segment_->next_offset < segment_->end_offset) return;
  if (!segment_->status) {
    growth_stopped(segment_->status);
    segment_->status = Status::ok();
    segment_->next_offset = segment_->begin_offset;
    return;
  }
  const std::uint32_t class_index = segment_->class_index;
  const std::uint32_t usable = segment_->end_slot;
  segment_.reset();
  growth_pause_ = kFirstPause;
  table_.grow(class_index, usable);
  OnGrown on_grown;
  {
    MutexLock lock(mutex_);
    if (!claimed_.empty()) claimed_[class_index].resize(usable);
    usable_[class_index].store(usable);
    growth_stopped_ = false;
    stats_.growth = "ok";
    on_grown = on_grown_;
  }
  if (on_grown) on_grown(class_index, usable);
}

// It is tried again: room may have come back.
void StoreCore::growth_stopped(const Status& why) {
  growth_pause_ = std::clamp(growth_pause_, kFirstPause, kLongestPause);
  growth_retry_at_ = TimePoint::clock::now() + growth_pause_;
  growth_pause_ *= 2;
  OnGrown on_grown;
  {
    MutexLock lock(mutex_);
    growth_stopped_ = true;
    stats_.growth = why.message();
    on_grown = on_grown_;
  }
  for (std::uint32_t c = 0; on_grown && c < usable_.size(); ++c) on_grown(c, usable_slots(c));
}

}  // namespace kvtier
