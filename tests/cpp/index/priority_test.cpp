// Priorities and times to live in a tier: they stand above every policy.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "kvtier/index/tier_index.h"

namespace kvtier {
namespace {

constexpr GroupId kGroup{0};
constexpr NamespaceId kTenant{0};

BlockKey numbered(std::uint64_t n) {
  BlockKey key{};
  std::memcpy(key.bytes.data(), &n, sizeof n);
  return key;
}

TierIndex tier_of(std::uint32_t slots, std::string_view eviction = "lru") {
  TierIndex tier({.slots_per_class = {slots}, .class_of_group = {0}, .hash_seed = 3, .eviction = eviction});
  tier.slots(0).grow(slots);
  return tier;
}

Entry* reserve(TierIndex& tier, std::uint64_t n, Priority priority, Entry* parent = nullptr) {
  return tier.reserve(numbered(n), kGroup, kTenant, 0, parent, 0, priority).entry;
}

Entry* store(TierIndex& tier, std::uint64_t n, Priority priority = Priority::normal,
             Entry* parent = nullptr) {
  Entry* entry = reserve(tier, n, priority, parent);
  if (entry != nullptr) tier.commit(*entry);
  return entry;
}

Entry* found(TierIndex& tier, std::uint64_t n) { return tier.index().find(numbered(n), kGroup); }

TEST(Priority, lower_goes_first_and_nothing_goes_for_a_lower_one) {
  TierIndex tier = tier_of(3);
  store(tier, 1, Priority::high);
  store(tier, 2, Priority::normal);
  store(tier, 3, Priority::low);
  EXPECT_EQ(tier.next_victim(0, Priority::low), found(tier, 3));
  store(tier, 4, Priority::normal);  // for the low one, though 1 and 2 are older
  EXPECT_EQ(found(tier, 3), nullptr);
  EXPECT_EQ(reserve(tier, 5, Priority::low), nullptr);
  EXPECT_NE(store(tier, 6, Priority::high), nullptr);
  EXPECT_EQ(found(tier, 2), nullptr);
  EXPECT_NE(store(tier, 7, Priority::high), nullptr);
  EXPECT_EQ(found(tier, 4), nullptr);
  EXPECT_EQ(reserve(tier, 8, Priority::normal), nullptr) << "all that is there is high";
  EXPECT_EQ(tier.next_victim(0, Priority::normal), nullptr);
  tier.touch(*found(tier, 1));
  EXPECT_NE(store(tier, 9, Priority::high), nullptr);
  EXPECT_EQ(found(tier, 6), nullptr) << "of equals the least recently used";
  EXPECT_NE(found(tier, 1), nullptr);
}

TEST(Priority, the_last_word_counts) {
  TierIndex tier = tier_of(2);
  store(tier, 1);
  store(tier, 2);
  tier.set_priority(*found(tier, 1), Priority::high);
  tier.set_priority(*found(tier, 2), Priority::high);
  EXPECT_EQ(reserve(tier, 3, Priority::normal), nullptr);
  tier.pin(*found(tier, 2));
  tier.set_priority(*found(tier, 2), Priority::low);
  tier.set_priority(*found(tier, 1), Priority::normal);
  EXPECT_NE(store(tier, 3, Priority::normal), nullptr);
  EXPECT_EQ(found(tier, 1), nullptr);
  EXPECT_NE(found(tier, 2), nullptr) << "a pin stands above it";
  tier.unpin(*found(tier, 2));
  EXPECT_NE(store(tier, 4, Priority::normal), nullptr);
  EXPECT_EQ(found(tier, 2), nullptr);
}

// Whatever the policy: random traffic, and at every eviction no block of a lower priority could have gone.
TEST(Priority, no_policy_evicts_a_block_while_a_lower_one_could_go) {
  for (const EvictionChoice& choice : eviction_choices()) {
    SCOPED_TRACE(choice.name);
    constexpr std::uint32_t kSlots = 12;
    TierIndex tier = tier_of(kSlots, choice.name);
    std::mt19937 random(7);
    std::vector<Entry*> pinned;
    std::map<Priority, int> evicted;
    int declined = 0;
    const auto may_go = [&](const Entry& entry, const Entry* spared) {
      return entry.linked && entry.state == SlotState::ready && entry.pins == 0 &&
             (!tier.leaf_first() || entry.children == 0) && &entry != spared;
    };
    for (int step = 0; step < 4000; ++step) {
      const std::uint64_t n = random() % 40;
      const auto priority = static_cast<Priority>(random() % 3);
      Entry* there = found(tier, n);
      if (there != nullptr) {
        const auto what = random() % 6;
        if (what == 0) tier.set_priority(*there, priority);
        if (what == 1) tier.drop(*there);
        if (what == 2 && pinned.size() < 4) {
          tier.pin(*there);
          pinned.push_back(there);
        }
        if (what > 2) tier.touch(*there);
        continue;
      }
      if (!pinned.empty() && random() % 3 == 0) {
        tier.unpin(*pinned.back());
        pinned.pop_back();
      }
      Entry* parent = found(tier, n / 2);
      std::vector<std::pair<std::uint64_t, Priority>> could_go;
      for (std::uint64_t other = 0; other < 40; ++other) {
        const Entry* entry = found(tier, other);
        if (entry != nullptr && may_go(*entry, parent)) could_go.emplace_back(other, entry->priority);
      }
      const bool had_room = tier.slots(0).has_free();
      const Entry* stored = store(tier, n, priority, parent);
      const auto lowest = std::min_element(could_go.begin(), could_go.end(),
                                           [](auto& a, auto& b) { return a.second < b.second; });
      const bool any = lowest != could_go.end() && lowest->second <= priority;
      ASSERT_EQ(stored != nullptr, had_room || any);
      declined += stored == nullptr ? 1 : 0;
      for (const auto& [other, rank] : could_go) {
        if (found(tier, other) != nullptr) continue;
        ASSERT_FALSE(had_room);
        ASSERT_EQ(rank, lowest->second);
        ++evicted[rank];
      }
    }
    EXPECT_GT(declined, 50);
    for (const Priority rank : {Priority::low, Priority::normal, Priority::high})
      EXPECT_GT(evicted[rank], 20);
  }
}

TEST(Priority, the_index_stays_within_its_bytes) {
  TierIndex tier = tier_of(1U << 16U);
  const double before = tier.bytes_per_block();
  EXPECT_LE(before, 128);
  store(tier, 1, Priority::high);
  EXPECT_LE(tier.bytes_per_block(), before + 16);
  EXPECT_LE(tier.bytes_per_block(), 128);
}

TEST(TimeToLive, a_block_is_due_when_its_time_is_over_and_goes_as_if_dropped) {
  TierIndex tier = tier_of(4);
  for (std::uint64_t n = 1; n <= 3; ++n) tier.let_expire(*store(tier, n), static_cast<std::int64_t>(100 - n));
  store(tier, 4);
  EXPECT_EQ(tier.next_expiry_us(), 97);
  EXPECT_EQ(tier.due(96), nullptr);
  tier.pin(*found(tier, 2));
  Entry* pinned = found(tier, 2);
  for (const std::uint64_t n : {3, 2, 1}) {
    Entry* due = tier.due(99);
    ASSERT_EQ(due, found(tier, n));
    tier.expire(*due);
    EXPECT_EQ(found(tier, n), nullptr);
  }
  EXPECT_EQ(tier.due(1000), nullptr);
  EXPECT_EQ(tier.next_expiry_us(), std::nullopt);
  EXPECT_EQ(tier.slots(0).counts().leaving, 1U);
  EXPECT_EQ(tier.slots(0).counts().free, 2U);
  tier.unpin(*pinned);
  EXPECT_EQ(tier.slots(0).counts().free, 3U);
}

TEST(TimeToLive, the_longest_counts_and_for_ever_is_the_longest) {
  TierIndex tier = tier_of(2);
  Entry& entry = *store(tier, 1);
  tier.lengthen(entry, 5);
  EXPECT_EQ(tier.next_expiry_us(), std::nullopt) << "it lives for ever";
  tier.let_expire(entry, 10);
  tier.lengthen(entry, 5);
  EXPECT_EQ(tier.next_expiry_us(), 10);
  tier.lengthen(entry, 20);
  EXPECT_EQ(tier.next_expiry_us(), 20);
  tier.lengthen(entry, std::nullopt);
  EXPECT_EQ(tier.next_expiry_us(), std::nullopt);
  EXPECT_FALSE(entry.expires);
}

TEST(TimeToLive, of_what_left_before_nothing_is_due) {
  TierIndex tier = tier_of(2);
  tier.let_expire(*store(tier, 1), 10);
  Entry* filling = reserve(tier, 2, Priority::normal);
  tier.let_expire(*filling, 10);
  tier.abort(*filling);
  tier.drop(*found(tier, 1));
  store(tier, 3);  // their records
  store(tier, 4);
  EXPECT_EQ(tier.due(1000), nullptr);
  Entry* due_while_filling = (tier.drop(*found(tier, 3)), reserve(tier, 5, Priority::normal));
  tier.let_expire(*due_while_filling, 10);
  tier.expire(*tier.due(10));
  EXPECT_FALSE(tier.commit(*due_while_filling));
}

}  // namespace
}  // namespace kvtier
