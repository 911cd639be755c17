#include "kvtier/platform/simulated_drive.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "support/temp_directory.h"

#include "kvtier/platform/block_file.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kSlots = 8;
constexpr std::uint64_t kSlotBytes = 16 * 1024;
constexpr std::uint64_t kWord = sizeof(std::uint64_t);
using Slot = std::vector<std::uint64_t>;  // a version, in each word

Slot version(std::uint64_t number) { return Slot(kSlotBytes / kWord, number); }

// A drive with one file of slots, and what stands in them when all is over.
class DriveTest : public ::testing::Test {
 protected:
  void SetUp() override { start({}); }

  void start(const DriveFaults& faults) {
    queue_.reset();
    drive_ = std::make_unique<SimulatedDrive>(faults);
    queue_ = drive_->make_queue(64);
    path_ = temp_.path() + "/slots" + std::to_string(++num_files_);
    file_ = FileHandle(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    ASSERT_EQ(::ftruncate(file_.fd(), kSlots * kSlotBytes), 0);
    buffers_.clear();
  }

  // The buffers of requests live until the next start().
  IoRequest write(std::uint64_t slot, std::uint64_t number, std::uint64_t tag = 0) {
    return request(IoOp::write, slot, buffers_.emplace_back(version(number)), tag);
  }
  IoRequest read(std::uint64_t slot, Slot& into, std::uint64_t tag = 0) {
    into.assign(kSlotBytes / kWord, ~std::uint64_t{0});
    return request(IoOp::read, slot, into, tag);
  }
  IoRequest request(IoOp op, std::uint64_t slot, Slot& slot_bytes, std::uint64_t tag) {
    return {op,         file_.fd(), slot * kSlotBytes, reinterpret_cast<std::byte*>(slot_bytes.data()),
            kSlotBytes, tag};
  }
  IoRequest sync(std::uint64_t tag = 0) { return {IoOp::sync, file_.fd(), 0, nullptr, 0, tag}; }

  std::map<std::uint64_t, int> run(const std::vector<IoRequest>& requests) {
    queue_->submit(requests);
    std::vector<IoCompletion> completions;
    while (queue_->in_flight() > 0) {
      if (!queue_->wait(completions, std::nullopt)) break;
    }
    std::map<std::uint64_t, int> errors;
    for (const IoCompletion& c : completions) errors.emplace(c.tag, c.error);
    return errors;
  }
  int run(const IoRequest& one) { return run(std::vector<IoRequest>{one}).at(one.tag); }

  // Through the drive, and what a new start would find.
  Slot seen(std::uint64_t slot) {
    Slot into;
    EXPECT_EQ(run(read(slot, into)), 0);
    return into;
  }
  Slot on_drive(std::uint64_t slot) const {
    const FileHandle file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
    Slot into(kSlotBytes / kWord);
    EXPECT_EQ(::pread(file.fd(), into.data(), kSlotBytes, static_cast<off_t>(slot * kSlotBytes)),
              static_cast<ssize_t>(kSlotBytes));
    return into;
  }

  TempDirectory temp_;
  std::unique_ptr<SimulatedDrive> drive_;
  std::unique_ptr<IoQueue> queue_;
  FileHandle file_;
  std::string path_;
  int num_files_ = 0;
  std::deque<Slot> buffers_;
};

int differing_bits(const Slot& a, const Slot& b) {
  int bits = 0;
  for (std::size_t i = 0; i < a.size(); ++i) bits += std::popcount(a[i] ^ b[i]);
  return bits;
}

bool is_whole(const Slot& slot) { return slot == version(slot[0]); }

// Whether all versions change at multiples of `sector` only.
bool is_torn_at(const Slot& slot, std::uint64_t sector) {
  for (std::size_t i = 1; i < slot.size(); ++i) {
    if (slot[i] != slot[i - 1] && i * kWord % sector != 0) return false;
  }
  return !is_whole(slot);
}

TEST_F(DriveTest, a_transfer_that_stops_short_is_gone_on_with_until_it_is_whole) {
  constexpr DriveFaults kShort{.seed = 3, .short_transfer = 0.9};
  start(kShort);
  for (std::uint64_t round = 1; round <= 50; ++round) {
    std::vector<IoRequest> requests;
    for (std::uint64_t slot = 0; slot < kSlots; ++slot)
      requests.push_back(write(slot, 10 * round + slot, slot));
    for (const auto& [slot, error] : run(requests)) ASSERT_EQ(error, 0) << slot;
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) ASSERT_EQ(seen(slot), version(10 * round + slot));
  }
  EXPECT_GT(drive_->faults_injected(), 1000U) << "more than one in a transfer";
  EXPECT_EQ(drive_->requests(), 50 * kSlots * 2) << "but one completion each";
  EXPECT_EQ(run(sync()), 0);
  EXPECT_EQ(on_drive(3), version(503));
}

