// docs/formats/catalog.md
#include "kvtier/storage/catalog_records.h"

#include <cstring>

#include "catalog_protocol.h"
#include "little_endian.h"

namespace kvtier {
namespace {

constexpr std::size_t kGroupAt = 32;  // in the key

constexpr std::size_t kSlotAt = 4;  // behind the class; both big-endian, so that places sort as bytes
constexpr std::size_t kGenerationAt = 8;
constexpr std::size_t kPayloadBytesAt = 16;
constexpr std::size_t kLastUseAt = 24;
constexpr std::size_t kNamespaceAt = 32;
constexpr std::size_t kDepthAt = 48;
constexpr std::size_t kHasParentAt = 52;
constexpr std::size_t kParentAt = 56;

static_assert(sizeof(CatalogBytes::key) == catalog_protocol::kKeyAndGroupBytes);
static_assert(sizeof(CatalogBytes::value) == catalog_protocol::kValueBytes);
static_assert(kLastUseAt == catalog_protocol::kLastUseAt && catalog_protocol::kPlaceAt == 0);

std::uint32_t swapped(std::uint32_t value) {
  return (value >> 24) | ((value >> 8) & 0xff00U) | ((value << 8) & 0xff0000U) | (value << 24);
}
void put_big_endian(std::span<std::byte> bytes, std::size_t at, std::uint32_t value) {
  put_little_endian(bytes, at, swapped(value));
}
std::uint32_t get_big_endian(std::span<const std::byte> bytes, std::size_t at) {
  return swapped(get_little_endian<std::uint32_t>(bytes, at));
}

}  // namespace

CatalogBytes encode_catalog_record(const CatalogRecord& record) {
  CatalogBytes bytes;
  put_bytes(bytes.key, 0, record.block.key.bytes);
  put_little_endian(bytes.key, kGroupAt, raw(record.block.group));
  const std::span<std::byte> value(bytes.value);
  put_big_endian(value, catalog_protocol::kPlaceAt, record.place.class_index);
  put_big_endian(value, kSlotAt, raw(record.place.slot));
  put_little_endian(value, kGenerationAt, static_cast<std::uint64_t>(record.generation));
  put_little_endian(value, kPayloadBytesAt, record.payload_bytes);
  put_little_endian(value, kLastUseAt, static_cast<std::uint64_t>(record.last_use_s));
  put_bytes(value, kNamespaceAt, record.block.name_space);
  put_little_endian(value, kDepthAt, record.block.depth);
  if (record.block.parent) {
    value[kHasParentAt] = std::byte{1};
    put_bytes(value, kParentAt, record.block.parent->bytes);
  }
  return bytes;
}

std::optional<CatalogRecord> decode_catalog_record(const CatalogBytes& bytes) {
  const std::span<const std::byte> value(bytes.value);
  const auto has_parent = std::to_integer<unsigned char>(value[kHasParentAt]);
  if (has_parent > 1 || !all_zero(value.subspan(kHasParentAt + 1, kParentAt - kHasParentAt - 1))) {
    return std::nullopt;
  }
  CatalogRecord record;
  std::memcpy(record.block.key.bytes.data(), bytes.key.data(), kKeyBytes);
  record.block.group = GroupId{get_little_endian<std::uint16_t>(bytes.key, kGroupAt)};
  record.place.class_index = get_big_endian(value, catalog_protocol::kPlaceAt);
  record.place.slot = SlotId{get_big_endian(value, kSlotAt)};
  record.generation = Generation{get_little_endian<std::uint64_t>(value, kGenerationAt)};
  record.payload_bytes = get_little_endian<std::uint64_t>(value, kPayloadBytesAt);
  record.last_use_s = static_cast<std::int64_t>(get_little_endian<std::uint64_t>(value, kLastUseAt));
  std::memcpy(record.block.name_space.data(), value.data() + kNamespaceAt, record.block.name_space.size());
  record.block.depth = get_little_endian<std::uint32_t>(value, kDepthAt);
  if (has_parent == 1) {
    record.block.parent.emplace();
    std::memcpy(record.block.parent->bytes.data(), value.data() + kParentAt, kKeyBytes);
  } else if (!all_zero(value.subspan(kParentAt))) {
    return std::nullopt;
  }
  return record;
}

}  // namespace kvtier
