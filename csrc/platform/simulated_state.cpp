#include "simulated_state.h"

#include <chrono>
#include <cstring>
#include <utility>

namespace kvtier {

using simulated::Copy;
using simulated::invalid_value;
using simulated::Mark;
using simulated::Piece;
using simulated::Schedule;

// One step per hold of the lock, so that other threads get in between.
Status SimulatedDevice::State::wait_for(const Mark& mark) {
  Schedule::Needs needs;
  {
    MutexLock lock(mutex);
    needs = schedule.needs_of(mark);
    const auto patience = std::chrono::microseconds(schedule.random().below(options.patience_us + 1));
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (schedule.health() && !mark.done && stepped.wait_until(lock, deadline)) {
    }
  }
  for (;;) {
    MutexLock lock(mutex);
    KVTIER_RETURN_IF_ERROR(schedule.health());
    if (mark.done) return Status::ok();
    if (!held && schedule.step_towards(needs)) {
      stepped.notify_all();
    } else {
      stepped.wait(lock);  // held: until somebody releases or steps
    }
  }
}

// Runs what has been left alone for half of the delay to the whole of it.
void SimulatedDevice::State::run_background() {
  const auto half_delay = std::chrono::microseconds(options.max_delay_us / 2 + 1);
  for (;;) {
    {
      MutexLock lock(mutex);
      while (!stopping && schedule.pending() == 0) submitted.wait(lock);
      const auto next_tick = std::chrono::steady_clock::now() + half_delay;
      while (!stopping && submitted.wait_until(lock, next_tick)) {
      }
      if (stopping) return;
      schedule.tick();
    }
    for (bool ran = true; ran;) {
      MutexLock lock(mutex);
      ran = !stopping && !held && schedule.step_overdue();
      if (ran) stepped.notify_all();
    }
  }
}

Result<Piece> SimulatedDevice::State::check_run(const CopyRun& run, Direction direction) const {
  const void* on_device = direction == Direction::load ? run.destination : run.source;
  const void* on_host = direction == Direction::load ? run.source : run.destination;
  Piece piece{static_cast<std::byte*>(run.destination), static_cast<const std::byte*>(run.source), run.bytes,
              allocations.holding(on_device, run.bytes), registrations.holding(on_host, run.bytes)};
  if (piece.device == nullptr) return invalid_value("a run leaves its allocation, or was never in one");
  if (on_host == nullptr || allocations.overlap(on_host, run.bytes)) {
    return invalid_value("the host side of a run is not host memory");
  }
  if (piece.host == nullptr && registrations.overlap(on_host, run.bytes)) {
    return invalid_value("a run leaves its registration, or straddles two");
  }
  return piece;
}

// cudaMemcpyAsync from pageable memory: copied to a staging buffer during the call.
void SimulatedDevice::State::stage(Copy& copy) {
  for (Piece& piece : copy.pieces) {
    if (piece.host != nullptr) continue;
    copy.staged.push_back(std::make_unique<std::byte[]>(piece.bytes));
    std::memcpy(copy.staged.back().get(), piece.source, piece.bytes);
    piece.source = copy.staged.back().get();
  }
}

}  // namespace kvtier
