// Drives, files, catalogs and superblocks that fail: a miss or a status, one line, and back in service.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>

#include "storage/store_world.h"

#include "kvtier/storage/slot_store.h"

namespace kvtier {
namespace {

using namespace store_world;

std::ptrdiff_t lines_of(const std::string& text) { return std::count(text.begin(), text.end(), '\n'); }

class SlotStoreFaults : public testing::Test {
 protected:
  void open_store() {
    store = std::move(open(home, options_of(home, drive)).store);
    wait_for_slots(*store, home.classes[0].num_slots);
  }
  Home home{16};
  SimulatedDrive drive{DriveFaults{}};
  std::unique_ptr<SlotStore> store;
};

TEST_F(SlotStoreFaults, a_failed_write_takes_writes_out_of_service_until_the_drive_works_again) {
  open_store();
  write_durably(*store, 0, {0, 1});
  testing::internal::CaptureStderr();
  drive.set_faults({.write_error = 1});
  const auto failed = start_write(*store, 1, {1, 1});
  EXPECT_EQ(failed->written.wait().code(), StatusCode::io);
  EXPECT_EQ(failed->written.wait().native_code(), EIO);
  wait_until([this] { return !store->can_write(); });
  EXPECT_TRUE(store->can_read());
  const auto refused = start_write(*store, 2, {2, 1});
  EXPECT_EQ(refused->written.count(), 1) << "at once";
  EXPECT_EQ(start_wipe(*store, {0})->wait().code(), StatusCode::io);
  EXPECT_NE(store->stats().health, "ok");
  EXPECT_TRUE(serves(*store, 0, {0, 1}));
  drive.set_faults({});
  wait_until([this] { return store->can_write(); });
  EXPECT_EQ(store->stats().health, "ok");
  EXPECT_EQ(lines_of(testing::internal::GetCapturedStderr()), 2) << "one line each way";
  write_durably(*store, 1, {1, 2});
  EXPECT_TRUE(serves(*store, 1, {1, 2}));
  EXPECT_FALSE(failed->durable.is_told());
  EXPECT_EQ(store->stats().writes_failed, 2U);
  EXPECT_TRUE(store->close(soon()));
  EXPECT_TRUE(home.superblock.clean);
}

TEST_F(SlotStoreFaults, a_full_drive_is_no_different) {
  open_store();
  drive.set_faults({.no_space = 1});
  EXPECT_EQ(start_write(*store, 1, {1, 1})->written.wait().native_code(), ENOSPC);
  drive.set_faults({});
  wait_until([this] { return store->can_write(); });
  write_durably(*store, 1, {1, 2});
}

TEST_F(SlotStoreFaults, one_bad_spot_is_a_miss_and_three_are_a_bad_drive) {
  open_store();
  for (std::uint32_t i = 0; i < 3; ++i) write_durably(*store, i, {i, 1});
  drive.set_faults({.read_error = 1});
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(start_read(*store, 0, {0, 1})->done.wait().status.code(), StatusCode::io);
  }
  EXPECT_TRUE(store->can_read());
  static_cast<void>(start_read(*store, 1, {1, 1})->done.wait());
  static_cast<void>(start_read(*store, 2, {2, 1})->done.wait());
  wait_until([this] { return !store->can_read(); });
  EXPECT_FALSE(store->can_write());
  const auto refused = start_read(*store, 2, {2, 1});
  EXPECT_EQ(refused->done.count(), 1);
  EXPECT_EQ(refused->done.wait().status.code(), StatusCode::io);
  drive.set_faults({});
  wait_until([this] { return store->can_read(); });
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_TRUE(serves(*store, i, {i, 1}));
  const StoreStats stats = store->stats();
  EXPECT_EQ(stats.reads, 16U);
  EXPECT_EQ(stats.reads_failed, 13U);
}

TEST_F(SlotStoreFaults, what_a_failed_sync_should_have_covered_is_not_durable_and_never_called_so) {
  open_store();
  drive.set_faults({.sync_error = 1});
  const auto write = start_write(*store, 1, {1, 1});
  EXPECT_TRUE(write->written.wait());
  EXPECT_EQ(write->durable.wait().code(), StatusCode::io);
  drive.set_faults({});
  wait_until([this] { return store->can_write(); });
  EXPECT_TRUE(store->flush(soon()));
  EXPECT_EQ(write->durable.count(), 1);
  EXPECT_EQ(store->stats().undurable_writes, 0U);
  static_cast<void>(serves(*store, 1, {1, 1}));  // it or a miss, not other bytes
  EXPECT_EQ(store->close(soon()).code(), StatusCode::io) << "the catalog does not know what stands there";
  EXPECT_FALSE(home.superblock.clean);
}

TEST_F(SlotStoreFaults, a_wipe_or_flush_across_a_failed_sync_fails) {
  open_store();
  write_durably(*store, 0, {0, 1});
  drive.set_faults({.sync_error = 1});
  EXPECT_EQ(start_wipe(*store, {0})->wait().code(), StatusCode::io);
  drive.set_faults({});
  wait_until([this] { return store->can_write(); });
  EXPECT_TRUE(start_wipe(*store, {0})->wait());
  EXPECT_FALSE(serves(*store, 0, {0, 1}));
}

TEST_F(SlotStoreFaults, a_superblock_that_cannot_be_written_stops_writes_not_reads) {
  open_store();
  home.superblock_fails = true;
  EXPECT_EQ(start_write(*store, 0, {0, 1})->written.wait().code(), StatusCode::io);
  {
    MutexLock lock(home.mutex);
    home.superblock_fails = false;
  }
  wait_until([this] { return store->can_write(); });
  write_durably(*store, 0, {0, 2});
}

// --- catalogs ---

struct FlakyPlan {
  std::atomic<int> good_commits{1 << 30};
  std::atomic<int> failed_resets{0};
  std::vector<CatalogRecord> lies;  // read behind what it holds
  bool breaks_behind_lies = false;
};

class FlakyCatalog final : public Catalog {
 public:
  FlakyCatalog(std::unique_ptr<Catalog> inner, FlakyPlan& plan) : inner_(std::move(inner)), plan_(plan) {}
  Status read(const OnRecords& on_records) override {
    KVTIER_RETURN_IF_ERROR(inner_->read(on_records));
    on_records(plan_.lies, 0);
    return plan_.breaks_behind_lies ? Status(StatusCode::corruption, "the rest cannot be read")
                                    : Status::ok();
  }
  Status commit(std::span<const CatalogChange> changes) override {
    if (plan_.good_commits-- <= 0) return Status::io("the helper is gone");
    return inner_->commit(changes);
  }
  Status reset_with(std::span<const CatalogRecord> records) override {
    if (plan_.failed_resets > 0) {
      --plan_.failed_resets;
      return Status::io("no helper can be started");
    }
    plan_.good_commits = 1 << 30;
    return inner_->reset_with(records);
  }

