// How a store finds itself: after a crash, without its catalog, beside older and newer images; and how it
// grows.
#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <functional>
#include <set>
#include <tuple>

#include "storage/store_world.h"

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/slot_store.h"

namespace kvtier {
namespace {

using namespace store_world;

// Ends an opening as a crash would: what close() says of it reaches neither superblock nor catalog.
void crash(Home& home, std::unique_ptr<SlotStore> store) {
  {
    MutexLock lock(home.mutex);
    home.superblock_fails = true;
    if (!home.catalog_version) home.catalog_version = home.catalogs.num_versions() - 1;
  }
  store.reset();
  MutexLock lock(home.mutex);
  home.superblock_fails = false;
}

// Writes an image into a slot file behind the store's back.
void plant(Home& home, std::uint32_t slot, const Block& block, Generation generation,
           std::uint32_t place_says = UINT32_MAX) {
  const SlotImages images(home.superblock.fingerprint, home.superblock.store, nullptr);
  const Image image;
  image.fill(block);
  const std::uint32_t said = place_says == UINT32_MAX ? slot : place_says;
  ASSERT_TRUE(images.seal(image.data(), image.data(),
                          {identity_of(block.number), {0, SlotId{said}}, generation, kPayload}));
  const int fd = ::open((home.files.path() + "/slots.0").c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::pwrite(fd, image.data(), kStride, static_cast<off_t>(slot * kStride)), ssize_t{kStride});
  ::close(fd);
}

std::vector<std::byte> header_in(const Home& home, std::uint32_t slot) {
  std::vector<std::byte> bytes(kSlotHeaderBytes);
  const int fd = ::open((home.files.path() + "/slots.0").c_str(), O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(::pread(fd, bytes.data(), bytes.size(), static_cast<off_t>(slot * kStride)),
            static_cast<ssize_t>(bytes.size()));
  ::close(fd);
  return bytes;
}

bool is_blank(const Home& home, std::uint32_t slot) {
  const auto bytes = header_in(home, slot);
  return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
}

class SlotStoreReopen : public testing::Test {
 protected:
  void fill(std::uint32_t blocks) {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 16);
    for (std::uint32_t i = 0; i < blocks; ++i) write_durably(*opened.store, i, {i, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  void lose_catalog() { home.catalog_version = 0; }
  SlotStore::Opened reopen() {
    return open(home, options_of(home), [this](const CatalogRecord& record) { found.push_back(record); });
  }

  Home home{16};
  std::vector<CatalogRecord> found;  // the I/O thread's until scan_done()
};

TEST_F(SlotStoreReopen, after_a_crash_what_the_catalog_does_not_know_is_found_by_a_scan) {
  {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 16);
    for (std::uint32_t i = 0; i < 4; ++i) write_durably(*opened.store, i, {i, 1});
    home.catalog_version = home.catalogs.num_versions() - 1;
    for (std::uint32_t i = 4; i < 8; ++i) write_durably(*opened.store, i, {i, 1});
    crash(home, std::move(opened.store));
  }
  SlotStore::Opened opened = reopen();
  EXPECT_EQ(opened.report.source, OpenReport::Source::catalog);
  EXPECT_EQ(opened.blocks.size(), 4U);
  wait_until([&] { return opened.store->scan_done(); });
  EXPECT_EQ(found.size(), 4U);
  for (std::uint32_t i = 0; i < 8; ++i) EXPECT_TRUE(serves(*opened.store, i, {i, 1}));
  EXPECT_TRUE(opened.store->close(soon()));
  EXPECT_TRUE(home.superblock.clean);
  home.catalog_version.reset();
  EXPECT_EQ(reopen().blocks.size(), 8U) << "what was found is in the catalog";
}

TEST_F(SlotStoreReopen, a_wipe_after_a_crash_waits_for_the_scan) {
  {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 16);
    for (std::uint32_t i = 0; i < 8; ++i) write_durably(*opened.store, i, {i, 1});
    home.catalog_version = home.catalogs.num_versions() - 2;  // block 7 is not in it
    crash(home, std::move(opened.store));
  }
  SlotStore::Opened opened = reopen();
  auto found_before_wipe = std::make_shared<Told<bool>>();
  opened.store->wipe({}, [&, found_before_wipe](const Status& status) {
    EXPECT_TRUE(status);
    found_before_wipe->tell(found.size() == 1 && opened.store->scan_done());
  });
  EXPECT_TRUE(found_before_wipe->wait());
}

TEST_F(SlotStoreReopen, a_slot_that_the_owner_takes_during_the_scan_is_his) {
  {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 16);
    for (std::uint32_t i = 0; i < 8; ++i) write_durably(*opened.store, i, {i, 1});
    home.catalog_version = 1;
    crash(home, std::move(opened.store));
  }
  SlotStore::Opened opened = reopen();
  std::vector<std::shared_ptr<PendingWrite>> writes;
  for (std::uint32_t i = 1; i < 8; ++i) writes.push_back(start_write(*opened.store, i, {100 + i, 1}));
  for (const auto& write : writes) EXPECT_TRUE(write->durable.wait());
  wait_until([&] { return opened.store->scan_done(); });
  for (std::uint32_t i = 1; i < 8; ++i) EXPECT_TRUE(serves(*opened.store, i, {100 + i, 1}));
}

TEST_F(SlotStoreReopen, a_crash_that_wrote_nothing_leaves_a_clean_store) {
  fill(3);
  crash(home, std::move(reopen().store));
  home.catalog_version.reset();
  EXPECT_TRUE(home.superblock.clean);
  SlotStore::Opened opened = reopen();
  EXPECT_EQ(opened.blocks.size(), 3U);
  EXPECT_TRUE(opened.store->scan_done());
}

TEST_F(SlotStoreReopen, without_its_catalog_a_store_is_rebuilt_from_headers_with_progress) {
  fill(10);
  lose_catalog();
  SlotStoreOptions options = options_of(home);
  std::vector<std::uint64_t> progress;
  std::uint64_t total_seen = 0;
  options.on_progress = [&](std::uint64_t done, std::uint64_t total) {
    progress.push_back(done);
    total_seen = total;
  };
  SlotStore::Opened opened = open(home, std::move(options));
  EXPECT_EQ(opened.report.source, OpenReport::Source::headers);
  EXPECT_FALSE(opened.report.why_rebuilt.empty());
  EXPECT_EQ(opened.blocks.size(), 10U);
  EXPECT_EQ(opened.report.discarded, 0U);
  ASSERT_FALSE(progress.empty());
  EXPECT_EQ(progress.back(), 16U);
  EXPECT_EQ(total_seen, 16U);
  for (std::uint32_t i = 0; i < 10; ++i) EXPECT_TRUE(serves(*opened.store, i, {i, 1}));
  EXPECT_TRUE(opened.store->close(soon()));
  home.catalog_version.reset();
  EXPECT_EQ(reopen().report.source, OpenReport::Source::catalog) << "the catalog was made anew";
}

TEST_F(SlotStoreReopen, of_two_images_of_a_block_the_newest_wins_and_the_other_is_wiped) {
  fill(3);
  plant(home, 9, {1, 5}, make_generation(1, 1000));  // newer than the one in slot 1
  plant(home, 10, {2, 0}, make_generation(0, 1));    // older than the one in slot 2
  lose_catalog();
  SlotStore::Opened opened = reopen();
  EXPECT_EQ(opened.blocks.size(), 3U);
  EXPECT_EQ(opened.report.discarded, 2U);
  EXPECT_TRUE(serves(*opened.store, 9, {1, 5}));
  EXPECT_TRUE(serves(*opened.store, 2, {2, 1}));
  EXPECT_TRUE(is_blank(home, 1));
  EXPECT_TRUE(is_blank(home, 10));
}

TEST_F(SlotStoreReopen, what_proves_nothing_is_wiped_and_does_not_come_back) {
  fill(6);
  plant(home, 8, {8, 1}, make_generation(1, 500), 9);  // says that it belongs elsewhere
  const int fd = ::open((home.files.path() + "/slots.0").c_str(), O_WRONLY | O_CLOEXEC);
  const char noise = 'x';
  ASSERT_EQ(::pwrite(fd, &noise, 1, 3 * kStride + 100), 1);  // a header whose checksum does not hold
  ::close(fd);
  lose_catalog();
  SlotStore::Opened opened = reopen();
  EXPECT_EQ(opened.blocks.size(), 5U);
  EXPECT_EQ(opened.report.discarded, 2U);
  EXPECT_TRUE(is_blank(home, 3));
  EXPECT_TRUE(is_blank(home, 8));
}

TEST_F(SlotStoreReopen, an_image_of_a_newer_version_is_left_alone_for_good) {
  fill(2);
  plant(home, 5, {5, 1}, make_generation(1, 500));
  // The version stands behind the magic, the header's checksum at 4080 (docs/formats/slot.md).
  std::vector<std::byte> newer = header_in(home, 5);
  newer[8] = std::byte{0xfe};
  const Checksum checksum = checksum_of(std::span(newer).first(4080));
  std::memcpy(newer.data() + 4080, &checksum.low, 8);
  std::memcpy(newer.data() + 4088, &checksum.high, 8);
  const int fd = ::open((home.files.path() + "/slots.0").c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::pwrite(fd, newer.data(), newer.size(), 5 * kStride), static_cast<ssize_t>(newer.size()));
  ::close(fd);
  const SlotImages images(home.superblock.fingerprint, home.superblock.store, nullptr);
  SlotHeader ignored;
  const std::vector<std::byte> before = header_in(home, 5);
  ASSERT_EQ(images.read_header(before.data(), {0, SlotId{5}}, &ignored), Verdict::newer_version);
  lose_catalog();
  SlotStore::Opened opened = reopen();
  EXPECT_EQ(opened.blocks.size(), 2U);
  EXPECT_EQ(opened.unusable, std::vector<SlotPlace>{(SlotPlace{0, SlotId{5}})});
  EXPECT_EQ(start_write(*opened.store, 5, {9, 1})->written.wait().code(), StatusCode::unsupported);
  EXPECT_TRUE(start_wipe(*opened.store, {5})->wait());
  EXPECT_TRUE(opened.store->can_write());
  EXPECT_EQ(header_in(home, 5), before);
}

TEST_F(SlotStoreReopen, records_that_cannot_be_are_discarded) {
  fill(2);
  {
    const auto catalog = home.catalogs.open(home.catalogs.num_versions() - 1);
    std::vector<CatalogChange> lies(3);
    for (std::uint32_t i = 0; i < 3; ++i) {
      lies[i].record = {identity_of(50 + i), {0, SlotId{4 + i}}, make_generation(1, 50 + i), kPayload, 0};
    }
    lies[0].record.place.slot = SlotId{999};
    lies[1].record.payload_bytes = kStride;
    lies[2].record.place.class_index = 7;
    ASSERT_TRUE(catalog->commit(lies));
  }
  SlotStore::Opened opened = reopen();
  EXPECT_EQ(opened.blocks.size(), 2U);
  EXPECT_EQ(opened.report.discarded, 3U);
}

// Generations are used up one opening at a time: who claims to have been written in the last one that there
// can be would make this opening the last.
TEST_F(SlotStoreReopen, a_generation_that_no_opening_can_have_written_is_not_believed) {
  constexpr Generation kLast = make_generation((1U << 24U) - 2, 1);
  fill(2);
  {
    const auto catalog = home.catalogs.open(home.catalogs.num_versions() - 1);
    CatalogChange lie;
    lie.record = {identity_of(50), {0, SlotId{5}}, kLast, kPayload, 0};
    ASSERT_TRUE(catalog->commit({&lie, 1}));
  }
  plant(home, 6, {6, 1}, kLast);
  for (const bool rebuilt : {false, true}) {
    if (rebuilt) lose_catalog();
    SlotStore::Opened opened = reopen();
    EXPECT_EQ(opened.blocks.size(), 2U);
    EXPECT_EQ(opened.report.discarded, 1U) << rebuilt;
    write_durably(*opened.store, 1, {1, 9});
    EXPECT_LT(home.superblock.open_counter, 10U);
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_TRUE(is_blank(home, 6));
}

TEST_F(SlotStoreReopen, blocks_come_least_recently_used_first_and_behind_their_parents) {
  SlotStore::Opened opened = open(home, options_of(home));
  wait_for_slots(*opened.store, 16);
  // 0 <- 1 <- 2, written child first.
  for (std::uint32_t i = 3; i-- > 0;) {
    const auto pending = std::make_shared<PendingWrite>();
    SlotWrite write;
    write.place = {0, SlotId{i}};
    write.block = identity_of(2 * i);  // of one group
    if (i > 0) write.block.parent = key_of(2 * (i - 1));
    write.payload_bytes = kPayload;
    write.image = pending->image.data();
    write.on_durable = [pending](const Status& status) { pending->durable.tell(status); };
    opened.store->write(std::move(write));
    EXPECT_TRUE(opened.store->flush(soon()));
    EXPECT_TRUE(pending->durable.wait());
  }
  EXPECT_TRUE(opened.store->close(soon()));
  SlotStore::Opened again = reopen();
  ASSERT_EQ(again.blocks.size(), 3U);
  for (std::uint32_t i = 0; i < 3; ++i) EXPECT_EQ(again.blocks[i].block.key, key_of(2 * i));
  EXPECT_EQ(again.blocks[2].block.parent, key_of(2));
}

// The order that the engine is promised, by its definition.
std::vector<CatalogRecord> by_use(std::vector<CatalogRecord> records) {
  std::sort(records.begin(), records.end(), [](const CatalogRecord& a, const CatalogRecord& b) {
    return std::tuple(a.last_use_s, a.block.depth, a.generation) <
           std::tuple(b.last_use_s, b.block.depth, b.generation);
  });
  std::vector<CatalogRecord> ordered;
  std::set<std::uint32_t> placed;  // by slot
  const std::function<void(const CatalogRecord&)> place = [&](const CatalogRecord& record) {
    if (!placed.insert(raw(record.place.slot)).second) return;
    for (const CatalogRecord& other : records) {
      const bool is_parent =
          record.block.parent == other.block.key && record.block.group == other.block.group;
      if (is_parent) place(other);
    }
    ordered.push_back(record);
  };
  for (const CatalogRecord& record : records) place(record);
  return ordered;
}

TEST_F(SlotStoreReopen, any_catalog_comes_in_the_order_of_use_with_parents_first) {
  constexpr std::uint32_t kBlocks = 1500;
  home.classes = {{kStride, 2000}};
  SlotStoreOptions whole = options_of(home);
  whole.growth = Growth::whole;
  SlotStore::Opened first = open(home, std::move(whole));
  wait_for_slots(*first.store, 2000);
  ASSERT_TRUE(first.store->close(soon()));

  std::vector<CatalogRecord> records(kBlocks);
  std::vector<CatalogChange> puts(kBlocks);
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    CatalogRecord& record = records[i];
    record.block = identity_of(i);
    record.block.depth = static_cast<std::uint32_t>(mixed(i) % 40);
    // Any block above any other: circles and parents of another group among them.
    if (mixed(i + 1) % 4 != 0)
      record.block.parent = key_of(static_cast<std::uint32_t>(mixed(i + 2) % (kBlocks + 50)));
    record.place = {0, SlotId{(i * 1171) % 2000}};
    record.generation = make_generation(1, 1 + (i * 7919) % 1500);
    record.payload_bytes = kPayload;
    record.last_use_s = 1'700'000'000 + static_cast<std::int64_t>(mixed(i + 3) % 5000);
    puts[i] = {CatalogChange::Kind::put, record};
  }
  ASSERT_TRUE(home.catalogs.open(home.catalogs.num_versions() - 1)->commit(puts));
  const SlotStore::Opened opened = reopen();
  const std::vector<CatalogRecord> expected = by_use(records);
  ASSERT_EQ(opened.blocks.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_EQ(opened.blocks[i].place.slot, expected[i].place.slot) << "at " << i;
    ASSERT_EQ(opened.blocks[i].block.key, expected[i].block.key);
    ASSERT_EQ(opened.blocks[i].generation, expected[i].generation);
  }
}

TEST_F(SlotStoreReopen, what_was_used_is_told_by_the_catalog) {
  fill(3);
  {
    std::vector<CatalogChange> long_ago(3);
    for (std::uint32_t i = 0; i < 3; ++i) {
      long_ago[i].kind = CatalogChange::Kind::touch;
      long_ago[i].record.place.slot = SlotId{i};
      long_ago[i].record.last_use_s = 1000 + i;
    }
    ASSERT_TRUE(home.catalogs.open(home.catalogs.num_versions() - 1)->commit(long_ago));
  }
  const std::int64_t before = std::time(nullptr);
  {
    SlotStore::Opened opened = reopen();
    ASSERT_EQ(opened.blocks.size(), 3U);
    EXPECT_EQ(opened.blocks.back().place.slot, SlotId{2});
    opened.store->note_use({0, SlotId{1}});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  SlotStore::Opened opened = reopen();
  ASSERT_EQ(opened.blocks.size(), 3U);
  EXPECT_EQ(opened.blocks.back().place.slot, SlotId{1});
  EXPECT_GE(opened.blocks.back().last_use_s, before);
}

// --- growth ---

TEST(SlotStoreGrowth, a_store_grows_to_its_bound_and_tells) {
  Home home{3000};  // 47 MiB: more than one segment
  SlotStoreOptions options = options_of(home);
  options.growth = Growth::whole;
  SlotStore::Opened opened = open(home, std::move(options));
  std::atomic<std::uint32_t> told{0};
  opened.store->on_grown([&](std::uint32_t class_index, std::uint32_t usable) {
    EXPECT_EQ(class_index, 0U);
    EXPECT_GT(usable, told.load());
    told = usable;
  });
  wait_for_slots(*opened.store, 3000);
  wait_until([&] { return told == 3000; });
  EXPECT_EQ(opened.store->stats().bytes_prewritten, 3000 * kStride);
  EXPECT_GE(opened.store->stats().allocated_bytes, 1024 * kStride);
  write_durably(*opened.store, 2999, {1, 1});
  EXPECT_TRUE(opened.store->close(soon()));
  EXPECT_EQ(std::filesystem::file_size(home.files.path() + "/slots.0"), 3000 * kStride);
}

TEST(SlotStoreGrowth, a_store_keeps_one_step_ahead_of_what_is_stored_and_takes_no_more) {
  constexpr std::uint32_t kStep = 1024;  // 16 MiB
  Home home{16 * kStep};
  const auto reserved_slots = [&home] {
    MutexLock lock(home.mutex);
    return home.reserved_bytes / kStride;  // and a little for the catalog
  };
  {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, kStep);
    EXPECT_TRUE(opened.store->flush(soon()));  // a round of its thread later
    EXPECT_EQ(opened.store->usable_slots(0), kStep);
    EXPECT_TRUE(opened.store->growing(0)) << "it would, if it had to";
    write_durably(*opened.store, 0, {0, 1});
    wait_for_slots(*opened.store, 2 * kStep);
    EXPECT_TRUE(opened.store->flush(soon()));
    EXPECT_EQ(opened.store->usable_slots(0), 2 * kStep);
    EXPECT_EQ(opened.store->stats().bytes_prewritten, 2 * kStep * kStride);
    EXPECT_LT(reserved_slots(), 3 * kStep);
    // What is wiped is room again.
    EXPECT_TRUE(start_wipe(*opened.store, {0})->wait());
    write_durably(*opened.store, 1, {1, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  SlotStore::Opened opened = open(home, options_of(home));
  EXPECT_TRUE(opened.store->flush(soon()));
  EXPECT_EQ(opened.store->usable_slots(0), 2 * kStep) << "an opening takes nothing either";
  EXPECT_TRUE(serves(*opened.store, 1, {1, 1}));
}

TEST(SlotStoreGrowth, growth_stops_at_what_the_ledger_grants_and_goes_on_when_there_is_room) {
  Home home{64};
  home.capacity_bytes = (std::uint64_t{256} << 10U) + 10 * kStride + 5000;
  SlotStore::Opened opened = open(home, options_of(home));
  wait_for_slots(*opened.store, 10);
  wait_until([&] { return opened.store->stats().growth != "ok"; });
  EXPECT_EQ(opened.store->usable_slots(0), 10U);
  write_durably(*opened.store, 9, {1, 1});
  {
    MutexLock lock(home.mutex);
    home.capacity_bytes *= 100;
  }
  wait_for_slots(*opened.store, 64);
  EXPECT_EQ(opened.store->stats().growth, "ok");
}

TEST(SlotStoreGrowth, a_store_that_is_granted_less_than_it_had_gives_back_the_rest) {
  Home home{64};
  {
    SlotStore::Opened opened = open(home, options_of(home));
    wait_for_slots(*opened.store, 64);
    write_durably(*opened.store, 3, {3, 1});
    write_durably(*opened.store, 60, {60, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  home.capacity_bytes = (std::uint64_t{256} << 10U) + 20 * kStride;
  SlotStore::Opened opened = open(home, options_of(home));
  EXPECT_EQ(opened.store->usable_slots(0), 20U);
  EXPECT_EQ(std::filesystem::file_size(home.files.path() + "/slots.0"), 20 * kStride);
  ASSERT_EQ(opened.blocks.size(), 1U);
  EXPECT_TRUE(serves(*opened.store, 3, {3, 1}));
  EXPECT_EQ(opened.report.discarded, 1U);
}

TEST(SlotStoreGrowth, classes_grow_side_by_side) {
  Home home{64};
  home.superblock.class_strides = {kStride, 2 * kStride};
  home.classes = {{kStride, 64}, {2 * kStride, 32}};
  SlotStore::Opened opened = open(home, options_of(home));
  wait_for_slots(*opened.store, 64, 0);
  wait_for_slots(*opened.store, 32, 1);
  const auto write = start_write(*opened.store, 31, {7, 1}, 1);
  EXPECT_TRUE(write->durable.wait());
  EXPECT_TRUE(start_read(*opened.store, 31, {7, 1}, ReadPriority::demand, 1)->done.wait().good());
  EXPECT_EQ(verdict_of(*opened.store, 31, {7, 1}), Verdict::blank) << "of the other class";
}

}  // namespace
}  // namespace kvtier
