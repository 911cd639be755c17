#include "kvtier/memory/arena.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "arena_fakes.h"

namespace kvtier {
namespace {

using fakes::capture_conflict;
using fakes::Gate;
using fakes::HookedHostMemory;
using fakes::RecordingDevice;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

// Chunks in the order of prefaulting: class 0 [0,4), class 1 [0,3), class 0 [4,8), class 1 [3,5), class 0
// [8,10).
ArenaGeometry small_geometry() { return {{{kMiB, 10}, {kMiB + 4096, 5}}, 4 * kMiB}; }
constexpr int kChunks = 5;
// Usable slots of both classes after so many chunks.
constexpr std::array<std::array<std::uint32_t, 2>, kChunks + 1> kUsable = {
    {{0, 0}, {4, 0}, {4, 3}, {8, 3}, {8, 5}, {10, 5}}};

struct Recorder {
  Mutex mutex;
  CondVar changed;
  std::vector<std::pair<std::size_t, std::uint32_t>> usable_calls;
  std::vector<Status> failures;

  Arena::OnUsable on_usable() {
    return [this](std::size_t class_index, std::uint32_t usable) {
      MutexLock lock(mutex);
      EXPECT_TRUE(failures.empty()) << "a slot after the failure";
      EXPECT_GT(usable, last(class_index)) << "usable only grows";
      usable_calls.emplace_back(class_index, usable);
      changed.notify_all();
    };
  }
  Arena::OnFailure on_failure() {
    return [this](const Status& status) {
      MutexLock lock(mutex);
      failures.push_back(status);
      changed.notify_all();
    };
  }
  std::uint32_t usable(std::size_t class_index) {
    MutexLock lock(mutex);
    return last(class_index);
  }
  void wait_for_usable(std::size_t class_index, std::uint32_t slots) {
    MutexLock lock(mutex);
    while (last(class_index) < slots) changed.wait(lock);
  }

 private:
  std::uint32_t last(std::size_t class_index) const {
    std::uint32_t last = 0;
    for (const auto& [index, usable] : usable_calls) last = index == class_index ? usable : last;
    return last;
  }
};

// Everything lives longer than the arena, as the contract asks.
class ArenaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    descriptors_ = open_descriptors();
    mappings_ = arena_mappings();
  }
  void TearDown() override {
    arena_.reset();
    EXPECT_EQ(open_descriptors(), descriptors_) << "descriptors leaked";
    EXPECT_EQ(arena_mappings(), mappings_) << "mappings leaked";
  }

  void create(const ArenaGeometry& geometry = small_geometry()) {
    auto arena = Arena::create(geometry, memory_, recorder_.on_usable(), recorder_.on_failure());
    ASSERT_TRUE(arena.is_ok()) << arena.status().message();
    arena_ = std::move(arena.value());
  }

  void expect_usable_after(int chunks) {
    for (std::size_t i = 0; i < 2; ++i) {
      EXPECT_EQ(recorder_.usable(i), kUsable[static_cast<std::size_t>(chunks)][i]) << "class " << i;
    }
  }
  // Whether every chunk lies in one registered range.
  bool all_registered(const RecordingDevice& device) const {
    for (const ArenaChunk& chunk : arena_->geometry().chunks()) {
      if (!device.covers(arena_->slot(chunk.class_index, SlotId{chunk.first_slot}), chunk.bytes))
        return false;
    }
    return true;
  }

  static std::size_t open_descriptors() {
    std::size_t count = 0;
    for (int fd = 0; fd < 1024; ++fd) count += ::fcntl(fd, F_GETFD) != -1 ? 1U : 0U;
    return count;
  }
  static std::size_t arena_mappings() {
    std::ifstream maps("/proc/self/maps");
    std::size_t count = 0;
    for (std::string line; std::getline(maps, line);) {
      count += line.find("kvtier-arena") != std::string::npos ? 1U : 0U;
    }
    return count;
  }

  HookedHostMemory memory_;
  Recorder recorder_;
  RecordingDevice device_;
  RecordingDevice other_device_;
  std::unique_ptr<Arena> arena_;

 private:
  std::size_t descriptors_ = 0;
  std::size_t mappings_ = 0;
};

// --- a whole arena ---

