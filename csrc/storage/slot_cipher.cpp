#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/rand.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "payload_cipher.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"

namespace kvtier {

using slot_format::CipherFields;
using slot_format::KeyId;
using slot_format::Salt;
using slot_format::Tag;

namespace {

constexpr std::size_t kSecretBytes = 32;
constexpr std::size_t kNonceBytes = 12;
constexpr std::string_view kKeyIdInfo = "kvtier slot key id 1";
constexpr std::string_view kSubkeyInfo = "kvtier slot subkey 1";
// A store that was opened often has images under many salts. Deriving a subkey takes microseconds, so few
// suffice.
constexpr std::size_t kCachedSubkeys = 64;
// OpenSSL counts in int; pieces of 16 MiB cost nothing and let a test reach the second one.
constexpr std::size_t kPieceBytes = std::size_t{16} << 20;

template <auto free_function>
struct FreeWith {
  template <typename T>
  void operator()(T* object) const {
    free_function(object);
  }
};
using CipherContext = std::unique_ptr<EVP_CIPHER_CTX, FreeWith<EVP_CIPHER_CTX_free>>;
using FetchedCipher = std::unique_ptr<EVP_CIPHER, FreeWith<EVP_CIPHER_free>>;
using FetchedKdf = std::unique_ptr<EVP_KDF, FreeWith<EVP_KDF_free>>;
using KdfContext = std::unique_ptr<EVP_KDF_CTX, FreeWith<EVP_KDF_CTX_free>>;

const unsigned char* in(const std::byte* bytes) { return reinterpret_cast<const unsigned char*>(bytes); }
unsigned char* out(std::byte* bytes) { return reinterpret_cast<unsigned char*>(bytes); }

// 96 bits: four zero bytes, then the write counter, little-endian.
std::array<std::byte, kNonceBytes> nonce_of(std::uint64_t write_counter) {
  std::array<std::byte, kNonceBytes> nonce{};
  std::memcpy(nonce.data() + 4, &write_counter, sizeof write_counter);
  return nonce;
}

// 32 bytes that are wiped when they go.
class Secret {
 public:
  Secret() = default;
  Secret(const Secret&) = delete;
  Secret& operator=(const Secret&) = delete;
  ~Secret() { OPENSSL_cleanse(bytes_.data(), bytes_.size()); }

  std::array<std::byte, kSecretBytes>& bytes() { return bytes_; }
  const std::array<std::byte, kSecretBytes>& bytes() const { return bytes_; }

 private:
  std::array<std::byte, kSecretBytes> bytes_{};
};

// One run of AES-256-GCM. Every step returns false when OpenSSL fails, or, in finish_decrypting(), the tag is
// wrong.
class Gcm {
 public:
  enum class Way : std::uint8_t { encrypt, decrypt };

  Gcm(const EVP_CIPHER* cipher, Way way, const Secret& key, std::uint64_t write_counter)
      : context_(EVP_CIPHER_CTX_new()) {
    const std::array<std::byte, kNonceBytes> nonce = nonce_of(write_counter);
    good_ = context_ != nullptr &&
            EVP_CipherInit_ex2(context_.get(), cipher, in(key.bytes().data()), in(nonce.data()),
                               way == Way::encrypt ? 1 : 0, nullptr) == 1;
  }

  bool authenticate(std::span<const std::byte> part) { return good_ && update(nullptr, part); }

  bool run(std::span<const std::byte> from, std::byte* to) {
    for (; good_ && !from.empty();) {
      const std::span<const std::byte> piece = from.first(std::min(from.size(), kPieceBytes));
      good_ = update(to, piece);
      to += piece.size();
      from = from.subspan(piece.size());
    }
    return good_;
  }

  bool finish_encrypting(Tag& tag) {
    return finish() && EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_GET_TAG,
                                           static_cast<int>(tag.size()), tag.data()) == 1;
  }

  bool finish_decrypting(Tag tag) {
    return good_ &&
           EVP_CIPHER_CTX_ctrl(context_.get(), EVP_CTRL_AEAD_SET_TAG, static_cast<int>(tag.size()),
                               tag.data()) == 1 &&
           finish();
  }

 private:
  bool update(std::byte* to, std::span<const std::byte> from) {
    int done = 0;
    good_ = EVP_CipherUpdate(context_.get(), out(to), &done, in(from.data()),
                             static_cast<int>(from.size())) == 1 &&
            static_cast<std::size_t>(done) == from.size();
    return good_;
  }
  bool finish() {
    std::array<unsigned char, EVP_MAX_BLOCK_LENGTH> nothing{};  // a stream cipher holds nothing back
    int done = 0;
    return good_ && EVP_CipherFinal_ex(context_.get(), nothing.data(), &done) == 1 && done == 0;
  }