TEST_F(DriveTest, the_rest_of_a_transfer_that_stopped_short_can_fail) {
  start({.seed = 4, .write_error = 0.5, .short_transfer = 0.5});
  int failed_in_the_rest = 0;
  for (std::uint64_t round = 1; round <= 200; ++round) {
    const std::uint64_t before = drive_->faults_injected();
    const int error = run(write(0, round));
    const std::uint64_t faults = drive_->faults_injected() - before;
    ASSERT_TRUE(error == 0 || error == EIO);
    if (error == 0) {
      ASSERT_EQ(seen(0), version(round));
    }
    failed_in_the_rest += error != 0 && faults > 1 ? 1 : 0;
  }
  EXPECT_GT(failed_in_the_rest, 20);
}

TEST_F(DriveTest, before_a_sync_a_power_loss_loses_some_keeps_some_tears_and_reorders) {
  int lost = 0;
  int kept = 0;
  int torn_at_512 = 0;
  int torn_at_4096 = 0;
  int reordered = 0;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    start({.seed = seed});
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) ASSERT_EQ(run(write(slot, slot + 1)), 0);
    EXPECT_LE(drive_->unsynced_writes(), kSlots);
    drive_->power_loss();
    EXPECT_EQ(drive_->unsynced_writes(), 0U);
    int torn = 0;
    bool earlier_is_lost = false;
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
      const Slot found = on_drive(slot);
      if (found == version(0)) {
        ++lost;
        earlier_is_lost = true;
      } else if (found == version(slot + 1)) {
        ++kept;
        reordered += earlier_is_lost ? 1 : 0;
      } else {
        ++torn;
        ASSERT_TRUE(is_torn_at(found, 512)) << "a sector of 512 bytes is never torn";
        ++(is_torn_at(found, 4096) ? torn_at_4096 : torn_at_512);
        for (const std::uint64_t word : found) ASSERT_TRUE(word == 0 || word == slot + 1);
      }
    }
    EXPECT_LE(torn, 1);
  }
  EXPECT_GT(lost, 100);
  EXPECT_GT(kept, 100);
  EXPECT_GT(torn_at_512, 10);
  EXPECT_GT(torn_at_4096, 10);
  EXPECT_GT(reordered, 100);
}

// Random writes and syncs against a model: after the loss each sector of a slot is the version that was
// synced last, or a later one.
TEST_F(DriveTest, after_a_sync_nothing_of_it_is_lost) {
  int later_than_synced = 0;
  for (std::uint64_t seed = 1; seed <= 150; ++seed) {
    start({.seed = seed});
    std::mt19937_64 random(seed);
    std::array<std::uint64_t, kSlots> written{};
    std::array<std::uint64_t, kSlots> synced{};
    std::uint64_t next = 1;
    for (int step = 0; step < 30; ++step) {
      if (random() % 4 == 0) {
        ASSERT_EQ(run(sync()), 0);
        synced = written;
        continue;
      }
      std::vector<IoRequest> writes;
      std::set<std::uint64_t> slots;
      for (std::uint64_t i = random() % 4 + 1; i > 0; --i) {
        const std::uint64_t slot = random() % kSlots;
        if (!slots.insert(slot).second) continue;
        written[slot] = next++;
        writes.push_back(write(slot, written[slot], slot));
      }
      run(writes);
      const std::uint64_t looked_at = random() % kSlots;
      ASSERT_EQ(seen(looked_at), version(written[looked_at]));
    }
    drive_->power_loss();
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
      for (const std::uint64_t word : on_drive(slot)) {
        ASSERT_GE(word, synced[slot]) << "seed " << seed;
        ASSERT_LE(word, written[slot]) << "seed " << seed;
        later_than_synced += word > synced[slot] ? 1 : 0;
      }
    }
  }
  EXPECT_GT(later_than_synced, 0);
}

