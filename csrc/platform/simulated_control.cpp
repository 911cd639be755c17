// The sides of SimulatedDevice that Device does not have: the framework's and the test's.
#include <cstdlib>
#include <cstring>
#include <utility>

#include "simulated_state.h"

namespace kvtier {
namespace {

constexpr std::size_t kAllocationAlignment = 256;  // cudaMalloc's
constexpr int kPoisonFresh = 0xcd;
constexpr int kPoisonFreed = 0xdd;

}  // namespace

using simulated::inherited_error;
using simulated::Kernel;
using simulated::Mark;
using simulated::Region;

// --- the framework's side ---

std::byte* SimulatedDevice::allocate(std::size_t bytes) {
  const std::size_t whole = (bytes + kAllocationAlignment - 1) / kAllocationAlignment * kAllocationAlignment;
  auto* begin = static_cast<std::byte*>(std::aligned_alloc(kAllocationAlignment, whole));
  KVTIER_CHECK(begin != nullptr);
  std::memset(begin, kPoisonFresh, whole);
  MutexLock lock(state_->mutex);
  state_->allocations.add(begin, bytes);
  return begin;
}

void SimulatedDevice::free(std::byte* begin) {
  if (inherited()) return;
  MutexLock lock(state_->mutex);
  const std::shared_ptr<Region> region = state_->allocations.take(begin);
  KVTIER_CHECK(region != nullptr);
  if (region->pending > 0) state_->schedule.report("device memory was freed under a submitted copy");
  std::memset(begin, kPoisonFreed, region->bytes);
  std::free(begin);
}

StreamHandle SimulatedDevice::create_framework_stream() {
  MutexLock lock(state_->mutex);
  return state_->schedule.add_stream();
}

void SimulatedDevice::launch(StreamHandle stream, std::function<void()> kernel) {
  MutexLock lock(state_->mutex);
  KVTIER_CHECK(state_->schedule.has_stream(stream));
  if (state_->capturing == stream) return;
  state_->schedule.submit(stream, Kernel{std::move(kernel)});
  state_->after_submission(lock);
}

Status SimulatedDevice::host_synchronize(StreamHandle stream) {
  if (inherited()) return inherited_error();
  std::shared_ptr<const Mark> mark;
  {
    MutexLock lock(state_->mutex);
    KVTIER_RETURN_IF_ERROR(state_->check_stream(stream, lock));
    mark = state_->schedule.submit_record(stream);
    state_->after_submission(lock);
  }
  return state_->wait_for(*mark);
}

Status SimulatedDevice::begin_capture(StreamHandle stream) {
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_stream(stream, lock));
  KVTIER_CHECK(!state_->capturing);
  state_->capturing = stream;
  state_->capture_spoiled = false;
  return Status::ok();
}

Status SimulatedDevice::end_capture() {
  MutexLock lock(state_->mutex);
  KVTIER_CHECK(state_->capturing.has_value());
  state_->capturing.reset();
  if (!state_->capture_spoiled) return state_->schedule.health();
  return Status::device("the capture was invalidated by a forbidden call",
                        cuda_error::kStreamCaptureInvalidated);
}

// --- the test's side ---

void SimulatedDevice::hold() {
  MutexLock lock(state_->mutex);
  state_->held = true;
}

void SimulatedDevice::release() {
  MutexLock lock(state_->mutex);
  state_->held = false;
  state_->stepped.notify_all();
}

void SimulatedDevice::hold(StreamHandle stream) {
  MutexLock lock(state_->mutex);
  state_->schedule.hold(stream);
}

void SimulatedDevice::release(StreamHandle stream) {
  MutexLock lock(state_->mutex);
  state_->schedule.release(stream);
  state_->stepped.notify_all();
}

bool SimulatedDevice::step() {
  MutexLock lock(state_->mutex);
  const bool ran = state_->schedule.step();
  state_->stepped.notify_all();
  return ran;
}

bool SimulatedDevice::step(StreamHandle stream) {
  MutexLock lock(state_->mutex);
  const bool ran = state_->schedule.step(stream);
  state_->stepped.notify_all();
  return ran;
}

std::size_t SimulatedDevice::run_until_idle() {
  std::size_t steps = 0;
  while (step()) ++steps;
  return steps;
}

std::size_t SimulatedDevice::pending() const {
  MutexLock lock(state_->mutex);
  return state_->schedule.pending();
}

void SimulatedDevice::fail_sticky(int code) {
  MutexLock lock(state_->mutex);
  state_->schedule.fail(Status::device("simulated sticky error", code));
  state_->stepped.notify_all();
}

void SimulatedDevice::fail_sticky_at_copy(std::uint64_t n, int code) {
  MutexLock lock(state_->mutex);
  state_->schedule.fail_at_copy(n, Status::device("simulated sticky error while copying", code));
}

std::vector<std::string> SimulatedDevice::violations() const {
  MutexLock lock(state_->mutex);
  return state_->schedule.violations();
}

}  // namespace kvtier
