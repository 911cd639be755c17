// docs/formats/directory.md
#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>

#include "little_endian.h"

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

constexpr std::array<unsigned char, 8> kMagic = {0x89, 'K', 'V', 'L', 'E', 'D', 'G', '\n'};
constexpr std::uint32_t kVersion = 1;

// Magic and version stand there, and the checksum in the last 16 bytes, in every version.
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kNumEntriesAt = 12;
constexpr std::size_t kCapacityAt = 16;
constexpr std::size_t kHeadBytes = 32;
constexpr std::size_t kEntryBytes = 48;
constexpr std::size_t kNameBytes = 32;
constexpr std::size_t kGrantedAt = 32;
constexpr std::size_t kLastOpenAt = 40;
constexpr std::size_t kChecksumBytes = 16;
// What Directory::read_file() takes.
static_assert(kHeadBytes + kMaxLedgerEntries * kEntryBytes + kChecksumBytes <= std::size_t{1} << 20);

constexpr std::size_t kPrefixDigits = 16;

bool is_hex_digit(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

// The name in a field of kNameBytes, padded with zeros; nullopt for anything else.
std::optional<std::string> decode_name(std::span<const std::byte> field) {
  std::string text;
  for (const std::byte byte : field) {
    if (byte == std::byte{0}) break;
    text.push_back(std::to_integer<char>(byte));
  }
  if (!all_zero(field.subspan(text.size())) || !parse_store_name(text)) return std::nullopt;
  return text;
}

}  // namespace

std::string StoreName::text() const { return prefix + "-" + std::to_string(number); }

std::string store_name_prefix(const Fingerprint& fingerprint) {
  constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (std::size_t i = 0; i < kPrefixDigits / 2; ++i) {
    const auto value = std::to_integer<unsigned>(fingerprint[i]);
    text.push_back(kDigits[value >> 4]);
    text.push_back(kDigits[value & 15]);
  }
  return text;
}

std::optional<StoreName> parse_store_name(std::string_view text) {
  if (text.size() < kPrefixDigits + 2 || text[kPrefixDigits] != '-') return std::nullopt;
  const std::string_view prefix = text.substr(0, kPrefixDigits);
  if (!std::all_of(prefix.begin(), prefix.end(), is_hex_digit)) return std::nullopt;
  const std::string_view digits = text.substr(kPrefixDigits + 1);
  if (digits.size() > 1 && digits.front() == '0') return std::nullopt;
  StoreName name{std::string(prefix), 0};
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), name.number);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  return name;
}

std::vector<std::byte> encode_ledger(const Ledger& ledger) {
  KVTIER_CHECK(ledger.entries.size() <= kMaxLedgerEntries);
  std::vector<LedgerEntry> entries = ledger.entries;
  std::sort(entries.begin(), entries.end(),
            [](const LedgerEntry& a, const LedgerEntry& b) { return a.store < b.store; });
  const std::size_t body_bytes = kHeadBytes + kEntryBytes * entries.size();
  std::vector<std::byte> storage(body_bytes + kChecksumBytes, std::byte{0});
  const std::span<std::byte> bytes(storage);
  put_bytes(bytes, 0, std::as_bytes(std::span(kMagic)));
  put_little_endian(bytes, kVersionAt, kVersion);
  put_little_endian(bytes, kNumEntriesAt, static_cast<std::uint32_t>(entries.size()));
  put_little_endian(bytes, kCapacityAt, ledger.capacity_bytes);
  for (std::size_t i = 0; i < entries.size(); ++i) {
    KVTIER_CHECK(parse_store_name(entries[i].store).has_value());
    const std::span<std::byte> entry = bytes.subspan(kHeadBytes + kEntryBytes * i, kEntryBytes);
    put_bytes(entry, 0, std::as_bytes(std::span(entries[i].store)));
    put_little_endian(entry, kGrantedAt, entries[i].granted_bytes);
    put_little_endian(entry, kLastOpenAt, static_cast<std::uint64_t>(entries[i].last_open_s));
  }
  const Checksum checksum = checksum_of(bytes.first(body_bytes));
  put_little_endian(bytes, body_bytes, checksum.low);
  put_little_endian(bytes, body_bytes + 8, checksum.high);
  return storage;
}

RecordVerdict decode_ledger(std::span<const std::byte> bytes, Ledger& ledger) {
  if (bytes.size() < kHeadBytes + kChecksumBytes) return RecordVerdict::damaged;
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) return RecordVerdict::damaged;
  const std::size_t body_bytes = bytes.size() - kChecksumBytes;
  const Checksum stored{get_little_endian<std::uint64_t>(bytes, body_bytes),
                        get_little_endian<std::uint64_t>(bytes, body_bytes + 8)};
  if (checksum_of(bytes.first(body_bytes)) != stored) return RecordVerdict::damaged;
  const auto version = get_little_endian<std::uint32_t>(bytes, kVersionAt);
  if (version > kVersion) return RecordVerdict::newer_version;
  if (version != kVersion) return RecordVerdict::damaged;

  const auto num_entries = get_little_endian<std::uint32_t>(bytes, kNumEntriesAt);
  if (num_entries > kMaxLedgerEntries || body_bytes != kHeadBytes + kEntryBytes * std::size_t{num_entries}) {
    return RecordVerdict::damaged;
  }
  if (!all_zero(bytes.subspan(kCapacityAt + 8, kHeadBytes - kCapacityAt - 8))) return RecordVerdict::damaged;
  Ledger result;
  result.capacity_bytes = get_little_endian<std::uint64_t>(bytes, kCapacityAt);
  for (std::size_t i = 0; i < num_entries; ++i) {
    const std::span<const std::byte> entry = bytes.subspan(kHeadBytes + kEntryBytes * i, kEntryBytes);
    std::optional<std::string> name = decode_name(entry.first(kNameBytes));
    if (!name) return RecordVerdict::damaged;
    if (!result.entries.empty() && result.entries.back().store >= *name) return RecordVerdict::damaged;
    result.entries.push_back(
        {std::move(*name), get_little_endian<std::uint64_t>(entry, kGrantedAt),
         static_cast<std::int64_t>(get_little_endian<std::uint64_t>(entry, kLastOpenAt))});
  }
  ledger = std::move(result);
  return RecordVerdict::good;
}

}  // namespace kvtier
