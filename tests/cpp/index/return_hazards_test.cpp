#include "kvtier/index/return_hazards.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <random>
#include <vector>

namespace kvtier {
namespace {

float value(const ReturnHazards& hazards, std::uint32_t block_class, Tick age) {
  return hazards.values(age)[block_class];
}

// `per_mille` of 1000 blocks a tick return at the age `at`; none does before or after.
void teach(ReturnHazards& hazards, std::uint32_t block_class, Tick at, std::uint32_t per_mille) {
  std::vector<std::uint32_t> blocks(hazards.values(0).size());
  for (Tick age = 0; age < 200; ++age) {
    blocks[block_class] = age < at ? 1'000 : 1'000 - per_mille;
    hazards.waited(age, blocks, 1'000);
  }
  for (unsigned n = 0; n < 1'000 * per_mille; ++n) hazards.returned(block_class, at);
}

TEST(ReturnHazards, without_experience_the_older_is_worth_less) {
  const ReturnHazards hazards(2);
  float younger = value(hazards, 0, 1);
  for (Tick age = 2; age < (1U << 20U); age *= 2) {
    EXPECT_LT(value(hazards, 0, age), younger) << age;
    EXPECT_EQ(value(hazards, 0, age), value(hazards, 1, age));
    younger = value(hazards, 0, age);
  }
  EXPECT_GT(younger, 0.0F);
  EXPECT_GT(value(hazards, 0, 0xffffffffU), 0.0F) << "the last bin has no end";
}

TEST(ReturnHazards, a_return_to_come_counts_before_its_time_and_not_behind_it) {
  ReturnHazards hazards(1);
  teach(hazards, 0, 60, 500);
  hazards.learn();
  EXPECT_GT(value(hazards, 0, 40), value(hazards, 0, 10));
  EXPECT_GT(value(hazards, 0, 56), value(hazards, 0, 40));
  EXPECT_LT(value(hazards, 0, 100), value(hazards, 0, 10) / 10);
  // Held from now until it is due, half of them return: 0.5 / (60 - 10) a tick, to the width of a bin.
  EXPECT_NEAR(value(hazards, 0, 10), 0.01, 0.003);
}

// Of 100 random histories: from nowhere does any horizon promise more returns per tick than the value, and
// one promises it.
TEST(ReturnHazards, the_value_is_that_of_the_best_horizon) {
  std::mt19937 random(5);  // NOLINT: the same every time
  for (int history = 0; history < 100; ++history) {
    ReturnHazards hazards(1);
    for (Tick age = 0; age < 3000; ++age) {
      const std::uint32_t blocks[] = {static_cast<std::uint32_t>(random() % 2000)};
      hazards.waited(age, blocks, 100);
    }
    for (int burst = 0; burst < 4; ++burst) {
      const Tick at = Tick{1} << (random() % 11);
      for (auto n = random() % 50'000; n > 0; --n) hazards.returned(0, at);
    }
    hazards.learn();
    // Held until the end of each bin, whose middle is halfway; the shares are returning()'s.
    std::vector<Tick> begins;
    for (Tick age = 0; age < (1U << 22U);
         age = age < 8 ? age + 1 : age + std::max<Tick>(1, std::bit_floor(age) / 4)) {
      begins.push_back(age);
    }
    for (std::size_t from = 8; from + 1 < begins.size(); ++from) {
      const Tick width = begins[from + 1] - begins[from];
      const double of_bin = hazards.returning(0, begins[from], width);
      double left = 1 - 0.5 * of_bin;  // in its middle
      double gained = 0.5 * of_bin;
      double held = 0.5 * static_cast<double>(width) * (1 - 0.5 * of_bin);
      double best = gained / held;
      for (std::size_t to = from + 1; to + 1 < begins.size(); ++to) {
        const Tick ticks = begins[to + 1] - begins[to];
        const double share = hazards.returning(0, begins[to], ticks);
        gained += left * share;
        held += left * static_cast<double>(ticks) * (1 - 0.5 * share);
        left *= 1 - share;
        best = std::max(best, gained / held);
      }
      EXPECT_NEAR(value(hazards, 0, begins[from]) / best, 1, 1e-4) << history << ", from " << begins[from];
    }
  }
}

TEST(ReturnHazards, classes_differ_by_what_they_did) {
  ReturnHazards hazards(3);
  teach(hazards, 0, 30, 800);
  teach(hazards, 1, 30, 20);
  hazards.learn();
  EXPECT_GT(value(hazards, 0, 5), 10 * value(hazards, 1, 5));
  // Nothing was seen of class 2: it is as all are together.
  EXPECT_GT(value(hazards, 0, 5), value(hazards, 2, 5));
  EXPECT_GT(value(hazards, 2, 5), value(hazards, 1, 5));
}

TEST(ReturnHazards, the_share_that_returns_within_a_time) {
  ReturnHazards hazards(2);
  // 500,000 returns at age 4 in 500,000 block-ticks: a hazard of 1, and a share of 1 / (1 + 1).
  teach(hazards, 0, 4, 500);
  // Ages 56 to 63 are a bin: 500,000 returns in 4 * 1,000,000 + 4 * 500,000 block-ticks, a hazard of 1 / 12;
  // over 8 ticks 8 / 12 / (1 + 8 / 12) = 0.4.
  teach(hazards, 1, 60, 500);
  hazards.learn();
  EXPECT_NEAR(hazards.returning(0, 4, 1), 0.5, 0.005);
  EXPECT_NEAR(hazards.returning(0, 0, 100), 0.5, 0.005);
  EXPECT_NEAR(hazards.returning(0, 5, 100), 0, 0.005);
  EXPECT_NEAR(hazards.returning(0, 0, 4), 0, 0.005);
  EXPECT_NEAR(hazards.returning(1, 56, 8), 0.4, 0.005);
  EXPECT_NEAR(hazards.returning(1, 56, 4), 0.2, 0.005) << "evenly within a bin";
  EXPECT_NEAR(hazards.returning(1, 60, 4), 0.2 / 0.8, 0.005) << "of those who still wait";
  EXPECT_EQ(hazards.returning(1, 56, 0), 0);
  const double ever = hazards.returning(1, 0, 0xffffffffU);
  EXPECT_GE(ever, 0.4);
  EXPECT_LE(ever, 1);
  EXPECT_EQ(hazards.returning(1, 0xffffffffU, 1), 0) << "the last bin has no end";
}

TEST(ReturnHazards, what_was_learned_gives_way_to_what_follows) {
  ReturnHazards steady(1);
  ReturnHazards by_count(1, /*returns_until_halved=*/50'000);
  ReturnHazards by_time(1);
  for (ReturnHazards* each : {&steady, &by_count, &by_time}) {
    teach(*each, 0, 30, 500);
    for (int hour = 0; hour < 6; ++hour) {
      if (each == &by_time) each->passed(3600);
      teach(*each, 0, 120, 80);
    }
    each->learn();
  }
  for (ReturnHazards* each : {&by_count, &by_time}) {
    EXPECT_LT(value(*each, 0, 20), value(steady, 0, 20) / 2);
    EXPECT_GT(value(*each, 0, 100), value(steady, 0, 100));
  }
}

TEST(ReturnHazards, a_night_without_returns_forgets_nothing) {
  ReturnHazards awake(1);
  ReturnHazards slept(1);
  for (ReturnHazards* each : {&awake, &slept}) {
    teach(*each, 0, 30, 500);
    each->passed(3600);
  }
  for (int night = 0; night < 100; ++night) slept.passed(10 * 3600);
  for (ReturnHazards* each : {&awake, &slept}) each->learn();
  EXPECT_EQ(value(slept, 0, 20), value(awake, 0, 20));
}

}  // namespace
}  // namespace kvtier
