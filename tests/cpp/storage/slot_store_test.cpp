// What every queue and mode must do: write, read, become durable, be found again.
#include "kvtier/storage/slot_store.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "storage/store_world.h"

namespace kvtier {
namespace {

using namespace store_world;

struct Mode {
  const char* name;
  enum class Queue : std::uint8_t { best, threads, simulated } queue;
  bool direct;
  bool encrypted;
};

std::shared_ptr<SlotCipher> cipher() {
  std::array<std::byte, 32> key{};
  key.fill(std::byte{42});
  return SlotCipher::make(key, {}).value();
}

class SlotStoreModes : public testing::TestWithParam<Mode> {
 protected:
  SlotStoreOptions options() {
    SlotStoreOptions options = options_of(home);
    options.use_direct_io = GetParam().direct;
    if (GetParam().encrypted) options.cipher = master;
    if (GetParam().queue == Mode::Queue::threads) {
      options.make_queue = [](std::uint32_t depth) {
        return make_thread_queue({.depth = depth, .threads = 3});
      };
    } else if (GetParam().queue == Mode::Queue::simulated) {
      options.make_queue = [this](std::uint32_t depth) -> Result<std::unique_ptr<IoQueue>> {
        return drive.make_queue(depth);
      };
    }
    return options;
  }

