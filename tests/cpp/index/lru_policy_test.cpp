#include <algorithm>
#include <map>

#include "conformance/eviction_conformance.h"

namespace kvtier {

struct LruPolicyPeer {
  static std::size_t waiting(const LruPolicy& policy) { return policy.waiting_.size(); }
};

namespace conformance {
namespace {

class LruHarness final : public EvictionHarness {
 public:
  EvictionPolicy& policy() override { return policy_; }

 private:
  LruPolicy policy_{kCapacity};
};

INSTANTIATE_TYPED_TEST_SUITE_P(Lru, EvictionConformance, ::testing::Types<LruHarness>);

}  // namespace
}  // namespace conformance

namespace {

std::optional<std::uint32_t> evict(LruPolicy& policy) {
  const std::optional<EntryId> victim = policy.victim();
  if (!victim) return std::nullopt;
  policy.erase(*victim);
  return raw(*victim);
}

TEST(LruPolicy, the_least_recently_used_goes_first) {
  LruPolicy policy(4);
  for (std::uint32_t id = 0; id < 4; ++id) policy.insert(EntryId{id});
  policy.touch(EntryId{0});
  policy.touch(EntryId{2});
  policy.touch(EntryId{2});
  EXPECT_EQ(evict(policy), 1U);
  EXPECT_EQ(evict(policy), 3U);
  EXPECT_EQ(evict(policy), 0U);
  EXPECT_EQ(evict(policy), 2U);
  EXPECT_EQ(evict(policy), std::nullopt);
}

TEST(LruPolicy, holding_and_letting_go_is_no_use) {
  std::vector<std::uint32_t> order{0, 1, 2, 3};
  do {
    LruPolicy policy(6);
    for (std::uint32_t id = 0; id < 6; ++id) policy.insert(EntryId{id});
    for (std::uint32_t id = 0; id < 4; ++id) policy.hold(EntryId{id + 1});
    for (const std::uint32_t id : order) policy.let_go(EntryId{id + 1});
    for (std::uint32_t id = 0; id < 6; ++id) ASSERT_EQ(evict(policy), id);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(LruPolicy, a_use_while_held_counts) {
  LruPolicy policy(3);
  for (std::uint32_t id = 0; id < 3; ++id) policy.insert(EntryId{id});
  policy.hold(EntryId{0});
  policy.touch(EntryId{0});
  policy.let_go(EntryId{0});
  EXPECT_EQ(evict(policy), 1U);
  EXPECT_EQ(evict(policy), 2U);
  EXPECT_EQ(evict(policy), 0U);
}

// The definition: among those not held, the one whose last use is longest ago.
TEST(LruPolicy, agrees_with_its_definition) {
  struct Block {
    int last_use;
    bool held;
  };
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 random(seed);
    LruPolicy policy(32);
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
        ASSERT_EQ(evict(policy), expected);
        if (expected) model.erase(*expected);
      } else if (it == model.end()) {
        policy.insert(EntryId{id});
        model[id] = {now, false};
      } else if (random() % 3 == 0) {
        policy.touch(EntryId{id});
        it->second.last_use = now;
      } else if (random() % 20 == 0) {
        policy.erase(EntryId{id});
        model.erase(it);
      } else {
        it->second.held ? policy.let_go(EntryId{id}) : policy.hold(EntryId{id});
        it->second.held = !it->second.held;
      }
      ASSERT_LE(LruPolicyPeer::waiting(policy), 2 * 32 + 65U);
    }
  }
}

TEST(LruPolicy, memory_stays_bounded_where_nothing_is_ever_evicted) {
  LruPolicy policy(100);
  for (std::uint32_t id = 0; id < 100; ++id) policy.insert(EntryId{id});
  for (int round = 0; round < 20000; ++round) {
    const auto id = static_cast<std::uint32_t>(1 + round % 98);
    policy.hold(EntryId{id});
    if (round % 3 == 0) policy.touch(EntryId{id});
    policy.let_go(EntryId{id});
  }
  EXPECT_LE(LruPolicyPeer::waiting(policy), 2 * 100 + 65U);
}

#ifndef NDEBUG
TEST(LruPolicyDeathTest, misuse_is_a_bug) {
  LruPolicy policy(4);
  policy.insert(EntryId{1});
  EXPECT_DEATH(policy.insert(EntryId{1}), "broken invariant");
  EXPECT_DEATH(policy.let_go(EntryId{1}), "broken invariant");
  EXPECT_DEATH(policy.touch(EntryId{0}), "broken invariant");
  EXPECT_DEATH(policy.touch(EntryId{3}), "broken invariant");
  EXPECT_DEATH(policy.erase(EntryId{0}), "broken invariant");
  policy.hold(EntryId{1});
  EXPECT_DEATH(policy.hold(EntryId{1}), "broken invariant");
}
#endif

}  // namespace
}  // namespace kvtier
