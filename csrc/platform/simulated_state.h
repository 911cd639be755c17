// SimulatedDevice::State: the lock, the schedule and the memory of one simulated device.
#pragma once

#include <optional>
#include <string>
#include <thread>

#include "simulated_regions.h"
#include "simulated_schedule.h"

#include "kvtier/core/mutex.h"
#include "kvtier/platform/simulated_device.h"

namespace kvtier::simulated {

inline Status inherited_error() { return Status::closed("the device belongs to the parent process"); }
inline Status invalid_handle(const char* what) {
  return Status::device(std::string(what) + " is not of this device", cuda_error::kInvalidResourceHandle);
}
inline Status invalid_value(const char* message) {
  return Status::device(message, cuda_error::kInvalidValue);
}
inline Status capture_conflict(const char* message) { return Status::device(message, kCaptureConflict); }

}  // namespace kvtier::simulated

namespace kvtier {

// In one piece, so that a forked child can leave all of it alone: even destroying a condition variable
// would wait there for the parent's threads.
struct SimulatedDevice::State {
  explicit State(const SimulatedOptions& given) : options(given), schedule(given.seed) {
    schedule.add_stream();  // the framework's default stream, 0
  }

  const SimulatedOptions options;
  mutable Mutex mutex;
  CondVar stepped;    // something ran, failed or was released: waiters look again
  CondVar submitted;  // the background thread looks again
  simulated::Schedule schedule KVTIER_GUARDED_BY(mutex);
  simulated::Regions allocations KVTIER_GUARDED_BY(mutex);
  simulated::Regions registrations KVTIER_GUARDED_BY(mutex);
  std::optional<StreamHandle> capturing KVTIER_GUARDED_BY(mutex);
  bool capture_spoiled KVTIER_GUARDED_BY(mutex) = false;
  bool held KVTIER_GUARDED_BY(mutex) = false;
  bool stopping KVTIER_GUARDED_BY(mutex) = false;
  std::thread background;

  // Ok, or why a call that capture counts as potentially unsafe cannot be made now. In CUDA the mere
  // attempt invalidates the capture, whoever makes it.
  Status check_unsafe(const MutexLock&) KVTIER_REQUIRES(mutex) {
    KVTIER_RETURN_IF_ERROR(schedule.health());
    if (!capturing || options.capture_mode == CaptureMode::relaxed) return Status::ok();
    capture_spoiled = true;
    return simulated::capture_conflict("not permitted while a graph is being captured");
  }
  Status check_stream(StreamHandle stream, const MutexLock&) const KVTIER_REQUIRES(mutex) {
    KVTIER_RETURN_IF_ERROR(schedule.health());
    if (!schedule.has_stream(stream)) return simulated::invalid_handle("the stream");
    if (capturing == stream) return simulated::capture_conflict("the stream is being captured");
    return Status::ok();
  }

  // Call behind each submission: eager seeds run some of it at once.
  void after_submission(const MutexLock&) KVTIER_REQUIRES(mutex) {
    while (!held && schedule.is_eager() && schedule.step()) {
    }
    submitted.notify_one();
    stepped.notify_all();
  }

  // Blocks until the mark is done or the device is broken, driving what the mark needs.
  Status wait_for(const simulated::Mark& mark) KVTIER_EXCLUDES(mutex);
  void run_background() KVTIER_EXCLUDES(mutex);

  // One run of a copy, or why CUDA would refuse it.
  Result<simulated::Piece> check_run(const CopyRun& run, Direction direction) const KVTIER_REQUIRES(mutex);
  // Reads the pageable sources of a load now.
  static void stage(simulated::Copy& copy);
};

}  // namespace kvtier
