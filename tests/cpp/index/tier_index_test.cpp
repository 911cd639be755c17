#include "kvtier/index/tier_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace kvtier {
namespace {

constexpr GroupId kGroup{0};
constexpr NamespaceId kTenant{0};

BlockKey key_of(std::uint64_t n) {
  BlockKey key{};
  std::memcpy(key.bytes.data(), &n, sizeof n);
  return key;
}

// A tier of one class and one group, all of it usable.
TierIndex tier_of(std::uint32_t slots, bool leaf_first = true) {
  TierIndex tier(
      {.slots_per_class = {slots}, .class_of_group = {0}, .eviction = "lru", .leaf_first = leaf_first});
  tier.slots(0).grow(slots);
  return tier;
}

TierIndex::Reservation reserve(TierIndex& tier, std::uint64_t n, Entry* parent = nullptr) {
  return tier.reserve(key_of(n), kGroup, kTenant, 0, parent);
}

Entry& store(TierIndex& tier, std::uint64_t n, Entry* parent = nullptr) {
  const TierIndex::Reservation reservation = reserve(tier, n, parent);
  EXPECT_EQ(reservation.outcome, ReserveOutcome::reserved);
  EXPECT_TRUE(tier.commit(*reservation.entry));
  return *reservation.entry;
}

bool resident(TierIndex& tier, std::uint64_t n) { return tier.index().find(key_of(n), kGroup) != nullptr; }

void expect_counts(const TierIndex& tier, std::uint32_t free, std::uint32_t filling, std::uint32_t ready,
                   std::uint32_t leaving) {
  const SlotPool::Counts counts = tier.slots(0).counts();
  EXPECT_EQ(counts.free, free);
  EXPECT_EQ(counts.filling, filling);
  EXPECT_EQ(counts.ready, ready);
  EXPECT_EQ(counts.leaving, leaving);
}

TEST(TierIndex, a_block_is_pending_until_its_commit_and_present_afterwards_I3) {
  TierIndex tier = tier_of(2);
  const TierIndex::Reservation first = reserve(tier, 1);
  ASSERT_EQ(first.outcome, ReserveOutcome::reserved);
  EXPECT_EQ(first.entry->state, SlotState::filling);
  TierIndex::Reservation again = reserve(tier, 1);
  EXPECT_EQ(again.outcome, ReserveOutcome::pending);
  EXPECT_EQ(again.entry, first.entry);
  EXPECT_TRUE(tier.commit(*first.entry));
  again = reserve(tier, 1);
  EXPECT_EQ(again.outcome, ReserveOutcome::present);
  EXPECT_EQ(again.entry, first.entry);
  expect_counts(tier, 1, 0, 1, 0);
}

TEST(TierIndex, what_reserve_was_told_is_in_the_entry) {
  TierIndex tier = tier_of(2);
  Entry& parent = store(tier, 1);
  const TierIndex::Reservation found = tier.reserve(key_of(2), kGroup, NamespaceId{9}, 17, &parent);
  EXPECT_EQ(found.entry->name_space, NamespaceId{9});
  EXPECT_EQ(found.entry->depth, 17U);
  EXPECT_EQ(found.entry->key, key_of(2));
  EXPECT_EQ(parent.children, 1U);
}

TEST(TierIndex, an_aborted_reservation_leaves_nothing) {
  TierIndex tier = tier_of(1);
  Entry& parent = store(tier, 1);
  tier.slots(0).grow(1);
  EXPECT_EQ(reserve(tier, 2, &parent).outcome, ReserveOutcome::declined);
  tier.drop(parent);
  const TierIndex::Reservation found = reserve(tier, 2);
  tier.abort(*found.entry);
  EXPECT_FALSE(resident(tier, 2));
  expect_counts(tier, 1, 0, 0, 0);
  EXPECT_EQ(tier.index().size(), 0U);
}

TEST(TierIndex, a_full_tier_evicts_the_least_recently_used) {
  TierIndex tier = tier_of(3);
  for (std::uint64_t n = 0; n < 3; ++n) store(tier, n);
  tier.touch(*tier.index().find(key_of(0), kGroup));
  store(tier, 3);
  EXPECT_TRUE(resident(tier, 0));
  EXPECT_FALSE(resident(tier, 1));
  EXPECT_EQ(tier.evictions(), 1U);
  expect_counts(tier, 0, 0, 3, 0);
}

TEST(TierIndex, pinned_block_is_never_evicted_I4) {
  TierIndex tier = tier_of(2);
  Entry& pinned = store(tier, 0);
  tier.pin(pinned);
  tier.pin(pinned);
  const SlotId slot = pinned.slot;
  store(tier, 1);
  for (std::uint64_t n = 2; n < 50; ++n) {
    EXPECT_NE(store(tier, n).slot, slot);
    EXPECT_TRUE(resident(tier, 0));
    EXPECT_EQ(pinned.slot, slot);
  }
  tier.unpin(pinned);
  store(tier, 50);
  EXPECT_TRUE(resident(tier, 0)) << "one pin is left";
  tier.unpin(pinned);
  store(tier, 51);
  store(tier, 52);
  EXPECT_FALSE(resident(tier, 0));
}

TEST(TierIndex, when_everything_is_pinned_or_filling_a_reservation_is_declined_I4) {
  TierIndex tier = tier_of(2);
  Entry& pinned = store(tier, 0);
  tier.pin(pinned);
  const TierIndex::Reservation filling = reserve(tier, 1);
  EXPECT_EQ(reserve(tier, 2).outcome, ReserveOutcome::declined);
  EXPECT_EQ(reserve(tier, 2).entry, nullptr);
  EXPECT_TRUE(tier.commit(*filling.entry));
  EXPECT_EQ(reserve(tier, 2).outcome, ReserveOutcome::reserved);
  EXPECT_EQ(tier.evictions(), 1U);
}

TEST(TierIndex, pins_are_counted_by_block_and_in_all) {
  TierIndex tier = tier_of(2);
  Entry& a = store(tier, 0);
  Entry& b = store(tier, 1);
  tier.pin(a);
  tier.pin(a);
  tier.pin(b);
  EXPECT_EQ(tier.pins(), 3U);
  EXPECT_EQ(tier.pinned_blocks(), 2U);
  tier.unpin(a);
  EXPECT_EQ(tier.pinned_blocks(), 2U);
  tier.unpin(a);
  tier.unpin(b);
  EXPECT_EQ(tier.pins(), 0U);
  EXPECT_EQ(tier.pinned_blocks(), 0U);
}

// Blocks first .. first + n of one prompt, inserted tail first as the engine commits.
void store_prompt(TierIndex& tier, std::uint64_t first, std::uint64_t n) {
  std::vector<Entry*> entries;
  for (std::uint64_t i = 0; i < n; ++i) {
    const TierIndex::Reservation found = reserve(tier, first + i, entries.empty() ? nullptr : entries.back());
    ASSERT_EQ(found.outcome, ReserveOutcome::reserved);
    entries.push_back(found.entry);
  }
  while (!entries.empty()) {
    EXPECT_TRUE(tier.commit(*entries.back()));
    entries.pop_back();
  }
}

TEST(TierIndex, tail_of_a_prompt_goes_first) {
  TierIndex tier = tier_of(4);
  store_prompt(tier, 0, 4);
  for (std::uint64_t gone = 0; gone < 4; ++gone) {
    store(tier, 100 + gone);
    for (std::uint64_t n = 0; n < 4; ++n)
      EXPECT_EQ(resident(tier, n), n < 3 - gone) << n << " after " << gone;
  }
}

TEST(TierIndex, tail_of_a_prompt_goes_first_whatever_the_order_of_its_commits) {
  std::vector<std::uint64_t> order{0, 1, 2, 3};
  do {
    TierIndex tier = tier_of(4);
    std::vector<Entry*> entries;
    for (std::uint64_t n = 0; n < 4; ++n) {
      entries.push_back(reserve(tier, n, entries.empty() ? nullptr : entries.back()).entry);
    }
    for (const std::uint64_t n : order) EXPECT_TRUE(tier.commit(*entries[n]));
    for (std::uint64_t gone = 0; gone < 4; ++gone) {
      // The newcomers are pinned, so that only the prompt can go.
      tier.pin(store(tier, 100 + gone));
      for (std::uint64_t n = 0; n < 4; ++n) ASSERT_EQ(resident(tier, n), n < 3 - gone);
    }
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(TierIndex, a_prompt_that_was_used_earlier_goes_before_one_that_was_used_later) {
  TierIndex tier = tier_of(6);
  store_prompt(tier, 0, 3);
  store_prompt(tier, 10, 3);
  for (std::uint64_t n = 0; n < 3; ++n) store(tier, 100 + n);
  for (std::uint64_t n = 0; n < 3; ++n) {
    EXPECT_FALSE(resident(tier, n));
    EXPECT_TRUE(resident(tier, 10 + n));
  }
}

TEST(TierIndex, parent_outlives_child) {
  TierIndex tier = tier_of(3);
  Entry& parent = store(tier, 0);
  Entry& child = store(tier, 1, &parent);
  tier.pin(child);
  store(tier, 2);
  for (std::uint64_t n = 3; n < 10; ++n) {
    store(tier, n);
    EXPECT_TRUE(resident(tier, 0));
    EXPECT_TRUE(resident(tier, 1));
  }
  tier.unpin(child);
}

TEST(TierIndex, a_child_that_is_still_filling_holds_its_parent) {
  TierIndex tier = tier_of(2);
  Entry& parent = store(tier, 0);
  const TierIndex::Reservation child = reserve(tier, 1, &parent);
  EXPECT_EQ(reserve(tier, 2).outcome, ReserveOutcome::declined);
  tier.abort(*child.entry);
  EXPECT_EQ(reserve(tier, 2).outcome, ReserveOutcome::reserved);
  EXPECT_TRUE(resident(tier, 0)) << "the child's slot was free";
  EXPECT_EQ(reserve(tier, 3).outcome, ReserveOutcome::reserved);
  EXPECT_FALSE(resident(tier, 0));
}

TEST(TierIndex, a_reservation_never_evicts_its_own_parent) {
  for (const bool leaf_first : {true, false}) {
    TierIndex tier = tier_of(1, leaf_first);
    Entry& parent = store(tier, 0);
    EXPECT_EQ(reserve(tier, 1, &parent).outcome, ReserveOutcome::declined);
    EXPECT_TRUE(resident(tier, 0));
    EXPECT_EQ(parent.children, 0U);
  }
}

TEST(TierIndex, without_leaf_first_age_alone_decides) {
  TierIndex tier = tier_of(2, /*leaf_first=*/false);
  Entry& parent = store(tier, 0);
  store(tier, 1, &parent);
  store(tier, 2);
  EXPECT_FALSE(resident(tier, 0));
  EXPECT_TRUE(resident(tier, 1));
}

TEST(TierIndex, dropped_while_pinned_frees_with_last_pin) {
  TierIndex tier = tier_of(1);
  Entry& entry = store(tier, 0);
  tier.pin(entry);
  tier.pin(entry);
  tier.drop(entry);
  EXPECT_FALSE(resident(tier, 0));
  expect_counts(tier, 0, 0, 0, 1);
  EXPECT_EQ(reserve(tier, 1).outcome, ReserveOutcome::declined);
  tier.unpin(entry);
  expect_counts(tier, 0, 0, 0, 1);
  tier.unpin(entry);
  expect_counts(tier, 1, 0, 0, 0);
  EXPECT_EQ(tier.pins(), 0U);
  EXPECT_EQ(tier.index().size(), 0U);
}

TEST(TierIndex, dropped_while_pinned_may_be_stored_anew_beside_it) {
  TierIndex tier = tier_of(2);
  Entry& old = store(tier, 0);
  tier.pin(old);
  tier.drop(old);
  Entry& young = store(tier, 0);
  EXPECT_NE(young.slot, old.slot);
  tier.unpin(old);
  EXPECT_EQ(tier.index().find(key_of(0), kGroup), &young);
  expect_counts(tier, 1, 0, 1, 0);
}

TEST(TierIndex, dropped_while_filling_is_unfindable_at_once_and_frees_at_its_end) {
  for (const bool commits : {true, false}) {
    TierIndex tier = tier_of(1);
    Entry& entry = *reserve(tier, 0).entry;
    tier.drop(entry);
    EXPECT_FALSE(resident(tier, 0));
    expect_counts(tier, 0, 1, 0, 0);
    EXPECT_EQ(reserve(tier, 1).outcome, ReserveOutcome::declined);
    if (commits) {
      EXPECT_FALSE(tier.commit(entry));
    } else {
      tier.abort(entry);
    }
    expect_counts(tier, 1, 0, 0, 0);
    EXPECT_EQ(tier.index().size(), 0U);
  }
}

TEST(TierIndex, a_quarantined_slot_is_held_until_it_is_released_I1) {
  for (const bool dropped : {false, true}) {
    TierIndex tier = tier_of(1);
    Entry& entry = *reserve(tier, 0).entry;
    if (dropped) tier.drop(entry);
    tier.quarantine(entry);
    EXPECT_FALSE(resident(tier, 0));
    expect_counts(tier, 0, 0, 0, 1);
    EXPECT_EQ(reserve(tier, 0).outcome, ReserveOutcome::declined);
    tier.release_quarantined(entry);
    expect_counts(tier, 1, 0, 0, 0);
    EXPECT_EQ(reserve(tier, 0).outcome, ReserveOutcome::reserved);
  }
}

TEST(TierIndex, a_dropped_parent_leaves_its_children_and_counts_no_more) {
  TierIndex tier = tier_of(3);
  Entry& parent = store(tier, 0);
  Entry& child = store(tier, 1, &parent);
  tier.drop(parent);
  EXPECT_TRUE(resident(tier, 1));
  Entry& reused = store(tier, 2);
  EXPECT_EQ(&reused, &parent) << "the record is reused";
  tier.drop(child);
  EXPECT_EQ(reused.children, 0U);
}

TEST(TierIndex, classes_do_not_evict_for_each_other) {
  TierIndex tier({.slots_per_class = {1, 1}, .class_of_group = {0, 1, 1}});
  for (std::size_t c = 0; c < 2; ++c) tier.slots(c).grow(1);
  Entry& first = *tier.reserve(key_of(1), GroupId{0}, kTenant, 0, nullptr).entry;
  EXPECT_TRUE(tier.commit(first));
  Entry& second = *tier.reserve(key_of(1), GroupId{1}, kTenant, 0, nullptr).entry;
  EXPECT_TRUE(tier.commit(second));
  EXPECT_EQ(tier.evictions(), 0U);
  EXPECT_EQ(tier.reserve(key_of(1), GroupId{2}, kTenant, 0, nullptr).outcome, ReserveOutcome::reserved);
  EXPECT_EQ(tier.evictions(), 1U);
  EXPECT_NE(tier.index().find(key_of(1), GroupId{0}), nullptr);
  EXPECT_EQ(tier.index().find(key_of(1), GroupId{1}), nullptr);
}

TEST(TierIndex, slots_that_are_not_prefaulted_yet_are_not_handed_out) {
  TierIndex tier({.slots_per_class = {2}, .class_of_group = {0}});
  EXPECT_EQ(reserve(tier, 0).outcome, ReserveOutcome::declined);
  tier.slots(0).grow(1);
  store(tier, 0);
  store(tier, 1);
  EXPECT_FALSE(resident(tier, 0));
  tier.slots(0).grow(2);
  store(tier, 2);
  EXPECT_TRUE(resident(tier, 1));
}

double bytes_per_block(std::uint32_t slots, std::string_view eviction) {
  return TierIndex({.slots_per_class = {slots}, .class_of_group = {0}, .eviction = eviction})
      .bytes_per_block();
}

TEST(TierIndex, stays_within_its_budget_of_memory) {
  EXPECT_LE(bytes_per_block(1U << 18, kDefaultEviction), 128.0);
  EXPECT_LE(bytes_per_block((1U << 18) + 1, kDefaultEviction), 128.0);
  EXPECT_LE(bytes_per_block((1U << 16) + 1, "lru"), 128.0);
}

TEST(TierIndex, a_policy_takes_memory_for_its_own_volume_alone) {
  constexpr std::uint32_t kSlots = 1U << 12;
  std::vector<EvictionOptions> asked;
  TierIndex::Options options{
      .slots_per_class = std::vector<std::uint32_t>(16, kSlots), .class_of_group = {0}, .num_volumes = 16};
  options.leaf_first = true;
  options.make_eviction = [&asked](const EvictionOptions& of) {
    asked.push_back(of);
    return find_eviction("lru")->make(of);
  };
  const TierIndex tier(options);
  ASSERT_EQ(asked.size(), 16U);
  for (const EvictionOptions& each : asked) EXPECT_EQ(each.records, kSlots);
  EXPECT_LE(tier.bytes_per_block(), bytes_per_block(kSlots, "lru") + 4.1);
}

// Everything at random, against a model that keeps a plain list of what it holds.
class AgainstModel {
 public:
  AgainstModel(unsigned seed, std::string_view eviction, bool leaf_first)
      : random_(seed),
        leaf_first_(leaf_first),
        tier_({.slots_per_class = {7, 3},
               .class_of_group = {0, 1, 0},
               .hash_seed = seed,
               .eviction = eviction,
               .leaf_first = leaf_first}) {}

  void run(int steps) {
    for (int step = 0; step < steps && !::testing::Test::HasFailure(); ++step) {
      one_step();
      check();
    }
  }

 private:
  static constexpr std::uint32_t kCapacity[2] = {7, 3};
  struct Block {
    Entry* entry;
    std::uint64_t key;
    GroupId group;
    SlotId slot;
    SlotState state;
    bool linked = true;
    bool quarantined = false;
    std::uint32_t pins = 0;
    std::uint64_t serial;
    std::uint64_t parent = 0;  // serial of, 0 for none
  };
  using Blocks = std::map<std::uint64_t, Block>;  // by serial

  std::uint32_t children_of(std::uint64_t serial) const {
    return static_cast<std::uint32_t>(std::count_if(
        blocks_.begin(), blocks_.end(), [&](const auto& other) { return other.second.parent == serial; }));
  }
  std::size_t class_of(const Block& block) const { return block.group == GroupId{1} ? 1 : 0; }

  Block* pick(const std::function<bool(const Block&)>& fits) {
    std::vector<Block*> found;
    for (auto& [serial, block] : blocks_) {
      if (fits(block)) found.push_back(&block);
    }
    return found.empty() ? nullptr : found[random_() % found.size()];
  }
  void gone(const Block& block) { blocks_.erase(std::uint64_t{block.serial}); }

  void reserve() {
    const GroupId group{static_cast<std::uint16_t>(random_() % 3)};
    const std::uint64_t key = random_() % 12;
    Block* parent = random_() % 2 ? pick([&](const Block& b) { return b.group == group; }) : nullptr;
    const std::size_t class_index = group == GroupId{1} ? 1 : 0;
    Block* same = pick([&](const Block& b) { return b.linked && b.key == key && b.group == group; });
    const auto may_go = [&](const Block& b) {
      return class_of(b) == class_index && b.state == SlotState::ready && b.pins == 0 && &b != parent &&
             (!leaf_first_ || children_of(b.serial) == 0);
    };
    const SlotPool::Counts before = tier_.slots(class_index).counts();
    const std::uint64_t evictions = tier_.evictions();
    const bool slot_is_free = kCapacity[class_index] - before.free < tier_.slots(class_index).usable();
    const bool could_evict = pick(may_go) != nullptr;

    const TierIndex::Reservation found =
        tier_.reserve(key_of(key), group, kTenant, 3, parent ? parent->entry : nullptr);
    if (same != nullptr) {
      EXPECT_EQ(found.entry, same->entry);
      EXPECT_EQ(found.outcome,
                same->state == SlotState::ready ? ReserveOutcome::present : ReserveOutcome::pending);
      return;
    }
    EXPECT_EQ(tier_.evictions() - evictions, !slot_is_free && could_evict ? 1U : 0U);
    if (tier_.evictions() != evictions) {
      // Exactly one block cannot be found any more, and it was one that might go.
      std::vector<Block*> evicted;
      for (auto& [serial, block] : blocks_) {
        if (block.linked && tier_.index().find(key_of(block.key), block.group) == nullptr)
          evicted.push_back(&block);
      }
      ASSERT_EQ(evicted.size(), 1U);
      EXPECT_TRUE(may_go(*evicted[0]));
      gone(*evicted[0]);
    }
    if (!slot_is_free && !could_evict) {
      EXPECT_EQ(found.outcome, ReserveOutcome::declined);
      return;
    }
    ASSERT_EQ(found.outcome, ReserveOutcome::reserved);
    const std::uint64_t serial = ++serials_;
    blocks_[serial] = {found.entry, key, group,  found.entry->slot,          SlotState::filling, true,
                       false,       0,   serial, parent ? parent->serial : 0};
  }

  void one_step() {
    if (random_() % 40 == 0) {
      const std::size_t c = random_() % 2;
      tier_.slots(c).grow(static_cast<std::uint32_t>(random_() % (kCapacity[c] + 1)));
    }
    const auto filling = [](const Block& b) { return b.state == SlotState::filling; };
    switch (random_() % 10) {
      default: reserve(); break;
      case 3:
      case 4:
        if (Block* b = pick(filling)) {
          EXPECT_EQ(tier_.commit(*b->entry), b->linked);
          b->state = SlotState::ready;
          if (!b->linked) gone(*b);
        }
        break;
      case 5:
        if (Block* b = pick(filling)) {
          if (random_() % 2 == 0) {
            tier_.abort(*b->entry);
            gone(*b);
          } else {
            tier_.quarantine(*b->entry);
            b->state = SlotState::leaving;
            b->linked = false;
            b->quarantined = true;
          }
        }
        break;
      case 6:
        if (Block* b = pick([](const Block& q) { return q.quarantined; })) {
          tier_.release_quarantined(*b->entry);
          gone(*b);
        }
        break;
      case 7:
        if (Block* b = pick([](const Block& r) { return r.state == SlotState::ready; })) {
          if (random_() % 2 == 0) {
            tier_.touch(*b->entry);
          } else {
            tier_.pin(*b->entry);
            ++b->pins;
          }
        }
        break;
      case 8:
        if (Block* b = pick([](const Block& p) { return p.pins > 0; })) {
          tier_.unpin(*b->entry);
          if (--b->pins == 0 && b->state == SlotState::leaving) gone(*b);
        }
        break;
      case 9:
        if (Block* b = pick([](const Block& l) { return l.linked; })) {
          tier_.drop(*b->entry);
          b->linked = false;
          if (b->state == SlotState::ready) {
            b->state = SlotState::leaving;
            if (b->pins == 0) gone(*b);
          }
        }
        break;
    }
  }

  void check() {
    std::uint64_t pins = 0;
    std::uint32_t pinned = 0;
    for (std::size_t c = 0; c < 2; ++c) {
      SlotPool::Counts expected{kCapacity[c], 0, 0, 0};
      std::set<SlotId> slots;
      for (const auto& [serial, block] : blocks_) {
        if (class_of(block) != c) continue;
        --expected.free;
        ++(block.state == SlotState::filling ? expected.filling
           : block.state == SlotState::ready ? expected.ready
                                             : expected.leaving);
        EXPECT_TRUE(slots.insert(block.slot).second) << "two holders of one slot (I2)";
      }
      const SlotPool::Counts counts = tier_.slots(c).counts();
      EXPECT_EQ(counts.free + counts.filling + counts.ready + counts.leaving, kCapacity[c]) << "I1";
      EXPECT_EQ(counts.free, expected.free);
      EXPECT_EQ(counts.filling, expected.filling);
      EXPECT_EQ(counts.ready, expected.ready);
      EXPECT_EQ(counts.leaving, expected.leaving);
    }
    for (const auto& [serial, block] : blocks_) {
      const Entry& entry = *block.entry;
      // What is held is still what it was: nobody else got the record or the slot (I2, I4).
      EXPECT_EQ(entry.key, key_of(block.key));
      EXPECT_EQ(entry.slot, block.slot);
      EXPECT_EQ(entry.state, block.state);
      EXPECT_EQ(tier_.slots(class_of(block)).state(block.slot), block.state);
      EXPECT_EQ(entry.linked, block.linked);
      EXPECT_EQ(entry.pins, block.pins);
      EXPECT_EQ(entry.children, children_of(serial));
      if (block.linked) {
        EXPECT_EQ(tier_.index().find(key_of(block.key), block.group), &entry);
      } else {
        EXPECT_NE(tier_.index().find(key_of(block.key), block.group), &entry);
      }
      pins += block.pins;
      pinned += block.pins > 0 ? 1 : 0;
    }
    EXPECT_EQ(tier_.index().size(), blocks_.size());
    EXPECT_EQ(tier_.pins(), pins);
    EXPECT_EQ(tier_.pinned_blocks(), pinned);
  }

  std::mt19937 random_;
  bool leaf_first_;
  TierIndex tier_;
  Blocks blocks_;
  std::uint64_t serials_ = 0;
};

TEST(TierIndex, agrees_with_a_naive_model_I1_I2_I3_I4) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(seed);
    AgainstModel(seed, "lru", true).run(1500);
    AgainstModel(seed, "lru", false).run(1500);
  }
}

TEST(TierIndex, with_every_policy_agrees_with_a_naive_model_I1_I2_I3_I4) {
  for (const EvictionChoice& choice : eviction_choices()) {
    for (unsigned seed = 0; seed < 8; ++seed) {
      SCOPED_TRACE(std::string(choice.name) + " " + std::to_string(seed));
      AgainstModel(seed, choice.name, true).run(1000);
      AgainstModel(seed, choice.name, false).run(1000);
    }
  }
}

TEST(TierIndex, orphans_are_counted_and_adopted_when_their_parent_is_back) {
  TierIndex tier({.slots_per_class = {3}, .class_of_group = {0}, .eviction = "fifo"});
  tier.slots(0).grow(3);
  Entry& parent = store(tier, 0);
  Entry& child = store(tier, 1, &parent);
  store(tier, 2, &parent);
  EXPECT_EQ(tier.orphans(), 0U);
  Entry& back = store(tier, 3);
  EXPECT_FALSE(resident(tier, 0));
  EXPECT_EQ(tier.orphans(), 2U);
  EXPECT_EQ(tier.index().parent(child), nullptr);
  tier.adopt(child, back);
  EXPECT_EQ(tier.index().parent(child), &back);
  tier.adopt(child, *tier.index().find(key_of(2), kGroup));
  EXPECT_EQ(tier.index().parent(child), &back) << "it has a parent";
}

TEST(TierIndex, lru_holds_an_adopted_child_s_parent) {
  TierIndex tier = tier_of(3);
  Entry& parent = store(tier, 0);
  Entry& child = store(tier, 1, &parent);
  tier.drop(parent);
  Entry& back = store(tier, 0);
  tier.adopt(child, back);
  tier.touch(child);
  store(tier, 2);
  store(tier, 3);
  EXPECT_TRUE(resident(tier, 0)) << "older, but its child is resident";
  EXPECT_EQ(tier.orphans(), 0U);
}

#ifndef NDEBUG
TEST(TierIndex, restored_blocks_are_ready_in_their_own_slots_and_age_in_the_order_given) {
  TierIndex tier = tier_of(4);
  Entry* parent = tier.restore(key_of(1), kGroup, kTenant, 0, 0, SlotId{2});
  Entry* child = tier.restore(key_of(2), kGroup, kTenant, 1, 0, SlotId{0});
  ASSERT_NE(parent, nullptr);
  ASSERT_NE(child, nullptr);
  tier.link_parent(*child, *parent);
  EXPECT_EQ(child->slot, SlotId{0});
  EXPECT_EQ(tier.restore(key_of(3), kGroup, kTenant, 0, 0, SlotId{2}), nullptr);  // taken
  EXPECT_EQ(tier.restore(key_of(1), kGroup, kTenant, 0, 0, SlotId{3}), nullptr);  // there already
  EXPECT_EQ(tier.restore(key_of(4), kGroup, kTenant, 0, 0, SlotId{4}), nullptr);  // no such slot
  expect_counts(tier, 2, 0, 2, 0);
  store(tier, 10);
  store(tier, 11);
  expect_counts(tier, 0, 0, 4, 0);
  store(tier, 12);  // the child goes first, although its parent is older
  EXPECT_FALSE(resident(tier, 2));
  EXPECT_TRUE(resident(tier, 1));
  store(tier, 13);
  EXPECT_FALSE(resident(tier, 1));
}

TEST(TierIndex, each_volume_has_slots_and_victims_of_its_own) {
  TierIndex tier({.slots_per_class = {1, 2}, .class_of_group = {0}, .num_volumes = 2});
  tier.slots(0).grow(1);
  tier.slots(1).grow(2);
  const auto put = [&tier](std::uint64_t n, std::uint32_t volume) {
    const TierIndex::Reservation found = tier.reserve(key_of(n), kGroup, kTenant, 0, nullptr, volume);
    ASSERT_EQ(found.outcome, ReserveOutcome::reserved);
    EXPECT_EQ(found.entry->volume, volume);
    EXPECT_TRUE(tier.commit(*found.entry));
  };
  put(1, 0);
  put(2, 1);
  put(3, 1);
  put(4, 1);
  EXPECT_FALSE(resident(tier, 2));  // the oldest of its volume
  EXPECT_TRUE(resident(tier, 1));   // older, on the other one
  EXPECT_EQ(tier.next_victim(0)->key, key_of(1));
  EXPECT_EQ(tier.next_victim(1)->key, key_of(3));
}

// The same at random to two volumes of one tier and to two tiers of one volume each.
TEST(TierIndex, with_every_policy_a_volume_decides_as_if_it_was_alone) {
  constexpr std::uint32_t kSlots = 12;
  for (const EvictionChoice& choice : eviction_choices()) {
    SCOPED_TRACE(choice.name);
    TierIndex both({.slots_per_class = {kSlots, kSlots},
                    .class_of_group = {0},
                    .num_volumes = 2,
                    .eviction = choice.name});
    std::vector<TierIndex> alone;
    for (std::uint32_t volume = 0; volume < 2; ++volume) {
      alone.push_back(
          TierIndex({.slots_per_class = {kSlots}, .class_of_group = {0}, .eviction = choice.name}));
      alone[volume].slots(0).grow(kSlots);
      both.slots(volume).grow(kSlots);
    }
    std::mt19937 random(9);  // NOLINT: the same every time
    for (int step = 0; step < 4000; ++step) {
      const std::uint64_t block = random() % 80;
      const auto volume = static_cast<std::uint32_t>(block % 2);
      const unsigned what = random() % 8;
      for (TierIndex* tier : {&both, &alone[volume]}) {
        const std::uint32_t here = tier == &both ? volume : 0;
        Entry* found = tier->index().find(key_of(block), kGroup);
        if (found == nullptr) {
          Entry* parent = block < 2 ? nullptr : tier->index().find(key_of(block - 2), kGroup);
          const auto priority = what == 0 ? Priority::low : what == 1 ? Priority::high : Priority::normal;
          const TierIndex::Reservation place = tier->reserve(
              key_of(block), kGroup, kTenant, static_cast<std::uint32_t>(block / 2), parent, here, priority);
          if (place.outcome == ReserveOutcome::reserved) tier->commit(*place.entry);
        } else if (what == 0) {
          tier->drop(*found);
        } else if (what == 1) {
          tier->set_priority(*found, Priority::normal);
        } else if (what == 2 && found->pins == 0) {
          tier->pin(*found);
        } else if (what == 3 && found->pins > 0) {
          tier->unpin(*found);
        } else {
          tier->touch(*found);
        }
      }
      for (std::uint64_t each = 0; each < 80; ++each) {
        ASSERT_EQ(resident(both, each), resident(alone[each % 2], each)) << each << " in step " << step;
      }
    }
    EXPECT_EQ(both.evictions(), alone[0].evictions() + alone[1].evictions());
    EXPECT_GT(both.evictions(), 100U);
  }
}

TEST(TierIndexDeathTest, misuse_is_a_bug) {
  TierIndex tier = tier_of(4);
  Entry& filling = *reserve(tier, 0).entry;
  EXPECT_DEATH(tier.pin(filling), "broken invariant");
  EXPECT_DEATH(tier.touch(filling), "broken invariant");
  EXPECT_DEATH(tier.release_quarantined(filling), "broken invariant");
  Entry& ready = store(tier, 1);
  EXPECT_DEATH(static_cast<void>(tier.commit(ready)), "broken invariant");
  EXPECT_DEATH(tier.abort(ready), "broken invariant");
  EXPECT_DEATH(tier.quarantine(ready), "broken invariant");
  EXPECT_DEATH(tier.unpin(ready), "broken invariant");
  tier.pin(ready);
  tier.drop(ready);
  EXPECT_DEATH(tier.drop(ready), "broken invariant");
  EXPECT_DEATH(tier.pin(ready), "broken invariant");
  EXPECT_DEATH(tier.release_quarantined(ready), "broken invariant");
}
#endif

}  // namespace
}  // namespace kvtier
