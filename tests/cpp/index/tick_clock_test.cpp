#include "kvtier/index/tick_clock.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

constexpr std::int64_t kSecondUs = 1'000'000;

TEST(TickClock, a_tick_is_a_second_since_the_first_time_that_was_told) {
  TickClock clock(1000);
  EXPECT_EQ(clock.advance(7 * kSecondUs), 0U);
  EXPECT_EQ(clock.advance(8 * kSecondUs - 1), 0U);
  EXPECT_EQ(clock.advance(8 * kSecondUs), 1U);
  EXPECT_EQ(clock.advance(20 * kSecondUs), 12U);
}

// 64 insertions are a tick, from the eighth on that came without a second.
TEST(TickClock, where_the_clock_stands_still_insertions_are_time) {
  TickClock clock(1000);
  clock.advance(0);
  Tick passed = 0;
  for (int n = 1; n <= 8 * 64 - 1; ++n) passed += clock.inserted(/*same_prompt=*/false);
  EXPECT_EQ(passed, 0U);
  EXPECT_EQ(clock.inserted(false), 1U);
  for (int n = 1; n <= 200; ++n)
    EXPECT_EQ(clock.inserted(/*same_prompt=*/true), 0U) << "a prompt has one time";
  EXPECT_EQ(clock.inserted(false), 1U);
  EXPECT_EQ(clock.advance(kSecondUs), 1U);
  EXPECT_EQ(clock.inserted(false), 0U);
}

}  // namespace
}  // namespace kvtier
