#include "kvtier/index/index.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <vector>

namespace kvtier {

// The inside of an Index, for making keys that collide.
struct IndexPeer {
  static std::uint64_t hash(const Index& index, const BlockKey& key, GroupId group) {
    return index.hash(key, group);
  }
  static std::size_t home(const Index& index, const BlockKey& key, GroupId group) {
    return index.home(Index::tag(index.hash(key, group)));
  }
  static std::size_t buckets(const Index& index) { return index.table_.size(); }
  static std::uint64_t second_seed(const Index& index) { return index.second_seed_; }
};

namespace {

constexpr GroupId kGroup{0};

BlockKey key_of(std::uint64_t a, std::uint64_t b = 0, std::uint64_t c = 0, std::uint64_t d = 0) {
  BlockKey key{};
  const std::uint64_t words[4] = {a, b, c, d};
  std::memcpy(key.bytes.data(), words, sizeof words);
  return key;
}

// With the seed known, one factor of each product can be made 0: then the other words do not matter, and
// home and tag are the same for all. (Without the seed nobody can.)
BlockKey colliding_key(const Index& index, std::uint64_t n) {
  const std::uint64_t seed = IndexPeer::second_seed(index);
  const BlockKey key = key_of(n, seed, n * n, ~seed);
  EXPECT_EQ(IndexPeer::hash(index, key, kGroup), IndexPeer::hash(index, key_of(0, seed, 0, ~seed), kGroup));
  return key;
}

Entry& set(Entry& entry) {
  entry.state = SlotState::ready;
  return entry;
}

TEST(Index, finds_what_was_inserted_under_its_key_and_group) {
  Index index(16, 1);
  Entry& a = index.insert(key_of(1), GroupId{0});
  Entry& b = index.insert(key_of(1), GroupId{1});
  Entry& c = index.insert(key_of(2), GroupId{0});
  EXPECT_EQ(index.find(key_of(1), GroupId{0}), &a);
  EXPECT_EQ(index.find(key_of(1), GroupId{1}), &b);
  EXPECT_EQ(index.find(key_of(2), GroupId{0}), &c);
  EXPECT_EQ(index.find(key_of(2), GroupId{1}), nullptr);
  EXPECT_EQ(index.find(key_of(3), GroupId{0}), nullptr);
  EXPECT_EQ(index.size(), 3U);
  EXPECT_EQ(a.state, SlotState::filling);
  EXPECT_TRUE(a.linked);
  EXPECT_EQ(&index.at(index.id(b)), &b);
}

TEST(Index, every_byte_of_a_key_counts) {
  Index index(64, 1);
  std::vector<Entry*> entries;
  for (std::size_t i = 0; i < kKeyBytes; ++i) {
    BlockKey key{};
    key.bytes[i] = std::byte{1};
    entries.push_back(&index.insert(key, kGroup));
  }
  for (std::size_t i = 0; i < kKeyBytes; ++i) {
    BlockKey key{};
    key.bytes[i] = std::byte{1};
    EXPECT_EQ(index.find(key, kGroup), entries[i]);
    key.bytes[i] = std::byte{2};
    EXPECT_EQ(index.find(key, kGroup), nullptr);
  }
}

TEST(Index, an_unlinked_entry_is_not_found_and_its_key_may_be_inserted_anew) {
  Index index(4, 1);
  Entry& old = index.insert(key_of(1), kGroup);
  index.unlink(old);
  EXPECT_EQ(index.find(key_of(1), kGroup), nullptr);
  EXPECT_EQ(index.size(), 1U);
  Entry& young = index.insert(key_of(1), kGroup);
  EXPECT_NE(&young, &old);
  EXPECT_EQ(index.find(key_of(1), kGroup), &young);
  index.erase(old);
  EXPECT_EQ(index.find(key_of(1), kGroup), &young);
  EXPECT_EQ(index.size(), 1U);
}

TEST(Index, keys_that_a_caller_makes_up_do_not_collide) {
  // The words of a multiplicative hash that make a product 0, were its constants not secret.
  Index index(1024, 0x1234);
  std::map<std::size_t, int> homes;
  for (std::uint64_t n = 0; n < 1024; ++n) {
    ++homes[IndexPeer::home(index, key_of(n, 0x9e3779b97f4a7c15ULL, 0, 0xd6e8feb86659fd93ULL), kGroup)];
  }
  EXPECT_GT(homes.size(), 512U);
}

TEST(Index, seeds_and_groups_decide_where_keys_land) {
  const Index one(1024, 1), other(1024, 2);
  int same_seed = 0, same_group = 0;
  for (std::uint64_t n = 0; n < 256; ++n) {
    same_seed += IndexPeer::home(one, key_of(n), kGroup) == IndexPeer::home(other, key_of(n), kGroup);
    same_group += IndexPeer::home(one, key_of(n), kGroup) == IndexPeer::home(one, key_of(n), GroupId{1});
  }
  EXPECT_LT(same_seed, 16);
  EXPECT_LT(same_group, 16);
}

TEST(Index, a_full_index_of_equal_hashes_finds_every_key) {
  constexpr std::uint64_t kCapacity = 200;
  Index index(kCapacity, 77);
  std::vector<Entry*> entries;
  for (std::uint64_t n = 0; n < kCapacity; ++n)
    entries.push_back(&index.insert(colliding_key(index, n), kGroup));
  EXPECT_EQ(index.size(), index.capacity());
  for (std::uint64_t n = 0; n < kCapacity; ++n) {
    EXPECT_EQ(index.find(colliding_key(index, n), kGroup), entries[n]);
  }
  EXPECT_EQ(index.find(colliding_key(index, kCapacity), kGroup), nullptr);
  // Removal from anywhere in the one long cluster keeps all others findable.
  std::mt19937 random(3);
  std::vector<std::uint64_t> left(kCapacity);
  for (std::uint64_t n = 0; n < kCapacity; ++n) left[n] = n;
  while (!left.empty()) {
    std::swap(left[random() % left.size()], left.back());
    const std::uint64_t gone = left.back();
    left.pop_back();
    index.unlink(*entries[gone]);
    index.erase(*entries[gone]);
    EXPECT_EQ(index.find(colliding_key(index, gone), kGroup), nullptr);
    for (const std::uint64_t n : left) ASSERT_EQ(index.find(colliding_key(index, n), kGroup), entries[n]);
  }
}

TEST(Index, find_each_answers_for_every_key_in_order) {
  Index index(300, 5);
  std::vector<BlockKey> keys;
  std::vector<Entry*> expected;
  for (std::uint64_t n = 0; n < 300; ++n) {
    // Some collide fully, some are absent, some are named twice.
    const BlockKey key = n % 3 == 0 ? colliding_key(index, n) : key_of(n, n * 7, 1, 2);
    expected.push_back(n % 5 == 0 ? nullptr : &index.insert(key, kGroup));
    keys.push_back(key);
    if (n % 7 == 0) {
      keys.push_back(keys.back());
      expected.push_back(expected.back());
    }
  }
  for (std::size_t size = 0; size <= keys.size(); size += size < 70 ? 1 : 31) {
    std::vector<Entry*> found;
    index.find_each(std::span(keys).first(size), kGroup, [&](std::size_t i, Entry* entry) {
      EXPECT_EQ(i, found.size());
      found.push_back(entry);
    });
    ASSERT_EQ(found, std::vector<Entry*>(expected.begin(), expected.begin() + static_cast<long>(size)));
  }
  index.find_each(keys, GroupId{1}, [](std::size_t, Entry* entry) { EXPECT_EQ(entry, nullptr); });
}

// Random operations against a map, over capacities from tiny (every bucket crowded) to roomy.
TEST(Index, agrees_with_a_map) {
  using Name = std::pair<std::uint64_t, std::uint16_t>;
  for (const std::size_t capacity : {1, 2, 3, 7, 8, 9, 31, 64, 500}) {
    for (unsigned seed = 0; seed < 12; ++seed) {
      std::mt19937 random(seed);
      Index index(capacity, seed);
      std::map<Name, Entry*> linked;
      std::vector<Entry*> unlinked;
      const auto key = [&](std::uint64_t n) {
        return n % 4 == 0 ? colliding_key(index, n) : key_of(n * 0x9e3779b97f4a7c15ULL, n, ~n, n);
      };
      for (int step = 0; step < 3000; ++step) {
        const Name name{random() % (2 * capacity), static_cast<std::uint16_t>(random() % 2)};
        const auto it = linked.find(name);
        switch (random() % 5) {
          case 0:
          case 1:
            if (it == linked.end() && linked.size() + unlinked.size() < capacity) {
              Entry& entry = index.insert(key(name.first), GroupId{name.second});
              EXPECT_EQ(entry.pins, 0U);
              EXPECT_EQ(entry.children, 0U);
              linked[name] = &set(entry);
            }
            break;
          case 2:
            if (it != linked.end()) {
              index.unlink(*it->second);
              unlinked.push_back(it->second);
              linked.erase(it);
            }
            break;
          case 3:
            if (!unlinked.empty()) {
              std::swap(unlinked[random() % unlinked.size()], unlinked.back());
              index.erase(*unlinked.back());
              unlinked.pop_back();
            }
            break;
          default: {
            std::vector<BlockKey> keys;
            for (std::uint64_t n = 0; n < 2 * capacity; ++n) keys.push_back(key(n));
            index.find_each(keys, GroupId{name.second}, [&](std::size_t i, Entry* entry) {
              const auto found = linked.find({i, name.second});
              ASSERT_EQ(entry, found == linked.end() ? nullptr : found->second);
              ASSERT_EQ(index.find(keys[i], GroupId{name.second}), entry);
            });
            if (capacity > 100) step += 50;  // it looked at everything
          }
        }
        ASSERT_EQ(index.size(), linked.size() + unlinked.size());
      }
      std::size_t live = 0;
      for (const Entry& record : index.records()) live += record.linked ? 1 : 0;
      EXPECT_EQ(live, linked.size());
    }
  }
}

TEST(Index, a_parent_counts_its_resident_children) {
  Index index(8, 1);
  Entry& parent = index.insert(key_of(1), kGroup);
  Entry& a = index.insert(key_of(3), kGroup);
  Entry& b = index.insert(key_of(4), kGroup);
  index.set_parent(a, parent);
  index.set_parent(b, parent);
  EXPECT_EQ(parent.children, 2U);
  index.unlink(a);
  EXPECT_EQ(parent.children, 2U) << "resident until erased";
  EXPECT_EQ(index.erase(a), nullptr);
  EXPECT_EQ(parent.children, 1U);
  index.unlink(b);
  EXPECT_EQ(index.erase(b), &parent) << "its last child went";
  EXPECT_EQ(parent.children, 0U);
}

TEST(Index, a_parent_that_went_first_is_never_mistaken_for_the_next_user_of_its_record) {
  Index index(3, 1);
  Entry& parent = index.insert(key_of(1), kGroup);
  Entry& child = index.insert(key_of(2), kGroup);
  index.set_parent(child, parent);
  index.unlink(parent);
  index.erase(parent);
  Entry& next = index.insert(key_of(3), kGroup);
  ASSERT_EQ(&next, &parent) << "the record is reused";
  Entry& its_child = index.insert(key_of(4), kGroup);
  index.set_parent(its_child, next);
  index.unlink(child);
  EXPECT_EQ(index.erase(child), nullptr);
  EXPECT_EQ(next.children, 1U) << "the orphan was not its child";
}

TEST(Index, children_are_counted_right_whatever_goes_first) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    std::mt19937 random(seed);
    Index index(12, seed);
    struct Node {
      Entry* entry;
      int parent = -1;  // position in `all`
      bool live = true;
    };
    std::vector<Node> all;
    std::uint64_t next_key = 0;
    for (int step = 0; step < 2000; ++step) {
      std::vector<int> live;
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (all[i].live) live.push_back(static_cast<int>(i));
      }
      if (random() % 2 == 0 && live.size() < 12) {
        Node node{&index.insert(key_of(next_key++), kGroup)};
        if (!live.empty() && random() % 3 != 0) {
          node.parent = live[random() % live.size()];
          index.set_parent(*node.entry, *all[static_cast<std::size_t>(node.parent)].entry);
        }
        all.push_back(node);
      } else if (!live.empty()) {
        Node& gone = all[static_cast<std::size_t>(live[random() % live.size()])];
        index.unlink(*gone.entry);
        index.erase(*gone.entry);
        gone.live = false;
      }
      for (std::size_t i = 0; i < all.size(); ++i) {
        if (!all[i].live) continue;
        std::uint32_t children = 0;
        for (const Node& node : all) children += node.live && node.parent == static_cast<int>(i) ? 1 : 0;
        ASSERT_EQ(all[i].entry->children, children);
      }
      if (all.size() > 60) break;
    }
  }
}

TEST(Index, stays_within_its_budget_of_memory) {
  EXPECT_LE(Index(std::size_t{1} << 20, 1).bytes_per_entry(), 96.0);
  EXPECT_LE(Index((std::size_t{1} << 19) + 1, 1).bytes_per_entry(), 96.0);
  EXPECT_GT(Index(0, 1).bytes_per_entry(), 0.0);
}

#ifndef NDEBUG
TEST(IndexDeathTest, misuse_is_a_bug) {
  Index index(1, 1);
  Entry& entry = index.insert(key_of(1), kGroup);
  EXPECT_DEATH(index.insert(key_of(2), kGroup), "broken invariant");
  EXPECT_DEATH(index.erase(entry), "broken invariant");
  index.unlink(entry);
  EXPECT_DEATH(index.unlink(entry), "broken invariant");
  index.erase(entry);
  EXPECT_DEATH(index.erase(entry), "broken invariant");
}
#endif

}  // namespace
}  // namespace kvtier