TEST_F(ArenaTest, becomes_whole_and_announces_every_slot) {
  create();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  expect_usable_after(kChunks);
  EXPECT_TRUE(recorder_.failures.empty());
  const Arena::Stats stats = arena_->stats();
  EXPECT_EQ(stats.total_bytes, small_geometry().total_bytes());
  EXPECT_EQ(stats.prefaulted_bytes, stats.total_bytes);
  EXPECT_EQ(stats.registered_chunks, 0U);
  EXPECT_TRUE(stats.huge_page_bytes == 0 || stats.huge_page_bytes == stats.total_bytes);
}

TEST_F(ArenaTest, classes_get_slots_in_turn) {
  create();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  const std::vector<std::pair<std::size_t, std::uint32_t>> expected = {
      {0, 4}, {1, 3}, {0, 8}, {1, 5}, {0, 10}};
  EXPECT_EQ(recorder_.usable_calls, expected);
}

TEST_F(ArenaTest, slots_are_where_the_geometry_says) {
  create();
  const std::byte* begin = arena_->slot(0, SlotId{0});
  EXPECT_EQ(arena_->slot(0, SlotId{9}) - begin,
            static_cast<std::ptrdiff_t>(small_geometry().slot_offset(0, SlotId{9})));
  EXPECT_EQ(arena_->slot(1, SlotId{4}) - begin,
            static_cast<std::ptrdiff_t>(small_geometry().slot_offset(1, SlotId{4})));
  struct stat file{};
  ASSERT_EQ(::fstat(arena_->fd(), &file), 0);
  EXPECT_EQ(static_cast<std::uint64_t>(file.st_size), small_geometry().total_bytes());
}

TEST_F(ArenaTest, works_without_callbacks) {
  auto arena = Arena::create(small_geometry(), memory_, nullptr, nullptr);
  ASSERT_TRUE(arena.is_ok());
  EXPECT_TRUE(arena.value()->wait_until_whole().is_ok());
}

TEST_F(ArenaTest, slots_are_usable_before_it_is_whole) {
  Gate gate;
  memory_.on_populate = [&](int call) {
    if (call >= 1) gate.pass();
    return Status::ok();
  };
  create();
  recorder_.wait_for_usable(0, 4);
  std::memset(arena_->slot(0, SlotId{3}), 0x5a, kMiB);
  EXPECT_LT(arena_->stats().prefaulted_bytes, arena_->stats().total_bytes);
  expect_usable_after(1);
  gate.open();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  EXPECT_EQ(arena_->slot(0, SlotId{3})[kMiB - 1], std::byte{0x5a});
}

TEST_F(ArenaTest, takes_its_pages_from_the_node_that_was_named) {
  std::vector<int> asked;
  memory_.on_prefer_node = [&](int node) { return asked.push_back(node), Status::ok(); };
  const auto arena = Arena::create(small_geometry(), memory_, nullptr, nullptr, NumaPlacement{.node = 0});
  ASSERT_TRUE(arena.is_ok());
  EXPECT_EQ(asked, std::vector<int>{0});
  EXPECT_EQ(arena.value()->stats().numa_node, 0);
  ASSERT_TRUE(arena.value()->wait_until_whole().is_ok());  // one arena at a time asks the hooks
  create();
  EXPECT_EQ(arena_->stats().numa_node, std::nullopt);
}

// --- what goes wrong below ---

TEST_F(ArenaTest, a_node_that_is_refused_is_an_error_only_where_it_is_required) {
  memory_.on_prefer_node = [](int) { return Status::resource("sandbox", EPERM); };
  const auto wished = Arena::create(small_geometry(), memory_, nullptr, nullptr, NumaPlacement{.node = 0});
  ASSERT_TRUE(wished.is_ok());
  EXPECT_EQ(wished.value()->stats().numa_node, std::nullopt);
  EXPECT_TRUE(wished.value()->wait_until_whole().is_ok());
  const auto required =
      Arena::create(small_geometry(), memory_, nullptr, nullptr, NumaPlacement{.node = 0, .required = true});
  ASSERT_FALSE(required.is_ok());
  EXPECT_EQ(required.status().native_code(), EPERM);
}

