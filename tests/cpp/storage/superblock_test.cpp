// The superblock's bytes: docs/formats/superblock.md.
#include <gtest/gtest.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

Superblock sample() {
  Superblock superblock;
  for (std::size_t i = 0; i < superblock.store.size(); ++i)
    superblock.store[i] = static_cast<std::byte>(0xa0 + i);
  for (std::size_t i = 0; i < superblock.fingerprint.size(); ++i) {
    superblock.fingerprint[i] = static_cast<std::byte>(i);
  }
  superblock.class_strides = {2'101'248, 266'240, 8192};
  superblock.open_counter = 0x01020304;
  superblock.clean = true;
  return superblock;
}

bool same(const Superblock& a, const Superblock& b) {
  return a.store == b.store && a.fingerprint == b.fingerprint && a.class_strides == b.class_strides &&
         a.open_counter == b.open_counter && a.clean == b.clean;
}

void seal(std::vector<std::byte>& bytes) {
  const Checksum checksum = checksum_of(std::span(bytes).first(4080));
  for (std::size_t i = 0; i < 8; ++i) {
    bytes[4080 + i] = static_cast<std::byte>(checksum.low >> (8 * i));
    bytes[4088 + i] = static_cast<std::byte>(checksum.high >> (8 * i));
  }
}

TEST(Superblock, comes_back_as_it_was) {
  for (std::size_t classes = 1; classes <= kMaxStoreClasses; classes += 21) {
    Superblock superblock = sample();
    superblock.class_strides.assign(classes, 4096 * classes);
    superblock.clean = classes % 2 == 0;
    Superblock read;
    ASSERT_EQ(decode_superblock(encode_superblock(superblock), read), RecordVerdict::good);
    EXPECT_TRUE(same(read, superblock));
  }
}

TEST(Superblock, has_the_bytes_of_its_golden_file) {
  std::ifstream file(std::filesystem::path(__FILE__).parent_path() / "../../golden/superblock_v1.bin",
                     std::ios::binary);
  ASSERT_TRUE(file.is_open());
  const std::string golden(std::istreambuf_iterator<char>(file), {});
  const std::vector<std::byte> bytes = encode_superblock(sample());
  ASSERT_EQ(golden.size(), bytes.size());
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()), golden);
}

TEST(Superblock, every_flipped_bit_is_damage) {
  const std::vector<std::byte> good = encode_superblock(sample());
  for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    Superblock read;
    ASSERT_EQ(decode_superblock(bytes, read), RecordVerdict::damaged) << bit;
    ASSERT_TRUE(same(read, Superblock{})) << "untouched";
  }
}

TEST(Superblock, any_other_length_is_damage) {
  std::vector<std::byte> bytes = encode_superblock(sample());
  Superblock read;
  for (const std::size_t size : {0U, 1U, 8U, 4080U, 4095U}) {
    EXPECT_EQ(decode_superblock(std::span(bytes).first(size), read), RecordVerdict::damaged);
  }
  bytes.push_back(std::byte{0});
  EXPECT_EQ(decode_superblock(bytes, read), RecordVerdict::damaged);
}

TEST(Superblock, a_sound_one_of_a_newer_version_is_told_from_damage) {
  std::vector<std::byte> bytes = encode_superblock(sample());
  bytes[8] = std::byte{2};
  bytes[600] = std::byte{77};  // a field that this version does not know
  Superblock read;
  EXPECT_EQ(decode_superblock(bytes, read), RecordVerdict::damaged) << "a flipped bit is no version";
  seal(bytes);
  EXPECT_EQ(decode_superblock(bytes, read), RecordVerdict::newer_version);
}

TEST(Superblock, what_is_never_written_is_damage_even_with_a_sound_checksum) {
  struct Harm {
    std::size_t at;
    unsigned char value;
  };
  // version 0; length; clean 2; padding; no class; 65 classes; more padding; a stride of zero; an unused
  // stride; reserved
  for (const Harm harm : {Harm{8, 0},
                          {12, 1},
                          {68, 2},
                          {69, 1},
                          {72, 0},
                          {72, 65},
                          {76, 1},
                          {80 + 8 * 3, 1},
                          {592, 1},
                          {4079, 1}}) {
    std::vector<std::byte> bytes = encode_superblock(sample());
    bytes[harm.at] = std::byte{harm.value};
    seal(bytes);
    Superblock read;
    EXPECT_EQ(decode_superblock(bytes, read), RecordVerdict::damaged) << harm.at;
  }
  std::vector<std::byte> bytes = encode_superblock(sample());
  for (std::size_t i = 80; i < 88; ++i) bytes[i] = std::byte{0};
  seal(bytes);
  Superblock read;
  EXPECT_EQ(decode_superblock(bytes, read), RecordVerdict::damaged);
}

}  // namespace
}  // namespace kvtier