  Home home;
  SimulatedDrive drive{DriveFaults{}};
  std::shared_ptr<SlotCipher> master = cipher();
};

INSTANTIATE_TEST_SUITE_P(Modes, SlotStoreModes,
                         testing::Values(Mode{"best", Mode::Queue::best, true, false},
                                         Mode{"threads", Mode::Queue::threads, true, false},
                                         Mode{"buffered", Mode::Queue::threads, false, false},
                                         Mode{"simulated", Mode::Queue::simulated, true, false},
                                         Mode{"best_encrypted", Mode::Queue::best, true, true},
                                         Mode{"threads_encrypted", Mode::Queue::threads, true, true}),
                         [](const auto& test) { return test.param.name; });

TEST_P(SlotStoreModes, what_was_flushed_is_found_again_after_close) {
  constexpr std::uint32_t kBlocks = 40;
  {
    SlotStore::Opened opened = open(home, options());
    EXPECT_EQ(opened.report.source, OpenReport::Source::fresh);
    EXPECT_TRUE(opened.blocks.empty());
    wait_for_slots(*opened.store, kBlocks);
    std::vector<std::shared_ptr<PendingWrite>> writes;
    for (std::uint32_t i = 0; i < kBlocks; ++i) writes.push_back(start_write(*opened.store, i, {i, 1}));
    EXPECT_TRUE(opened.store->flush(soon()));
    for (const auto& write : writes) {
      EXPECT_TRUE(write->written.wait());
      EXPECT_TRUE(write->durable.wait());
    }
    for (std::uint32_t i = 0; i < kBlocks; ++i) EXPECT_TRUE(serves(*opened.store, i, {i, 1}));
    EXPECT_TRUE(opened.store->close(soon()));
    for (const auto& write : writes) {
      EXPECT_EQ(write->written.count(), 1);
      EXPECT_EQ(write->durable.count(), 1);
    }
  }
  EXPECT_TRUE(home.superblock.clean);
  SlotStore::Opened opened = open(home, options());
  EXPECT_EQ(opened.report.source, OpenReport::Source::catalog);
  EXPECT_TRUE(opened.store->scan_done());
  EXPECT_EQ(opened.blocks.size(), kBlocks);
  for (const CatalogRecord& record : opened.blocks) {
    EXPECT_TRUE(serves(*opened.store, raw(record.place.slot), {raw(record.place.slot), 1}));
    EXPECT_EQ(record.block.name_space, identity_of(raw(record.place.slot)).name_space);
  }
  EXPECT_TRUE(opened.store->close(soon()));
}

TEST_P(SlotStoreModes, a_commit_comes_without_a_flush) {
  SlotStore::Opened opened = open(home, options());
  wait_for_slots(*opened.store, 1);
  EXPECT_TRUE(start_write(*opened.store, 0, {7, 1})->durable.wait());
  const StoreStats stats = opened.store->stats();
  EXPECT_EQ(stats.undurable_writes, 0U);
  EXPECT_GE(stats.syncs, 1U);
  EXPECT_GE(stats.commits, 1U);
}

TEST_P(SlotStoreModes, an_overwritten_slot_answers_for_its_new_block_only) {
  SlotStore::Opened opened = open(home, options());
  wait_for_slots(*opened.store, 4);
  write_durably(*opened.store, 3, {1, 1});
  write_durably(*opened.store, 3, {2, 1});
  EXPECT_TRUE(serves(*opened.store, 3, {2, 1}));
  EXPECT_EQ(verdict_of(*opened.store, 3, {1, 1}), Verdict::stale);
}

TEST_P(SlotStoreModes, a_wiped_slot_is_blank_and_stays_so_without_the_catalog) {
  {
    SlotStore::Opened opened = open(home, options());
    wait_for_slots(*opened.store, 4);
    write_durably(*opened.store, 0, {1, 1});
    write_durably(*opened.store, 1, {2, 1});
    EXPECT_TRUE(start_wipe(*opened.store, {0})->wait());
    EXPECT_EQ(verdict_of(*opened.store, 0, {1, 1}), Verdict::blank);
    EXPECT_TRUE(opened.store->close(soon()));
  }
  home.catalog_version = 0;  // lost
  SlotStore::Opened opened = open(home, options());
  EXPECT_EQ(opened.report.source, OpenReport::Source::headers);
  ASSERT_EQ(opened.blocks.size(), 1U);
  EXPECT_EQ(opened.blocks[0].block.key, key_of(2));
  EXPECT_TRUE(serves(*opened.store, 1, {2, 1}));
}

TEST_P(SlotStoreModes, many_threads_at_once) {
  constexpr std::uint32_t kThreads = 4;
  constexpr std::uint32_t kSlotsEach = 8;
  SlotStore::Opened opened = open(home, options());
  SlotStore& store = *opened.store;
  wait_for_slots(store, kThreads * kSlotsEach);
  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&store, t] {
      for (std::uint32_t round = 1; round <= 6; ++round) {
        std::vector<std::shared_ptr<PendingWrite>> writes;
        for (std::uint32_t i = 0; i < kSlotsEach; ++i) {
          const std::uint32_t slot = t * kSlotsEach + i;
          writes.push_back(start_write(store, slot, {slot * 100 + round, round}));
        }
        for (const auto& write : writes) EXPECT_TRUE(write->written.wait());
        std::vector<std::shared_ptr<PendingRead>> reads;
        for (const auto& write : writes) {
          store.note_use(write->place);
          reads.push_back(start_read(store, raw(write->place.slot), write->block,
                                     round % 2 == 0 ? ReadPriority::demand : ReadPriority::prefetch));
          store.hurry(reads.back()->job);
        }
        for (const auto& read : reads) {
          EXPECT_TRUE(read->done.wait().good());
          EXPECT_TRUE(read->image.holds(read->block));
        }
        EXPECT_TRUE(start_wipe(store, {t * kSlotsEach})->wait());
        static_cast<void>(store.stats());
      }
      EXPECT_TRUE(store.flush(soon()));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(store.close(soon()));
  const StoreStats stats = store.stats();
  EXPECT_EQ(stats.writes, kThreads * kSlotsEach * 6U);
  EXPECT_EQ(stats.reads_good, stats.writes);
  EXPECT_EQ(stats.wipes, kThreads * 6U);
  EXPECT_EQ(stats.undurable_writes, 0U);
  EXPECT_EQ(stats.in_flight + stats.queued_reads + stats.queued_writes, 0U);
}

// --- what does not depend on the queue ---

TEST(SlotStore, plaintext_never_reaches_the_drive_with_a_cipher) {
  Home home;
  {
    SlotStoreOptions options = options_of(home);
    options.cipher = cipher();
    SlotStore::Opened opened = open(home, std::move(options));
    wait_for_slots(*opened.store, 3);
    for (std::uint32_t i = 0; i < 3; ++i) write_durably(*opened.store, i, {i, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  std::ifstream file(home.files.path() + "/slots.0", std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  for (std::uint32_t i = 0; i < 3; ++i) {
    const Image image;
    image.fill({i, 1});
    for (std::uint64_t at = 0; at + 16 <= kPayload; at += 1024) {
      const std::string piece(reinterpret_cast<const char*>(image.data()) + kSlotHeaderBytes + at, 16);
      EXPECT_EQ(bytes.find(piece), std::string::npos) << "block " << i << " at " << at;
    }
  }
  EXPECT_EQ(bytes.find(std::string(16, 0x5a)), std::string::npos) << "the image's padding";
}

TEST(SlotStore, a_flush_that_ends_with_the_store_does_not_hold_it_up) {
  for (int i = 0; i < 50; ++i) {
    Home home;
    SlotStore::Opened opened = open(home, options_of(home));
    Told<Status> flushed;
    opened.store->begin_flush([&flushed](const Status& status) { flushed.tell(status); });
    EXPECT_TRUE(opened.store->close(soon()));
    EXPECT_TRUE(flushed.wait());
  }
}

TEST(SlotStore, buffers_of_encryption_are_registered_or_said_not_to_be) {
  Home home;
  SlotStoreOptions options = options_of(home);
  const std::vector<std::byte> key(32, std::byte{7});
  options.cipher = SlotCipher::make(key, {}).value();
  SlotStore::Opened opened = open(home, std::move(options));
  wait_for_slots(*opened.store, 16);
  const auto registered = [&] { return opened.store->stats().queue.find("registered") != std::string::npos; };
  EXPECT_FALSE(registered()) << "before one is needed";
  for (std::uint32_t i = 0; i < 16; ++i) write_durably(*opened.store, i, {i, 1});
  EXPECT_EQ(registered(), opened.store->stats().buffers_problem.empty());
  for (std::uint32_t i = 0; i < 16; ++i) EXPECT_TRUE(serves(*opened.store, i, {i, 1}));
}

TEST(SlotStore, registered_buffers_are_used_or_said_not_to_be) {
  Home home;
  const Image region(16 * kStride);
  SlotStore::Opened opened = open(home, options_of(home));
  opened.store->add_buffers({{region.data(), 8 * kStride}, {region.data() + 8 * kStride, 8 * kStride}});
  wait_for_slots(*opened.store, 4);
  EXPECT_TRUE(opened.store->flush(soon()));  // behind the registrations
  const StoreStats stats = opened.store->stats();
  const bool registered = stats.queue.find("registered") != std::string::npos;
  EXPECT_EQ(registered, stats.buffers_problem.empty()) << stats.buffers_problem;
  Told<Status> written;
  SlotWrite write;
  write.place = {0, SlotId{2}};
  write.block = identity_of(5);
  write.payload_bytes = kPayload;
  write.image = region.data() + 3 * kStride;
  write.on_written = [&written](const Status& status) { written.tell(status); };
  opened.store->write(std::move(write));
  EXPECT_TRUE(written.wait());
  const auto read = start_read(*opened.store, 2, {5, 1});
  EXPECT_TRUE(read->done.wait().good());
  EXPECT_EQ(std::memcmp(read->image.data() + kSlotHeaderBytes, region.data() + 3 * kStride + kSlotHeaderBytes,
                        kPayload),
            0);
  EXPECT_TRUE(opened.store->close(soon()));
}

TEST(SlotStore, threads_and_descriptors_come_back_to_where_they_began) {
  const auto count = [](const char* path) {
    return std::distance(std::filesystem::directory_iterator(path), std::filesystem::directory_iterator());
  };
  Home home;
  const auto once = [&home] {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 4);
    write_durably(*opened.store, 1, {1, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  };
  once();
  const auto descriptors = count("/proc/self/fd");
  const auto threads = count("/proc/self/task");
  for (int i = 0; i < 5; ++i) once();
  EXPECT_EQ(count("/proc/self/fd"), descriptors);
  EXPECT_EQ(count("/proc/self/task"), threads);
}

TEST(SlotStore, a_closed_store_answers_at_once_and_never_again_does_anything) {
  Home home;
  SlotStore::Opened opened = open(home, options_of(home));
  wait_for_slots(*opened.store, 1);
  EXPECT_TRUE(opened.store->close(soon()));
  EXPECT_TRUE(opened.store->close(soon()));
  const auto write = start_write(*opened.store, 0, {1, 1});
  EXPECT_EQ(write->written.count(), 1);
  EXPECT_EQ(write->written.wait().code(), StatusCode::closed);
  EXPECT_FALSE(write->durable.is_told());
  EXPECT_EQ(start_read(*opened.store, 0, {1, 1})->done.wait().status.code(), StatusCode::closed);
  EXPECT_EQ(start_wipe(*opened.store, {0})->wait().code(), StatusCode::closed);
  EXPECT_EQ(opened.store->flush(soon()).code(), StatusCode::closed);
  EXPECT_FALSE(opened.store->can_write());
  EXPECT_FALSE(opened.store->can_read());
}

TEST(SlotStore, options_that_cannot_be_are_refused_by_name) {
  Home home;
  SlotStoreOptions options = options_of(home);
  options.queue_depth = 0;
  EXPECT_EQ(try_open(home, options).status().message(), "queue_depth = 0: allowed are 1 to 4096");
  options = options_of(home);
  options.classes[0].slot_stride_bytes = 5000;
  EXPECT_EQ(try_open(home, options).status().code(), StatusCode::invalid_argument);
  options = options_of(home);
  options.classes[0].slot_stride_bytes = 2 * kStride;
  EXPECT_EQ(try_open(home, options).status().code(), StatusCode::invalid_argument);
  home.superblock.open_counter = (1U << 24U) - 1;
  EXPECT_EQ(try_open(home, options_of(home)).status().code(), StatusCode::unsupported);
}

}  // namespace
}  // namespace kvtier
