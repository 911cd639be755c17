#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "support/eviction_world.h"

namespace kvtier {
namespace {

class Lru : public NumberedPolicy {
 public:
  explicit Lru(std::size_t blocks) : NumberedPolicy("lru", blocks) {}
};

TEST(LruPolicy, the_least_recently_used_goes_first) {
  Lru policy(4);
  for (std::uint32_t id = 0; id < 4; ++id) policy.insert(id);
  policy.touch(0);
  policy.touch(2);
  policy.touch(2);
  EXPECT_EQ(policy.evict(), 1U);
  EXPECT_EQ(policy.evict(), 3U);
  EXPECT_EQ(policy.evict(), 0U);
  EXPECT_EQ(policy.evict(), 2U);
  EXPECT_EQ(policy.evict(), std::nullopt);
}

TEST(LruPolicy, holding_and_letting_go_is_no_use) {
  std::vector<std::uint32_t> order{0, 1, 2, 3};
  do {
    Lru policy(6);
    for (std::uint32_t id = 0; id < 6; ++id) policy.insert(id);
    for (std::uint32_t id = 0; id < 4; ++id) policy.hold(id + 1);
    for (const std::uint32_t id : order) policy.let_go(id + 1);
    for (std::uint32_t id = 0; id < 6; ++id) ASSERT_EQ(policy.evict(), id);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(LruPolicy, a_use_while_held_counts) {
  Lru policy(3);
  for (std::uint32_t id = 0; id < 3; ++id) policy.insert(id);
  policy.hold(0);
  policy.touch(0);
  policy.let_go(0);
  EXPECT_EQ(policy.evict(), 1U);
  EXPECT_EQ(policy.evict(), 2U);
  EXPECT_EQ(policy.evict(), 0U);
}

// The definition: among those not held, the one whose last use is longest ago.
TEST(LruPolicy, agrees_with_its_definition) {
  struct Block {
    int last_use;
    bool held;
  };
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 random(seed);
    Lru policy(32);
    std::map<std::uint32_t, Block> model;
    const unsigned evict_one_in = seed % 2 == 0 ? 5 : 200;
    for (int now = 1; now <= 3000; ++now) {
      const auto id = static_cast<std::uint32_t>(random() % 32);
      const auto it = model.find(id);
      if (random() % evict_one_in == 0) {
        std::optional<std::uint32_t> expected;
        for (const auto& [candidate, block] : model) {
          if (!block.held && (!expected || block.last_use < model[*expected].last_use)) expected = candidate;
        }
        ASSERT_EQ(policy.evict(), expected);
        if (expected) model.erase(*expected);
      } else if (it == model.end()) {
        policy.insert(id);
        model[id] = {now, false};
      } else if (random() % 3 == 0) {
        policy.touch(id);
        it->second.last_use = now;
      } else if (random() % 20 == 0) {
        policy.drop(id);
        model.erase(it);
      } else {
        it->second.held ? policy.let_go(id) : policy.hold(id);
        it->second.held = !it->second.held;
      }
    }
  }
}

#ifndef NDEBUG
TEST(LruPolicyDeathTest, misuse_is_a_bug) {
  Lru policy(4);
  policy.insert(1);
  EXPECT_DEATH(policy.insert(1), "broken invariant");
  EXPECT_DEATH(policy.let_go(1), "broken invariant");
  EXPECT_DEATH(policy.touch(0), "broken invariant");
  EXPECT_DEATH(policy.touch(3), "broken invariant");
  EXPECT_DEATH(policy.drop(0), "broken invariant");
  policy.hold(1);
  EXPECT_DEATH(policy.hold(1), "broken invariant");
}
#endif

}  // namespace
}  // namespace kvtier
