#include "kvtier/core/key_chain.h"

#include <openssl/evp.h>

#include <algorithm>
#include <bit>
#include <memory>

namespace kvtier {
namespace {

static_assert(std::endian::native == std::endian::little, "tokens are hashed as little-endian int32");

struct FreeContext {
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};

// One reusable SHA-256: fetching the algorithm costs more than hashing a block, so it is done once.
class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    good_ = context_ != nullptr && EVP_DigestInit_ex2(context_.get(), EVP_sha256(), nullptr) == 1;
  }
  void update(const void* data, std::size_t bytes) {
    good_ = good_ && EVP_DigestUpdate(context_.get(), data, bytes) == 1;
  }
  void update_u64(std::uint64_t value) { update(&value, sizeof value); }
  // Ends this digest and begins the next.
  BlockKey finish() {
    BlockKey key{};
    unsigned size = 0;
    good_ = good_ && EVP_DigestFinal_ex(context_.get(), reinterpret_cast<unsigned char*>(key.bytes.data()),
                                        &size) == 1;
    good_ = good_ && EVP_DigestInit_ex2(context_.get(), nullptr, nullptr) == 1;
    return key;
  }
  Status status() const {
    return good_ ? Status::ok() : Status::resource("SHA-256 is not available from OpenSSL");
  }

 private:
  std::unique_ptr<EVP_MD_CTX, FreeContext> context_;
  bool good_ = false;
};

}  // namespace

Result<BlockKey> root_key(std::span<const std::span<const std::byte>> fields) {
  Sha256 sha;
  sha.update_u64(fields.size());
  for (const auto& field : fields) {
    sha.update_u64(field.size());
    sha.update(field.data(), field.size());
  }
  const BlockKey key = sha.finish();
  KVTIER_RETURN_IF_ERROR(sha.status());
  return key;
}

Result<std::vector<BlockKey>> chain_keys(const BlockKey& parent, std::span<const std::int32_t> tokens,
                                         std::uint32_t block_tokens, std::span<const KeyExtra> extras) {
  if (block_tokens == 0) return Status::invalid_argument("block_tokens is 0; it must be at least 1");
  for (std::size_t i = 0; i < extras.size(); ++i) {
    const KeyExtra& extra = extras[i];
    if (extra.begin_token >= extra.end_token || extra.end_token <= 0 ||
        extra.end_token > static_cast<std::int64_t>(tokens.size())) {
      return Status::invalid_argument(
          "extra " + std::to_string(i) + " covers tokens [" + std::to_string(extra.begin_token) + ", " +
          std::to_string(extra.end_token) + "); allowed: a non-empty range that ends within [1, " +
          std::to_string(tokens.size()) + "]");
    }
    if (i > 0 && extra.begin_token < extras[i - 1].begin_token) {
      return Status::invalid_argument("extra " + std::to_string(i) + " begins before the one in front of it");
    }
  }

  Sha256 sha;
  Sha256 extra_sha;
  std::vector<BlockKey> keys(tokens.size() / block_tokens);
  BlockKey previous = parent;
  std::vector<std::size_t> open;  // extras that began before the block's end and have not ended before it
  std::size_t next = 0;           // the first extra that has not begun yet
  for (std::size_t block = 0; block < keys.size(); ++block) {
    const auto begin = static_cast<std::int64_t>(block * block_tokens);
    const std::int64_t end = begin + block_tokens;
    sha.update(previous.bytes.data(), kKeyBytes);
    sha.update(tokens.data() + begin, std::size_t{block_tokens} * sizeof(std::int32_t));
    for (; next < extras.size() && extras[next].begin_token < end; ++next) open.push_back(next);
    std::erase_if(open, [&](std::size_t i) { return extras[i].end_token <= begin; });
    for (const std::size_t i : open) {
      const KeyExtra& extra = extras[i];
      // Relative to the block, so that keys do not depend on where a call began. The begin may be below
      // 0: the offset into a content that began earlier. The end is clipped: what lies behind the block
      // may not be known yet when a prompt comes in pieces.
      extra_sha.update_u64(static_cast<std::uint64_t>(extra.begin_token) - static_cast<std::uint64_t>(begin));
      extra_sha.update_u64(static_cast<std::uint64_t>(std::min(extra.end_token, end) - begin));
      extra_sha.update_u64(extra.content.size());
      extra_sha.update(extra.content.data(), extra.content.size());
    }
    // The message's length tells whether there is a digest behind the tokens.
    if (!open.empty()) {
      const BlockKey digest = extra_sha.finish();
      sha.update(digest.bytes.data(), kKeyBytes);
    }
    previous = keys[block] = sha.finish();
  }
  KVTIER_RETURN_IF_ERROR(sha.status());
  KVTIER_RETURN_IF_ERROR(extra_sha.status());
  return keys;
}

}  // namespace kvtier
