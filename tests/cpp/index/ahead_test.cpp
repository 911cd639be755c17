// What waiting requests want, and what is fetched ahead of them: from TierIndex to those who learn from uses.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/eviction_world.h"

#include "kvtier/index/return_book.h"
#include "kvtier/index/tier_index.h"

namespace kvtier {
namespace {

constexpr GroupId kGroup{0};

// What it was told, as "insert", "insert expected", "insert ahead", "expect", "no more" and "touch" of a key.
class Telling final : public EvictionPolicy {
 public:
  explicit Telling(std::vector<std::string>& told) : told_(told) {}
  void insert(EntryId id, const BlockFacts& block) override {
    ids_.push_back(id);
    std::string said = "insert";
    if (block.expected) said += " expected";
    if (block.arrival == Arrival::ahead) said += " ahead";
    told_.push_back(said);
  }
  void touch(EntryId /*id*/) override { told_.emplace_back("touch"); }
  void hold(EntryId /*id*/) override {}
  void let_go(EntryId /*id*/) override {}
  void erase(EntryId id, const BlockName& /*name*/, Departure /*why*/) override { std::erase(ids_, id); }
  std::optional<EntryId> victim() override {
    return ids_.empty() ? std::nullopt : std::optional(ids_.front());
  }
  void expect(EntryId /*id*/) override { told_.emplace_back("expect"); }
  void expect_no_more(EntryId /*id*/) override { told_.emplace_back("no more"); }
  double bytes_per_record() const override { return 0; }

 private:
  std::vector<std::string>& told_;
  std::vector<EntryId> ids_;
};

class Ahead : public ::testing::Test {
 protected:
  Ahead() { tier_.slots(0).grow(2); }
  Entry& store(std::uint64_t n, Arrival arrival = Arrival::used) {
    Entry& entry = *reserve(n, arrival);
    EXPECT_TRUE(tier_.commit(entry));
    return entry;
  }
  Entry* reserve(std::uint64_t n, Arrival arrival) {
    return tier_.reserve(numbered_key(n), kGroup, NamespaceId{0}, 0, nullptr, 0, Priority::normal, arrival)
        .entry;
  }
  void expect(std::uint64_t n) { tier_.expect(numbered_key(n), kGroup); }
  void no_more(std::uint64_t n) { tier_.expect_no_more(numbered_key(n), kGroup); }
  std::vector<std::string> told() { return std::exchange(told_, {}); }
  using Told = std::vector<std::string>;

  std::vector<std::string> told_;
  TierIndex tier_{
      {.slots_per_class = {2},
       .class_of_group = {0},
       .make_eviction = [this](const EvictionOptions&) { return std::make_unique<Telling>(told_); },
       .leaf_first = true}};
};

TEST_F(Ahead, of_requests_that_wait_for_a_block_the_first_and_the_last_are_told) {
  store(1);
  expect(1);
  expect(1);
  no_more(1);
  EXPECT_EQ(told(), (Told{"insert", "expect"}));
  no_more(1);
  EXPECT_EQ(told(), Told{"no more"});
  no_more(1);
  EXPECT_EQ(told(), Told{}) << "nobody waited";
}

TEST_F(Ahead, a_block_that_comes_later_is_expected_as_long_as_somebody_waits) {
  expect(1);
  expect(2);
  no_more(2);
  store(1);
  store(2);
  EXPECT_EQ(told(), (Told{"insert expected", "insert"}));
  tier_.drop(*tier_.index().find(numbered_key(1), kGroup));
  no_more(1);
  EXPECT_EQ(told(), Told{}) << "it is not there";
}

TEST_F(Ahead, expectations_of_others_are_their_own_however_many_there_are) {
  for (std::uint64_t n = 0; n < 100; ++n) expect(n);
  expect(7);
  for (std::uint64_t n = 0; n < 100; ++n) no_more(n);
  store(7);
  EXPECT_EQ(told(), Told{"insert expected"});
}

TEST_F(Ahead, a_block_of_another_priority_is_not_the_policys) {
  Entry& entry = store(1);
  tier_.set_priority(entry, Priority::high);
  expect(1);
  no_more(1);
  EXPECT_EQ(told(), Told{"insert"});
}

TEST_F(Ahead, what_is_fetched_ahead_is_told_so) {
  store(1, Arrival::ahead);
  store(2);
  EXPECT_EQ(told(), (Told{"insert ahead", "insert"}));
}

TEST_F(Ahead, what_a_request_joins_while_it_is_fetched_is_used_as_it_comes) {
  Entry& entry = *reserve(1, Arrival::ahead);
  tier_.arrive(entry);
  tier_.commit(entry);
  EXPECT_EQ(told(), Told{"insert"});
}

// Every ten seconds a block appears, and a minute and a half later it is fetched for the request that uses
// it ten seconds after. If that were two returns, blocks that had one would seem to come back in ten seconds.
TEST(ReturnBook, a_fetch_ahead_and_the_use_that_it_was_for_are_one_return) {
  ReturnBook book(1000, 1);
  const auto at = [&](Tick second) { book.advance(std::int64_t{second} * 1'000'000); };
  constexpr Tick kBlocks = 4000;
  for (Tick n = 0; n < kBlocks; ++n) {
    at(10 * n);
    book.appears(numbered_key(n), kGroup, nullptr, Arrival::used);
    if (n >= 9) book.appears(numbered_key(n - 9), kGroup, nullptr, Arrival::ahead);
    if (n >= 10) book.used(numbered_key(n - 10), kGroup);
  }
  const BlockKey plain = numbered_key(1'000'000);
  at(10 * kBlocks);
  book.appears(plain, kGroup, nullptr, Arrival::used);
  EXPECT_GT(book.returning(plain, kGroup, 0, 150), 0.6) << "all that appear do";
  at(10 * kBlocks + 100);
  book.used(plain, kGroup);
  EXPECT_LT(book.returning(plain, kGroup, 0, 30), 0.1) << "none comes a third time";
}

}  // namespace
}  // namespace kvtier
