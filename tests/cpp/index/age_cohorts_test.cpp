#include "kvtier/index/age_cohorts.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>
#include <span>
#include <vector>

namespace kvtier {

struct AgeCohortsPeer {
  static std::size_t cohorts(const AgeCohorts& ages) { return ages.cohorts_.size(); }
};

namespace {

constexpr auto kNobodyAsks = [](Tick, std::span<const std::uint32_t>, Tick) {};

// rank() by value(class, age).
template <typename Value>
auto by(Value value) {
  return [value](Tick age, std::span<float> into) {
    for (std::uint32_t c = 0; c < into.size(); ++c) into[c] = value(c, age);
  };
}
// As LRU would: the older, the less.
const auto kByAge = by([](std::uint32_t, Tick age) { return 1 / (1 + static_cast<float>(age)); });

TEST(AgeCohorts, the_queue_of_least_value_comes_first) {
  AgeCohorts ages(4, 2);
  ages.add_last(EntryId{0}, 0, 0);
  ages.add_last(EntryId{1}, 0, 1);
  ages.pass(5, kNobodyAsks);
  ages.add_last(EntryId{2}, 5, 0);
  EXPECT_FALSE(ages.ranked());
  ages.rank(by([](std::uint32_t block_class, Tick age) {
    return block_class == 1 ? 0.5F : age < 3 ? 0.25F : 1.0F;
  }));
  std::vector<std::uint32_t> order;
  const std::map<std::uint32_t, std::pair<Tick, std::uint32_t>> where{{0, {0, 0}}, {1, {0, 1}}, {2, {5, 0}}};
  while (const std::optional<EntryId> first = ages.first()) {
    order.push_back(raw(*first));
    ages.remove(*first, where.at(raw(*first)).first, where.at(raw(*first)).second);
  }
  EXPECT_EQ(order, (std::vector<std::uint32_t>{2, 1, 0}));
}

TEST(AgeCohorts, a_queue_is_in_the_order_of_arrival_but_for_who_is_put_first) {
  AgeCohorts ages(4, 1);
  for (const std::uint32_t id : {1U, 2U}) ages.add_last(EntryId{id}, 0, 0);
  ages.add_first(EntryId{3}, 0, 0);
  ages.rank(kByAge);
  for (const std::uint32_t id : {3U, 1U, 2U}) {
    ASSERT_TRUE(ages.ranked());
    EXPECT_EQ(ages.first(), EntryId{id});
    ages.remove(EntryId{id}, 0, 0);
  }
  EXPECT_EQ(ages.first(), std::nullopt);
}

TEST(AgeCohorts, a_queue_that_had_nobody_when_it_was_ranked_is_ranked_anew) {
  AgeCohorts ages(2, 2);
  ages.add_last(EntryId{0}, 0, 0);
  ages.pass(1, kNobodyAsks);
  ages.rank(kByAge);
  ages.remove(EntryId{0}, 0, 0);
  EXPECT_EQ(ages.first(), std::nullopt);
  ages.add_last(EntryId{0}, 0, 0);
  EXPECT_TRUE(ages.ranked());
  EXPECT_EQ(ages.first(), EntryId{0});
  ages.add_last(EntryId{1}, 0, 1);
  EXPECT_FALSE(ages.ranked());
}

TEST(AgeCohorts, what_is_used_in_the_tick_of_the_ranking_is_ranked_already) {
  AgeCohorts ages(3, 2);
  ages.add_last(EntryId{0}, 0, 1);
  ages.pass(1, kNobodyAsks);
  ages.rank(by([](std::uint32_t block_class, Tick) { return block_class == 1 ? 0.5F : 0.25F; }));
  EXPECT_EQ(ages.first(), EntryId{0});
  ages.add_last(EntryId{1}, 1, 1);
  ages.add_last(EntryId{2}, 1, 0);
  EXPECT_TRUE(ages.ranked());
  for (const std::uint32_t id : {2U, 0U, 1U}) {
    EXPECT_EQ(ages.first(), EntryId{id});
    ages.remove(EntryId{id}, id == 0 ? 0 : 1, id == 2 ? 0 : 1);
  }
}

TEST(AgeCohorts, every_block_is_waited_for_at_its_age_in_every_tick) {
  AgeCohorts ages(1, 2);
  ages.count_in(0, 1);
  std::map<Tick, std::uint64_t> waited;
  const auto note = [&](Tick age, std::span<const std::uint32_t> blocks, Tick ticks) {
    ASSERT_EQ(blocks.size(), 2U);
    EXPECT_EQ(blocks[0], 0U);
    if (blocks[1] > 0) waited[age] += std::uint64_t{blocks[1]} * ticks;
  };
  ages.pass(3, note);
  EXPECT_EQ(waited, (std::map<Tick, std::uint64_t>{{0, 1}, {1, 1}, {2, 1}}));
  ages.count_in(3, 1);
  ages.pass(1, note);
  EXPECT_EQ(waited, (std::map<Tick, std::uint64_t>{{0, 2}, {1, 1}, {2, 1}, {3, 1}}));
  ages.count_out(0, 1);
  ages.count_out(3, 1);
  ages.pass(10, note);
  EXPECT_EQ(waited.size(), 4U);
}

TEST(AgeCohorts, a_long_pause_takes_few_steps_and_loses_no_time) {
  AgeCohorts ages(1, 1);
  ages.count_in(0, 0);
  std::uint64_t ticks = 0;
  int steps = 0;
  ages.pass(100'000, [&](Tick, std::span<const std::uint32_t> blocks, Tick step) {
    ticks += std::uint64_t{blocks[0]} * step;
    ++steps;
  });
  EXPECT_EQ(ticks, 100'000U);
  EXPECT_EQ(ages.now(), 100'000U);
  EXPECT_LT(steps, 150);
}

// Blocks are used at random for a long time: who comes first may be younger than the oldest by the precision
// alone, and there are few cohorts.
TEST(AgeCohorts, the_oldest_comes_first_to_an_eighth_of_its_age) {
  constexpr std::uint32_t kBlocks = 2000;
  AgeCohorts ages(kBlocks, 3);
  std::mt19937 random(11);  // NOLINT: the same every time
  std::map<std::uint32_t, Tick> used;
  std::size_t most_cohorts = 0;
  for (int step = 0; step < 200'000; ++step) {
    const auto id = static_cast<std::uint32_t>(random() % kBlocks);
    if (const auto found = used.find(id); found != used.end()) {
      ages.remove(EntryId{id}, found->second, id % 3);
      ages.count_out(found->second, id % 3);
    }
    used[id] = ages.now();
    ages.add_last(EntryId{id}, ages.now(), id % 3);
    ages.count_in(ages.now(), id % 3);
    if (random() % 20 == 0) ages.pass(random() % 50 == 0 ? 300 : 1, kNobodyAsks);
    if (step % 1000 != 999) continue;
    most_cohorts = std::max(most_cohorts, AgeCohortsPeer::cohorts(ages));
    Tick oldest = ages.now();
    for (const auto& [block, at] : used) oldest = std::min(oldest, at);
    ages.rank(kByAge);
    const std::optional<EntryId> first = ages.first();
    ASSERT_TRUE(first);
    const Tick age = ages.now() - used.at(raw(first.value_or(EntryId{0})));
    EXPECT_GE(age + 1, (ages.now() - oldest) * 7 / 8) << "at step " << step;
  }
  EXPECT_LE(most_cohorts, 160U);
  std::uint64_t counted = 0;
  ages.pass(1, [&](Tick, std::span<const std::uint32_t> blocks, Tick) {
    counted = std::accumulate(blocks.begin(), blocks.end(), counted);
  });
  EXPECT_EQ(counted, used.size());
}

TEST(AgeCohorts, however_long_it_runs_the_cohorts_are_bounded) {
  AgeCohorts ages(1, 1);
  for (Tick n = 0; n < 3000; ++n) {
    ages.count_in(ages.now(), 0);
    ages.pass(1U << (n % 16), kNobodyAsks);
    ASSERT_LE(AgeCohortsPeer::cohorts(ages), 256U);
  }
}

}  // namespace
}  // namespace kvtier
