// What slot_image.cpp needs of a SlotCipher. Private to storage; docs/formats/slot.md, "Encryption".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "slot_header.h"

#include "kvtier/core/status.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier {

class SlotSubkey;  // 32 secret bytes, wiped when dropped

// Threads: any. Blocks: no, but for a mutex held for nanoseconds (for the HKDF, microseconds, with a new
// salt).
class PayloadCipher : public SlotCipher {
 public:
  // A nonce that no other write has or will have, and the subkey to use it with.
  struct Turn {
    slot_format::CipherFields fields;
    std::shared_ptr<const SlotSubkey> subkey;
  };
  using Parts = std::span<const std::span<const std::byte>>;

  // Errors: resource: no random salt, or no memory.
  virtual Result<Turn> next_turn() = 0;
  // Encrypts `plain` to `encrypted` (as long; the two do not overlap), authenticating `parts` with it. A turn
  // is used once. Errors: resource; `encrypted` is then undefined.
  virtual Status encrypt(const Turn& turn, Parts parts, std::span<const std::byte> plain,
                         std::byte* encrypted, slot_format::Tag& tag) const = 0;

  // Whether the master key of that id was given.
  virtual bool knows(const slot_format::KeyId& id) const = 0;
  // Decrypts to `plain`. False, with `plain` wiped, unless the tag proves payload and parts (or the cipher
  // could not be run at all).
  virtual bool decrypt(const slot_format::CipherFields& fields, Parts parts,
                       std::span<const std::byte> encrypted, const slot_format::Tag& tag,
                       std::byte* plain) = 0;
};

}  // namespace kvtier