TEST_F(ArenaTest, refuses_what_does_not_fit_and_names_both_figures) {
  const std::uint64_t total = small_geometry().total_bytes();
  memory_.available = [&](int) { return total - 1; };
  auto arena = Arena::create(small_geometry(), memory_, nullptr, nullptr);
  ASSERT_FALSE(arena.is_ok());
  EXPECT_EQ(arena.status().code(), StatusCode::resource);
  for (const std::uint64_t figure : {total, total - 1}) {
    EXPECT_NE(arena.status().message().find(std::to_string(figure)), std::string::npos)
        << arena.status().message();
  }
  memory_.available = [&](int) { return total; };
  create();
  EXPECT_TRUE(arena_->wait_until_whole().is_ok());
}

TEST_F(ArenaTest, refuses_a_geometry_that_is_not_valid) {
  auto arena = Arena::create({{{4096, 0}}, kMiB}, memory_, nullptr, nullptr);
  ASSERT_FALSE(arena.is_ok());
  EXPECT_EQ(arena.status().code(), StatusCode::invalid_argument);
}

TEST_F(ArenaTest, each_failing_call_of_create_is_reported_and_leaves_nothing) {
  const auto fail = [] { return Status::resource("no luck", ENOMEM); };
  const auto expect_no_luck = [&] {
    auto arena = Arena::create(small_geometry(), memory_, nullptr, nullptr);
    ASSERT_FALSE(arena.is_ok());
    EXPECT_EQ(arena.status().message(), "no luck");
    EXPECT_EQ(arena.status().native_code(), ENOMEM);
  };
  memory_.on_map = fail;
  expect_no_luck();
  memory_.on_create = fail;
  expect_no_luck();
  memory_.on_create = [] { return Status::ok(); };
  memory_.on_available = [&](int) { return fail(); };
  expect_no_luck();
}

class ArenaFaultTest : public ArenaTest, public ::testing::WithParamInterface<int> {};

TEST_P(ArenaFaultTest, failed_populate_keeps_the_slots_before_it) {
  memory_.on_populate = [](int call) {
    return call == GetParam() ? Status::resource("no luck") : Status::ok();
  };
  create();
  arena_->register_with(device_);
  EXPECT_EQ(arena_->wait_until_whole().message(), "no luck");
  expect_usable_after(GetParam());
  ASSERT_EQ(recorder_.failures.size(), 1U);
  EXPECT_EQ(recorder_.failures[0].message(), "no luck");
  EXPECT_EQ(device_.registered(), static_cast<std::size_t>(GetParam()));
  for (std::uint32_t slot = 0; slot < recorder_.usable(0); ++slot)
    arena_->slot(0, SlotId{slot})[0] = std::byte{1};
  arena_.reset();
  EXPECT_EQ(device_.registered(), 0U);
}

TEST_P(ArenaFaultTest, refused_registration_is_counted_and_its_slots_are_usable_all_the_same) {
  device_.on_register = [](int call) {
    return call == GetParam() ? Status::device("no luck", 2) : Status::ok();
  };
  Gate registered;  // so that the device is known from the first chunk on
  memory_.on_populate = [&](int) {
    registered.pass();
    return Status::ok();
  };
  create();
  arena_->register_with(device_);
  arena_->register_with(other_device_);
  registered.open();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  expect_usable_after(kChunks);
  EXPECT_EQ(device_.register_calls(), kChunks) << "not tried again";
  EXPECT_EQ(arena_->stats().refused_chunks, 1U);
  EXPECT_EQ(arena_->stats().registered_chunks, 2U * kChunks - 1);
  EXPECT_TRUE(all_registered(other_device_));
  arena_.reset();
  EXPECT_EQ(device_.registered(), 0U);
}

INSTANTIATE_TEST_SUITE_P(EveryCall, ArenaFaultTest, ::testing::Range(0, kChunks));

// A framework that grew meanwhile must make the arena smaller, not the kernel kill the process.
TEST_F(ArenaTest, prefaulting_stops_when_the_memory_is_used_up_by_others) {
  memory_.available = [](int call) { return call < 3 ? std::uint64_t{1} << 40 : kMiB; };
  create();
  const Status status = arena_->wait_until_whole();
  if (arena_->stats().huge_page_bytes != 0) GTEST_SKIP() << "huge pages are the arena's from the beginning";
  EXPECT_EQ(status.code(), StatusCode::resource);
  EXPECT_NE(status.message().find(std::to_string(kMiB)), std::string::npos) << status.message();
  expect_usable_after(2);
  EXPECT_EQ(recorder_.failures.size(), 1U);
}

