#include "kvtier/storage/slot_image.h"

#include <openssl/sha.h>

#include <algorithm>
#include <utility>

#include "payload_cipher.h"
#include "slot_header.h"

#include "kvtier/core/ordering.h"
#include "kvtier/storage/checksum.h"

namespace kvtier {
namespace {

using slot_format::Codec;
using slot_format::ConstHeaderBytes;
using slot_format::HeaderBytes;
using slot_format::HeaderFields;

PayloadCipher* payload_cipher(const std::shared_ptr<SlotCipher>& cipher) {
  return static_cast<PayloadCipher*>(cipher.get());  // nothing else can be made of a SlotCipher
}

ConstHeaderBytes header_of(const std::byte* image) { return ConstHeaderBytes(image, kSlotHeaderBytes); }

std::span<const std::byte> payload_of(const std::byte* image, std::uint64_t bytes) {
  return {image + kSlotHeaderBytes, bytes};
}

// All that a header alone can tell: what decode() says, whose it is, where it belongs, whether it can be
// read.
Verdict judge_header(ConstHeaderBytes bytes, const Fingerprint& fingerprint, const StoreId& store,
                     const PayloadCipher* cipher, const SlotPlace& place, HeaderFields& fields) {
  if (const Verdict verdict = slot_format::decode(bytes, fields); verdict != Verdict::good) return verdict;
  if (fields.fingerprint != fingerprint || fields.store != store || fields.header.place != place) {
    return Verdict::foreign;
  }
  if (fields.codec == Codec::aes_256_gcm) {
    return cipher != nullptr && cipher->knows(fields.cipher.key_id) ? Verdict::good : Verdict::unknown_key;
  }
  // Whoever can write to the drive can make a plain image; a store that encrypts has never written one.
  return cipher == nullptr ? Verdict::good : Verdict::foreign;
}

}  // namespace

NamespaceTag namespace_tag(std::string_view name) {
  std::array<unsigned char, SHA256_DIGEST_LENGTH> digest{};
  const void* made = SHA256(reinterpret_cast<const unsigned char*>(name.data()), name.size(), digest.data());
  KVTIER_CHECK(made != nullptr);  // without SHA-256 no key could have been made either
  NamespaceTag tag{};
  std::ranges::transform(std::span(digest).first(tag.size()), tag.begin(),
                         [](unsigned char c) { return std::byte{c}; });
  return tag;
}

std::string_view to_string(Verdict verdict) {
  switch (verdict) {
    case Verdict::good: return "good";
    case Verdict::blank: return "blank";
    case Verdict::foreign: return "foreign";
    case Verdict::newer_version: return "newer_version";
    case Verdict::corrupt_header: return "corrupt_header";
    case Verdict::corrupt_payload: return "corrupt_payload";
    case Verdict::stale: return "stale";
    case Verdict::unknown_key: return "unknown_key";
  }
  return "unknown";
}

SlotImages::SlotImages(const Fingerprint& fingerprint, const StoreId& store,
                       std::shared_ptr<SlotCipher> cipher)
    : fingerprint_(fingerprint), store_(store), cipher_(std::move(cipher)) {}

Status SlotImages::seal(std::byte* image, const std::byte* plain, const SlotHeader& header) const {
  KVTIER_CHECK(header.generation != Generation{0});
  KVTIER_CHECK((image != plain) == encrypts());
  HeaderFields fields;
  fields.fingerprint = fingerprint_;
  fields.store = store_;
  fields.header = header;
  const HeaderBytes bytes(image, kSlotHeaderBytes);
  const std::span<const std::byte> payload = payload_of(plain, header.payload_bytes);
  if (!encrypts()) {
    fields.payload_checksum = checksum_of(payload);
    slot_format::encode(bytes, fields);
  } else {
    PayloadCipher* cipher = payload_cipher(cipher_);
    Result<PayloadCipher::Turn> turn = cipher->next_turn();
    if (!turn) return turn.status();
    fields.codec = Codec::aes_256_gcm;
    fields.cipher = turn->fields;
    slot_format::encode(bytes, fields);
    slot_format::Tag tag{};
    KVTIER_RETURN_IF_ERROR(cipher->encrypt(*turn, slot_format::authenticated_parts(bytes), payload,
                                           image + kSlotHeaderBytes, tag));
    slot_format::set_tag(bytes, tag);
  }
  slot_format::set_header_checksum(bytes);
  return Status::ok();
}

Verdict SlotImages::open(std::byte* plain, const std::byte* image, std::uint64_t image_bytes,
                         const SlotPlace& place, const BlockKey* expected_key, GroupId expected_group,
                         Generation expected_generation, SlotHeader* header) const {
  KVTIER_CHECK(image_bytes >= kSlotHeaderBytes);
  KVTIER_CHECK((image != plain) == encrypts());
  PayloadCipher* cipher = payload_cipher(cipher_);
  HeaderFields fields;
  const Verdict verdict = judge_header(header_of(image), fingerprint_, store_, cipher, place, fields);
  if (verdict != Verdict::good) return verdict;
  const SlotHeader& said = fields.header;
  if (said.payload_bytes > image_bytes - kSlotHeaderBytes) return Verdict::corrupt_header;
  if (expected_key != nullptr) {
    const bool same_block = said.block.key == *expected_key && said.block.group == expected_group;
    const bool same_write =
        said.generation == expected_generation || !ordering_enabled(OrderingPoint::disk_verify_generation);
    if (!same_block || !same_write) return Verdict::stale;
  }
  const std::span<const std::byte> payload = payload_of(image, said.payload_bytes);
  const bool proved = encrypts()
                          ? cipher->decrypt(fields.cipher, slot_format::authenticated_parts(header_of(image)),
                                            payload, fields.tag, plain + kSlotHeaderBytes)
                          : checksum_of(payload) == fields.payload_checksum ||
                                !ordering_enabled(OrderingPoint::disk_verify_checksum);
  if (!proved) return Verdict::corrupt_payload;
  if (header != nullptr) *header = said;
  return Verdict::good;
}

Verdict SlotImages::read_header(const std::byte* header_bytes, const SlotPlace& place,
                                SlotHeader* header) const {
  HeaderFields fields;
  const Verdict verdict =
      judge_header(header_of(header_bytes), fingerprint_, store_, payload_cipher(cipher_), place, fields);
  if (verdict == Verdict::good && header != nullptr) *header = fields.header;
  return verdict;
}

}  // namespace kvtier
