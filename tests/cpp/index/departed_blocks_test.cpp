#include "kvtier/index/departed_blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <random>

#include "support/eviction_world.h"

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

TEST(DepartedBlocks, what_is_found_stays_and_its_class_may_change) {
  DepartedBlocks departed(2);
  departed.add(5, {.used = 50, .block_class = 7});
  EXPECT_FALSE(departed.find(6));
  EXPECT_EQ(departed.find(5)->block_class, 7);
  departed.set_class(5, 8);
  EXPECT_EQ(departed.take(5)->block_class, 8);
  EXPECT_FALSE(departed.find(5));
}

TEST(DepartedBlocks, returns_beyond_the_most_are_the_most) {
  DepartedBlocks departed(1);
  departed.add(5, {.returns = 200, .chain = BlockPast::kMostChain, .block_class = BlockPast::kMostClass});
  EXPECT_EQ(departed.find(5)->returns, BlockPast::kMostReturns);
  EXPECT_EQ(departed.find(5)->chain, BlockPast::kMostChain);
  EXPECT_EQ(departed.find(5)->block_class, BlockPast::kMostClass);
}

TEST(DepartedBlocks, a_bucket_forgets_the_one_that_was_added_first) {
  DepartedBlocks departed(5);  // one bucket
  for (Tick n = 0; n < 8; ++n) EXPECT_FALSE(departed.add(n, {.used = n}));
  EXPECT_TRUE(departed.take(3));
  EXPECT_FALSE(departed.add(8, {.used = 8})) << "there is room";
  for (Tick n = 9; n < 12; ++n) EXPECT_EQ(departed.add(n, {.used = n})->used, n - 9);
  for (Tick n = 4; n < 12; ++n) EXPECT_EQ(departed.find(n)->used, n);
}

// Against a table that forgets nothing but what it is told to. The last eight are known whatever falls
// together.
TEST(DepartedBlocks, what_is_not_forgotten_is_known) {
  constexpr std::size_t kCapacity = 37;
  DepartedBlocks departed(kCapacity);
  std::map<Tick, std::uint64_t> known;  // digest by when it was added
  std::map<std::uint64_t, Tick> added;
  std::mt19937_64 random(3);  // NOLINT: the same every time
  std::deque<std::uint64_t> last;
  for (Tick n = 0; n < 20'000; ++n) {
    const std::uint64_t digest = (random() % 600) * 0x9e3779b97f4a7c15ULL;
    const std::optional<BlockPast> past = departed.take(digest);
    ASSERT_EQ(past.has_value(), added.contains(digest)) << n;
    if (past) {
      ASSERT_EQ(past->used, added[digest]);
      known.erase(added[digest]);
      added.erase(digest);
    }
    if (random() % 4 == 0) continue;
    if (const std::optional<BlockPast> forgotten = departed.add(digest, {.used = n})) {
      ASSERT_TRUE(known.contains(forgotten->used));
      const std::uint64_t gone = known[forgotten->used];
      ASSERT_EQ(std::count(last.begin(), last.end(), gone), 0) << "it was one of the last seven";
      added.erase(gone);
      known.erase(forgotten->used);
    }
    known[n] = digest;
    added[digest] = n;
    ASSERT_LE(known.size(), kCapacity * 3 / 2 + 7);
    last.push_back(digest);
    if (last.size() > 7) last.pop_front();
  }
  EXPECT_GT(known.size(), kCapacity / 2);
}

// As many as should be, and the younger the likelier: digests spread evenly.
TEST(DepartedBlocks, about_the_last_ones_are_known) {
  constexpr std::uint64_t kCapacity = 100'000;
  DepartedBlocks departed(kCapacity);
  const auto digest = [](std::uint64_t n) { return block_digest(numbered_key(n), GroupId{0}, 11); };
  for (std::uint64_t n = 0; n < 4 * kCapacity; ++n) departed.add(digest(n), {});
  const auto share = [&](std::uint64_t from, std::uint64_t to) {
    std::uint64_t found = 0;
    for (std::uint64_t n = from; n < to; ++n) found += departed.find(digest(4 * kCapacity - 1 - n)) ? 1 : 0;
    return static_cast<double>(found) / static_cast<double>(to - from);
  };
  EXPECT_GT(share(0, kCapacity / 4), 0.99);
  EXPECT_NEAR(share(0, kCapacity), 0.96, 0.02);  // fewer than eight later ones in its bucket: Poisson
  EXPECT_LT(share(3 * kCapacity, 4 * kCapacity), 0.01);
  EXPECT_LE(DepartedBlocks::bytes_for(kCapacity), 12.01 * kCapacity);
}

}  // namespace
}  // namespace kvtier
