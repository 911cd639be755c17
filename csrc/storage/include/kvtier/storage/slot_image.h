// The image of a block in a slot: a header of 4096 bytes that proves what it is, then the payload.
// docs/formats/slot.md is the byte table; tests/golden/ holds images of every version.
//
// The same image stands in host and disk slots, so that a block moves by one read or one write. Nothing on a
// drive is believed: open() recomputes both checksums and compares whatever the caller knows (I3).
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "kvtier/core/layout.h"
#include "kvtier/core/status.h"
#include "kvtier/core/types.h"

namespace kvtier {

using Fingerprint = std::array<std::byte, 32>;   // of all that makes two stores' blocks incompatible
using StoreId = std::array<std::byte, 16>;       // random, of one store directory
using NamespaceTag = std::array<std::byte, 16>;  // first half of SHA-256 of the namespace's name

NamespaceTag namespace_tag(std::string_view name);

// Orders the writes of one store: (open counter, sequence number in that opening). 0 is no generation.
enum class Generation : std::uint64_t {};
inline constexpr int kSequenceBits = 40;
constexpr Generation make_generation(std::uint32_t open_counter, std::uint64_t sequence) {
  return Generation{(std::uint64_t{open_counter} << kSequenceBits) | sequence};
}

struct SlotPlace {
  std::uint32_t class_index = 0;
  SlotId slot{0};
  friend bool operator==(const SlotPlace&, const SlotPlace&) = default;
};

struct BlockIdentity {
  BlockKey key{};
  GroupId group{0};
  std::optional<BlockKey> parent;  // of the same group
  std::uint32_t depth = 0;         // blocks before it in its sequence
  NamespaceTag name_space{};
};

// What a header says, all of it proved by its checksum.
struct SlotHeader {
  BlockIdentity block;
  SlotPlace place;
  Generation generation{0};
  std::uint64_t payload_bytes = 0;
};

// What became of an image that was read. Outcomes, not failures.
enum class Verdict : std::uint8_t {
  good,
  blank,            // all zeros where the header stands: a slot that was never written, or wiped
  foreign,          // not ours: no magic; another store, fingerprint, place; plain where the store encrypts
  newer_version,    // written by a later kvtier; must be left untouched
  corrupt_header,   // its checksum does not hold, or it says what its version does not allow
  corrupt_payload,  // the payload's does not (or the cipher's tag)
  stale,            // a sound image of another block or generation than was asked for
  unknown_key,      // encrypted under a master key that is not given
};
std::string_view to_string(Verdict verdict);

// Encrypts and decrypts payloads: AES-256-GCM (OpenSSL). The subkey of an opening is HKDF-SHA-256 of the
// master key and a random salt that stands in every header; the nonce is a write counter of that subkey,
// never derived from place or generation; the whole header but its checksum and tag is authenticated with the
// payload. Threads: any. Reading images of earlier openings derives their subkeys anew (cached).
class SlotCipher {
 public:
  // master_key: 32 bytes. Older keys may be given for reading only, so that keys rotate. Errors:
  // invalid_argument for a wrong length, internal if OpenSSL fails its self-test.
  // writes_per_subkey: after so many a new salt is drawn; at most 2^32 (NIST SP 800-38D), fewer in tests.
  static Result<std::shared_ptr<SlotCipher>> make(std::span<const std::byte> master_key,
                                                  std::span<const std::span<const std::byte>> older_keys,
                                                  std::uint64_t writes_per_subkey = std::uint64_t{1} << 32);
  virtual ~SlotCipher() = default;
  SlotCipher(const SlotCipher&) = delete;
  SlotCipher& operator=(const SlotCipher&) = delete;

 private:
  friend class PayloadCipher;  // the one implementation, csrc/storage/payload_cipher.h
  SlotCipher() = default;
};

// Seals and verifies images of one store. Immutable but for the cipher's counter. Threads: any.
class SlotImages {
 public:
  SlotImages(const Fingerprint& fingerprint, const StoreId& store, std::shared_ptr<SlotCipher> cipher);

  // Whether sealing and opening change the payload: then the image on the drive needs a buffer of its own.
  bool encrypts() const { return cipher_ != nullptr; }

  // Fills in the header at `image` for the payload behind it, checksums included (20 GB/s from memory,
  // encrypted 4). Bytes between payload and stride are not touched and are proved by nothing. With a cipher:
  // reads the payload behind `plain` and writes header and ciphertext to `image` (the two differ); without,
  // `plain` == `image`. Requires a generation other than 0. Errors (with a cipher only): resource when
  // OpenSSL cannot draw a salt or allocate; `image` is then undefined and must not be written.
  Status seal(std::byte* image, const std::byte* plain, const SlotHeader& header) const;

  // Judges an image that was read for `place`. Verifies header and payload; with `expected_key` (null: any
  // block), also key, group and generation, else `stale`. docs/formats/slot.md has the order of the checks.
  // On good, `header` (if not null) is what it says, and the payload stands in clear behind `plain` (== image
  // without a cipher); with a cipher and a wrong tag it is wiped there. The header at `plain` is not touched.
  // Requires image_bytes >= kSlotHeaderBytes. Never reads beyond image_bytes (the slot's stride).
  Verdict open(std::byte* plain, const std::byte* image, std::uint64_t image_bytes, const SlotPlace& place,
               const BlockKey* expected_key, GroupId expected_group, Generation expected_generation,
               SlotHeader* header) const;
  // The header alone (kSlotHeaderBytes), for rebuilding a catalog: payload unproved, and that it fits its
  // slot.
  Verdict read_header(const std::byte* header_bytes, const SlotPlace& place, SlotHeader* header) const;

 private:
  Fingerprint fingerprint_;
  StoreId store_;
  std::shared_ptr<SlotCipher> cipher_;
};

}  // namespace kvtier
