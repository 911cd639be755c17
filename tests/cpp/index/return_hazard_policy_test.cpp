#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "support/eviction_world.h"

#include "kvtier/index/eviction.h"

namespace kvtier {
namespace {

constexpr std::int64_t kSecondUs = 1'000'000;

// A tier of `blocks` run by the policy leaf first, for chains of blocks named by number: what TierIndex does,
// without keys and slots. A chain's parent is always resident, and goes after it.
class LeafFirstTier {
 public:
  explicit LeafFirstTier(std::uint32_t blocks) : children_(blocks, 0), name_(blocks, 0) {
    policy_ = find_eviction("return-hazard")->make({.records = blocks, .blocks = blocks, .seed = 5});
    for (std::uint32_t id = blocks; id-- > 0;) free_.push_back(id);
  }

  void at(double second) { policy_->advance(static_cast<std::int64_t>(second * kSecondUs)); }
  bool has(std::uint64_t name) const { return resident_.contains(name); }

  // Uses a prompt whose i-th block is first + i; true when all of it was there.
  bool use(std::uint64_t first, std::uint64_t length) {
    std::vector<EntryId> prompt;
    bool hit = true;
    for (std::uint64_t name = first; name < first + length; ++name) {
      if (!has(name)) {
        hit = false;
        insert(name, name == first ? std::nullopt : std::optional(prompt.back()), name - first);
      }
      prompt.push_back(EntryId{resident_.at(name)});
      if (children_[raw(prompt.back())] == 0) policy_->hold(prompt.back());
      ++children_[raw(prompt.back())];  // a pin
    }
    for (std::size_t n = prompt.size(); n-- > 0;) {
      policy_->touch(prompt[n]);
      if (--children_[raw(prompt[n])] == 0) policy_->let_go(prompt[n]);
    }
    return hit;
  }
  std::uint64_t evict() {
    const std::optional<EntryId> named = policy_->victim();
    if (!named) throw std::logic_error("nothing to evict");
    const EntryId victim = *named;
    const std::uint64_t name = name_[raw(victim)];
    const BlockKey key = numbered_key(name);
    policy_->erase(victim, {.key = key, .group = GroupId{0}}, Departure::evicted);
    resident_.erase(name);
    free_.push_back(raw(victim));
    if (const auto found = parent_.find(raw(victim)); found != parent_.end()) {
      if (--children_[found->second] == 0) policy_->let_go(EntryId{found->second});
      parent_.erase(found);
    }
    return name;
  }
  // As TierIndex: of several requests the first and the last are told.
  void expect(std::uint64_t name) {
    if (expected_[name]++ == 0 && has(name)) policy_->expect(EntryId{resident_.at(name)});
  }
  void expect_no_more(std::uint64_t name) {
    if (--expected_[name] == 0 && has(name)) policy_->expect_no_more(EntryId{resident_.at(name)});
  }
  void fetch_ahead(std::uint64_t name) { insert(name, std::nullopt, 0, Arrival::ahead); }
  EvictionPolicy& policy() { return *policy_; }
  std::size_t free() const { return free_.size(); }

