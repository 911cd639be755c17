#include "kvtier/index/departed_blocks.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

namespace kvtier {
namespace {

TEST(DepartedBlocks, what_is_taken_is_forgotten) {
  DepartedBlocks departed(2);
  EXPECT_FALSE(departed.add(5, {.used = 50, .returns = 3, .chain = 2, .block_class = 7}));
  const std::optional<BlockPast> past = departed.take(5);
  ASSERT_TRUE(past);
  EXPECT_EQ(past->used, 50U);
  EXPECT_EQ(past->returns, 3);
  EXPECT_EQ(past->chain, 2);
  EXPECT_EQ(past->block_class, 7);
  EXPECT_FALSE(departed.take(5));
}

TEST(DepartedBlocks, what_is_found_may_be_changed_where_it_stands) {
  DepartedBlocks departed(2);
  departed.add(5, {.used = 50, .block_class = 7});
  EXPECT_EQ(departed.find(6), nullptr);
  ASSERT_NE(departed.find(5), nullptr);
  departed.find(5)->block_class = 8;
  EXPECT_EQ(departed.take(5)->block_class, 8);
  EXPECT_EQ(departed.find(5), nullptr);
}

// Digests collide in the table on purpose: they differ in the seven bits that it does not look at, too.
TEST(DepartedBlocks, the_last_ones_are_remembered_and_no_others) {
  constexpr std::size_t kCapacity = 37;
  DepartedBlocks departed(kCapacity);
  struct Place {
    std::uint64_t digest;
    bool taken;
  };
  std::deque<Place> last;
  std::mt19937_64 random(3);  // NOLINT: the same every time
  for (Tick n = 0; n < 20'000; ++n) {
    const std::uint64_t digest = random() % 600;
    const auto known = std::find_if(last.begin(), last.end(),
                                    [&](const Place& p) { return p.digest == digest && !p.taken; });
    const std::optional<BlockPast> past = departed.take(digest);
    ASSERT_EQ(past.has_value(), known != last.end()) << n;
    if (known != last.end()) known->taken = true;
    if (random() % 4 == 0) continue;
    const bool forgets = last.size() == kCapacity && !last.front().taken;
    ASSERT_EQ(departed.add(digest, {.used = n}).has_value(), forgets) << n;
    if (last.size() == kCapacity) last.pop_front();
    last.push_back({digest, false});
  }
}

}  // namespace
}  // namespace kvtier
