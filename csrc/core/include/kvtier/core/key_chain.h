// KeyChain: the 32-byte keys of a prompt's blocks (docs/formats/keys.md).
//
// A key is SHA-256 over (parent key, tokens of the block, digest of what else the block depends on),
// and the first parent is SHA-256 over the namespace and the fingerprint of model and layout. So equal
// keys mean equal tokens in equal context under equal weights, for one tenant (FIPS 180-4; the chain of
// hashes is the prefix-caching scheme of vLLM, arXiv:2309.06180, section 4.3, with a cryptographic hash).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/core/types.h"

namespace kvtier {

// Something that a run of tokens depends on besides their ids: an image behind placeholder tokens.
struct KeyExtra {
  std::int64_t begin_token;  // half-open range, counted from tokens[0]; below 0 when it began before them
  std::int64_t end_token;
  std::span<const std::byte> content;  // borrowed for the call; usually a content hash
};

// The parent of a prompt's first block. Fields are length-prefixed, so no two lists of fields collide.
Result<BlockKey> root_key(std::span<const std::span<const std::byte>> fields);

// Keys of the whole blocks of `tokens` (a last partial block has none), first block below `parent`.
// `extras` must be sorted by begin_token; each changes the blocks it overlaps and so all behind them.
// Pure; from any thread; does not wait. 1M tokens take about 10 ms with the SHA extensions.
Result<std::vector<BlockKey>> chain_keys(const BlockKey& parent, std::span<const std::int32_t> tokens,
                                         std::uint32_t block_tokens, std::span<const KeyExtra> extras);

}  // namespace kvtier
