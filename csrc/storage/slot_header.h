// The 4096 bytes of a slot header as a value: docs/formats/slot.md, version 1. Private to storage.
//
// Every field has an explicit offset and is little-endian; no struct is laid over the bytes. What is not a
// field is zero, and is checked to be: so a header has exactly one encoding, and bits that mean nothing do
// not exist.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier::slot_format {

inline constexpr std::array<unsigned char, 8> kMagic = {0x89, 'K', 'V', 'S', 'L', 'O', 'T', '\n'};
inline constexpr std::uint32_t kVersion = 1;

struct Field {
  std::size_t at;
  std::size_t bytes;
  constexpr std::size_t end() const { return at + bytes; }
};

// The same in every version, for ever: what a reader needs to tell a newer image from a damaged one.
inline constexpr Field kMagicField{0, 8};
inline constexpr Field kVersionField{8, 4};
inline constexpr Field kHeaderBytesField{12, 4};
inline constexpr Field kHeaderChecksumField{4080, 16};

// Version 1.
inline constexpr Field kFingerprintField{16, 32};
inline constexpr Field kStoreField{48, 16};
inline constexpr Field kClassField{64, 4};
inline constexpr Field kSlotField{68, 4};
inline constexpr Field kGenerationField{72, 8};
inline constexpr Field kKeyField{80, 32};
inline constexpr Field kParentField{112, 32};
inline constexpr Field kNamespaceField{144, 16};
inline constexpr Field kDepthField{160, 4};
inline constexpr Field kGroupField{164, 2};
inline constexpr Field kHasParentField{166, 1};
inline constexpr Field kCodecField{167, 1};
inline constexpr Field kPayloadBytesField{168, 8};
inline constexpr Field kPayloadChecksumField{176, 16};  // plain
inline constexpr Field kKeyIdField{192, 8};             // this and the next three: encrypted
inline constexpr Field kSaltField{200, 16};
inline constexpr Field kWriteCounterField{216, 8};
inline constexpr Field kTagField{224, 16};
inline constexpr Field kReservedField{240, 3840};

inline constexpr std::array kFields = {kMagicField,        kVersionField,         kHeaderBytesField,
                                       kFingerprintField,  kStoreField,           kClassField,
                                       kSlotField,         kGenerationField,      kKeyField,
                                       kParentField,       kNamespaceField,       kDepthField,
                                       kGroupField,        kHasParentField,       kCodecField,
                                       kPayloadBytesField, kPayloadChecksumField, kKeyIdField,
                                       kSaltField,         kWriteCounterField,    kTagField,
                                       kReservedField,     kHeaderChecksumField};

// Whether the fields cover the header without gap or overlap.
constexpr bool fields_tile_the_header() {
  std::size_t at = 0;
  for (const Field& field : kFields) {
    if (field.at != at) return false;
    at = field.end();
  }
  return at == kSlotHeaderBytes;
}
static_assert(fields_tile_the_header());
static_assert(kFingerprintField.bytes == sizeof(Fingerprint) && kStoreField.bytes == sizeof(StoreId));
static_assert(kKeyField.bytes == sizeof(BlockKey) && kParentField.bytes == sizeof(BlockKey));
static_assert(kNamespaceField.bytes == sizeof(NamespaceTag));

enum class Codec : std::uint8_t { plain = 0, aes_256_gcm = 1 };

using KeyId = std::array<std::byte, 8>;
using Salt = std::array<std::byte, 16>;
using Tag = std::array<std::byte, 16>;

// How a payload was encrypted, but for the tag: which master key, which subkey of it, which nonce.
struct CipherFields {
  KeyId key_id{};
  Salt salt{};
  std::uint64_t write_counter = 0;
  friend bool operator==(const CipherFields&, const CipherFields&) = default;
};

struct HeaderFields {
  Fingerprint fingerprint{};
  StoreId store{};
  SlotHeader header;
  Codec codec = Codec::plain;
  Checksum payload_checksum;  // plain; zero otherwise
  CipherFields cipher;        // encrypted; zero otherwise
  Tag tag{};                  // encrypted; zero otherwise
};

using HeaderBytes = std::span<std::byte, kSlotHeaderBytes>;
using ConstHeaderBytes = std::span<const std::byte, kSlotHeaderBytes>;

// Writes all 4096 bytes, the header checksum as zero.
void encode(HeaderBytes bytes, const HeaderFields& fields);
void set_tag(HeaderBytes bytes, const Tag& tag);
// The last step.
void set_header_checksum(HeaderBytes bytes);

// blank, foreign (no magic), corrupt_header, newer_version; or good: the fields are what version 1 allows.
// Whose they are, and where they belong, is not looked at.
Verdict decode(ConstHeaderBytes bytes, HeaderFields& fields);

// What is authenticated with an encrypted payload: the whole header but its tag and checksum.
inline std::array<std::span<const std::byte>, 2> authenticated_parts(ConstHeaderBytes bytes) {
  return {bytes.subspan(0, kTagField.at), bytes.subspan(kReservedField.at, kReservedField.bytes)};
}

}  // namespace kvtier::slot_format
