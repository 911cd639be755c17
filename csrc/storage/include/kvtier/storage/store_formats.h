// The small records of a store directory as bytes: superblock (docs/formats/superblock.md), ledger
// (docs/formats/directory.md) and write budget (docs/formats/budget.md). Pure. Nothing that is read from a
// drive is believed: decoding judges, and never reads beyond what it was given.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvtier/storage/store_directory.h"

namespace kvtier {

// What became of a record that was read. Only a record with a sound checksum is called newer, so that a
// flipped bit does not lock a store away for ever.
enum class RecordVerdict : std::uint8_t { good, damaged, newer_version };

inline constexpr std::size_t kSuperblockBytes = 4096;
inline constexpr std::size_t kMaxStoreClasses = 64;

// Requires 1 to kMaxStoreClasses classes, none of stride 0.
std::vector<std::byte> encode_superblock(const Superblock& superblock);
// On good, `superblock` is what the bytes say; otherwise it is untouched.
RecordVerdict decode_superblock(std::span<const std::byte> bytes, Superblock& superblock);

struct LedgerEntry {
  std::string store;                // "<fingerprint>-<n>"
  std::uint64_t granted_bytes = 0;  // to the process that has it open, or had it open last
  std::int64_t last_open_s = 0;     // Unix time
  friend bool operator==(const LedgerEntry&, const LedgerEntry&) = default;
};

struct Ledger {
  std::uint64_t capacity_bytes = 0;  // as the last opener of the directory gave it
  std::vector<LedgerEntry> entries;  // sorted by store, each once
  friend bool operator==(const Ledger&, const Ledger&) = default;
};

inline constexpr std::size_t kMaxLedgerEntries = 16384;

// Requires at most kMaxLedgerEntries entries with names that parse_store_name() takes; sorts them.
std::vector<std::byte> encode_ledger(const Ledger& ledger);
RecordVerdict decode_ledger(std::span<const std::byte> bytes, Ledger& ledger);

inline constexpr std::size_t kBudgetBytes = 512;

std::vector<std::byte> encode_budget(const SavedBudget& budget);
RecordVerdict decode_budget(std::span<const std::byte> bytes, SavedBudget& budget);

// A store's directory is named by the first 8 bytes of its fingerprint in hex and a number. Two fingerprints
// that begin alike share the prefix and take different numbers.
struct StoreName {
  std::string prefix;  // 16 lower-case hex digits
  std::uint32_t number = 0;
  std::string text() const;
  friend auto operator<=>(const StoreName&, const StoreName&) = default;
};
std::string store_name_prefix(const Fingerprint& fingerprint);
// nullopt for anything that text() would not write.
std::optional<StoreName> parse_store_name(std::string_view text);

}  // namespace kvtier
