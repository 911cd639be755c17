#include "kvtier/index/event_feed.h"

#include <gtest/gtest.h>

#include "kvtier/index/tier_index.h"

namespace kvtier {
namespace {

constexpr GroupId kGroup{0};

BlockKey numbered(std::uint8_t n) {
  BlockKey key{};
  key.bytes[0] = std::byte{n};
  return key;
}

BlockKey mixed(BlockKey key, const BlockKey& epoch) {
  for (std::size_t i = 0; i < kKeyBytes; ++i) key.bytes[i] ^= epoch.bytes[i];
  return key;
}

void push(EventFeed& feed, std::uint8_t n, const BlockKey& epoch = {}) {
  feed.push(mixed(numbered(n), epoch), kGroup, Tier::host, EventKind::stored);
}

// The keys' numbers; 0 for a reset.
std::vector<int> numbers(const BlockEvents& taken) {
  std::vector<int> out;
  for (const BlockEvent& event : taken.events) {
    EXPECT_EQ(event.key, numbered(std::to_integer<std::uint8_t>(event.key.bytes[0])));
    EXPECT_EQ(event.kind == EventKind::reset, event.key == BlockKey{});
    out.push_back(std::to_integer<int>(event.key.bytes[0]));
  }
  return out;
}

TEST(EventFeed, each_event_is_taken_once_and_in_order) {
  EventFeed feed(4);
  for (int round = 0; round < 5; ++round) {  // around the ring
    push(feed, 1);
    push(feed, 2);
    push(feed, 3);
    EXPECT_EQ(numbers(feed.take(2)), (std::vector{1, 2}));
    const BlockEvents rest = feed.take(10);
    EXPECT_EQ(numbers(rest), std::vector{3});
    EXPECT_EQ(rest.lost, 0U);
  }
  EXPECT_TRUE(feed.take(10).events.empty());
}

TEST(EventFeed, a_late_reader_gets_the_last_ones_and_how_many_were_lost) {
  EventFeed feed(3);
  for (std::uint8_t n = 1; n <= 8; ++n) push(feed, n);
  BlockEvents taken = feed.take(1);
  EXPECT_EQ(taken.lost, 5U);
  EXPECT_EQ(numbers(taken), std::vector{6});
  taken = feed.take(10);
  EXPECT_EQ(taken.lost, 0U) << "it is said once";
  EXPECT_EQ(numbers(taken), (std::vector{7, 8}));
}

TEST(EventFeed, keys_come_out_without_the_epoch_that_they_were_mixed_with) {
  const BlockKey first = mixed(numbered(77), numbered(0));
  BlockKey second = numbered(5);
  second.bytes[31] = std::byte{9};
  EventFeed feed(8);
  feed.reset(first);
  EXPECT_EQ(feed.waiting(), 0U) << "nothing was announced that a reset could take back";
  push(feed, 1, first);
  feed.reset(second);
  push(feed, 2, second);
  EXPECT_EQ(numbers(feed.take(10)), (std::vector{1, 0, 2}));
  push(feed, 3, second);
  EXPECT_EQ(numbers(feed.take(10)), std::vector{3});
}

TEST(EventFeed, a_reset_that_was_lost_counts_for_the_keys_behind_it) {
  BlockKey epoch = numbered(5);
  epoch.bytes[17] = std::byte{200};
  EventFeed feed(2);
  push(feed, 1);
  feed.reset(epoch);
  push(feed, 2, epoch);
  push(feed, 3, epoch);
  const BlockEvents taken = feed.take(10);
  EXPECT_EQ(taken.lost, 2U);
  EXPECT_EQ(numbers(taken), (std::vector{2, 3}));
}

// --- what a tier announces ---

struct Announcing {
  explicit Announcing(std::uint32_t slots)
      : tier({.slots_per_class = {slots}, .class_of_group = {0}, .leaf_first = true}) {
    tier.slots(0).grow(slots);
    tier.announce_to(feed, Tier::disk);
  }
  Entry& store(std::uint8_t n) {
    Entry* entry = tier.reserve(numbered(n), kGroup, NamespaceId{0}, 0, nullptr).entry;
    tier.commit(*entry);
    return *entry;
  }
  std::vector<std::pair<EventKind, int>> taken() {
    std::vector<std::pair<EventKind, int>> out;
    for (const BlockEvent& event : feed.take(100).events) {
      EXPECT_EQ(event.tier, Tier::disk);
      out.emplace_back(event.kind, std::to_integer<int>(event.key.bytes[0]));
    }
    return out;
  }
  EventFeed feed{100};
  TierIndex tier;
};

using Told = std::vector<std::pair<EventKind, int>>;

TEST(EventFeed, a_tier_tells_what_became_ready_and_why_it_left) {
  Announcing world(2);
  world.store(1);
  Entry& second = world.store(2);
  world.store(3);
  EXPECT_EQ(
      world.taken(),
      (Told{
          {EventKind::stored, 1}, {EventKind::stored, 2}, {EventKind::evicted, 1}, {EventKind::stored, 3}}));
  world.tier.pin(second);
  world.tier.drop(second);
  EXPECT_EQ(world.taken(), (Told{{EventKind::dropped, 2}})) << "at once, though its slot is held";
  world.tier.unpin(second);
  world.tier.lose(*world.tier.index().find(numbered(3), kGroup));
  EXPECT_EQ(world.taken(), (Told{{EventKind::failed, 3}}));
}

TEST(EventFeed, what_was_never_ready_and_what_was_restored_is_not_told_of) {
  Announcing world(3);
  Entry* aborted = world.tier.reserve(numbered(1), kGroup, NamespaceId{0}, 0, nullptr).entry;
  world.tier.abort(*aborted);
  Entry* dropped = world.tier.reserve(numbered(2), kGroup, NamespaceId{0}, 0, nullptr).entry;
  world.tier.drop(*dropped);
  EXPECT_FALSE(world.tier.commit(*dropped));
  Entry* quarantined = world.tier.reserve(numbered(3), kGroup, NamespaceId{0}, 0, nullptr).entry;
  world.tier.quarantine(*quarantined);
  world.tier.release_quarantined(*quarantined);
  Entry* restored = world.tier.restore(numbered(4), kGroup, NamespaceId{0}, 0, 0, SlotId{0});
  ASSERT_NE(restored, nullptr);
  EXPECT_EQ(world.taken(), Told{});
  world.tier.drop(*restored);
  EXPECT_EQ(world.taken(), (Told{{EventKind::dropped, 4}}));
}

}  // namespace
}  // namespace kvtier