 private:
  std::unique_ptr<Catalog> inner_;
  FlakyPlan& plan_;
};

SlotStoreOptions flaky(Home& home, FlakyPlan& plan) {
  SlotStoreOptions options = options_of(home);
  options.make_catalog = [&home, &plan](const Directory&) -> Result<std::unique_ptr<Catalog>> {
    const std::size_t version = home.catalog_version.value_or(home.catalogs.num_versions() - 1);
    return std::unique_ptr<Catalog>(std::make_unique<FlakyCatalog>(home.catalogs.open(version), plan));
  };
  return options;
}

// Blocks 0..2 durable in slots 0..2.
void fill_and_close(Home& home, FlakyPlan& plan) {
  SlotStore::Opened opened = open(home, flaky(home, plan));
  wait_for_slots(*opened.store, 16);
  for (std::uint32_t i = 0; i < 3; ++i) write_durably(*opened.store, i, {i, 1});
  EXPECT_TRUE(opened.store->close(soon()));
}

TEST(SlotStoreCatalog, of_records_that_claim_one_slot_the_latest_writing_stays) {
  Home home{16};
  FlakyPlan plan;
  fill_and_close(home, plan);
  std::vector<CatalogRecord> records =
      home.catalogs.open(home.catalogs.num_versions() - 1)->read_all().value();
  ASSERT_EQ(records.size(), 3U);
  std::ranges::sort(records, {}, [](const CatalogRecord& record) { return raw(record.place.slot); });
  for (std::uint32_t i = 0; i < 3; ++i) {  // older than what is there; of its time; younger
    CatalogRecord lie = records[i];
    lie.block = identity_of(50 + i);
    lie.generation = Generation{static_cast<std::uint64_t>(lie.generation) + i - 1};
    plan.lies.push_back(lie);
  }
  SlotStore::Opened again = open(home, flaky(home, plan));
  std::map<std::uint32_t, BlockKey> found;
  for (const CatalogRecord& record : again.blocks) {
    EXPECT_TRUE(found.emplace(raw(record.place.slot), record.block.key).second);
  }
  EXPECT_EQ(again.report.discarded, 3U);
  EXPECT_EQ(found, (std::map<std::uint32_t, BlockKey>{
                       {0, records[0].block.key}, {1, records[1].block.key}, {2, key_of(52)}}));
  EXPECT_EQ(verdict_of(*again.store, 2, {52, 0}), Verdict::stale) << "its header says who it is";
}

TEST(SlotStoreCatalog, of_one_that_breaks_while_it_is_read_nothing_is_kept) {
  Home home{16};
  FlakyPlan plan;
  fill_and_close(home, plan);
  plan.lies = {{identity_of(50), {0, SlotId{9}}, make_generation(1000, 1), kPayload, 0}};
  plan.breaks_behind_lies = true;
  SlotStore::Opened again = open(home, flaky(home, plan));
  EXPECT_EQ(again.report.source, OpenReport::Source::headers);
  EXPECT_EQ(again.report.why_rebuilt, "the rest cannot be read");
  EXPECT_EQ(again.report.discarded, 0U);
  ASSERT_EQ(again.blocks.size(), 3U);
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_EQ(verdict_of(*again.store, i, {i, 1}), Verdict::good);
  write_durably(*again.store, 9, {9, 1});
  EXPECT_TRUE(again.store->close(soon()));
  const std::vector<CatalogRecord> kept =
      home.catalogs.open(home.catalogs.num_versions() - 1)->read_all().value();
  EXPECT_EQ(kept.size(), 4U);
  for (const CatalogRecord& record : kept) {
    EXPECT_LT(record.generation, make_generation(1000, 0));
  }
}

TEST(SlotStoreCatalog, a_new_store_does_not_believe_a_catalog_that_was_left_there) {
  Home home{16};
  FlakyPlan plan;
  plan.lies = {{identity_of(50), {0, SlotId{0}}, make_generation(1000, 1), kPayload, 0}};
  SlotStore::Opened opened = open(home, flaky(home, plan));
  EXPECT_EQ(opened.report.source, OpenReport::Source::fresh);
  EXPECT_TRUE(opened.blocks.empty());
  EXPECT_EQ(opened.store->stats().catalog_resets, 1U);
  wait_for_slots(*opened.store, 16);
  write_durably(*opened.store, 0, {0, 1});
  EXPECT_EQ(verdict_of(*opened.store, 0, {0, 1}), Verdict::good);
}

TEST(SlotStoreCatalog, a_catalog_that_fails_is_made_anew_with_all_blocks) {
  Home home{16};
  FlakyPlan plan;
  {
    SlotStore::Opened opened = open(home, flaky(home, plan));
    wait_for_slots(*opened.store, 16);
    for (std::uint32_t i = 0; i < 4; ++i) write_durably(*opened.store, i, {i, 1});
    plan.good_commits = 0;
    for (std::uint32_t i = 4; i < 8; ++i) write_durably(*opened.store, i, {i, 1});
    EXPECT_EQ(opened.store->stats().catalog_resets, 1U);
    EXPECT_EQ(opened.store->stats().catalog_health, "ok");
    EXPECT_TRUE(opened.store->close(soon()));
  }
  SlotStore::Opened opened = open(home, flaky(home, plan));
  EXPECT_EQ(opened.report.source, OpenReport::Source::catalog);
  EXPECT_EQ(opened.blocks.size(), 8U);
  for (std::uint32_t i = 0; i < 8; ++i) EXPECT_TRUE(serves(*opened.store, i, {i, 1}));
}

// Slot 0 is overwritten while there is no catalog: the old one must not be believed by the next opening.
TEST(SlotStoreCatalog, without_a_catalog_blocks_become_durable_and_are_found_by_their_headers) {
  Home home{16};
  FlakyPlan plan;
  {
    SlotStore::Opened opened = open(home, flaky(home, plan));
    wait_for_slots(*opened.store, 16);
    write_durably(*opened.store, 0, {0, 1});
    write_durably(*opened.store, 1, {1, 1});
    plan.good_commits = 0;
    plan.failed_resets = 1 << 20;
    write_durably(*opened.store, 0, {9, 1});
    write_durably(*opened.store, 2, {2, 1});
    EXPECT_NE(opened.store->stats().catalog_health, "ok");
    EXPECT_TRUE(opened.store->close(soon())) << "without a catalog it is not clean, and that is no failure";
    EXPECT_FALSE(home.superblock.clean);
  }
  plan.failed_resets = 0;
  plan.good_commits = 1 << 30;
  for (int round = 0; round < 2; ++round) {
    SlotStore::Opened opened = open(home, flaky(home, plan));
    EXPECT_EQ(opened.report.source, round == 0 ? OpenReport::Source::headers : OpenReport::Source::catalog);
    EXPECT_EQ(opened.blocks.size(), 3U);
    EXPECT_TRUE(serves(*opened.store, 0, {9, 1}));
    EXPECT_TRUE(serves(*opened.store, 1, {1, 1}));
    EXPECT_TRUE(serves(*opened.store, 2, {2, 1}));
    EXPECT_TRUE(opened.store->close(soon()));
  }
}

TEST(SlotStoreCatalog, a_store_whose_catalog_cannot_be_opened_serves_all_the_same) {
  Home home{16};
  {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 16);
    write_durably(*opened.store, 5, {5, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  SlotStoreOptions options = options_of(home);
  options.make_catalog = [](const Directory&) -> Result<std::unique_ptr<Catalog>> {
    return Status::unsupported("no helper here");
  };
  SlotStore::Opened opened = open(home, std::move(options));
  EXPECT_EQ(opened.report.source, OpenReport::Source::headers);
  EXPECT_EQ(opened.report.why_rebuilt, "no helper here");
  EXPECT_TRUE(serves(*opened.store, 5, {5, 1}));
  write_durably(*opened.store, 6, {6, 1});
  EXPECT_NE(opened.store->stats().catalog_health, "ok");
}

// --- files that somebody else changes ---

TEST(SlotStoreFiles, a_file_that_was_cut_off_holds_nothing_and_can_be_written_again) {
  Home home{16};
  SlotStore::Opened opened = open(home, options_of(home));
  wait_for_slots(*opened.store, 16);
  write_durably(*opened.store, 5, {5, 1});
  std::filesystem::resize_file(home.files.path() + "/slots.0", kStride);
  EXPECT_EQ(verdict_of(*opened.store, 5, {5, 1}), Verdict::blank);
  write_durably(*opened.store, 5, {5, 2});
  EXPECT_TRUE(serves(*opened.store, 5, {5, 2}));
  EXPECT_EQ(opened.store->stats().health, "ok");
}

TEST(SlotStoreFiles, a_file_that_was_overwritten_is_judged_not_served) {
  Home home{16};
  SlotStore::Opened opened = open(home, options_of(home));
  wait_for_slots(*opened.store, 16);
  for (std::uint32_t i = 0; i < 3; ++i) write_durably(*opened.store, i, {i, 1});
  {
    std::fstream file(home.files.path() + "/slots.0", std::ios::binary | std::ios::in | std::ios::out);
    const std::string noise(kSlotHeaderBytes, 'x');
    file.seekp(0);
    file << noise;
    file.seekp(static_cast<std::streamoff>(kStride + kSlotHeaderBytes));
    file << noise;
  }
  EXPECT_EQ(verdict_of(*opened.store, 0, {0, 1}), Verdict::foreign);
  EXPECT_EQ(verdict_of(*opened.store, 1, {1, 1}), Verdict::corrupt_payload);
  EXPECT_TRUE(serves(*opened.store, 2, {2, 1}));
  const StoreStats stats = opened.store->stats();
  EXPECT_EQ(stats.verdicts[static_cast<std::size_t>(Verdict::foreign)], 1U);
  EXPECT_EQ(stats.verdicts[static_cast<std::size_t>(Verdict::corrupt_payload)], 1U);
  EXPECT_EQ(stats.verdicts[static_cast<std::size_t>(Verdict::good)], stats.reads_good);
}

// --- the n-th request ---

TEST(SlotStoreFaultsByNumber, whichever_request_fails_what_is_durable_is_found_and_what_is_wiped_is_not) {
  testing::internal::CaptureStderr();
  std::uint64_t n = 0;
  for (bool injected = true; injected; ++n) {
    ASSERT_LT(n, 200U);
    Home home{8};
    SimulatedDrive drive{DriveFaults{.seed = n + 1, .fail_nth = n}};
    std::vector<std::shared_ptr<PendingWrite>> writes;
    std::shared_ptr<Told<Status>> wiped;
    {
      SlotStore::Opened opened = open(home, options_of(home, drive));
      SlotStore& store = *opened.store;
      wait_for_slots(store, 8);
      for (std::uint32_t i = 0; i < 6; ++i) writes.push_back(start_write(store, i, {i, 1}));
      for (const auto& write : writes) static_cast<void>(write->written.wait());
      static_cast<void>(store.flush(soon()));
      for (std::uint32_t i = 0; i < 6; ++i) static_cast<void>(serves(store, i, {i, 1}));
      wiped = start_wipe(store, {0, 1});
      static_cast<void>(wiped->wait());
      static_cast<void>(store.close(soon()));
      const StoreStats stats = store.stats();
      EXPECT_EQ(stats.in_flight + stats.queued_reads + stats.queued_writes + stats.undurable_writes, 0U);
      EXPECT_EQ(stats.writes + stats.writes_failed, 6U);
    }
    injected = drive.faults_injected() > 0;
    SlotStore::Opened opened = open(home, options_of(home));
    wait_until([&] { return opened.store->scan_done(); });
    for (std::uint32_t i = 0; i < 6; ++i) {
      EXPECT_EQ(writes[i]->written.count(), 1);
      EXPECT_EQ(writes[i]->durable.count(), writes[i]->written.wait() ? 1 : 0);
      const bool durable = writes[i]->durable.is_told() && writes[i]->durable.wait();
      const bool found = serves(*opened.store, i, {i, 1});
      if (i < 2) {
        EXPECT_FALSE(found && wiped->wait()) << "block " << i << " came back, request " << n;
      } else {
        EXPECT_TRUE(found || !durable) << "block " << i << " is lost, request " << n;
      }
    }
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_GE(n, 15U) << "the scenario has more requests than that";
  static_cast<void>(testing::internal::GetCapturedStderr());
}

TEST(SlotStoreFaultsByNumber, completions_that_come_late_or_never_hold_memory_not_the_caller) {
  Home home{8};
  SimulatedDrive drive{DriveFaults{}};
  SlotStore::Opened opened = open(home, options_of(home, drive));
  wait_for_slots(*opened.store, 8);
  write_durably(*opened.store, 0, {0, 1});
  drive.set_faults({.delay = 1, .never_completes = true});
  const auto read = start_read(*opened.store, 0, {0, 1});
  wait_until([&] { return opened.store->stats().in_flight == 1; });
  EXPECT_EQ(opened.store->close(std::chrono::steady_clock::now()).code(), StatusCode::timeout);
  opened.store.reset();
  EXPECT_FALSE(read->done.is_told());
  drive.set_faults({});
  drive.release_delayed();
  EXPECT_TRUE(read->done.wait().good());
  EXPECT_TRUE(read->image.holds({0, 1}));
  wait_until([&] {
    MutexLock lock(home.mutex);
    return home.leases == 0;
  });
}

}  // namespace
}  // namespace kvtier
