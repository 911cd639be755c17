#include "kvtier/index/tick_clock.h"

#include <algorithm>
#include <limits>

namespace kvtier {
namespace {

constexpr std::int64_t kTickUs = 1'000'000;
constexpr std::size_t kTicksPerTier = 64;
constexpr std::size_t kLeastInsertsPerTick = 64;
constexpr std::size_t kInsertTicksUnheeded = 8;

}  // namespace

TickClock::TickClock(std::size_t blocks)
    : inserts_per_tick_(std::max(kLeastInsertsPerTick, blocks / kTicksPerTier)),
      insert_ticks_(kInsertTicksUnheeded - 1) {}

Tick TickClock::advance(std::int64_t now_us) {
  const std::int64_t second = now_us / kTickUs;
  const std::int64_t passed = std::min<std::int64_t>(second - second_, std::numeric_limits<Tick>::max() / 4);
  second_ = second;
  if (!clock_runs_ || passed <= 0) {
    clock_runs_ = true;
    return 0;
  }
  inserts_since_second_ = 0;
  insert_ticks_ = kInsertTicksUnheeded - 1;
  return static_cast<Tick>(passed);
}

Tick TickClock::inserted(bool same_prompt) {
  ++inserts_since_second_;
  if (same_prompt) return 0;
  const std::size_t ticks = inserts_since_second_ / inserts_per_tick_;
  if (ticks < kInsertTicksUnheeded || ticks <= insert_ticks_) return 0;
  ++insert_ticks_;
  return 1;
}

}  // namespace kvtier