// --- devices ---

TEST_F(ArenaTest, a_slot_is_announced_only_after_its_registration) {
  Gate populating;
  memory_.on_populate = [&](int) {
    populating.pass();
    return Status::ok();
  };
  std::atomic<const Arena*> arena = nullptr;
  auto created = Arena::create(
      small_geometry(), memory_,
      [&](std::size_t class_index, std::uint32_t usable) {
        const std::byte* slot = arena.load()->slot(class_index, SlotId{usable - 1});
        EXPECT_TRUE(device_.covers(slot, kMiB)) << class_index << " " << usable;
      },
      nullptr);
  ASSERT_TRUE(created.is_ok());
  arena_ = std::move(created.value());
  arena = arena_.get();
  arena_->register_with(device_);
  populating.open();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  EXPECT_TRUE(all_registered(device_));
}

TEST_F(ArenaTest, device_that_comes_while_prefaulting_gets_earlier_and_later_chunks) {
  Gate gate;
  memory_.on_populate = [&](int call) {
    if (call == 2) gate.pass();
    return Status::ok();
  };
  create();
  gate.wait_for_arrival();
  arena_->register_with(device_);
  arena_->register_with(device_);  // twice is once
  gate.open();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  EXPECT_TRUE(all_registered(device_));
  EXPECT_EQ(device_.register_calls(), kChunks);
}

TEST_F(ArenaTest, whoever_waited_for_the_offers_meets_no_pageable_chunk) {
  create();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  for (int round = 0; round < 20; ++round) {
    arena_->register_with(device_);
    arena_->wait_until_offered(device_);
    EXPECT_TRUE(all_registered(device_));
    arena_->unregister_from(device_);
    arena_->wait_until_offered(device_);  // gone: nothing to wait for
  }
}

TEST_F(ArenaTest, device_that_comes_late_goes_and_comes_again_gets_all_chunks) {
  create();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  for (int round = 0; round < 2; ++round) {
    arena_->register_with(device_);
    ASSERT_TRUE(arena_->wait_until_whole().is_ok());
    EXPECT_TRUE(all_registered(device_));
    EXPECT_EQ(arena_->stats().registered_chunks, static_cast<std::uint64_t>(kChunks));
    arena_->unregister_from(device_);
    EXPECT_EQ(device_.registered(), 0U);
    EXPECT_EQ(arena_->stats().registered_chunks, 0U);
  }
  arena_->unregister_from(device_);  // unknown: nothing to do
  arena_->unregister_from(other_device_);
}

TEST_F(ArenaTest, unregistering_waits_for_the_call_in_hand_and_takes_that_chunk_out_too) {
  Gate gate;
  device_.on_register = [&](int call) {
    if (call == 1) gate.pass();
    return Status::ok();
  };
  create();
  arena_->register_with(device_);
  gate.wait_for_arrival();
  std::thread opener([&] { gate.open(); });
  arena_->unregister_from(device_);
  EXPECT_EQ(device_.registered(), 0U);
  const int calls = device_.register_calls();
  opener.join();
  EXPECT_TRUE(arena_->wait_until_whole().is_ok());
  EXPECT_EQ(device_.register_calls(), calls) << "called after it was taken out";
  expect_usable_after(kChunks);
}

TEST_F(ArenaTest, a_leaving_device_gets_no_chunk_and_holds_up_none) {
  Gate known;
  Gate populating;
  Gate leaving;
  memory_.on_populate = [&](int call) {
    if (call == 0) known.pass();
    if (call == 2) populating.pass();
    return Status::ok();
  };
  device_.on_unregister = [&](int) {
    leaving.pass();
    return Status::ok();
  };
  create();
  arena_->register_with(device_);
  known.open();
  populating.wait_for_arrival();
  EXPECT_EQ(device_.registered(), 2U);
  std::thread leaver([&] { arena_->unregister_from(device_); });
  leaving.wait_for_arrival();
  populating.open();
  EXPECT_TRUE(arena_->wait_until_whole().is_ok());
  expect_usable_after(kChunks);
  EXPECT_EQ(device_.register_calls(), 2);
  leaving.open();
  leaver.join();
  EXPECT_EQ(device_.registered(), 0U);
}

