// What every EvictionPolicy must do (kvtier/index/eviction.h), written once, whatever its order.
//
// Instantiated by name, for all of eviction_choices() in tests/cpp/index/eviction_test.cpp.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <random>
#include <set>
#include <string_view>
#include <vector>

#include "support/eviction_world.h"

namespace kvtier::conformance {

class EvictionConformance : public ::testing::TestWithParam<std::string_view> {
 protected:
  static constexpr std::uint32_t kCapacity = 256;  // blocks and records that the policy is made for

  void insert(std::uint32_t id) { insert(id, id); }
  void insert(std::uint32_t id, std::uint64_t key) {
    policy_.insert(id, key, id % 20);
    evictable_.insert(id);
  }
  void insert_all() {
    for (std::uint32_t id = 0; id < kCapacity; ++id) insert(id);
  }
  void hold(std::uint32_t id) {
    policy_.hold(id);
    evictable_.erase(id);
    held_.insert(id);
  }
  void let_go(std::uint32_t id) {
    policy_.let_go(id);
    held_.erase(id);
    evictable_.insert(id);
  }
  void erase(std::uint32_t id, Departure why = Departure::dropped) {
    policy_.erase(id, why);
    evictable_.erase(id);
    held_.erase(id);
    expected_.erase(id);
  }
  std::optional<std::uint32_t> victim() {
    const std::optional<std::uint32_t> found = policy_.victim();
    EXPECT_EQ(found.has_value(), !evictable_.empty());
    if (!found) return std::nullopt;
    EXPECT_FALSE(held_.contains(*found)) << "a held entry was named";
    EXPECT_TRUE(evictable_.contains(*found)) << "an entry that is not inside was named";
    return *found;
  }
  std::vector<std::uint32_t> evict_all() {
    std::vector<std::uint32_t> gone;
    while (const std::optional<std::uint32_t> id = victim()) {
      erase(*id, Departure::evicted);
      gone.push_back(*id);
    }
    return gone;
  }

  NumberedPolicy policy_{GetParam(), kCapacity};
  std::set<std::uint32_t> evictable_;
  std::set<std::uint32_t> held_;
  std::set<std::uint32_t> expected_;
};

TEST_P(EvictionConformance, an_empty_policy_has_no_victim) {
  EXPECT_EQ(victim(), std::nullopt);
  insert(3);
  erase(3);
  EXPECT_EQ(victim(), std::nullopt);
}

TEST_P(EvictionConformance, a_victim_stays_until_it_is_erased) {
  insert(7);
  EXPECT_EQ(victim(), 7U);
  EXPECT_EQ(victim(), 7U);
  erase(7);
  EXPECT_EQ(victim(), std::nullopt);
}

TEST_P(EvictionConformance, every_block_goes_once) {
  insert_all();
  EXPECT_EQ(evict_all().size(), kCapacity);
}

TEST_P(EvictionConformance, a_held_block_is_no_victim_until_it_is_let_go_I4) {
  insert_all();
  for (std::uint32_t id = 0; id < kCapacity; ++id) hold(id);
  EXPECT_EQ(victim(), std::nullopt);
  for (std::uint32_t id = 0; id < kCapacity; ++id) {
    let_go(id);
    EXPECT_EQ(victim(), id);
    hold(id);
  }
  EXPECT_EQ(victim(), std::nullopt);
}

TEST_P(EvictionConformance, a_held_block_may_be_touched_and_erased) {
  insert(1);
  insert(2);
  hold(1);
  policy_.touch(1);
  erase(1);
  EXPECT_EQ(evict_all(), std::vector<std::uint32_t>{2});
}

TEST_P(EvictionConformance, a_record_may_come_back) {
  for (int round = 0; round < 3; ++round) {
    insert(5);
    policy_.touch(5);
    if (round == 1) hold(5);
    if (round == 1) let_go(5);
    EXPECT_EQ(victim(), 5U);
    erase(5);
  }
}

TEST_P(EvictionConformance, whatever_is_done_victims_are_inside_and_not_held) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    std::mt19937 random(seed);
    std::int64_t now_us = 0;
    for (int step = 0; step < 3000; ++step) {
      const auto id = static_cast<std::uint32_t>(random() % kCapacity);
      const bool evictable = evictable_.contains(id);
      const bool held = held_.contains(id);
      now_us += static_cast<std::int64_t>(random() % 1'000'000);
      policy_.policy().advance(now_us);
      switch (random() % 7) {
        case 0:
          if (!evictable && !held) insert(id, random() % (3 * kCapacity));  // some are ghosts
          break;
        case 1:
          if (evictable || held) policy_.touch(id);
          break;
        case 2:
          if (evictable || held) erase(id);
          break;
        case 3:
        case 4:
          if (evictable) hold(id);
          if (held) let_go(id);
          break;
        case 5:
          if (!evictable && !held) break;
          if (expected_.insert(id).second) {
            policy_.policy().expect(EntryId{id});
          } else {
            expected_.erase(id);
            policy_.policy().expect_no_more(EntryId{id});
          }
          break;
        default:
          if (const std::optional<std::uint32_t> gone = victim(); gone && random() % 2 == 0)
            erase(*gone, Departure::evicted);
      }
      ASSERT_FALSE(::testing::Test::HasFailure());
    }
    while (!held_.empty()) let_go(*held_.begin());
    static_cast<void>(evict_all());
    EXPECT_TRUE(evictable_.empty());
  }
}

TEST_P(EvictionConformance, what_is_fetched_changes_nothing) {
  NumberedPolicy told(GetParam(), kCapacity);
  std::mt19937 random(3);
  std::uint64_t next = 0;
  std::array<std::uint64_t, kCapacity> inside{};  // keys by id
  for (std::uint32_t round = 0; round < 40 * kCapacity; ++round) {
    std::vector<BlockKey> soon;  // known ones and others, none and more than are asked for at once
    for (std::size_t i = random() % 80; i > 0; --i) soon.push_back(numbered_key(random() % (next + 10)));
    told.policy().fetch(soon, GroupId{0});
    std::uint32_t id = round;
    if (round >= kCapacity) {
      const std::optional<std::uint32_t> gone = policy_.evict();
      ASSERT_TRUE(gone);
      ASSERT_EQ(told.evict(), gone) << round;
      id = *gone;
    }
    std::uint64_t key = random() % (next + 1);
    if (random() % 3 > 0 || std::ranges::find(inside, key) != inside.end()) key = ++next;  // others return
    inside[id] = key;
    policy_.insert(id, key, round % 20);
    told.insert(id, key, round % 20);
  }
}

TEST_P(EvictionConformance, a_policy_says_how_much_memory_it_takes) {
  // Of a tier so large that what does not grow with it hardly matters.
  constexpr std::size_t kLarge = std::size_t{1} << 18;
  const double large = NumberedPolicy(GetParam(), kLarge).policy().bytes_per_record();
  EXPECT_GE(large, 8.0);
  EXPECT_LE(large, 96.0);
  const double bytes = policy_.policy().bytes_per_record();
  insert_all();
  EXPECT_EQ(policy_.policy().bytes_per_record(), bytes) << "allocated at the start";
}

}  // namespace kvtier::conformance
