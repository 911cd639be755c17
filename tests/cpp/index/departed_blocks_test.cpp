#include "kvtier/index/departed_blocks.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

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

TEST(DepartedBlocks, the_one_that_was_added_first_is_forgotten) {
  DepartedBlocks departed(4);
  for (Tick n = 0; n < 4; ++n) EXPECT_FALSE(departed.add(n, {.used = n}));
  EXPECT_EQ(departed.add(4, {.used = 4})->used, 0U);
  EXPECT_FALSE(departed.find(0));
  EXPECT_TRUE(departed.take(1));
  EXPECT_FALSE(departed.add(5, {.used = 5})) << "its turn was come, and its place is empty";
  for (Tick n = 2; n < 6; ++n) EXPECT_EQ(departed.find(n)->used, n);
}

// Digests whose upper halves are the same fall into one bucket.
TEST(DepartedBlocks, what_falls_together_is_told_apart) {
  DepartedBlocks departed(3);
  for (Tick n = 10; n < 30; ++n) {
    departed.add(n, {.used = n});
    if (n % 3 == 0) departed.add((std::uint64_t{n} << 32U) | std::uint64_t{1} << 63U, {.used = 100 + n});
    EXPECT_EQ(departed.find(n)->used, n);
    EXPECT_FALSE(departed.find(n + 1));
    EXPECT_FALSE(departed.find(n - 3));
  }
}

// Against a ring and a map.
TEST(DepartedBlocks, the_last_ones_are_known_and_no_others) {
  for (const std::size_t capacity : {1U, 2U, 37U, 256U}) {
    DepartedBlocks departed(capacity);
    std::map<std::uint64_t, Tick> known;  // when it was added, by digest
    std::vector<std::uint64_t> ring(capacity);
    std::size_t added = 0;
    std::mt19937_64 random(3);  // NOLINT: the same every time
    for (Tick n = 1; n < 50'000; ++n) {
      const std::uint64_t digest =
          block_digest(numbered_key(random() % (4 * capacity)), GroupId{0}, /*seed=*/capacity);
      const std::optional<BlockPast> found = departed.find(digest);
      ASSERT_EQ(found.has_value(), known.contains(digest)) << n << " of " << capacity;
      if (found) {
        ASSERT_EQ(found->used, known[digest]);
        if (random() % 2 == 0) continue;
        ASSERT_EQ(departed.take(digest)->used, known[digest]);
        known.erase(digest);
      }
      if (random() % 4 == 0) continue;
      const std::uint64_t first = ring[added % capacity];
      const bool forgets = known.contains(first) && known[first] + capacity == added + 1;
      const std::optional<BlockPast> forgotten = departed.add(digest, {.used = static_cast<Tick>(added + 1)});
      ASSERT_EQ(forgotten.has_value(), forgets) << n << " of " << capacity;
      if (forgets) known.erase(first);
      ring[added % capacity] = digest;
      known[digest] = static_cast<Tick>(++added);
    }
  }
}

TEST(DepartedBlocks, a_block_takes_sixteen_bytes) {
  EXPECT_LE(DepartedBlocks::bytes_for(100'000), 16.01 * 100'000);
}

}  // namespace
}  // namespace kvtier