TEST_F(DriveTest, a_sync_promises_nothing_of_writes_beside_it) {
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    start({.seed = seed});
    run({write(0, 1, 1), sync(2)});
    drive_->power_loss();
    lost += on_drive(0) == version(0) ? 1 : 0;
  }
  EXPECT_GT(lost, 5);
}

TEST_F(DriveTest, a_sync_is_of_its_file) {
  const FileHandle other(::open((temp_.path() + "/other").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    start({.seed = seed});
    ASSERT_EQ(run(write(0, 1)), 0);
    ASSERT_EQ(run(IoRequest{IoOp::sync, other.fd(), 0, nullptr, 0, 0}), 0);
    drive_->power_loss();
    lost += on_drive(0) == version(0) ? 1 : 0;
  }
  EXPECT_GT(lost, 5);
}

TEST_F(DriveTest, writes_in_flight_may_arrive_and_all_requests_fail_afterwards) {
  int arrived = 0;
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    start({.seed = seed});
    queue_->submit(std::vector<IoRequest>{write(0, 1, 1), write(1, 2, 2), sync(3)});
    drive_->power_loss();
    drive_->power_loss();
    std::vector<IoCompletion> completions;
    while (queue_->in_flight() > 0) ASSERT_TRUE(queue_->wait(completions, std::nullopt).is_ok());
    ASSERT_EQ(completions.size(), 3U);
    for (const IoCompletion& c : completions) EXPECT_EQ(c.error, EIO);
    EXPECT_EQ(run(sync()), EIO);
    EXPECT_EQ(run(write(3, 9)), EIO);
    EXPECT_EQ(on_drive(3), version(0));
    ++(on_drive(0) == version(0) ? lost : arrived);
  }
  EXPECT_GT(arrived, 5);
  EXPECT_GT(lost, 5);
}

TEST_F(DriveTest, power_loss_needs_nobody_s_descriptor_and_ends_a_wait) {
  start({.delay = 1, .never_completes = true});
  const IoRequest request = write(0, 1);
  queue_->submit({&request, 1});
  file_ = FileHandle();
  std::thread power([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    drive_->power_loss();
  });
  std::vector<IoCompletion> completions;
  ASSERT_TRUE(queue_->wait(completions, std::nullopt).is_ok());
  power.join();
  ASSERT_EQ(completions.size(), 1U);
  EXPECT_EQ(completions[0].error, EIO);
}

TEST_F(DriveTest, the_same_seed_gives_the_same_end) {
  const auto end_of = [&](std::uint64_t seed) {
    start({.seed = seed, .write_error = 0.1, .bit_flip = 0.1, .misplaced = 0.1, .lost_write = 0.1});
    for (std::uint64_t i = 0; i < 40; ++i)
      run({write(i % kSlots, i + 1, 1), write((i + 3) % kSlots, i + 100, 2)});
    const std::uint64_t faults = drive_->faults_injected();
    drive_->power_loss();
    std::vector<Slot> slots;
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) slots.push_back(on_drive(slot));
    return std::pair(faults, slots);
  };
  EXPECT_EQ(end_of(1), end_of(1));
  EXPECT_NE(end_of(1), end_of(2));
}

TEST_F(DriveTest, completions_come_out_of_order) {
  std::vector<IoRequest> requests;
  for (std::uint64_t i = 0; i < 16; ++i) requests.push_back(sync(i));
  queue_->submit(requests);
  std::vector<IoCompletion> completions;
  while (queue_->in_flight() > 0) ASSERT_TRUE(queue_->wait(completions, std::nullopt).is_ok());
  EXPECT_FALSE(std::is_sorted(completions.begin(), completions.end(),
                              [](const IoCompletion& a, const IoCompletion& b) { return a.tag < b.tag; }));
}

TEST_F(DriveTest, what_is_not_aligned_for_a_direct_file_is_refused) {
  const FileHandle direct(::open(path_.c_str(), O_RDWR | O_DIRECT | O_CLOEXEC));
  if (!direct.is_open()) GTEST_SKIP() << "the file system takes no direct I/O";
  alignas(4096) static std::array<std::byte, 8192> memory;
  for (const IoOp op : {IoOp::read, IoOp::write}) {
    EXPECT_EQ(run(IoRequest{op, direct.fd(), 0, memory.data(), 4096, 0}), 0);
    EXPECT_EQ(run(IoRequest{op, direct.fd(), 100, memory.data(), 4096, 0}), EINVAL);
    EXPECT_EQ(run(IoRequest{op, direct.fd(), 0, memory.data() + 8, 4096, 0}), EINVAL);
    EXPECT_EQ(run(IoRequest{op, direct.fd(), 0, memory.data(), 1000, 0}), EINVAL);
  }
}

