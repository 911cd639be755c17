#include "kvtier/index/slot_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <vector>

namespace kvtier {
namespace {

constexpr std::array kStates{SlotState::free, SlotState::filling, SlotState::ready, SlotState::leaving};

std::uint32_t sum(const SlotPool::Counts& counts) {
  return counts.free + counts.filling + counts.ready + counts.leaving;
}

// The table of docs/invariants.md, written out: [from][to].
constexpr bool kAllowed[4][4] = {
    //            free   filling ready  leaving
    /* free    */ {false, true, false, false},
    /* filling */ {true, false, true, true},
    /* ready   */ {true, false, false, true},
    /* leaving */ {true, false, false, false},
};

TEST(SlotStep, the_table_of_allowed_steps) {
  for (const SlotState from : kStates) {
    for (const SlotState to : kStates) {
      EXPECT_EQ(slot_step_allowed(from, to), kAllowed[static_cast<int>(from)][static_cast<int>(to)])
          << static_cast<int>(from) << " -> " << static_cast<int>(to);
    }
  }
}

// A slot in `state`, by allowed steps.
SlotId bring_to(SlotPool& pool, SlotState state) {
  const SlotId slot = *pool.take();
  if (state == SlotState::free) pool.step(slot, SlotState::free);
  if (state == SlotState::ready) pool.step(slot, SlotState::ready);
  if (state == SlotState::leaving) pool.step(slot, SlotState::leaving);
  EXPECT_EQ(pool.state(slot), state);
  return slot;
}

TEST(SlotPool, allowed_steps_are_counted_I1) {
  for (const SlotState from : kStates) {
    for (const SlotState to : kStates) {
      if (to == SlotState::filling || !slot_step_allowed(from, to)) continue;  // take() alone fills
      SlotPool pool(3);
      pool.grow(3);
      const SlotId slot = bring_to(pool, from);
      pool.step(slot, to);
      EXPECT_EQ(pool.state(slot), to);
      const SlotPool::Counts counts = pool.counts();
      EXPECT_EQ(counts.free, to == SlotState::free ? 3U : 2U);
      EXPECT_EQ(counts.ready, to == SlotState::ready ? 1U : 0U);
      EXPECT_EQ(counts.leaving, to == SlotState::leaving ? 1U : 0U);
      EXPECT_EQ(sum(counts), 3U);
    }
  }
}

#ifndef NDEBUG
TEST(SlotPoolDeathTest, other_steps_are_bugs) {
  for (const SlotState from : kStates) {
    for (const SlotState to : kStates) {
      if (to != SlotState::filling && slot_step_allowed(from, to)) continue;
      SlotPool pool(3);
      pool.grow(3);
      const SlotId slot = bring_to(pool, from);
      EXPECT_DEATH(pool.step(slot, to), "broken invariant")
          << static_cast<int>(from) << " -> " << static_cast<int>(to);
    }
  }
  SlotPool pool(3);
  EXPECT_DEATH(pool.step(SlotId{3}, SlotState::free), "broken invariant");
}
#endif

TEST(SlotPool, only_usable_slots_are_handed_out_but_all_are_counted_I1) {
  SlotPool pool(4);
  EXPECT_EQ(pool.take(), std::nullopt);
  EXPECT_EQ(pool.counts().free, 4U);
  pool.grow(2);
  EXPECT_EQ(pool.usable(), 2U);
  EXPECT_TRUE(pool.take());
  EXPECT_TRUE(pool.take());
  EXPECT_EQ(pool.take(), std::nullopt);
  EXPECT_EQ(sum(pool.counts()), 4U);
  pool.grow(1);  // never shrinks
  EXPECT_EQ(pool.usable(), 2U);
  pool.grow(100);
  EXPECT_EQ(pool.usable(), 4U);
  EXPECT_TRUE(pool.take());
  EXPECT_TRUE(pool.take());
  EXPECT_EQ(pool.take(), std::nullopt);
  EXPECT_EQ(pool.counts().filling, 4U);
}

TEST(SlotPool, an_empty_pool_has_no_slots) {
  SlotPool pool(0);
  pool.grow(5);
  EXPECT_EQ(pool.take(), std::nullopt);
  EXPECT_EQ(sum(pool.counts()), 0U);
}

TEST(SlotPool, a_slot_has_at_most_one_holder_I2) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    std::mt19937 random(seed);
    SlotPool pool(16);
    std::set<std::uint32_t> held;
    std::vector<SlotState> model(16, SlotState::free);
    std::uint32_t usable = 0;
    for (int step = 0; step < 2000; ++step) {
      if (random() % 50 == 0)
        pool.grow(usable = std::min(16U, usable + static_cast<std::uint32_t>(random() % 8)));
      if (random() % 2 == 0) {
        const std::optional<SlotId> slot = pool.take();
        ASSERT_EQ(slot.has_value(), held.size() < usable);
        if (slot) {
          ASSERT_TRUE(held.insert(raw(*slot)).second) << "handed out twice";
          ASSERT_LT(raw(*slot), usable);
          model[raw(*slot)] = SlotState::filling;
        }
      } else if (!held.empty()) {
        const std::uint32_t slot = *std::next(held.begin(), static_cast<long>(random() % held.size()));
        const SlotState to = kStates[random() % 4];
        if (to == SlotState::filling || !slot_step_allowed(model[slot], to)) continue;
        pool.step(SlotId{slot}, to);
        model[slot] = to;
        if (to == SlotState::free) held.erase(slot);
      }
      SlotPool::Counts expected;
      for (const SlotState state : model) {
        ++(state == SlotState::free      ? expected.free
           : state == SlotState::filling ? expected.filling
           : state == SlotState::ready   ? expected.ready
                                         : expected.leaving);
      }
      ASSERT_EQ(pool.counts().free, expected.free);
      ASSERT_EQ(pool.counts().filling, expected.filling);
      ASSERT_EQ(pool.counts().ready, expected.ready);
      ASSERT_EQ(pool.counts().leaving, expected.leaving);
    }
  }
}

TEST(SlotPool, a_slot_taken_by_name_is_not_handed_out_again_until_it_is_free) {
  SlotPool pool(6);
  pool.grow(5);
  EXPECT_TRUE(pool.take_at(SlotId{3}));
  EXPECT_FALSE(pool.take_at(SlotId{3}));
  EXPECT_FALSE(pool.take_at(SlotId{5}));  // not usable yet
  std::vector<SlotId> taken;
  while (const auto slot = pool.take()) taken.push_back(*slot);
  EXPECT_EQ(taken, (std::vector{SlotId{0}, SlotId{1}, SlotId{2}, SlotId{4}}));
  EXPECT_FALSE(pool.has_free());
  pool.step(SlotId{3}, SlotState::free);
  pool.step(SlotId{1}, SlotState::free);
  EXPECT_TRUE(pool.has_free());
  EXPECT_TRUE(pool.take_at(SlotId{1}));  // freed, and standing among the recycled ones
  EXPECT_EQ(pool.take(), SlotId{3});
  EXPECT_EQ(pool.take(), std::nullopt);
  pool.step(SlotId{1}, SlotState::free);
  EXPECT_EQ(pool.take(), SlotId{1});
  EXPECT_EQ(pool.take(), std::nullopt);
}

}  // namespace
}  // namespace kvtier
