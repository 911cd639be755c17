// The write budget's bytes (docs/formats/budget.md), and that a store keeps it.
#include <gtest/gtest.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "storage/store_world.h"

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

using namespace store_world;

SavedBudget sample() { return {1'000'000'000'000, 123'456'789'012, 1'700'000'000}; }

void seal(std::vector<std::byte>& bytes) {
  const std::size_t body = bytes.size() - 16;
  const Checksum checksum = checksum_of(std::span(bytes).first(body));
  for (std::size_t i = 0; i < 8; ++i) {
    bytes[body + i] = static_cast<std::byte>(checksum.low >> (8 * i));
    bytes[body + 8 + i] = static_cast<std::byte>(checksum.high >> (8 * i));
  }
}

TEST(BudgetRecord, has_the_bytes_of_its_golden_file_and_comes_back) {
  std::ifstream file(std::filesystem::path(__FILE__).parent_path() / "../../golden/budget_v1.bin",
                     std::ios::binary);
  ASSERT_TRUE(file.is_open());
  const std::string golden(std::istreambuf_iterator<char>(file), {});
  const std::vector<std::byte> bytes = encode_budget(sample());
  ASSERT_EQ(golden.size(), bytes.size());
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), golden);
  SavedBudget read;
  ASSERT_EQ(decode_budget(bytes, read), RecordVerdict::good);
  EXPECT_EQ(read, sample());
}

TEST(BudgetRecord, every_flipped_bit_and_every_cut_is_damage) {
  const std::vector<std::byte> good = encode_budget(sample());
  SavedBudget read;
  for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_EQ(decode_budget(bytes, read), RecordVerdict::damaged) << bit;
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    ASSERT_EQ(decode_budget(std::span(good).first(size), read), RecordVerdict::damaged) << size;
  }
  EXPECT_EQ(read, SavedBudget{}) << "untouched";
}

TEST(BudgetRecord, a_sound_one_of_a_newer_version_is_told_from_damage) {
  std::vector<std::byte> bytes = encode_budget(sample());
  bytes[8] = std::byte{2};
  bytes[100] = std::byte{7};  // a field that this version does not know
  seal(bytes);
  SavedBudget read;
  EXPECT_EQ(decode_budget(bytes, read), RecordVerdict::newer_version);
  for (const std::size_t at : {std::size_t{12}, std::size_t{40}, std::size_t{495}}) {
    bytes = encode_budget(sample());
    bytes[at] = std::byte{1};
    seal(bytes);
    EXPECT_EQ(decode_budget(bytes, read), RecordVerdict::damaged) << at;
  }
}

TEST(BudgetRecord, a_store_gives_back_what_was_saved_last_and_nothing_of_an_older_store) {
  Home home;
  {
    SlotStore::Opened opened = open(home, options_of(home));
    EXPECT_FALSE(opened.budget.has_value());
    opened.store->save_budget({5, 4, 3});
    opened.store->save_budget(sample());
    EXPECT_TRUE(opened.store->close(soon()));
  }
  SlotStore::Opened opened = open(home, options_of(home));
  ASSERT_TRUE(opened.budget.has_value());
  EXPECT_EQ(*opened.budget, sample());
}

TEST(BudgetRecord, a_newer_one_is_left_untouched_and_a_damaged_one_is_replaced) {
  Home home;
  std::vector<std::byte> newer = encode_budget(sample());
  newer[8] = std::byte{9};
  seal(newer);
  ASSERT_TRUE(home.directory->replace_file("budget", newer));
  {
    SlotStore::Opened opened = open(home, options_of(home));
    EXPECT_FALSE(opened.budget.has_value());
    opened.store->save_budget(sample());
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_EQ(home.directory->read_file("budget").value(), newer);
  newer[30] ^= std::byte{1};
  ASSERT_TRUE(home.directory->replace_file("budget", newer));
  {
    SlotStore::Opened opened = open(home, options_of(home));
    EXPECT_FALSE(opened.budget.has_value());
    opened.store->save_budget(sample());
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_EQ(home.directory->read_file("budget").value(), encode_budget(sample()));
}

}  // namespace
}  // namespace kvtier