// Each fault by itself: seen, counted, and only where it belongs.

TEST_F(DriveTest, read_errors) {
  start({.read_error = 1});
  Slot into;
  EXPECT_EQ(run(write(0, 1)), 0);
  EXPECT_EQ(run(sync()), 0);
  EXPECT_EQ(drive_->faults_injected(), 0U);
  EXPECT_EQ(run(read(0, into)), EIO);
  EXPECT_EQ(drive_->faults_injected(), 1U);
  EXPECT_EQ(drive_->requests(), 3U);
}

TEST_F(DriveTest, write_errors_may_leave_a_part) {
  int none = 0;
  int part = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    start({.seed = seed, .write_error = 1});
    EXPECT_EQ(run(write(0, 1)), EIO);
    EXPECT_EQ(drive_->faults_injected(), 1U);
    const Slot found = seen(0);
    none += found == version(0) ? 1 : 0;
    part += is_torn_at(found, 512) ? 1 : 0;
  }
  EXPECT_GT(none, 0);
  EXPECT_GT(part, 10);
}

TEST_F(DriveTest, sync_errors_make_durable_keep_or_lose) {
  int durable = 0;
  int kept = 0;
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    start({.seed = seed, .sync_error = 1});
    ASSERT_EQ(run(write(0, 1)), 0);
    ASSERT_EQ(run(sync()), EIO);
    EXPECT_EQ(drive_->faults_injected(), 1U);
    if (on_drive(0) == version(1)) {
      ++durable;
    } else {
      ++(seen(0) == version(1) ? kept : lost);
    }
  }
  EXPECT_GT(durable, 5);
  EXPECT_GT(kept, 5);
  EXPECT_GT(lost, 5);
}

// What is flushed is the drive's cache, and its loss is told once.
TEST_F(DriveTest, a_sync_error_loses_what_came_after_the_sync_was_submitted_too) {
  int lost = 0;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    start({.seed = seed, .sync_error = 1, .delay = 1, .delayed_requests = 1});
    queue_->submit(std::vector<IoRequest>{sync()});
    drive_->set_faults({.seed = seed});
    static_cast<void>(run(write(0, 1)));
    lost += seen(0) == version(1) || on_drive(0) == version(1) ? 0 : 1;
  }
  EXPECT_GT(lost, 5);
}

TEST_F(DriveTest, no_space_writes_nothing) {
  start({.no_space = 1});
  EXPECT_EQ(run(write(0, 1)), ENOSPC);
  EXPECT_EQ(seen(0), version(0));
  EXPECT_EQ(drive_->faults_injected(), 1U);
}

TEST_F(DriveTest, bits_flip_in_what_is_read_and_in_what_is_written) {
  ASSERT_EQ(run(write(0, 1)), 0);
  drive_->set_faults({.bit_flip = 1});
  EXPECT_EQ(differing_bits(seen(0), version(1)), 1);
  ASSERT_EQ(run(write(1, 2)), 0);
  EXPECT_EQ(drive_->faults_injected(), 2U);
  drive_->set_faults({});
  EXPECT_EQ(seen(0), version(1));
  EXPECT_EQ(differing_bits(seen(1), version(2)), 1);
}

TEST_F(DriveTest, misplaced_writes_land_in_another_slot) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    start({.seed = seed, .misplaced = 1});
    ASSERT_EQ(run(write(3, 1)), 0);
    EXPECT_EQ(drive_->faults_injected(), 1U);
    int found = 0;
    for (std::uint64_t slot = 0; slot < kSlots; ++slot) found += seen(slot) == version(1) ? 1 : 0;
    EXPECT_EQ(found, 1);
    EXPECT_EQ(seen(3), version(0));
  }
}

TEST_F(DriveTest, lost_writes_are_lost_though_synced) {
  start({.lost_write = 1});
  EXPECT_EQ(run(write(0, 1)), 0);
  EXPECT_EQ(run(sync()), 0);
  EXPECT_EQ(seen(0), version(0));
  EXPECT_EQ(drive_->faults_injected(), 1U);
}