  CipherContext context_;
  bool good_ = false;
};

}  // namespace

class SlotSubkey {
 public:
  Secret secret;
};

namespace {

// Owns the master keys; wiped on destruction, as are subkeys and OpenSSL's contexts (their library does it).
class AesGcmCipher final : public PayloadCipher {
 public:
  explicit AesGcmCipher(std::uint64_t writes_per_subkey) : writes_per_subkey_(writes_per_subkey) {}

  // Fetches the algorithms (once: a fetch costs more than encrypting a page) and tries them.
  Status prepare() {
    aes_.reset(EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr));
    hkdf_.reset(EVP_KDF_fetch(nullptr, "HKDF", nullptr));
    if (aes_ == nullptr || hkdf_ == nullptr) {
      return Status::internal("OpenSSL has no AES-256-GCM or no HKDF; encryption of slots needs both");
    }
    // Test case 14 of the GCM specification (McGrew and Viega): key, nonce and one block, all zero.
    constexpr Tag kKnown = {std::byte{0xd0}, std::byte{0xd1}, std::byte{0xc8}, std::byte{0xa7},
                            std::byte{0x99}, std::byte{0x99}, std::byte{0x6b}, std::byte{0xf0},
                            std::byte{0x26}, std::byte{0x5b}, std::byte{0x98}, std::byte{0xb5},
                            std::byte{0xd4}, std::byte{0x8a}, std::byte{0xb9}, std::byte{0x19}};
    const Secret zero;
    const std::array<std::byte, 16> block{};
    std::array<std::byte, 16> result{};
    Tag tag{};
    Gcm gcm(aes_.get(), Gcm::Way::encrypt, zero, 0);
    const bool ran = gcm.run(block, result.data()) && gcm.finish_encrypting(tag);
    if (!ran || tag != kKnown) return Status::internal("OpenSSL's AES-256-GCM fails its self-test");
    return Status::ok();
  }

  // The first one added is the one that writes.
  Status add_master_key(std::span<const std::byte> key) {
    if (key.size() != kSecretBytes) {
      return Status::invalid_argument("a master key has " + std::to_string(key.size()) +
                                      " bytes; allowed: exactly " + std::to_string(kSecretBytes));
    }
    auto master = std::make_unique<Master>();
    std::ranges::copy(key, master->secret.bytes().begin());
    if (!derive(master->secret, {}, kKeyIdInfo, master->id)) {
      return Status::internal("OpenSSL's HKDF-SHA-256 failed");
    }
    masters_.push_back(std::move(master));
    return Status::ok();
  }

  Result<Turn> next_turn() override {
    const MutexLock lock(mutex_);
    // A child of fork() has its parent's salt and counter: together they would use every nonce twice.
    const std::uint64_t process = process_generation();
    if (writing_ == nullptr || turns_ == writes_per_subkey_ || process != process_) {
      Salt salt{};
      if (RAND_bytes(out(salt.data()), static_cast<int>(salt.size())) != 1) {
        return Status::resource("OpenSSL has no random bytes for a new salt");
      }
      std::shared_ptr<const SlotSubkey> fresh = subkey_of(*masters_.front(), salt);
      if (fresh == nullptr) return Status::resource("OpenSSL's HKDF-SHA-256 failed for a new subkey");
      writing_ = std::move(fresh);
      salt_ = salt;
      turns_ = 0;
      process_ = process;
    }
    return Turn{.fields = {.key_id = masters_.front()->id, .salt = salt_, .write_counter = turns_++},
                .subkey = writing_};
  }

  Status encrypt(const Turn& turn, Parts parts, std::span<const std::byte> plain, std::byte* encrypted,
                 Tag& tag) const override {
    Gcm gcm(aes_.get(), Gcm::Way::encrypt, turn.subkey->secret, turn.fields.write_counter);
    const bool ran = std::ranges::all_of(parts, [&](const auto& part) { return gcm.authenticate(part); }) &&
                     gcm.run(plain, encrypted) && gcm.finish_encrypting(tag);
    return ran ? Status::ok() : Status::resource("OpenSSL's AES-256-GCM failed to encrypt a payload");
  }

  bool knows(const KeyId& id) const override { return master_of(id) != nullptr; }

  bool decrypt(const CipherFields& fields, Parts parts, std::span<const std::byte> encrypted, const Tag& tag,
               std::byte* plain) override {
    const std::shared_ptr<const SlotSubkey> subkey = reading_subkey(fields);
    if (subkey == nullptr) return false;
    Gcm gcm(aes_.get(), Gcm::Way::decrypt, subkey->secret, fields.write_counter);
    const bool proved =
        std::ranges::all_of(parts, [&](const auto& part) { return gcm.authenticate(part); }) &&
        gcm.run(encrypted, plain) && gcm.finish_decrypting(tag);
    if (!proved) OPENSSL_cleanse(plain, encrypted.size());
    return proved;
  }

