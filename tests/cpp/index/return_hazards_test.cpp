#include "kvtier/index/return_hazards.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

// `per_mille` of 1000 blocks a tick return at the age `at`; none does before or after.
void teach(ReturnHazards& hazards, std::uint32_t block_class, Tick at, unsigned per_mille) {
  for (Tick age = 0; age < 200; ++age) {
    hazards.waited(block_class, age, age < at ? 1'000'000 : 1'000 * (1'000 - per_mille));
  }
  for (unsigned n = 0; n < 1'000 * per_mille; ++n) hazards.returned(block_class, at);
}

TEST(ReturnHazards, without_experience_the_older_is_worth_less) {
  const ReturnHazards hazards(2);
  float younger = hazards.value(0, 1);
  for (Tick age = 2; age < (1U << 20U); age *= 2) {
    EXPECT_LT(hazards.value(0, age), younger) << age;
    EXPECT_EQ(hazards.value(0, age), hazards.value(1, age));
    younger = hazards.value(0, age);
  }
  EXPECT_GT(younger, 0.0F);
  EXPECT_GT(hazards.value(0, 0xffffffffU), 0.0F) << "the last bin has no end";
}

TEST(ReturnHazards, a_return_to_come_counts_before_its_time_and_not_behind_it) {
  ReturnHazards hazards(1);
  teach(hazards, 0, 60, 500);
  hazards.learn();
  EXPECT_GT(hazards.value(0, 40), hazards.value(0, 10));
  EXPECT_GT(hazards.value(0, 56), hazards.value(0, 40));
  EXPECT_LT(hazards.value(0, 100), hazards.value(0, 10) / 10);
  // Held from now until it is due, half of them return: 0.5 / (60 - 10) a tick, to the width of a bin.
  EXPECT_NEAR(hazards.value(0, 10), 0.01, 0.003);
}

TEST(ReturnHazards, classes_differ_by_what_they_did) {
  ReturnHazards hazards(3);
  teach(hazards, 0, 30, 800);
  teach(hazards, 1, 30, 20);
  hazards.learn();
  EXPECT_GT(hazards.value(0, 5), 10 * hazards.value(1, 5));
  // Nothing was seen of class 2: it is as all are together.
  EXPECT_GT(hazards.value(0, 5), hazards.value(2, 5));
  EXPECT_GT(hazards.value(2, 5), hazards.value(1, 5));
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

TEST(ReturnHazards, what_is_halved_gives_way_to_what_follows) {
  ReturnHazards steady(1);
  ReturnHazards changed(1);
  for (ReturnHazards* each : {&steady, &changed}) teach(*each, 0, 30, 500);
  for (int n = 0; n < 6; ++n) changed.halve();
  for (ReturnHazards* each : {&steady, &changed}) {
    teach(*each, 0, 120, 500);
    each->learn();
  }
  EXPECT_LT(changed.value(0, 20), steady.value(0, 20) / 2);
  EXPECT_GT(changed.value(0, 100), steady.value(0, 100));
}

}  // namespace
}  // namespace kvtier