 private:
  void insert(std::uint64_t name, std::optional<EntryId> parent, std::uint64_t depth,
              Arrival arrival = Arrival::used) {
    if (free_.empty()) evict();
    const EntryId id{free_.back()};
    free_.pop_back();
    if (parent) {
      ++children_[raw(*parent)];
      parent_[raw(id)] = raw(*parent);
    }
    resident_[name] = raw(id);
    name_[raw(id)] = name;
    children_[raw(id)] = 0;
    const BlockKey key = numbered_key(name);
    policy_->insert(id, {.key = key,
                         .depth = static_cast<std::uint32_t>(depth),
                         .parent = parent,
                         .expected = expected_[name] > 0,
                         .arrival = arrival});
  }

  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<std::uint32_t> free_;
  std::unordered_map<std::uint64_t, std::uint32_t> resident_;
  std::unordered_map<std::uint32_t, std::uint32_t> parent_;
  std::unordered_map<std::uint64_t, int> expected_;  // requests that wait, by name
  std::vector<std::uint32_t> children_;              // and pins
  std::vector<std::uint64_t> name_;
};

TEST(ReturnHazardPolicy, without_experience_the_least_recently_used_goes) {
  LeafFirstTier tier(64);
  for (std::uint64_t prompt = 0; prompt < 16; ++prompt) {
    tier.at(static_cast<double>(prompt) * 10);
    tier.use(prompt * 100, 4);
  }
  for (std::uint64_t prompt = 0; prompt < 16; ++prompt) {
    for (std::uint64_t block = 4; block-- > 0;) EXPECT_EQ(tier.evict(), prompt * 100 + block);
  }
}

// Chats come back every 20 s; each second two prompts come once and never again. LRU holds everything for
// 8 s and hits nothing but what it holds by chance.
TEST(ReturnHazardPolicy, prompts_that_come_back_outlive_those_that_do_not) {
  LeafFirstTier tier(128);
  std::uint64_t once = 1'000'000;
  int hits = 0;
  int uses = 0;
  for (int second = 0; second < 2000; ++second) {
    tier.at(second);
    const std::uint64_t chat = static_cast<std::uint64_t>(second % 20);
    if (chat < 8) {
      const bool hit = tier.use(chat * 1000, 8);
      if (second >= 1000) ++uses;
      if (second >= 1000 && hit) ++hits;
    }
    for (int n = 0; n < 2; ++n) tier.use(once += 100, 8);
  }
  EXPECT_EQ(uses, 400);
  EXPECT_GE(hits, 390);
}

TEST(ReturnHazardPolicy, what_a_prompt_did_is_remembered_after_its_eviction) {
  // As above, but only as many chats as cannot all be held, so most of them return to a tier without them.
  LeafFirstTier tier(64);
  std::uint64_t once = 1'000'000;
  int hits = 0;
  for (int second = 0; second < 4000; ++second) {
    tier.at(second);
    const bool hit = tier.use(static_cast<std::uint64_t>(second % 40) * 1000, 4);
    if (second >= 2000 && hit) ++hits;
    tier.use(once += 100, 4);
  }
  // 64 blocks hold 16 of the 40 chats at most, LRU none.
  EXPECT_GE(hits, 400);
  EXPECT_LE(hits, 2000 * 16 / 40);
}

TEST(ReturnHazardPolicy, without_a_clock_insertions_are_time) {
  LeafFirstTier tier(2048);
  std::uint64_t once = 1'000'000;
  int hits = 0;
  for (int round = 0; round < 1200; ++round) {
    const bool hit = tier.use(static_cast<std::uint64_t>(round % 40) * 1000, 16);
    if (round >= 600 && hit) ++hits;
    for (int n = 0; n < 4; ++n) tier.use(once += 100, 16);
  }
  EXPECT_GE(hits, 590);  // LRU: 0, as 40 rounds are 3200 blocks
}

TEST(ReturnHazardPolicy, an_expected_block_goes_last_until_it_is_expected_no_more) {
  LeafFirstTier tier(8);
  for (std::uint64_t name = 0; name < 4; ++name) {
    tier.at(static_cast<double>(name) * 5);
    if (name == 2) tier.expect(2);  // before it is there
    tier.use(name, 1);
  }
  tier.expect(0);
  tier.expect(0);
  tier.expect(1);
  EXPECT_EQ(tier.evict(), 3U);
  tier.expect_no_more(0);  // one more request waits for it
  tier.use(3, 1);
  EXPECT_EQ(tier.evict(), 3U);
  tier.expect_no_more(0);
  EXPECT_EQ(tier.evict(), 0U);
  EXPECT_EQ(tier.evict(), 1U) << "nothing else is left, and it is the older";
  EXPECT_EQ(tier.evict(), 2U);
  EXPECT_EQ(tier.policy().victim(), std::nullopt);
}

TEST(ReturnHazardPolicy, a_request_that_uses_a_block_twice_makes_one_use_of_it) {
  // The chats of one tier are used again a second later, as a server loads a prefix and then stores behind
  // it. Both tiers must take the same decisions: returns are counted once.
  LeafFirstTier once(64);
  LeafFirstTier twice(64);
  std::mt19937 random(1);  // NOLINT: the same every time
  for (int n = 0; n < 3000; ++n) {
    const std::uint64_t chat = random() % 60 * 100;
    for (LeafFirstTier* tier : {&once, &twice}) tier->at(n * 3.0);
    ASSERT_EQ(once.use(chat, 4), twice.use(chat, 4)) << n;
    for (LeafFirstTier* tier : {&once, &twice}) tier->at(n * 3.0 + 1);
    twice.use(chat, 4);
  }
}

TEST(ReturnHazardPolicy, the_same_calls_name_the_same_victims) {
  std::vector<std::uint64_t> victims[2];
  for (std::vector<std::uint64_t>& gone : victims) {
    LeafFirstTier tier(200);
    std::mt19937 random(9);  // NOLINT: the same every time
    for (int n = 0; n < 3000; ++n) {
      tier.at(n * 0.7);
      tier.use(random() % 300 * 100, 1 + random() % 9);
      if (tier.free() < 20) gone.push_back(tier.evict());
    }
  }
  EXPECT_GT(victims[0].size(), 1000U);
  EXPECT_EQ(victims[0], victims[1]);
}

}  // namespace
}  // namespace kvtier
