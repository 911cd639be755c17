#include "kvtier/index/age_queues.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <vector>

namespace kvtier {

struct AgeQueuesPeer {
  static std::size_t waiting(const AgeQueues& queues, std::uint32_t queue) {
    return queues.heaps_[queue].waiting.size();
  }
};

namespace {

TEST(AgeQueues, a_move_changes_queue_and_age_and_keeps_the_mark) {
  AgeQueues queues(4, 2);
  for (std::uint32_t id = 0; id < 3; ++id) queues.push(EntryId{id}, 0);
  queues.set_mark(EntryId{0}, 3);
  queues.move(EntryId{0}, 1);
  queues.move(EntryId{1}, 0);
  EXPECT_EQ(queues.oldest(0), EntryId{2});
  EXPECT_EQ(queues.oldest(1), EntryId{0});
  EXPECT_EQ(queues.mark(EntryId{0}), 3U);
  EXPECT_EQ(queues.queue(EntryId{0}), 1U);
  EXPECT_EQ(queues.size(0), 2U);
  EXPECT_EQ(queues.size(1), 1U);
  queues.erase(EntryId{0});
  queues.push(EntryId{0}, 1);
  EXPECT_EQ(queues.mark(EntryId{0}), 0U) << "of another block";
}

// The definition: of those in the queue that are not held, the one moved longest ago.
TEST(AgeQueues, agree_with_their_definition) {
  struct Block {
    std::uint32_t queue;
    int moved;
    bool held;
  };
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    AgeQueues queues(32, 3);
    std::map<std::uint32_t, Block> model;
    const unsigned erase_one_in = seed % 2 == 0 ? 5 : 200;
    for (int now = 1; now <= 3000; ++now) {
      const auto id = static_cast<std::uint32_t>(random() % 32);
      const auto queue = static_cast<std::uint32_t>(random() % 3);
      const auto it = model.find(id);
      if (it == model.end()) {
        queues.push(EntryId{id}, queue);
        model[id] = {queue, now, false};
      } else if (random() % erase_one_in == 0) {
        queues.erase(EntryId{id});
        model.erase(it);
      } else if (random() % 3 == 0) {
        queues.move(EntryId{id}, queue);
        it->second = {queue, now, it->second.held};
      } else {
        it->second.held ? queues.let_go(EntryId{id}) : queues.hold(EntryId{id});
        it->second.held = !it->second.held;
      }
      for (std::uint32_t q = 0; q < 3; ++q) {
        std::optional<EntryId> oldest;
        std::size_t size = 0;
        for (const auto& [candidate, block] : model) {
          if (block.queue != q) continue;
          ++size;
          if (!block.held && (!oldest || block.moved < model[raw(*oldest)].moved))
            oldest = EntryId{candidate};
        }
        ASSERT_EQ(queues.oldest(q), oldest);
        ASSERT_EQ(queues.size(q), size);
        ASSERT_LE(AgeQueuesPeer::waiting(queues, q), 2 * 32 + 65U);
      }
    }
  }
}

TEST(AgeQueues, memory_stays_bounded_where_nothing_is_ever_evicted) {
  AgeQueues queues(100, 1);
  for (std::uint32_t id = 0; id < 100; ++id) queues.push(EntryId{id}, 0);
  for (int round = 0; round < 20000; ++round) {
    const EntryId id{static_cast<std::uint32_t>(1 + round % 98)};
    queues.hold(id);
    if (round % 3 == 0) queues.move(id, 0);
    queues.let_go(id);
  }
  EXPECT_LE(AgeQueuesPeer::waiting(queues, 0), 2 * 100 + 65U);
}

}  // namespace
}  // namespace kvtier
