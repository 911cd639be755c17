// The ledger's bytes and the names of stores: docs/formats/directory.md.
#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <vector>

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

Ledger sample() {
  return {std::uint64_t{1} << 40,
          {{"00112233445566ff-0", std::uint64_t{5} << 30, 1'700'000'000},
           {"00112233445566ff-4294967295", 0, -1},
           {"ffeeddccbbaa9988-12", ~std::uint64_t{0}, 0}}};
}

void seal(std::vector<std::byte>& bytes) {
  const std::size_t body = bytes.size() - 16;
  const Checksum checksum = checksum_of(std::span(bytes).first(body));
  for (std::size_t i = 0; i < 8; ++i) {
    bytes[body + i] = static_cast<std::byte>(checksum.low >> (8 * i));
    bytes[body + 8 + i] = static_cast<std::byte>(checksum.high >> (8 * i));
  }
}

TEST(Ledger, comes_back_as_it_was) {
  Ledger read;
  ASSERT_EQ(decode_ledger(encode_ledger(sample()), read), RecordVerdict::good);
  EXPECT_EQ(read, sample());
  ASSERT_EQ(decode_ledger(encode_ledger(Ledger{}), read), RecordVerdict::good);
  EXPECT_EQ(read, Ledger{});
}

TEST(Ledger, has_the_layout_of_its_table) {
  const std::vector<std::byte> bytes = encode_ledger(sample());
  ASSERT_EQ(bytes.size(), 32U + 3 * 48 + 16);
  EXPECT_EQ(bytes[0], std::byte{0x89});
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()) + 1, 7), "KVLEDG\n");
  EXPECT_EQ(bytes[8], std::byte{1});
  EXPECT_EQ(bytes[12], std::byte{3});
  EXPECT_EQ(bytes[16 + 5], std::byte{1}) << "2^40";
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(bytes.data()) + 32), "00112233445566ff-0");
  EXPECT_EQ(bytes[32 + 32 + 3], std::byte{0x40}) << "5 GiB";
}

TEST(Ledger, every_flipped_bit_and_every_cut_is_damage) {
  const std::vector<std::byte> good = encode_ledger(sample());
  Ledger read;
  for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= std::byte{1} << (bit % 8);
    ASSERT_EQ(decode_ledger(bytes, read), RecordVerdict::damaged) << bit;
  }
  for (std::size_t size = 0; size < good.size(); ++size) {
    ASSERT_EQ(decode_ledger(std::span(good).first(size), read), RecordVerdict::damaged) << size;
  }
  EXPECT_EQ(read, Ledger{}) << "untouched";
}

TEST(Ledger, a_sound_one_of_a_newer_version_is_told_from_damage) {
  std::vector<std::byte> bytes = encode_ledger(sample());
  bytes[8] = std::byte{2};
  bytes.insert(bytes.end() - 16, std::byte{5});  // of another length, too
  seal(bytes);
  Ledger read;
  EXPECT_EQ(decode_ledger(bytes, read), RecordVerdict::newer_version);
}

TEST(Ledger, what_is_never_written_is_damage_even_with_a_sound_checksum) {
  struct Harm {
    std::size_t at;
    char value;
  };
  // version 0; the count; reserved; a name that is none; behind a name's end; a name out of order
  for (const Harm harm : {Harm{8, 0}, {12, 2}, {15, 1}, {24, 1}, {32, '/'}, {32, 0}, {63, 'x'}, {32, 'f'}}) {
    std::vector<std::byte> bytes = encode_ledger(sample());
    bytes[harm.at] = static_cast<std::byte>(harm.value);
    seal(bytes);
    Ledger read;
    EXPECT_EQ(decode_ledger(bytes, read), RecordVerdict::damaged) << harm.at;
  }
}

TEST(StoreName, says_fingerprint_and_number) {
  Fingerprint fingerprint{};
  for (std::size_t i = 0; i < fingerprint.size(); ++i) fingerprint[i] = static_cast<std::byte>(0xf8 + i);
  EXPECT_EQ(store_name_prefix(fingerprint), "f8f9fafbfcfdfeff");
  const auto name = parse_store_name("f8f9fafbfcfdfeff-17");
  ASSERT_TRUE(name.has_value());
  EXPECT_EQ(name->number, 17U);
  EXPECT_EQ(name->text(), "f8f9fafbfcfdfeff-17");
}

TEST(StoreName, anything_else_is_none) {
  for (const char* text :
       {"", "f8f9fafbfcfdfeff", "f8f9fafbfcfdfeff-", "f8f9fafbfcfdfeff-01", "f8f9fafbfcfdfeff--1",
        "F8f9fafbfcfdfeff-1", "f8f9fafbfcfdfef-1", "f8f9fafbfcfdfeff-4294967296", "f8f9fafbfcfdfeff-1 ",
        "../f9fafbfcfdfeff-1", "f8f9fafbfcfdfeff-1/", "lost+found"}) {
    EXPECT_FALSE(parse_store_name(text).has_value()) << text;
  }
}

}  // namespace
}  // namespace kvtier
