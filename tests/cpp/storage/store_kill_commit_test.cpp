// kill -9 before every call by which a store writes, syncs and commits blocks: what it had called durable is
// served by the next opening, what it had called wiped is not, and bytes are right or not there.
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <vector>

#include "storage/kill_points.h"
#include "storage/real_store.h"

namespace kvtier::store_world {
#ifdef KVTIER_TEST_CATALOG_HELPER
namespace {

enum class Word : std::uint32_t { begun, durable, wiped, wiping };

struct Line {
  Word word;
  std::uint32_t slot, number;
};

class StoreKillCommitTest : public RealStore {
 protected:
  // Threads make the calls, so that they can be counted; io_uring makes none.
  static void with_threads(SlotStoreOptions& options) {
    options.commit_interval = std::chrono::seconds(30);  // commits when it is told to
    options.make_queue = [](std::uint32_t depth) {
      return make_thread_queue({.depth = depth, .threads = 1});
    };
  }

  // What the victim does from its point 0 on. Returns the step that failed.
  int live(int out, int point) {
    kill_points::calls_until_kill.store(-1);
    SlotStore::Opened opened = open_real(nullptr, with_threads);
    wait_for_slots(*opened.store, kSlots);
    const auto say = [out](Word word, std::uint32_t slot, std::uint32_t number) {
      const Line line{word, slot, number};
      return ::write(out, &line, sizeof line) == ssize_t{sizeof line};
    };
    kill_points::calls_until_kill.store(point);
    // A block in each of two slots, then others over them and into a third; each pair is flushed together.
    for (const auto& [first, second] : {std::pair{Block{0, 1}, Block{1, 1}}, {Block{10, 1}, Block{2, 1}}}) {
      std::vector<std::shared_ptr<PendingWrite>> writes;
      for (const Block& block : {first, second}) {
        const std::uint32_t slot = block.number % 10;
        if (!say(Word::begun, slot, block.number)) return 1;
        writes.push_back(start_write(*opened.store, slot, block));
        if (!writes.back()->written.wait()) return 2;
      }
      if (!opened.store->flush(soon())) return 3;
      for (const auto& write : writes) {
        if (!write->durable.wait()) return 4;
        if (!say(Word::durable, raw(write->place.slot), write->block.number)) return 1;
      }
    }
    if (!say(Word::wiping, 1, 1)) return 1;
    if (!start_wipe(*opened.store, {1})->wait()) return 5;
    if (!say(Word::wiped, 1, 1)) return 1;
    return opened.store->close(soon()) ? 0 : 6;
  }

  struct Book {
    std::map<std::uint32_t, std::uint32_t> owed;  // slot -> number
    std::map<std::uint32_t, std::set<std::uint32_t>> begun;
    std::set<std::uint32_t> wiped;
    std::uint32_t durable = 0;
  };

  static Book read_book(int in) {
    Book book;
    Line line{};
    while (::read(in, &line, sizeof line) == ssize_t{sizeof line}) {
      switch (line.word) {
        case Word::begun:
          book.begun[line.slot].insert(line.number);
          book.owed.erase(line.slot);
          break;
        case Word::durable:
          book.owed[line.slot] = line.number;
          ++book.durable;
          break;
        case Word::wiping: book.owed.erase(line.slot); break;
        case Word::wiped: book.wiped.insert(line.number); break;
      }
    }
    return book;
  }

  void expect_kept(const Book& book) {
    std::map<std::uint32_t, CatalogRecord> named;
    SlotStore::Opened opened = open_and_scan(named);
    for (const auto& [slot, number] : book.owed) {
      ASSERT_TRUE(named.contains(slot)) << slot;
      EXPECT_EQ(named.at(slot).block.key, key_of(number));
      EXPECT_TRUE(serves(*opened.store, slot, {number, 1}));
    }
    for (const auto& [slot, record] : named) {
      for (const std::uint32_t number : book.begun.at(slot)) {
        if (record.block.key != key_of(number)) continue;
        const bool there = serves(*opened.store, slot, {number, 1});  // with the right bytes
        EXPECT_FALSE(there && book.wiped.contains(number)) << "revived: " << number;
      }
    }
    EXPECT_TRUE(opened.store->close(soon()));
  }
};

TEST_F(StoreKillCommitTest, what_was_durable_before_any_call_is_served) {
  std::set<std::uint32_t> durable;  // how much was, over all points
  int point = 0;
  for (bool killed = true; killed && point < 200; ++point) {
    std::filesystem::remove_all(files.path() + "/disk");
    std::array<int, 2> ends{};
    ASSERT_EQ(::pipe(ends.data()), 0);
    killed = kill_points::is_killed_at(-1, [&] { return live(ends[1], point); });
    ::close(ends[1]);
    const Book book = read_book(ends[0]);
    ::close(ends[0]);
    durable.insert(book.durable);
    expect_kept(book);
    if (HasFailure()) FAIL() << "killed before call " << point;
  }
  EXPECT_GE(point, 16) << "writes, syncs, commits, a wipe and a close are so many calls";
  EXPECT_LT(point, 200);
  EXPECT_TRUE(durable.contains(0) && durable.contains(2) && durable.contains(4));
}

}  // namespace
#endif
}  // namespace kvtier::store_world
