// Mutated superblocks, ledgers and catalog records: decoding judges every one, and what it calls good is
// exactly what encoding would write. A fixed number by a fixed seed (KVTIER_FUZZ_SEED: another);
// KVTIER_FUZZ_SECONDS=600 goes on for so long by the clock. They start from tests/golden/fuzz, whose files
// are called by their verdicts.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "storage/slot_samples.h"

#include "kvtier/storage/catalog_records.h"
#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

using slot_samples::Bytes;
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
  const char* first = std::getenv("KVTIER_FUZZ_SEED");
  Random random(seed + (first == nullptr ? 0 : 4 * std::strtoull(first, nullptr, 10)));
  std::uint64_t done = 0;
  while (!testing::Test::HasFailure() && (done < rounds || std::chrono::steady_clock::now() < end)) {
    one(random);
    ++done;
  }
  return done;
}

struct Record {
  std::string name;  // <verdict>-<what>
  Bytes bytes;
};

// tests/golden/fuzz/<kind>, by name.
std::vector<Record> corpus_of(const std::string& kind) {
  std::vector<Record> records;
  for (const auto& entry : std::filesystem::directory_iterator(slot_samples::golden_path() / "fuzz" / kind)) {
    records.push_back({entry.path().stem(), slot_samples::read_whole(entry.path())});
  }
  std::ranges::sort(records, {}, &Record::name);
  return records;
}

std::string name_of(RecordVerdict verdict) {
  switch (verdict) {
    case RecordVerdict::good: return "good";
    case RecordVerdict::damaged: return "damaged";
    case RecordVerdict::newer_version: return "newer_version";
  }
  return "";
}

// Decodes, and holds what is called good to its one encoding.
std::string judge_superblock(const Bytes& bytes) {
  Superblock read;
  const RecordVerdict verdict = decode_superblock(bytes, read);
  if (verdict == RecordVerdict::good) {
    EXPECT_EQ(encode_superblock(read), bytes);
  }
  return name_of(verdict);
}

std::string judge_ledger(const Bytes& bytes) {
  Ledger read;
  const RecordVerdict verdict = decode_ledger(bytes, read);
  if (verdict == RecordVerdict::good) {
    EXPECT_EQ(encode_ledger(read), bytes);
  }
  return name_of(verdict);
}

std::string judge_catalog_record(const Bytes& bytes) {
  CatalogBytes parts;
  if (bytes.size() != parts.key.size() + parts.value.size()) return "damaged";  // as the catalog says itself
  std::copy_n(bytes.begin(), parts.key.size(), parts.key.begin());
  std::copy_n(bytes.begin() + std::ssize(parts.key), parts.value.size(), parts.value.begin());
  const std::optional<CatalogRecord> read = decode_catalog_record(parts);
  if (!read) return "damaged";
  EXPECT_EQ(encode_catalog_record(*read), parts);
  return "good";
}

using Judge = std::string (*)(const Bytes&);

TEST(StoreFuzz, the_corpus_is_judged_as_its_files_are_called) {
  const std::vector<std::pair<std::string, Judge>> kinds = {
      {"catalog", judge_catalog_record}, {"superblock", judge_superblock}, {"ledger", judge_ledger}};
  for (const auto& [kind, judge] : kinds) {
    const std::vector<Record> records = corpus_of(kind);
    EXPECT_GE(records.size(), 10U) << kind;
    for (const Record& record : records) {
      EXPECT_EQ(judge(record.bytes), record.name.substr(0, record.name.find('-')))
          << kind << "/" << record.name;
    }
  }
}

// Mutants of the corpus, most of them with a sound checksum. Returns how often each verdict was given.
std::map<std::string, std::uint64_t> fuzz(const std::string& kind, Judge judge, std::uint64_t seed,
                                          std::uint64_t rounds) {
  const std::vector<Record> records = corpus_of(kind);
  std::map<std::string, std::uint64_t> verdicts;
  campaign(seed, rounds, [&](Random& random) {
    Bytes bytes = records[below(random, records.size())].bytes;
    mutate(bytes, random);
    if (below(random, 4) != 0) seal(bytes);
    ++verdicts[judge(bytes)];
  });
  return verdicts;
}

TEST(StoreFuzz, superblocks) {
  auto verdicts = fuzz("superblock", judge_superblock, 1, 20'000);
  EXPECT_GT(verdicts["good"], 100U) << "the mutations reach what is allowed, too";
  EXPECT_GT(verdicts["newer_version"], 100U);
}

TEST(StoreFuzz, ledgers) {
  auto verdicts = fuzz("ledger", judge_ledger, 2, 100'000);
  EXPECT_GT(verdicts["good"], 100U);
  EXPECT_GT(verdicts["newer_version"], 100U);
}

TEST(StoreFuzz, catalog_records) {
  const std::vector<Record> records = corpus_of("catalog");
  std::map<std::string, std::uint64_t> verdicts;
  campaign(3, 200'000, [&](Random& random) {  // they have no checksum, and one length
    Bytes bytes = records[below(random, records.size())].bytes;
    for (std::uint64_t i = below(random, 6); i > 0; --i)
      bytes[below(random, bytes.size())] = interesting(random);
    ++verdicts[judge_catalog_record(bytes)];
  });
  EXPECT_GT(verdicts["good"], 1000U);
  EXPECT_GT(verdicts["damaged"], 1000U);
}

}  // namespace
}  // namespace kvtier
