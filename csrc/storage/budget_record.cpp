// docs/formats/budget.md
#include <array>
#include <cstring>

#include "little_endian.h"

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

constexpr std::array<unsigned char, 8> kMagic = {0x89, 'K', 'V', 'B', 'D', 'G', 'T', '\n'};
constexpr std::uint32_t kVersion = 1;

// Magic and version stand there, and the checksum in the last 16 bytes, in every version.
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kZeroAt = 12;
constexpr std::size_t kPerDayAt = 16;
constexpr std::size_t kLeftAt = 24;
constexpr std::size_t kTimeAt = 32;
constexpr std::size_t kPaddingAt = 40;
constexpr std::size_t kChecksumAt = 496;
static_assert(kChecksumAt + 16 == kBudgetBytes);

}  // namespace

std::vector<std::byte> encode_budget(const SavedBudget& budget) {
  std::vector<std::byte> storage(kBudgetBytes, std::byte{0});
  const std::span<std::byte> bytes(storage);
  put_bytes(bytes, 0, std::as_bytes(std::span(kMagic)));
  put_little_endian(bytes, kVersionAt, kVersion);
  put_little_endian(bytes, kPerDayAt, budget.bytes_per_day);
  put_little_endian(bytes, kLeftAt, budget.left_bytes);
  put_little_endian(bytes, kTimeAt, static_cast<std::uint64_t>(budget.at_s));
  const Checksum checksum = checksum_of(bytes.first(kChecksumAt));
  put_little_endian(bytes, kChecksumAt, checksum.low);
  put_little_endian(bytes, kChecksumAt + 8, checksum.high);
  return storage;
}

RecordVerdict decode_budget(std::span<const std::byte> bytes, SavedBudget& budget) {
  if (bytes.size() < kBudgetBytes) return RecordVerdict::damaged;
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) return RecordVerdict::damaged;
  const std::size_t checksum_at = bytes.size() - 16;
  const Checksum stored{get_little_endian<std::uint64_t>(bytes, checksum_at),
                        get_little_endian<std::uint64_t>(bytes, checksum_at + 8)};
  if (checksum_of(bytes.first(checksum_at)) != stored) return RecordVerdict::damaged;
  const auto version = get_little_endian<std::uint32_t>(bytes, kVersionAt);
  if (version > kVersion) return RecordVerdict::newer_version;
  if (version != kVersion || bytes.size() != kBudgetBytes) return RecordVerdict::damaged;
  if (!all_zero(bytes.subspan(kZeroAt, kPerDayAt - kZeroAt)) ||
      !all_zero(bytes.subspan(kPaddingAt, kChecksumAt - kPaddingAt))) {
    return RecordVerdict::damaged;
  }
  budget.bytes_per_day = get_little_endian<std::uint64_t>(bytes, kPerDayAt);
  budget.left_bytes = get_little_endian<std::uint64_t>(bytes, kLeftAt);
  budget.at_s = static_cast<std::int64_t>(get_little_endian<std::uint64_t>(bytes, kTimeAt));
  return RecordVerdict::good;
}

}  // namespace kvtier
