#include "slot_header.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace kvtier::slot_format {
namespace {

static_assert(std::endian::native == std::endian::little, "fields are copied as they are in memory");

template <Field field, typename T>
void put(HeaderBytes bytes, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) == field.bytes);
  std::memcpy(bytes.data() + field.at, &value, sizeof value);
}

template <typename T, Field field>
T get(ConstHeaderBytes bytes) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) == field.bytes);
  T value;
  std::memcpy(&value, bytes.data() + field.at, sizeof value);
  return value;
}

// By memcmp with itself one byte on: a loop over the reserved bytes took 2 us, longer than both checksums of
// a 4 KiB payload.
bool is_zero(std::span<const std::byte> bytes) {
  return bytes.front() == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

template <Field field>
void put_checksum(HeaderBytes bytes, const Checksum& checksum) {
  put<Field{field.at, 8}>(bytes, checksum.low);
  put<Field{field.at + 8, 8}>(bytes, checksum.high);
}

template <Field field>
Checksum get_checksum(ConstHeaderBytes bytes) {
  return {.low = get<std::uint64_t, Field{field.at, 8}>(bytes),
          .high = get<std::uint64_t, Field{field.at + 8, 8}>(bytes)};
}

// Over everything in front of it.
Checksum header_checksum(ConstHeaderBytes bytes) {
  return checksum_of(bytes.first<kHeaderChecksumField.at>());
}

}  // namespace

void encode(HeaderBytes bytes, const HeaderFields& fields) {
  const SlotHeader& header = fields.header;
  const BlockIdentity& block = header.block;
  std::ranges::fill(bytes, std::byte{0});
  put<kMagicField>(bytes, kMagic);
  put<kVersionField>(bytes, kVersion);
  put<kHeaderBytesField>(bytes, static_cast<std::uint32_t>(kSlotHeaderBytes));
  put<kFingerprintField>(bytes, fields.fingerprint);
  put<kStoreField>(bytes, fields.store);
  put<kClassField>(bytes, header.place.class_index);
  put<kSlotField>(bytes, raw(header.place.slot));
  put<kGenerationField>(bytes, static_cast<std::uint64_t>(header.generation));
  put<kKeyField>(bytes, block.key.bytes);
  if (block.parent.has_value()) put<kParentField>(bytes, block.parent->bytes);
  put<kNamespaceField>(bytes, block.name_space);
  put<kDepthField>(bytes, block.depth);
  put<kGroupField>(bytes, raw(block.group));
  put<kHasParentField>(bytes, static_cast<std::uint8_t>(block.parent.has_value() ? 1 : 0));
  put<kCodecField>(bytes, static_cast<std::uint8_t>(fields.codec));
  put<kPayloadBytesField>(bytes, header.payload_bytes);
  put_checksum<kPayloadChecksumField>(bytes, fields.payload_checksum);
  put<kKeyIdField>(bytes, fields.cipher.key_id);
  put<kSaltField>(bytes, fields.cipher.salt);
  put<kWriteCounterField>(bytes, fields.cipher.write_counter);
  put<kTagField>(bytes, fields.tag);
}

void set_tag(HeaderBytes bytes, const Tag& tag) { put<kTagField>(bytes, tag); }

void set_header_checksum(HeaderBytes bytes) {
  put_checksum<kHeaderChecksumField>(bytes, header_checksum(bytes));
}

Verdict decode(ConstHeaderBytes bytes, HeaderFields& fields) {
  if (std::memcmp(bytes.data(), kMagic.data(), kMagic.size()) != 0) {
    return is_zero(bytes) ? Verdict::blank : Verdict::foreign;
  }
  // The checksum comes before the version: a version that a flipped bit made must not look newer.
  if (get_checksum<kHeaderChecksumField>(bytes) != header_checksum(bytes)) return Verdict::corrupt_header;
  const auto version = get<std::uint32_t, kVersionField>(bytes);
  if (version > kVersion) return Verdict::newer_version;

  const auto has_parent = get<std::uint8_t, kHasParentField>(bytes);
  const auto codec = get<std::uint8_t, kCodecField>(bytes);
  const auto part = [&](std::size_t begin, std::size_t end) { return bytes.subspan(begin, end - begin); };
  const std::span<const std::byte> parent = part(kParentField.at, kParentField.end());
  const std::span<const std::byte> plain_only = part(kPayloadChecksumField.at, kPayloadChecksumField.end());
  const std::span<const std::byte> encrypted_only = part(kKeyIdField.at, kTagField.end());
  const std::span<const std::byte> reserved = part(kReservedField.at, kReservedField.end());

  fields = {};
  fields.fingerprint = get<Fingerprint, kFingerprintField>(bytes);
  fields.store = get<StoreId, kStoreField>(bytes);
  fields.header.place.class_index = get<std::uint32_t, kClassField>(bytes);
  fields.header.place.slot = SlotId{get<std::uint32_t, kSlotField>(bytes)};
  fields.header.generation = Generation{get<std::uint64_t, kGenerationField>(bytes)};
  fields.header.payload_bytes = get<std::uint64_t, kPayloadBytesField>(bytes);
  BlockIdentity& block = fields.header.block;
  block.key = get<BlockKey, kKeyField>(bytes);
  if (has_parent != 0) block.parent = get<BlockKey, kParentField>(bytes);
  block.name_space = get<NamespaceTag, kNamespaceField>(bytes);
  block.depth = get<std::uint32_t, kDepthField>(bytes);
  block.group = GroupId{get<std::uint16_t, kGroupField>(bytes)};
  fields.codec = static_cast<Codec>(codec);
  fields.payload_checksum = get_checksum<kPayloadChecksumField>(bytes);
  fields.cipher.key_id = get<KeyId, kKeyIdField>(bytes);
  fields.cipher.salt = get<Salt, kSaltField>(bytes);
  fields.cipher.write_counter = get<std::uint64_t, kWriteCounterField>(bytes);
  fields.tag = get<Tag, kTagField>(bytes);

  const bool allowed = version == kVersion &&
                       get<std::uint32_t, kHeaderBytesField>(bytes) == kSlotHeaderBytes &&
                       fields.header.generation != Generation{0} && has_parent <= 1 &&
                       (has_parent == 1 || is_zero(parent)) && is_zero(reserved) &&
                       ((fields.codec == Codec::plain && is_zero(encrypted_only)) ||
                        (fields.codec == Codec::aes_256_gcm && is_zero(plain_only)));
  return allowed ? Verdict::good : Verdict::corrupt_header;
}

}  // namespace kvtier::slot_format
