// docs/formats/superblock.md
#include <algorithm>
#include <array>
#include <cstring>

#include "little_endian.h"

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {
namespace {

constexpr std::array<unsigned char, 8> kMagic = {0x89, 'K', 'V', 'S', 'U', 'P', 'B', '\n'};
constexpr std::uint32_t kVersion = 1;

// Offsets. Magic, version, length and checksum stand there in every version.
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kLengthAt = 12;
constexpr std::size_t kStoreAt = 16;
constexpr std::size_t kFingerprintAt = 32;
constexpr std::size_t kOpenCounterAt = 64;
constexpr std::size_t kCleanAt = 68;
constexpr std::size_t kNumClassesAt = 72;
constexpr std::size_t kStridesAt = 80;
constexpr std::size_t kReservedAt = kStridesAt + 8 * kMaxStoreClasses;
constexpr std::size_t kChecksumAt = 4080;
static_assert(kReservedAt == 592 && kChecksumAt + 16 == kSuperblockBytes);

}  // namespace

std::vector<std::byte> encode_superblock(const Superblock& superblock) {
  KVTIER_CHECK(!superblock.class_strides.empty() && superblock.class_strides.size() <= kMaxStoreClasses);
  std::vector<std::byte> storage(kSuperblockBytes, std::byte{0});
  const std::span<std::byte> bytes(storage);
  put_bytes(bytes, 0, std::as_bytes(std::span(kMagic)));
  put_little_endian(bytes, kVersionAt, kVersion);
  put_little_endian(bytes, kLengthAt, static_cast<std::uint32_t>(kSuperblockBytes));
  put_bytes(bytes, kStoreAt, superblock.store);
  put_bytes(bytes, kFingerprintAt, superblock.fingerprint);
  put_little_endian(bytes, kOpenCounterAt, superblock.open_counter);
  bytes[kCleanAt] = superblock.clean ? std::byte{1} : std::byte{0};
  put_little_endian(bytes, kNumClassesAt, static_cast<std::uint32_t>(superblock.class_strides.size()));
  for (std::size_t i = 0; i < superblock.class_strides.size(); ++i) {
    KVTIER_CHECK(superblock.class_strides[i] != 0);
    put_little_endian(bytes, kStridesAt + 8 * i, superblock.class_strides[i]);
  }
  const Checksum checksum = checksum_of(bytes.first(kChecksumAt));
  put_little_endian(bytes, kChecksumAt, checksum.low);
  put_little_endian(bytes, kChecksumAt + 8, checksum.high);
  return storage;
}

RecordVerdict decode_superblock(std::span<const std::byte> bytes, Superblock& superblock) {
  if (bytes.size() != kSuperblockBytes) return RecordVerdict::damaged;
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) return RecordVerdict::damaged;
  const Checksum stored{get_little_endian<std::uint64_t>(bytes, kChecksumAt),
                        get_little_endian<std::uint64_t>(bytes, kChecksumAt + 8)};
  if (checksum_of(bytes.first(kChecksumAt)) != stored) return RecordVerdict::damaged;
  const auto version = get_little_endian<std::uint32_t>(bytes, kVersionAt);
  if (version > kVersion) return RecordVerdict::newer_version;
  if (version != kVersion) return RecordVerdict::damaged;
  if (get_little_endian<std::uint32_t>(bytes, kLengthAt) != kSuperblockBytes) return RecordVerdict::damaged;

  const auto clean = std::to_integer<unsigned char>(bytes[kCleanAt]);
  const auto num_classes = get_little_endian<std::uint32_t>(bytes, kNumClassesAt);
  if (clean > 1 || num_classes == 0 || num_classes > kMaxStoreClasses) return RecordVerdict::damaged;
  if (!all_zero(bytes.subspan(kCleanAt + 1, kNumClassesAt - kCleanAt - 1)) ||
      !all_zero(bytes.subspan(kNumClassesAt + 4, kStridesAt - kNumClassesAt - 4))) {
    return RecordVerdict::damaged;
  }
  const std::size_t strides_end = kStridesAt + 8 * std::size_t{num_classes};
  if (!all_zero(bytes.subspan(strides_end, kChecksumAt - strides_end))) return RecordVerdict::damaged;

  Superblock result;
  std::memcpy(result.store.data(), bytes.data() + kStoreAt, result.store.size());
  std::memcpy(result.fingerprint.data(), bytes.data() + kFingerprintAt, result.fingerprint.size());
  result.open_counter = get_little_endian<std::uint32_t>(bytes, kOpenCounterAt);
  result.clean = clean == 1;
  for (std::size_t i = 0; i < num_classes; ++i) {
    result.class_strides.push_back(get_little_endian<std::uint64_t>(bytes, kStridesAt + 8 * i));
    if (result.class_strides.back() == 0) return RecordVerdict::damaged;
  }
  superblock = std::move(result);
  return RecordVerdict::good;
}

}  // namespace kvtier
