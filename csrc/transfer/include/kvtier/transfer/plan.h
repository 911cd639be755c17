// plan(): which runs of bytes a move consists of. Pure: same input, same runs, nothing is touched.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvtier/platform/device.h"
#include "kvtier/transfer/page_map.h"

namespace kvtier {

// One block of a move: this rank's stripe in a slot, and the pages that hold the block.
struct BlockMove {
  std::byte* stripe;
  // Index into the page list of the block's first page (it has pages_per_block of them).
  std::uint32_t first_page;
  // Which block of its page it is; 0 when a block is whole pages.
  std::uint32_t sub_block;
};

// Appends the runs of `moves` restricted to layers [layer_begin, layer_end), block by block. Runs that
// continue each other on both sides are joined, within a block and within an allocation. Page ids must be in
// range: check_pages() first.
void plan(const PageMap& map, std::span<const BlockMove> moves, std::span<const PageId> pages,
          Direction direction, std::uint32_t layer_begin, std::uint32_t layer_end,
          std::vector<CopyRun>& runs);

// Errors: invalid_argument for a page id out of range and, for loads, for a place that is named twice
// (the runs of a batch are unordered, so what would stand there is undefined). A move that names pages
// beyond the list, or a block that a page does not have, is a bug (KVTIER_CHECK).
Status check_pages(const PageMap& map, std::span<const BlockMove> moves, std::span<const PageId> pages,
                   Direction direction);

}  // namespace kvtier
