// TickClock: time for what is learned from uses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvtier/index/return_hazards.h"

namespace kvtier {

// A tick is a second of the clock. Where no second passes while many blocks are inserted (a trace without
// times, or played at many times its speed) insertions count as time instead: a 64th of the tier is a tick,
// once there were eight in a second. Threads: none of its own.
class TickClock {
 public:
  // `blocks`: of the tier.
  explicit TickClock(std::size_t blocks);

  // The time of what follows, as EvictionPolicy::advance(). Returns the ticks that have passed.
  Tick advance(std::int64_t now_us);
  // A block was inserted, of the same prompt as the one before or not: a prompt has one time. Returns the
  // ticks that have passed.
  Tick inserted(bool same_prompt);

 private:
  std::size_t inserts_per_tick_;
  std::size_t inserts_since_second_ = 0;
  std::size_t insert_ticks_;  // that have passed since the second
  std::int64_t second_ = 0;
  bool clock_runs_ = false;
};

}  // namespace kvtier
