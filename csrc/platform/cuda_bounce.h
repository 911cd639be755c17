// BounceRing: how bytes of host memory that could not be pinned reach the device: packed into a small pinned
// buffer, and from there by the usual paths. Slow and blocking, as device.h allows for such memory.
#pragma once

#include <array>
#include <cstddef>

#include "cuda_driver.h"

#include "kvtier/core/mutex.h"

namespace kvtier::cuda {

// One direction's. Owns: pinned memory. Threads: any; one copy at a time holds mutex(). Requires a Scope.
class BounceRing {
 public:
  static constexpr std::size_t kParts = 2;
  static constexpr std::size_t kPartBytes = std::size_t{4} << 20;

  Mutex& mutex() KVTIER_THREAD_ANNOTATION(lock_returned(mutex_)) { return mutex_; }
  // Makes the buffer. Errors: when not even that can be pinned.
  Status prepare() KVTIER_REQUIRES(mutex_);
  // Whether the buffer was made; everything below requires it.
  bool is_ready() const KVTIER_REQUIRES(mutex_) { return buffer_ != nullptr; }
  // The buffer's next part, once the copies that were said to use it are over. Blocks until then.
  Result<std::byte*> next_part() KVTIER_REQUIRES(mutex_);
  // What was submitted to `stream` so far uses the part that next_part() gave last.
  Status in_use(cudaStream_t stream) KVTIER_REQUIRES(mutex_);
  // Blocks until the copies of the last part are over.
  Status finish_part() KVTIER_REQUIRES(mutex_);
  void free() KVTIER_REQUIRES(mutex_);
  void abandon() KVTIER_REQUIRES(mutex_);

 private:
  Mutex mutex_;
  std::byte* buffer_ KVTIER_GUARDED_BY(mutex_) = nullptr;
  std::array<RawEvent, kParts> done_ KVTIER_GUARDED_BY(mutex_);
  std::size_t last_ KVTIER_GUARDED_BY(mutex_) = 0;
};

}  // namespace kvtier::cuda
