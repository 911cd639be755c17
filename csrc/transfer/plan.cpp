#include "kvtier/transfer/plan.h"

#include <algorithm>
#include <string>

#include "kvtier/core/status.h"

namespace kvtier {

void plan(const PageMap& map, std::span<const BlockMove> moves, std::span<const PageId> pages,
          Direction direction, std::uint32_t layer_begin, std::uint32_t layer_end,
          std::vector<CopyRun>& runs) {
  const std::span<const Piece> pieces = map.pieces_of_layers(layer_begin, layer_end);
  runs.reserve(runs.size() + moves.size() * pieces.size());
  for (const BlockMove& move : moves) {
    std::byte* previous_page_end = nullptr;  // runs of two blocks are never joined: their slots are apart
    std::byte* previous_slot_end = nullptr;
    std::uint32_t previous_allocation = 0;  // no run straddles two: devices refuse it (device.h)
    for (const Piece& piece : pieces) {
      const std::uint64_t page = raw(pages[move.first_page + piece.page_in_block]);
      std::byte* in_page = piece.base + page * piece.page_stride + move.sub_block * piece.sub_stride;
      std::byte* in_slot = move.stripe + piece.stripe_offset;
      if (in_page == previous_page_end && in_slot == previous_slot_end &&
          piece.allocation == previous_allocation) {
        runs.back().bytes += piece.bytes;
      } else if (direction == Direction::store) {
        runs.push_back({in_slot, in_page, piece.bytes});
      } else {
        runs.push_back({in_page, in_slot, piece.bytes});
      }
      previous_page_end = in_page + piece.bytes;
      previous_slot_end = in_slot + piece.bytes;
      previous_allocation = piece.allocation;
    }
  }
}

Status check_pages(const PageMap& map, std::span<const BlockMove> moves, std::span<const PageId> pages,
                   Direction direction) {
  for (std::size_t i = 0; i < pages.size(); ++i) {
    if (raw(pages[i]) >= map.num_pages()) {
      return Status::invalid_argument("page_ids[" + std::to_string(i) + "] is " +
                                      std::to_string(raw(pages[i])) + "; allowed: 0 to " +
                                      std::to_string(map.num_pages() - 1));
    }
  }
  const std::uint32_t per_block = map.spec().pages_per_block();
  for (const BlockMove& move : moves) {
    KVTIER_CHECK(std::uint64_t{move.first_page} + per_block <= pages.size());
    KVTIER_CHECK(move.sub_block < map.spec().blocks_per_page());
  }
  if (direction == Direction::store) return Status::ok();
  std::vector<std::uint64_t> places;
  places.reserve(moves.size() * per_block);
  for (const BlockMove& move : moves) {
    for (std::uint32_t p = 0; p < per_block; ++p) {
      places.push_back(std::uint64_t{raw(pages[move.first_page + p])} * map.spec().blocks_per_page() +
                       move.sub_block);
    }
  }
  std::sort(places.begin(), places.end());
  const auto twice = std::adjacent_find(places.begin(), places.end());
  if (twice != places.end()) {
    return Status::invalid_argument("page id " + std::to_string(*twice / map.spec().blocks_per_page()) +
                                    " is named twice in page_ids of one load; allowed: each place once");
  }
  return Status::ok();
}

}  // namespace kvtier