TEST_F(ArenaTest, registering_and_unregistering_from_many_threads) {
  create({{{kMiB, 16}, {4096, 512}}, kMiB});
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      RecordingDevice own;
      RecordingDevice& shared = i % 2 == 0 ? device_ : other_device_;
      for (int round = 0; round < 20; ++round) {
        arena_->register_with(own);
        arena_->register_with(shared);
        static_cast<void>(arena_->stats());
        arena_->unregister_from(shared);
        arena_->unregister_from(own);
        EXPECT_EQ(own.registered(), 0U);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  EXPECT_EQ(arena_->stats().registered_chunks, 0U);
  EXPECT_EQ(recorder_.usable(0), 16U);
  EXPECT_EQ(recorder_.usable(1), 512U);
}

TEST_F(ArenaTest, callbacks_may_call_the_arena) {
  std::atomic<Arena*> arena = nullptr;
  Gate gate;
  auto created = Arena::create(
      small_geometry(), memory_,
      [&](std::size_t, std::uint32_t) {
        gate.pass();
        arena.load()->register_with(device_);
        static_cast<void>(arena.load()->stats());
        arena.load()->unregister_from(device_);
      },
      nullptr);
  ASSERT_TRUE(created.is_ok());
  arena_ = std::move(created.value());
  arena = arena_.get();
  gate.open();
  EXPECT_TRUE(arena_->wait_until_whole().is_ok());
}

// --- captures ---

TEST_F(ArenaTest, capture_conflict_is_retried_and_not_a_refusal) {
  device_.on_register = [](int call) { return call < 3 ? capture_conflict() : Status::ok(); };
  create();
  arena_->register_with(device_);
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  EXPECT_TRUE(all_registered(device_));
  EXPECT_EQ(device_.register_calls(), kChunks + 3);
  EXPECT_EQ(arena_->stats().refused_chunks, 0U);
}

TEST_F(ArenaTest, prefaulting_goes_on_during_a_capture_and_announcing_waits) {
  std::atomic<bool> capturing = true;
  Gate populating;
  Gate last_chunk;
  last_chunk.open();
  device_.on_register = [&](int) { return capturing ? capture_conflict() : Status::ok(); };
  memory_.on_populate = [&](int call) {
    if (call == 0) populating.pass();
    if (call == kChunks - 1) last_chunk.pass();
    return call == kChunks - 1 ? Status::resource("no luck") : Status::ok();
  };
  create();
  arena_->register_with(device_);
  populating.open();

  const auto before = std::chrono::steady_clock::now();
  const int first = device_.register_calls();
  device_.wait_for_register_calls(first + 4);
  EXPECT_GE(std::chrono::steady_clock::now() - before, std::chrono::milliseconds(40)) << "it must not spin";
  last_chunk.wait_for_arrival();
  expect_usable_after(0);
  capturing = false;
  EXPECT_EQ(arena_->wait_until_whole().message(), "no luck");
  expect_usable_after(kChunks - 1);  // all before the failure, although it had happened long before
  EXPECT_EQ(recorder_.failures.size(), 1U);
}

TEST_F(ArenaTest, a_capture_that_never_ends_holds_up_neither_leaving_nor_destruction) {
  device_.on_register = [](int) { return capture_conflict(); };
  other_device_.on_register = [](int) { return capture_conflict(); };
  create();
  arena_->register_with(device_);
  arena_->register_with(other_device_);
  device_.wait_for_register_calls(2);
  other_device_.wait_for_register_calls(2);
  arena_->unregister_from(device_);
  const int calls = device_.register_calls();
  arena_.reset();
  EXPECT_EQ(device_.register_calls(), calls);
}

TEST_F(ArenaTest, unregistering_outlasts_a_short_capture) {
  device_.on_unregister = [](int call) { return call < 3 ? capture_conflict() : Status::ok(); };
  create();
  arena_->register_with(device_);
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  arena_->unregister_from(device_);
  EXPECT_EQ(device_.registered(), 0U);
}

// --- the end ---

TEST_F(ArenaTest, destruction_stops_after_the_chunk_in_hand) {
  Gate gate;
  std::atomic<int> populated = 0;
  memory_.on_populate = [&](int call) {
    ++populated;
    if (call == 1) gate.pass();
    if (call > 1) std::this_thread::sleep_for(std::chrono::milliseconds(20));  // a slow machine, not a wait
    return Status::ok();
  };
  create({{{kMiB, 64}}, kMiB});
  arena_->register_with(device_);
  gate.wait_for_arrival();
  std::thread opener([&] { gate.open(); });
  arena_.reset();
  opener.join();
  EXPECT_LT(populated, 64);
  EXPECT_EQ(device_.registered(), 0U);
}

TEST_F(ArenaTest, no_callback_comes_after_destruction) {
  for (int round = 0; round < 30; ++round) {
    auto alive = std::make_unique<std::atomic<bool>>(true);  // a late callback is a use after free
    auto arena = Arena::create(
        {{{4096, 512}}, 64 * 4096}, memory_,
        [&alive](std::size_t, std::uint32_t) { EXPECT_TRUE(alive->load()); }, nullptr);
    ASSERT_TRUE(arena.is_ok());
    arena.value().reset();
    alive.reset();
  }
}

// Were the addresses given back, the next allocation there would be copied from the old pages.
TEST_F(ArenaTest, what_a_device_still_has_registered_stays_mapped) {
  device_.may_keep_ranges = true;
  device_.on_unregister = [](int call) { return call == 1 ? Status::device("sticky", 700) : Status::ok(); };
  create();
  arena_->register_with(device_);
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  std::byte* const begin = arena_->slot(0, SlotId{0});
  arena_.reset();
  EXPECT_EQ(device_.registered(), 1U);
  EXPECT_EQ(::mprotect(begin, small_geometry().total_bytes(), PROT_READ), 0) << "no longer mapped";
  linux_host_memory().unmap(begin, small_geometry().total_bytes());
}

// --- another view of the same memory ---

TEST_F(ArenaTest, mapped_arena_shows_the_same_bytes_and_registers_on_its_own) {
  create();
  ASSERT_TRUE(arena_->wait_until_whole().is_ok());
  auto guest = Arena::map(arena_->geometry(), arena_->fd(), memory_);
  ASSERT_TRUE(guest.is_ok()) << guest.status().message();
  EXPECT_NE(guest.value()->fd(), arena_->fd()) << "the descriptor is duplicated";
  EXPECT_EQ(::fcntl(guest.value()->fd(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  guest.value()->register_with(device_);
  ASSERT_TRUE(guest.value()->wait_until_whole().is_ok());
  EXPECT_EQ(guest.value()->stats().registered_chunks, static_cast<std::uint64_t>(kChunks));
  EXPECT_EQ(guest.value()->stats().prefaulted_bytes, 0U);

  std::memset(arena_->slot(1, SlotId{4}), 0x77, kMiB);
  arena_.reset();  // the memory lives as long as its last mapping
  EXPECT_EQ(guest.value()->slot(1, SlotId{4})[kMiB - 1], std::byte{0x77});
}

TEST_F(ArenaTest, map_refuses_what_is_not_this_arena) {
  create();
  ArenaGeometry larger = small_geometry();
  larger.classes[0].num_slots += 2;  // one slot more would still fit into the padding
  const auto refused = [&](const ArenaGeometry& geometry, int fd) {
    auto guest = Arena::map(geometry, fd, memory_);
    EXPECT_FALSE(guest.is_ok());
    return guest.status();
  };
  const Status size = refused(larger, arena_->fd());
  EXPECT_EQ(size.code(), StatusCode::invalid_argument);
  EXPECT_NE(size.message().find(std::to_string(larger.total_bytes())), std::string::npos) << size.message();
  EXPECT_NE(size.message().find(std::to_string(small_geometry().total_bytes())), std::string::npos);

  EXPECT_EQ(refused(small_geometry(), -1).native_code(), EBADF);
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  EXPECT_EQ(refused(small_geometry(), pipe_ends[0]).code(), StatusCode::invalid_argument);
  ::close(pipe_ends[0]);
  ::close(pipe_ends[1]);
  EXPECT_EQ(refused({{}, kMiB}, arena_->fd()).code(), StatusCode::invalid_argument);
  memory_.on_map = [] { return Status::resource("no luck"); };
  EXPECT_EQ(refused(small_geometry(), arena_->fd()).message(), "no luck");
}

}  // namespace
}  // namespace kvtier