TEST_F(DriveTest, the_nth_request_fails_whatever_it_is) {
  for (std::uint64_t n = 0; n < 6; ++n) {
    start({.fail_nth = n});
    Slot into;
    std::vector<int> errors;
    for (int round = 0; round < 2; ++round) {
      errors.push_back(run(write(0, 1)));
      errors.push_back(run(sync()));
      errors.push_back(run(read(0, into)));
    }
    for (std::uint64_t i = 0; i < errors.size(); ++i) EXPECT_EQ(errors[i], i == n ? EIO : 0) << n;
    EXPECT_EQ(drive_->faults_injected(), 1U);
    drive_->set_faults({.fail_nth = 1});  // counts from here
    EXPECT_EQ(run(sync()), 0);
    EXPECT_EQ(run(sync()), EIO);
  }
}

TEST_F(DriveTest, delayed_requests_come_after_others_or_last) {
  start({.delay = 1, .delayed_requests = 4});
  const IoRequest late = sync(99);
  queue_->submit({&late, 1});
  drive_->set_faults({});
  for (std::uint64_t i = 0; i < 4; ++i) {
    const IoRequest other = sync(i);
    queue_->submit({&other, 1});
    std::vector<IoCompletion> completions;
    ASSERT_TRUE(queue_->wait(completions, std::nullopt).is_ok());
    ASSERT_EQ(completions.size(), 1U);
    EXPECT_EQ(completions[0].tag, i);
  }
  std::vector<IoCompletion> completions;
  ASSERT_TRUE(queue_->wait(completions, std::nullopt).is_ok());
  EXPECT_EQ(completions[0].tag, 99U);
  EXPECT_EQ(drive_->faults_injected(), 1U);
}

TEST_F(DriveTest, what_never_completes_comes_when_it_is_released) {
  using Clock = std::chrono::steady_clock;
  start({.delay = 1, .never_completes = true});
  const IoRequest request = write(0, 1, 7);
  queue_->submit({&request, 1});
  std::vector<IoCompletion> completions;
  ASSERT_TRUE(queue_->wait(completions, Clock::now() + std::chrono::milliseconds(10)).is_ok());
  EXPECT_TRUE(completions.empty());
  std::thread release([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    drive_->release_delayed();
  });
  ASSERT_TRUE(queue_->wait(completions, std::nullopt).is_ok());
  release.join();
  ASSERT_EQ(completions.size(), 1U);
  EXPECT_EQ(completions[0].tag, 7U);
  EXPECT_EQ(completions[0].error, 0);
  drive_->set_faults({});
  EXPECT_EQ(seen(0), version(1));
}

TEST_F(DriveTest, queues_share_the_drive) {
  ASSERT_EQ(run(write(0, 1)), 0);
  std::unique_ptr<IoQueue> second = drive_->make_queue(4);
  std::swap(queue_, second);
  EXPECT_EQ(seen(0), version(1));
  EXPECT_EQ(run(sync()), 0);
  EXPECT_EQ(on_drive(0), version(1));
  EXPECT_EQ(drive_->unsynced_writes(), 0U);
}

TEST_F(DriveTest, each_of_many_owners_finds_its_own_writes) {
  std::vector<std::thread> owners;
  for (std::uint64_t slot = 0; slot < kSlots; ++slot) {
    owners.emplace_back([&, slot] {
      const std::unique_ptr<IoQueue> queue = drive_->make_queue(1);
      const auto run_one = [&](const IoRequest& one) {
        queue->submit({&one, 1});
        std::vector<IoCompletion> completions;
        while (completions.empty()) static_cast<void>(queue->wait(completions, std::nullopt));
        return completions[0].error;
      };
      for (std::uint64_t round = 1; round <= 30; ++round) {
        Slot from = version(round * 100 + slot);
        Slot into(from.size());
        EXPECT_EQ(run_one(request(IoOp::write, slot, from, 0)), 0);
        EXPECT_EQ(run_one(request(IoOp::read, slot, into, 0)), 0);
        EXPECT_EQ(into, from);
        EXPECT_EQ(run_one(sync()), 0);
        EXPECT_EQ(on_drive(slot), from);
      }
    });
  }
  for (std::thread& owner : owners) owner.join();
}

}  // namespace
}  // namespace kvtier
