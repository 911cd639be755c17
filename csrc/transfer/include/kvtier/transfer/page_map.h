// PageMap: where the bytes of a framework's pages are, and how they stand in a slot.
//
// A framework's KV cache is one or more tensors with a page axis P and, inside a page, the axes of
// GroupSpec::page_order at any strides: layers in one tensor or apart, K and V in one tensor or apart,
// pages padded or not. A block in a slot is dense:
//
//   stripe = [layer][page of the block][axes of page_order]      (tokens of the block only, when a page
//                                                                 holds several blocks)
//
// The map breaks a block into *pieces*: the longest stretches that are contiguous on both sides.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/layout.h"
#include "kvtier/core/status.h"
#include "kvtier/core/types.h"

namespace kvtier {

struct TensorAxis {
  char letter;  // P page, L layer, or one of page_order's K T H D
  std::uint64_t extent;
  std::int64_t stride_bytes;
};

// A tensor of the framework's, borrowed: valid until the pages are detached.
struct TensorView {
  std::byte* base = nullptr;
  std::vector<TensorAxis> axes;
};

// One contiguous stretch of a block on both sides.
struct Piece {
  std::byte* base;              // of the tensor, at page 0
  std::uint64_t page_stride;    // from one page to the next
  std::uint64_t stripe_offset;  // in the slot, from the start of this rank's stripe
  std::uint64_t sub_stride;     // from one block of a page to the next; 0 when a block is whole pages
  std::uint32_t bytes;
  std::uint32_t layer;
  std::uint32_t page_in_block;
  std::uint32_t allocation;  // pieces with the same number are known to lie in one allocation
};

// Immutable after make(). Threads: any.
class PageMap {
 public:
  // Tensors: one per layer (with a K axis, or without when the group has one part), or two per layer in
  // the order key, value, key, value ..., or one (or a key and a value tensor) for all layers with an L
  // axis. Axes of extent 1 may be left out, except P. Errors: invalid_argument naming the tensor, the axis,
  // the value and what is allowed. Of tensors that overlap
  // one another, those are found that are the same or shifted by whole pages.
  static Result<PageMap> make(const GroupSpec& spec, std::span<const TensorView> tensors);

  const GroupSpec& spec() const { return spec_; }
  std::uint32_t num_pages() const { return num_pages_; }
  // Sorted by layer, then by offset in the stripe.
  std::span<const Piece> pieces() const { return pieces_; }
  // Pieces of layers [begin, end).
  std::span<const Piece> pieces_of_layers(std::uint32_t begin, std::uint32_t end) const;

 private:
  GroupSpec spec_;
  std::uint32_t num_pages_ = 0;
  std::vector<Piece> pieces_;
};

}  // namespace kvtier