 private:
  struct Master {
    Secret secret;
    KeyId id{};
  };
  struct Cached {
    KeyId key_id{};
    Salt salt{};
    std::shared_ptr<const SlotSubkey> subkey;
  };

  const Master* master_of(const KeyId& id) const {
    const auto at = std::ranges::find_if(masters_, [&](const auto& master) { return master->id == id; });
    return at == masters_.end() ? nullptr : at->get();
  }

  // Fills `derived` by HKDF-SHA-256 (RFC 5869).
  bool derive(const Secret& master, std::span<const std::byte> salt, std::string_view info,
              std::span<std::byte> derived) const {
    const KdfContext context(EVP_KDF_CTX_new(hkdf_.get()));
    if (context == nullptr) return false;
    // OpenSSL's parameters are not const, and are only read.
    const auto octets = [](const char* name, const void* data, std::size_t bytes) {
      return OSSL_PARAM_construct_octet_string(name, const_cast<void*>(data), bytes);
    };
    std::string digest = "SHA256";
    std::vector<OSSL_PARAM> parameters = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest.data(), 0),
        octets(OSSL_KDF_PARAM_KEY, master.bytes().data(), kSecretBytes),
        octets(OSSL_KDF_PARAM_INFO, info.data(), info.size())};
    if (!salt.empty()) parameters.push_back(octets(OSSL_KDF_PARAM_SALT, salt.data(), salt.size()));
    parameters.push_back(OSSL_PARAM_construct_end());
    return EVP_KDF_derive(context.get(), out(derived.data()), derived.size(), parameters.data()) == 1;
  }

  std::shared_ptr<const SlotSubkey> subkey_of(const Master& master, const Salt& salt) const {
    auto subkey = std::make_shared<SlotSubkey>();
    if (!derive(master.secret, salt, kSubkeyInfo, subkey->secret.bytes())) return nullptr;
    return subkey;
  }

  // Null when no such master key was given, or OpenSSL failed.
  std::shared_ptr<const SlotSubkey> reading_subkey(const CipherFields& fields) {
    const Master* master = master_of(fields.key_id);
    if (master == nullptr) return nullptr;
    const MutexLock lock(mutex_);
    const auto at = std::ranges::find_if(cache_, [&](const Cached& cached) {
      return cached.salt == fields.salt && cached.key_id == fields.key_id;
    });
    if (at != cache_.end()) return at->subkey;
    std::shared_ptr<const SlotSubkey> subkey = subkey_of(*master, fields.salt);
    if (subkey == nullptr) return nullptr;
    Cached fresh{.key_id = fields.key_id, .salt = fields.salt, .subkey = subkey};
    if (cache_.size() < kCachedSubkeys) {
      cache_.push_back(std::move(fresh));
    } else {
      cache_[oldest_] = std::move(fresh);
      oldest_ = (oldest_ + 1) % kCachedSubkeys;
    }
    return subkey;
  }

  const std::uint64_t writes_per_subkey_;
  FetchedCipher aes_;
  FetchedKdf hkdf_;
  std::vector<std::unique_ptr<Master>> masters_;  // not changed once made

  Mutex mutex_;
  std::shared_ptr<const SlotSubkey> writing_ KVTIER_GUARDED_BY(mutex_);
  Salt salt_ KVTIER_GUARDED_BY(mutex_){};
  std::uint64_t turns_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint64_t process_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::vector<Cached> cache_ KVTIER_GUARDED_BY(mutex_);
  std::size_t oldest_ KVTIER_GUARDED_BY(mutex_) = 0;  // of a full cache_
};

}  // namespace

Result<std::shared_ptr<SlotCipher>> SlotCipher::make(std::span<const std::byte> master_key,
                                                     std::span<const std::span<const std::byte>> older_keys,
                                                     std::uint64_t writes_per_subkey) {
  constexpr std::uint64_t kMost = std::uint64_t{1} << 32;
  if (writes_per_subkey == 0 || writes_per_subkey > kMost) {
    return Status::invalid_argument("writes_per_subkey is " + std::to_string(writes_per_subkey) +
                                    "; allowed: 1 to " + std::to_string(kMost));
  }
  auto cipher = std::make_shared<AesGcmCipher>(writes_per_subkey);
  KVTIER_RETURN_IF_ERROR(cipher->prepare());
  KVTIER_RETURN_IF_ERROR(cipher->add_master_key(master_key));
  for (const std::span<const std::byte> key : older_keys) {
    KVTIER_RETURN_IF_ERROR(cipher->add_master_key(key));
  }
  return std::shared_ptr<SlotCipher>(std::move(cipher));
}

}  // namespace kvtier
