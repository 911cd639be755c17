// What every EvictionPolicy must do (kvtier/index/eviction.h), written once, whatever its order.
//
// An implementation derives a default-constructible harness from EvictionHarness, and its test file says
//
//   INSTANTIATE_TYPED_TEST_SUITE_P(Lru, EvictionConformance, ::testing::Types<LruHarness>);
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "kvtier/index/eviction.h"

namespace kvtier::conformance {

class EvictionHarness {
 public:
  virtual ~EvictionHarness() = default;
  static constexpr std::uint32_t kCapacity = 256;  // records that the policy is made for
  virtual EvictionPolicy& policy() = 0;
};

template <typename Harness>
class EvictionConformance : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kCapacity = EvictionHarness::kCapacity;

  EvictionPolicy& policy() { return harness_.policy(); }
  void insert(std::uint32_t id) {
    policy().insert(EntryId{id});
    evictable_.insert(id);
  }
  void insert_all() {
    for (std::uint32_t id = 0; id < kCapacity; ++id) insert(id);
  }
  void hold(std::uint32_t id) {
    policy().hold(EntryId{id});
    evictable_.erase(id);
    held_.insert(id);
  }
  void let_go(std::uint32_t id) {
    policy().let_go(EntryId{id});
    held_.erase(id);
    evictable_.insert(id);
  }
  void erase(std::uint32_t id) {
    policy().erase(EntryId{id});
    evictable_.erase(id);
    held_.erase(id);
  }
  std::optional<std::uint32_t> victim() {
    const std::optional<EntryId> found = policy().victim();
    EXPECT_EQ(found.has_value(), !evictable_.empty());
    if (!found) return std::nullopt;
    EXPECT_FALSE(held_.contains(raw(*found))) << "a held entry was named";
    EXPECT_TRUE(evictable_.contains(raw(*found))) << "an entry that is not inside was named";
    return raw(*found);
  }
  std::vector<std::uint32_t> evict_all() {
    std::vector<std::uint32_t> gone;
    while (const std::optional<std::uint32_t> id = victim()) {
      erase(*id);
      gone.push_back(*id);
    }
    return gone;
  }

  Harness harness_;
  std::set<std::uint32_t> evictable_;
  std::set<std::uint32_t> held_;
};

TYPED_TEST_SUITE_P(EvictionConformance);

TYPED_TEST_P(EvictionConformance, an_empty_policy_has_no_victim) {
  EXPECT_EQ(this->victim(), std::nullopt);
  this->insert(3);
  this->erase(3);
  EXPECT_EQ(this->victim(), std::nullopt);
}

TYPED_TEST_P(EvictionConformance, a_victim_stays_until_it_is_erased) {
  this->insert(7);
  EXPECT_EQ(this->victim(), 7U);
  EXPECT_EQ(this->victim(), 7U);
  this->erase(7);
  EXPECT_EQ(this->victim(), std::nullopt);
}

TYPED_TEST_P(EvictionConformance, every_block_goes_once) {
  this->insert_all();
  EXPECT_EQ(this->evict_all().size(), this->kCapacity);
}

TYPED_TEST_P(EvictionConformance, a_held_block_is_no_victim_until_it_is_let_go_I4) {
  this->insert_all();
  for (std::uint32_t id = 0; id < this->kCapacity; ++id) this->hold(id);
  EXPECT_EQ(this->victim(), std::nullopt);
  for (std::uint32_t id = 0; id < this->kCapacity; ++id) {
    this->let_go(id);
    EXPECT_EQ(this->victim(), id);
    this->hold(id);
  }
  EXPECT_EQ(this->victim(), std::nullopt);
}

TYPED_TEST_P(EvictionConformance, a_held_block_may_be_touched_and_erased) {
  this->insert(1);
  this->insert(2);
  this->hold(1);
  this->policy().touch(EntryId{1});
  this->erase(1);
  EXPECT_EQ(this->evict_all(), std::vector<std::uint32_t>{2});
}

TYPED_TEST_P(EvictionConformance, a_record_may_come_back) {
  for (int round = 0; round < 3; ++round) {
    this->insert(5);
    this->policy().touch(EntryId{5});
    if (round == 1) this->hold(5);
    if (round == 1) this->let_go(5);
    EXPECT_EQ(this->victim(), 5U);
    this->erase(5);
  }
}

TYPED_TEST_P(EvictionConformance, whatever_is_done_victims_are_inside_and_not_held) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    for (int step = 0; step < 3000; ++step) {
      const auto id = static_cast<std::uint32_t>(random() % this->kCapacity);
      const bool evictable = this->evictable_.contains(id);
      const bool held = this->held_.contains(id);
      switch (random() % 6) {
        case 0:
          if (!evictable && !held) this->insert(id);
          break;
        case 1:
          if (evictable || held) this->policy().touch(EntryId{id});
          break;
        case 2:
          if (evictable || held) this->erase(id);
          break;
        case 3:
        case 4:
          if (evictable) this->hold(id);
          if (held) this->let_go(id);
          break;
        default:
          if (const std::optional<std::uint32_t> gone = this->victim(); gone && random() % 2 == 0)
            this->erase(*gone);
      }
      ASSERT_FALSE(::testing::Test::HasFailure());
    }
    while (!this->held_.empty()) this->let_go(*this->held_.begin());
    static_cast<void>(this->evict_all());
    EXPECT_TRUE(this->evictable_.empty());
  }
}

REGISTER_TYPED_TEST_SUITE_P(EvictionConformance, an_empty_policy_has_no_victim,
                            a_victim_stays_until_it_is_erased, every_block_goes_once,
                            a_held_block_is_no_victim_until_it_is_let_go_I4,
                            a_held_block_may_be_touched_and_erased, a_record_may_come_back,
                            whatever_is_done_victims_are_inside_and_not_held);

}  // namespace kvtier::conformance
