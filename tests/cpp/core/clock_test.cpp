#include "kvtier/core/clock.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

TEST(Clock, the_steady_clock_never_goes_back) {
  const SteadyClock clock;
  std::int64_t before = clock.now_us();
  for (int i = 0; i < 1000; ++i) {
    const std::int64_t now = clock.now_us();
    EXPECT_GE(now, before);
    before = now;
  }
}

TEST(Clock, the_manual_clock_moves_only_when_told) {
  ManualClock clock;
  EXPECT_EQ(clock.now_us(), 0);
  clock.advance_us(250);
  EXPECT_EQ(clock.now_us(), 250);
  clock.advance_us(1);
  EXPECT_EQ(clock.now_us(), 251);
}

}  // namespace
}  // namespace kvtier
