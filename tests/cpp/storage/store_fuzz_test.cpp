// Mutated superblocks, ledgers and catalog records: decoding judges every one, and what it calls good is
// exactly what encoding would write. A fixed number by a fixed seed; KVTIER_FUZZ_SECONDS=600 goes on for so
// long by the clock.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "kvtier/storage/catalog_records.h"
#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

using Bytes = std::vector<std::byte>;
using Random = std::mt19937_64;

std::uint64_t below(Random& random, std::uint64_t bound) { return random() % bound; }

std::byte interesting(Random& random) {
  constexpr std::array kValues = {0x00, 0x01, 0x02, 0x7f, 0x80, 0xff, 0x2d, 0x2f, 0x30, 0x61};
  return below(random, 2) == 0 ? static_cast<std::byte>(random())
                               : static_cast<std::byte>(kValues[below(random, kValues.size())]);
}

// A few flips, overwrites, cuts, insertions and moves.
void mutate(Bytes& bytes, Random& random) {
  for (std::uint64_t i = 1 + below(random, 4); i > 0 && !bytes.empty(); --i) {
    const std::size_t at = below(random, bytes.size());
    // Most of a superblock is reserved; its fields are at the front.
    const std::size_t near = below(random, std::min<std::size_t>(bytes.size(), 96));
    const auto place = [&bytes](std::size_t offset) {
      return bytes.begin() + static_cast<std::ptrdiff_t>(offset);
    };
    switch (below(random, 8)) {
      case 0: bytes[at] ^= std::byte{1} << below(random, 8); break;
      case 1: bytes[near] ^= std::byte{1} << below(random, 8); break;
      case 2: bytes[at] = interesting(random); break;
      case 3: bytes[near] = interesting(random); break;
      case 4: bytes.resize(at); break;
      case 5: bytes.insert(place(at), 1 + below(random, 64), interesting(random)); break;
      case 6:
        std::fill(place(at), place(std::min(bytes.size(), at + 1 + below(random, 16))), interesting(random));
        break;
      default: std::swap(bytes[near], bytes[at]); break;
    }
  }
}

// A sound checksum in the last 16 bytes, so that what lies behind it is reached.
void seal(Bytes& bytes) {
  if (bytes.size() < 16) return;
  const std::size_t body = bytes.size() - 16;
  const Checksum checksum = checksum_of(std::span(bytes).first(body));
  for (std::size_t i = 0; i < 8; ++i) {
    bytes[body + i] = static_cast<std::byte>(checksum.low >> (8 * i));
    bytes[body + 8 + i] = static_cast<std::byte>(checksum.high >> (8 * i));
  }
}

// Calls `one` with ever new randomness, and returns how often.
std::uint64_t campaign(std::uint64_t seed, std::uint64_t rounds, const std::function<void(Random&)>& one) {
  const char* given = std::getenv("KVTIER_FUZZ_SECONDS");
  const std::chrono::seconds duration(given == nullptr ? 0 : std::atoi(given) / 3);  // three campaigns
  const auto end = std::chrono::steady_clock::now() + duration;
  Random random(seed);
  std::uint64_t done = 0;
  while (!testing::Test::HasFailure() && (done < rounds || std::chrono::steady_clock::now() < end)) {
    one(random);
    ++done;
  }
  return done;
}

TEST(StoreFuzz, superblocks) {
  Superblock superblock;
  superblock.class_strides = {4096, 2'101'248};
  superblock.open_counter = 77;
  const Bytes good = encode_superblock(superblock);
  std::uint64_t accepted = 0;
  campaign(1, 20'000, [&](Random& random) {
    Bytes bytes = good;
    mutate(bytes, random);
    if (below(random, 4) != 0) seal(bytes);
    Superblock read;
    if (decode_superblock(bytes, read) != RecordVerdict::good) return;
    ++accepted;
    ASSERT_EQ(encode_superblock(read), bytes);
  });
  EXPECT_GT(accepted, 100U) << "the mutations reach what is allowed, too";
}

TEST(StoreFuzz, ledgers) {
  const Ledger ledger{
      1 << 30, {{"0011223344556677-0", 5, 6}, {"0011223344556677-1", 7, 8}, {"aa11223344556677-9", 1, 2}}};
  const Bytes good = encode_ledger(ledger);
  std::uint64_t accepted = 0;
  campaign(2, 100'000, [&](Random& random) {
    Bytes bytes = good;
    mutate(bytes, random);
    if (below(random, 4) != 0) seal(bytes);
    Ledger read;
    if (decode_ledger(bytes, read) != RecordVerdict::good) return;
    ++accepted;
    ASSERT_EQ(encode_ledger(read), bytes);
  });
  EXPECT_GT(accepted, 1000U);
}

TEST(StoreFuzz, catalog_records) {
  CatalogRecord record;
  record.block.parent = BlockKey{};
  record.block.depth = 3;
  record.payload_bytes = 4096;
  std::uint64_t accepted = 0;
  std::uint64_t refused = 0;
  campaign(3, 200'000, [&](Random& random) {
    record.block.parent.reset();
    if (below(random, 2) == 0) record.block.parent = BlockKey{};
    CatalogBytes bytes = encode_catalog_record(record);
    for (std::uint64_t i = below(random, 6); i > 0; --i) {
      const std::uint64_t at = below(random, bytes.key.size() + bytes.value.size());
      std::byte& byte = at < bytes.key.size() ? bytes.key[at] : bytes.value[at - bytes.key.size()];
      byte = interesting(random);
    }
    const std::optional<CatalogRecord> read = decode_catalog_record(bytes);
    ++(read ? accepted : refused);
    if (read) {
      ASSERT_EQ(encode_catalog_record(*read), bytes);
    }
  });
  EXPECT_GT(accepted, 1000U);
  EXPECT_GT(refused, 1000U);
}

}  // namespace
}  // namespace kvtier
