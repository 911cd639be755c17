// The arithmetic of a cache group: how many bytes a page, a block and a slot have.
//
// A *group* is a set of layers whose KV is stored and evicted together. Inside a page, each layer's
// bytes stand in `page_order`, outermost axis first: K the part (key, value), T the token, H the head,
// D the head dimension. "KTHD" is what vLLM and FlashInfer call NHD, "KHTD" HND; latent attention (MLA)
// has one part and one head: "TD". A slot keeps that order and never transposes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kvtier/core/status.h"

namespace kvtier {

// A slot image is a header of exactly this size, then the payload. Host and disk slots are alike.
inline constexpr std::uint64_t kSlotHeaderBytes = 4096;
// Strides are multiples of this: the largest direct-I/O alignment met so far.
inline constexpr std::uint64_t kSlotAlignment = 4096;

struct GroupSpec {
  std::string name;  // for messages only
  std::uint32_t num_layers = 0;
  std::uint32_t num_parts = 2;  // extent of K: 2 for keys and values, 1 for a latent
  std::uint32_t num_heads = 0;  // KV heads held by one rank
  std::uint32_t head_dim = 0;   // items
  std::uint32_t item_bytes = 0;
  std::uint32_t page_tokens = 0;   // tokens in one page of the framework's memory
  std::uint32_t block_tokens = 0;  // tokens in one block; one of the two divides the other
  std::string page_order = "KTHD";
  std::optional<std::uint32_t> window_tokens;  // sliding window; nullopt for full attention
  std::uint32_t num_stripes = 1;  // ranks whose parts stand side by side in a slot (1 when replicated)

  Status validate() const;

  // Bytes of one token in one layer, all parts and heads of one rank.
  std::uint64_t layer_token_bytes() const {
    return std::uint64_t{num_parts} * num_heads * head_dim * item_bytes;
  }
  // Bytes of one block of one rank: the stripe that one rank reads and writes.
  std::uint64_t stripe_bytes() const { return layer_token_bytes() * num_layers * block_tokens; }
  std::uint64_t payload_bytes() const { return stripe_bytes() * num_stripes; }
  std::uint64_t slot_stride_bytes() const;

  // Exactly one of these is greater than one, unless both are one.
  std::uint32_t pages_per_block() const {
    return block_tokens > page_tokens ? block_tokens / page_tokens : 1;
  }
  std::uint32_t blocks_per_page() const {
    return page_tokens > block_tokens ? page_tokens / block_tokens : 1;
  }

  // Blocks before position p that must be ready for p to be a usable prefix: all of them for full
  // attention (nullopt), else those that the window reaches back to.
  std::optional<std::uint32_t> window_blocks() const;

  // Extent of one axis letter; 0 for a letter that page_order does not have.
  std::uint32_t extent(char axis) const;
};

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace kvtier
