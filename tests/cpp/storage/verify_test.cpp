// verify and purge on real stores: what is counted as what, and that what was purged is gone.
#include "kvtier/storage/verify.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "storage/store_world.h"

namespace kvtier {
namespace {

using namespace store_world;

constexpr std::uint32_t kSlots = 16;

// A directory with stores of several models. Catalogs are kept beside it: purge_stores() meets none.
class Verify : public testing::Test {
 protected:
  SlotStore::Opened open_store(std::uint8_t model, std::shared_ptr<SlotCipher> cipher = nullptr) {
    const auto directory = StoreDirectory::open(path, std::uint64_t{64} << 20U).value();
    Fingerprint fingerprint{};
    fingerprint.fill(std::byte{model});
    const std::uint64_t strides[] = {kStride};
    SlotStoreOptions options;
    options.classes = {{kStride, kSlots}};
    options.commit_interval = std::chrono::milliseconds(1);
    options.cipher = std::move(cipher);
    CatalogHistory& catalog = catalogs[model];
    options.make_catalog = [&catalog](const Directory&) -> Result<std::unique_ptr<Catalog>> {
      return catalog.open(catalog.num_versions() - 1);
    };
    auto opened = SlotStore::open(directory->acquire(fingerprint, strides, SecondProcess::refuse).value(),
                                  std::move(options), nullptr);
    wait_for_slots(*opened.value().store, kSlots);
    return std::move(opened.value());
  }
  void make_store(std::uint8_t model, std::uint32_t blocks, std::shared_ptr<SlotCipher> cipher = nullptr) {
    SlotStore::Opened opened = open_store(model, std::move(cipher));
    for (std::uint32_t i = 0; i < blocks; ++i) write_durably(*opened.store, i, {i, 1});
    ASSERT_TRUE(opened.store->close(soon()));
  }
  std::string file_of(std::uint8_t model) const {
    constexpr char kDigits[] = "0123456789abcdef";
    std::string name;
    for (int i = 0; i < 8; ++i) name += {kDigits[model >> 4], kDigits[model & 15]};
    return path + "/stores/" + name + "-0/slots.0";
  }
  void flip(std::uint8_t model, std::uint64_t at) const {
    const FileHandle file(::open(file_of(model).c_str(), O_RDWR | O_CLOEXEC));
    char byte = 0;
    ASSERT_EQ(::pread(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
    byte = static_cast<char>(byte ^ 4);
    ASSERT_EQ(::pwrite(file.fd(), &byte, 1, static_cast<off_t>(at)), 1);
  }
  StoreSurvey survey(const SurveyOptions& options = {}) const {
    auto found = survey_stores(path, options);
    EXPECT_TRUE(found.is_ok()) << found.status().message();
    EXPECT_EQ(found->stores.size(), 1U);
    return found->stores.at(0);
  }

  TempDirectory files;
  std::string path = files.path() + "/disk";
  std::map<std::uint8_t, CatalogHistory> catalogs;
};

std::shared_ptr<SlotCipher> cipher_of(std::uint8_t seed) {
  const std::vector<std::byte> key(32, std::byte{seed});
  return SlotCipher::make(key, {}).value();
}

TEST_F(Verify, counts_good_and_free_slots_and_reads_every_byte) {
  make_store(7, 5);
  std::uint64_t told = 0;
  std::uint64_t total = 0;
  SurveyOptions options;
  std::vector<std::uint32_t> depths;
  options.on_block = [&](const StoreSurvey&, const SlotHeader& header) {
    depths.push_back(header.block.depth);
  };
  options.go_on = [&](std::uint64_t done, std::uint64_t all) {
    told = done;
    total = all;
    return true;
  };
  const StoreSurvey store = survey(options);
  EXPECT_EQ(store.slots.good, 5U);
  EXPECT_EQ(store.slots.free, kSlots - 5);
  EXPECT_EQ(store.slots.corrupt + store.slots.foreign + store.slots.failed + store.slots.unreadable, 0U);
  EXPECT_EQ(depths, (std::vector<std::uint32_t>{0, 1, 2, 3, 4}));
  EXPECT_TRUE(store.readable);
  EXPECT_FALSE(store.in_use);
  EXPECT_EQ(told, total);
  EXPECT_EQ(total, kSlots * kStride);
}

TEST_F(Verify, a_flipped_bit_of_header_or_payload_is_corrupt_and_one_of_the_padding_is_not) {
  make_store(7, 5);
  flip(7, 0 * kStride + 90);                                 // the key
  flip(7, 2 * kStride + kSlotHeaderBytes + kPayload - 1);    // the last byte
  flip(7, 3 * kStride + kSlotHeaderBytes + kPayload + 100);  // behind it
  const StoreSurvey store = survey();
  EXPECT_EQ(store.slots.corrupt, 2U);
  EXPECT_EQ(store.slots.good, 3U);
}

TEST_F(Verify, an_image_in_another_slot_and_one_of_another_store_are_foreign) {
  make_store(7, 4);
  {
    const FileHandle file(::open(file_of(7).c_str(), O_RDWR | O_CLOEXEC));
    std::vector<char> image(kStride);
    ASSERT_EQ(::pread(file.fd(), image.data(), image.size(), 0), ssize_t{kStride});
    ASSERT_EQ(::pwrite(file.fd(), image.data(), image.size(), 9 * kStride), ssize_t{kStride});
  }
  EXPECT_EQ(survey().slots.foreign, 1U);
  make_store(8, 4);
  std::filesystem::copy_file(file_of(7), file_of(8), std::filesystem::copy_options::overwrite_existing);
  auto found = survey_stores(path, {});
  ASSERT_EQ(found->stores.size(), 2U);
  EXPECT_EQ(found->stores[1].slots.foreign, 5U);
  EXPECT_EQ(found->stores[1].slots.good, 0U);
}

TEST_F(Verify, encrypted_blocks_are_good_with_their_key_and_unreadable_without) {
  make_store(7, 4, cipher_of(1));
  EXPECT_EQ(survey().slots.unreadable, 4U);
  SurveyOptions options;
  options.cipher = cipher_of(2);
  EXPECT_EQ(survey(options).slots.unreadable, 4U);
  options.cipher = cipher_of(1);
  EXPECT_EQ(survey(options).slots.good, 4U);
  flip(7, kStride + kSlotHeaderBytes);
  EXPECT_EQ(survey(options).slots.corrupt, 1U);
}

TEST_F(Verify, a_store_that_is_open_is_passed_over_or_read_while_it_is_written_to) {
  const SlotStore::Opened opened = open_store(7);
  write_durably(*opened.store, 3, {3, 1});
  EXPECT_NE(survey().not_read, "");
  SurveyOptions options;
  options.in_use = StoresInUse::read;
  const StoreSurvey store = survey(options);
  EXPECT_TRUE(store.in_use);
  EXPECT_EQ(store.slots.good, 1U);
  auto purged = purge_stores(path, std::nullopt);
  ASSERT_EQ(purged->size(), 1U);
  EXPECT_TRUE(purged->at(0).in_use);
  EXPECT_NE(purged->at(0).not_purged, "");
  EXPECT_TRUE(serves(*opened.store, 3, {3, 1}));
}

TEST_F(Verify, who_is_told_may_end_it) {
  make_store(7, 4);
  SurveyOptions options;
  options.go_on = [](std::uint64_t, std::uint64_t) { return false; };
  EXPECT_EQ(survey_stores(path, options).status().code(), StatusCode::closed);
}

TEST_F(Verify, what_is_no_store_directory_is_said_to_be_none) {
  const auto says = [&](const std::string& directory, const std::string& what) {
    const Status status = survey_stores(directory, {}).status();
    EXPECT_NE(status.message().find(what), std::string::npos) << status.message();
    EXPECT_EQ(purge_stores(directory, std::nullopt).status().message(), status.message());
    return status.code();
  };
  const std::string empty = files.path() + "/empty";
  std::filesystem::create_directory(empty);
  std::filesystem::permissions(empty, std::filesystem::perms::owner_all);
  EXPECT_EQ(says(empty, "is empty"), StatusCode::invalid_argument);
  EXPECT_TRUE(std::filesystem::is_empty(empty)) << "nothing is made";
  EXPECT_EQ(says(files.path() + "/none", "none"), StatusCode::io);
  EXPECT_FALSE(std::filesystem::exists(files.path() + "/none"));
  make_store(7, 1);
  EXPECT_EQ(says(std::filesystem::path(file_of(7)).parent_path(), "two levels up"),
            StatusCode::invalid_argument);
}

TEST_F(Verify, a_purged_namespace_is_gone_for_good_and_the_others_are_served) {
  make_store(7, 6);  // the tenants 0, 1, 2 in turn
  auto purged = purge_stores(path, namespace_tag("tenant 1"));
  ASSERT_TRUE(purged.is_ok()) << purged.status().message();
  EXPECT_EQ(purged->at(0).dropped, 2U);
  EXPECT_EQ(purged->at(0).not_purged, "");
  const StoreSurvey store = survey();
  EXPECT_EQ(store.slots.good, 4U);
  EXPECT_EQ(store.slots.free, kSlots - 4);
  {
    // The catalog, which was out of purge's reach here, still names them: their slots prove nothing.
    SlotStore::Opened opened = open_store(7);
    for (std::uint32_t i = 0; i < 6; ++i) EXPECT_EQ(serves(*opened.store, i, {i, 1}), i % 3 != 1) << i;
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_EQ(purge_stores(path, namespace_tag("tenant 1"))->at(0).dropped, 0U);
}

TEST_F(Verify, purging_all_leaves_images_of_a_newer_version_alone) {
  make_store(7, 3);
  {
    const FileHandle file(::open(file_of(7).c_str(), O_RDWR | O_CLOEXEC));
    const FileHandle golden(
        ::open((std::filesystem::path(__FILE__).parent_path() / "../../golden/slot/newer_v2.bin").c_str(),
               O_RDONLY | O_CLOEXEC));
    std::vector<char> image(kSlotHeaderBytes);
    ASSERT_EQ(::pread(golden.fd(), image.data(), image.size(), 0), ssize_t{kSlotHeaderBytes});
    ASSERT_EQ(::pwrite(file.fd(), image.data(), image.size(), 8 * kStride), ssize_t{kSlotHeaderBytes});
  }
  EXPECT_EQ(survey().slots.newer, 1U);
  auto purged = purge_stores(path, std::nullopt);
  EXPECT_EQ(purged->at(0).dropped, 3U);
  EXPECT_EQ(purged->at(0).newer, 1U);
  const StoreSurvey store = survey();
  EXPECT_EQ(store.slots.newer, 1U);
  EXPECT_EQ(store.slots.free, kSlots - 1);
}

}  // namespace
}  // namespace kvtier
