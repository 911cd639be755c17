// Clock: the time that policies and leases see. Waiting for threads uses the real steady clock.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace kvtier {

// Threads: now() from any thread. Never blocks.
class Clock {
 public:
  virtual ~Clock() = default;
  // Microseconds since an arbitrary origin; never goes back.
  virtual std::int64_t now_us() const = 0;
};

class SteadyClock final : public Clock {
 public:
  std::int64_t now_us() const override {
    return std::chrono::duration_cast<std::chrono::microseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }
};

// Moves only when told to.
class ManualClock final : public Clock {
 public:
  std::int64_t now_us() const override { return now_us_.load(std::memory_order_relaxed); }
  void advance_us(std::int64_t us) { now_us_.fetch_add(us, std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> now_us_{0};
};

}  // namespace kvtier
