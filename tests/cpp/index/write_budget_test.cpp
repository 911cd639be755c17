#include "kvtier/index/write_budget.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

constexpr std::int64_t kDayUs = std::int64_t{86'400} * 1'000'000;

TEST(WriteBudget, a_day_fills_the_bucket) {
  WriteBudget budget(1000, 0);
  EXPECT_EQ(budget.fullness(0), 1);
  EXPECT_TRUE(budget.take(800, 0));
  EXPECT_DOUBLE_EQ(budget.fullness(0), 0.2);
  EXPECT_FALSE(budget.take(300, 0));
  EXPECT_DOUBLE_EQ(budget.fullness(kDayUs / 10), 0.3);
  EXPECT_TRUE(budget.take(300, kDayUs / 10));
  EXPECT_EQ(budget.fullness(3 * kDayUs), 1);
}

TEST(WriteBudget, without_a_limit_it_is_always_full) {
  WriteBudget budget(std::nullopt, 0);
  EXPECT_TRUE(budget.take(std::uint64_t{1} << 60U, 0));
  EXPECT_EQ(budget.fullness(0), 1);
}

}  // namespace
}  // namespace kvtier
