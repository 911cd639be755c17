#include "kvtier/index/return_admission.h"

#include <gtest/gtest.h>

#include <vector>

#include "support/eviction_world.h"

namespace kvtier {
namespace {

constexpr GroupId kGroup{0};
constexpr std::int64_t kSecondUs = 1'000'000;

TEST(Residence, is_blocks_by_the_rate_at_which_they_enter) {
  Residence residence(1000);
  EXPECT_EQ(residence.ticks(50), 0U) << "nothing has entered yet";
  for (Tick tick = 100; tick < 200; ++tick) {
    for (int n = 0; n < 5; ++n) residence.entered(tick);
  }
  EXPECT_EQ(residence.ticks(200), 200U);  // 500 in 100 ticks
  EXPECT_EQ(residence.ticks(300), 400U) << "when nothing enters, nothing leaves";
}

TEST(Residence, follows_the_rate) {
  Residence residence(1000);
  Tick tick = 0;
  for (; tick < 2'000; ++tick) {
    for (int n = 0; n < 5; ++n) residence.entered(tick);
  }
  EXPECT_NEAR(residence.ticks(tick), 200, 2);
  for (; tick < 4'000; ++tick) {
    for (int n = 0; n < 20; ++n) residence.entered(tick);
  }
  EXPECT_NEAR(residence.ticks(tick), 50, 2);
}

// A host tier of 30 blocks that takes in three in ten seconds keeps each for 100 seconds. Every ten seconds
// a prompt of a head and a tail comes (the head is used again `pause` later, once), and one of a single
// block, which never is.
class Traffic {
 public:
  explicit Traffic(Tick pause) : pause_(pause) {}

  void run(Tick until) {
    for (; now_ < until; now_ += 10) {
      admission_.advance(std::int64_t{now_} * kSecondUs);
      const std::uint64_t n = now_ / 10;
      admission_.appears(head(n), kGroup, nullptr, Arrival::used);
      const BlockKey above = head(n);
      admission_.appears(numbered_key(4 * n + 1), kGroup, &above, Arrival::used);
      admission_.appears(once(n), kGroup, nullptr, Arrival::used);
      if (now_ >= pause_) admission_.used(head(n - pause_ / 10), kGroup);
    }
  }
  static BlockKey head(std::uint64_t n) { return numbered_key(4 * n); }
  static BlockKey once(std::uint64_t n) { return numbered_key(4 * n + 2); }
  std::uint64_t last() const { return now_ / 10 - 1; }
  // Writes that nothing stands against, so that the drive of 300 blocks is known to keep each for 1000 s.
  void write_all(Tick until) {
    while (now_ < until) {
      run(now_ + 10);
      const BlockKey key = head(last());
      for (int n = 0; n < 3; ++n) EXPECT_TRUE(admit(key));
    }
  }

  bool admit(const BlockKey& key, double budget = 1) {
    return admission_.admit({.block = {key}, .victim = std::nullopt, .bytes = 1, .budget = budget});
  }
  bool admit(const BlockKey& key, const BlockKey& victim, double budget = 1) {
    return admission_.admit({.block = {key}, .victim = BlockName{victim}, .bytes = 1, .budget = budget});
  }
  void note(const BlockKey& key) { admission_.note({.block = {key}, .victim = std::nullopt}); }
  double worth(const BlockKey& key) { return admission_.worth({key}); }

 private:
  Tick pause_;
  Tick now_ = 0;
  ReturnAdmission admission_{30, 300, 1};
};

TEST(ReturnAdmission, a_block_is_worth_the_chance_that_it_returns_from_the_drive) {
  Traffic traffic(400);
  traffic.write_all(40'000);
  // All of them, 400 s later; over the ages of a bin the hazard is even, and some seem to be left.
  EXPECT_GT(traffic.worth(Traffic::head(traffic.last())), 0.75);
  EXPECT_LT(traffic.worth(Traffic::once(traffic.last())), 0.02);
  EXPECT_LT(traffic.worth(Traffic::head(traffic.last() - 100)), 0.2) << "it has had its return";
}

TEST(ReturnAdmission, what_returns_only_when_the_drive_has_let_it_go_is_worth_nothing) {
  Traffic traffic(4'000);  // a block is in the host tier and then on the drive for 1100 s
  traffic.write_all(40'000);
  EXPECT_LT(traffic.worth(Traffic::head(traffic.last())), 0.1);
}

TEST(ReturnAdmission, the_better_of_block_and_victim_stays) {
  Traffic traffic(400);
  traffic.write_all(40'000);
  const BlockKey head = Traffic::head(traffic.last());
  const BlockKey once = Traffic::once(traffic.last());
  EXPECT_FALSE(traffic.admit(once, head));
  EXPECT_TRUE(traffic.admit(head, once));
  const BlockKey unknown = numbered_key(1'000'000'007);
  EXPECT_TRUE(traffic.admit(head, unknown)) << "not used for longer than anybody remembers";
}

TEST(ReturnAdmission, a_victim_that_is_worth_more_than_they_are_keeps_nobody_out) {
  Traffic traffic(400);
  traffic.write_all(40'000);
  const std::uint64_t last = traffic.last();
  for (int n = 0; n < 100; ++n) EXPECT_TRUE(traffic.admit(Traffic::head(last), Traffic::once(last)));
  EXPECT_TRUE(traffic.admit(Traffic::head(last), Traffic::head(last)));
}

TEST(ReturnAdmission, a_first_victim_that_nobody_beats_keeps_nobody_out_for_ever) {
  Traffic traffic(400);
  traffic.write_all(40'000);
  const BlockKey head = Traffic::head(traffic.last());
  const BlockKey middling = Traffic::head(traffic.last() - 100);  // it has had its return
  ASSERT_GT(traffic.worth(middling), 0);
  int refused = 0;
  while (refused < 40'000 && !traffic.admit(middling, head)) ++refused;
  EXPECT_GT(refused, 100);
  EXPECT_LT(refused, 20'000);
}

TEST(ReturnAdmission, what_is_refused_lowers_the_bar) {
  Traffic traffic(400);
  traffic.write_all(40'000);
  const BlockKey head = Traffic::head(traffic.last());
  const BlockKey once = Traffic::once(traffic.last());
  EXPECT_TRUE(traffic.admit(head, head));
  EXPECT_FALSE(traffic.admit(once, once)) << "victims are usually heads";
  int refused = 1;
  while (!traffic.admit(once, once) && refused < 1'000'000) ++refused;
  EXPECT_GT(refused, 1'000);
  EXPECT_LT(refused, 100'000);
}

// Heads and others are offered in turn: what is usual is half of a head's worth.
TEST(ReturnAdmission, a_write_costs_more_the_less_of_the_budget_is_left) {
  Traffic traffic(400);
  traffic.write_all(40'000);
  const BlockKey head = Traffic::head(traffic.last());
  const BlockKey once = Traffic::once(traffic.last());
  for (int n = 0; n < 30'000; ++n) traffic.note(n % 2 == 0 ? head : once);
  EXPECT_TRUE(traffic.admit(head, 0.2)) << "the price is half of its worth";
  EXPECT_TRUE(traffic.admit(head, 0.13)) << "84 in a hundred";
  EXPECT_FALSE(traffic.admit(head, 0.1)) << "9 / 8 of its worth";
  EXPECT_TRUE(traffic.admit(once, 1));
  EXPECT_FALSE(traffic.admit(once, 0.5)) << "an eighth of the other's worth";
  EXPECT_FALSE(traffic.admit(head, 0));
}

}  // namespace
}  // namespace kvtier
