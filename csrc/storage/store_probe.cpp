// Out of service, and back: one line on stderr each way.
#include <cerrno>
#include <cstdio>

#include "store_core.h"

namespace kvtier {

void StoreCore::log(const std::string& what) const {
  std::fprintf(stderr, "kvtier: disk store %s: %s\n", name_.c_str(), what.c_str());
}

void StoreCore::write_trouble(const Status& why) {
  const Service before = health_.service();
  health_.write_failed(why, TimePoint::clock::now());
  publish_health(before);
}

void StoreCore::read_trouble(const SlotPlace& place, const Status& why) {
  const Service before = health_.service();
  health_.read_failed(place, why, TimePoint::clock::now());
  publish_health(before);
}

void StoreCore::publish_health(Service before) {
  const Service now = health_.service();
  if (now == before || !queue_status_) return;  // with a broken queue it is out for good
  const bool in_service = now == Service::in_service;
  {
    MutexLock lock(mutex_);
    accepts_writes_ = in_service && !closing_;
    accepts_reads_ = now != Service::out && !closing_;
    stats_.health = in_service ? "ok" : health_.reason();
  }
  if (before == Service::in_service) log("out of service, tried again by and by: " + health_.reason());
  if (in_service) return log("back in service");
  const Status status = Status::io("the store " + name_ + " is out of service: " + health_.reason());
  fail_queued_jobs(status);
  for (const auto& barrier : barriers_) {
    if (!barrier->to_wipe.empty() && barrier->status) barrier->status = status;
    barrier->to_wipe.clear();
  }
}

void StoreCore::probe_if_due(TimePoint now) {
  const auto at = health_.probe_at();
  if (!at || now < *at || ending_ || !queue_status_) return;
  health_.probe_begins();
  if (unanswered_syncs_ > 0) {  // what is written now would be lost with it, should it fail yet
    health_.probe_failed(Status::timeout("a sync in " + name_ + " is not answered yet"), now);
    return;
  }
  probe_ = std::make_unique<Probe>();
  if (const auto place = probe_place()) {
    probe_->place = *place;
    probe_->has_slot = true;
    table_.at(*place).busy = true;
  } else {
    probe_->stage = Probe::Stage::sync;
  }
}

// A slot that may be written to: one that holds nothing, or nobody knows what. Nobody writes or wipes now,
// and what holds nothing is not read.
std::optional<SlotPlace> StoreCore::probe_place() const {
  std::optional<SlotPlace> blank;
  std::optional<SlotPlace> failed;  // the last time: one bad spot is not a bad drive
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    for (std::uint32_t slot = 0; slot < table_.num_slots(c); ++slot) {
      const SlotState& state = table_.at({c, SlotId{slot}});
      if (state.busy || state.generation != Generation{0}) continue;
      if (probe_failed_at_ == SlotPlace{c, SlotId{slot}}) {
        failed = probe_failed_at_;
        continue;
      }
      if (state.content == SlotContent::doubtful) return SlotPlace{c, SlotId{slot}};
      if (state.content == SlotContent::unknown && scan_done_.load() && !blank) blank = {c, SlotId{slot}};
    }
  }
  return blank ? blank : failed;
}

bool StoreCore::start_probe() {
  if (probe_ == nullptr || probe_->in_flight) return false;
  if (probe_->stage == Probe::Stage::sync && batch_ != nullptr && batch_->is_syncing()) return false;
  probe_->in_flight = true;
  if (probe_->stage == Probe::Stage::write) probe_->failed_syncs = failed_syncs_;
  const std::uint32_t op = begin_op(Purpose::probe, probe_->place);
  const std::uint64_t offset = offset_of(probe_->place);
  switch (probe_->stage) {
    case Probe::Stage::write: submit_op(op, IoOp::write, offset, zeros_.get(), kSlotHeaderBytes); break;
    case Probe::Stage::sync: submit_op(op, IoOp::sync, 0, nullptr, 0); break;
    case Probe::Stage::read: submit_op(op, IoOp::read, offset, probe_buffer_.get(), kSlotHeaderBytes); break;
  }
  return true;
}

void StoreCore::settle_probe(int error) {
  // A file that was cut off from outside still reads.
  if (error == ENODATA && probe_->stage == Probe::Stage::read) error = 0;
  probe_->in_flight = false;
  const TimePoint now = TimePoint::clock::now();
  const SlotPlace place = probe_->place;
  if (error == 0 && probe_->stage != Probe::Stage::read) {
    if (probe_->stage == Probe::Stage::write) probe_->wrote = true;
    probe_->stage = probe_->stage == Probe::Stage::write ? Probe::Stage::sync : Probe::Stage::read;
    return;
  }
  const std::unique_ptr<Probe> probe = std::move(probe_);
  if (error != 0 && probe->stage == Probe::Stage::sync) sync_failed();
  Status failed;
  if (error != 0) {
    failed = io_failure("trying", place, error);
    if (probe->has_slot) fail_barriers(failed);  // who waits to wipe has left this one to us
    probe_failed_at_ = place;
  } else if (unanswered_syncs_ > 0) {  // given up since the probe began
    failed = Status::timeout("a sync in " + name_ + " is not answered yet");
  }
  if (probe->wrote && error == 0 && probe->failed_syncs == failed_syncs_) {
    table_.set_content(place, SlotContent::unknown);
    forget(place);
  }
  const Service before = health_.service();
  if (failed) {
    health_.probe_worked(now);
  } else {
    health_.probe_failed(failed, now);
  }
  publish_health(before);
  if (probe->has_slot) release_slot(place);
}

}  // namespace kvtier
