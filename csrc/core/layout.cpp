#include "kvtier/core/layout.h"

#include <algorithm>

namespace kvtier {
namespace {

// Far above any real model, and low enough that no product of extents overflows 64 bits unseen.
constexpr std::uint64_t kMaxPayloadBytes = std::uint64_t{1} << 40;

Status must_be_positive(const std::string& group, const char* what, std::uint64_t value) {
  if (value > 0) return Status::ok();
  return Status::invalid_argument("group '" + group + "': " + what + " is 0; it must be at least 1");
}

}  // namespace

Status GroupSpec::validate() const {
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "num_layers", num_layers));
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "num_heads", num_heads));
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "head_dim", head_dim));
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "item_bytes", item_bytes));
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "page_tokens", page_tokens));
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "block_tokens", block_tokens));
  KVTIER_RETURN_IF_ERROR(must_be_positive(name, "num_stripes", num_stripes));
  if (num_parts != 1 && num_parts != 2) {
    return Status::invalid_argument("group '" + name + "': num_parts is " + std::to_string(num_parts) +
                                    "; allowed: 1 (latent) or 2 (keys and values)");
  }
  if (block_tokens % page_tokens != 0 && page_tokens % block_tokens != 0) {
    return Status::invalid_argument("group '" + name + "': block_tokens is " + std::to_string(block_tokens) +
                                    " and page_tokens " + std::to_string(page_tokens) +
                                    "; one must be a multiple of the other");
  }
  if (window_tokens && *window_tokens == 0) {
    return Status::invalid_argument("group '" + name +
                                    "': window_tokens is 0; leave it out for full attention");
  }
  std::string letters = page_order;
  std::sort(letters.begin(), letters.end());
  if (std::adjacent_find(letters.begin(), letters.end()) != letters.end() ||
      letters.find_first_not_of("DHKT") != std::string::npos || letters.find('T') == std::string::npos ||
      letters.find('D') == std::string::npos) {
    return Status::invalid_argument("group '" + name + "': page_order is \"" + page_order +
                                    "\"; allowed: T and D and at most K and H, each once, outermost first");
  }
  if ((num_parts == 2 && letters.find('K') == std::string::npos) ||
      (num_heads > 1 && letters.find('H') == std::string::npos)) {
    return Status::invalid_argument("group '" + name + "': page_order \"" + page_order +
                                    "\" lacks an axis whose extent is greater than 1");
  }
  std::uint64_t bytes = 1;
  for (const std::uint64_t factor :
       {std::uint64_t{num_layers}, std::uint64_t{num_parts}, std::uint64_t{num_heads},
        std::uint64_t{head_dim}, std::uint64_t{item_bytes},
        std::uint64_t{std::max(block_tokens, page_tokens)}, std::uint64_t{num_stripes}}) {
    if (bytes > kMaxPayloadBytes / factor) {
      return Status::invalid_argument("group '" + name + "': a block or page would have more than 1 TiB");
    }
    bytes *= factor;
  }
  return Status::ok();
}

std::uint64_t GroupSpec::slot_stride_bytes() const {
  return round_up(kSlotHeaderBytes + payload_bytes(), kSlotAlignment);
}

std::optional<std::uint32_t> GroupSpec::window_blocks() const {
  if (!window_tokens) return std::nullopt;
  // The next token attends to window - 1 tokens before it; at least one block proves that it was computed.
  const std::uint64_t before = std::uint64_t{*window_tokens} - 1;
  return static_cast<std::uint32_t>(std::max<std::uint64_t>(1, (before + block_tokens - 1) / block_tokens));
}

std::uint32_t GroupSpec::extent(char axis) const {
  if (page_order.find(axis) == std::string::npos) return 0;
  switch (axis) {
    case 'K': return num_parts;
    case 'T': return page_tokens;
    case 'H': return num_heads;
    case 'D': return head_dim;
    default: return 0;
  }
}

}  // namespace kvtier
