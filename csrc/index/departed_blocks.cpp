#include "kvtier/index/departed_blocks.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {

DepartedBlocks::DepartedBlocks(std::size_t capacity) : buckets_(num_buckets(capacity)) {
  KVTIER_CHECK(capacity > 0);
}

BlockPast DepartedBlocks::past_of(const Place& place) {
  return {.used = place.used,
          .returns = static_cast<std::uint8_t>(place.returns),
          .chain = static_cast<std::uint8_t>(place.chain),
          .block_class = static_cast<std::uint8_t>(place.block_class)};
}

const DepartedBlocks::Place* DepartedBlocks::place_of(std::uint64_t digest) const {
  for (const Place& place : buckets_[bucket_of(digest)].places) {
    if (place.label == label(digest) && !place.vacant()) return &place;
  }
  return nullptr;
}

std::optional<BlockPast> DepartedBlocks::add(std::uint64_t digest, const BlockPast& past) {
  std::array<Place, kPlaces>& places = buckets_[bucket_of(digest)].places;
  auto* room = std::find_if(places.begin(), places.end(), [](const Place& place) { return place.vacant(); });
  std::optional<BlockPast> forgotten;
  if (room == places.end()) forgotten = past_of(*--room);
  std::copy_backward(places.begin(), room, room + 1);
  Place& first = places.front();
  first.used = past.used;
  first.label = label(digest) & 0xfffffU;
  first.returns = std::min(past.returns, BlockPast::kMostReturns) & 0x3fU;
  first.chain = past.chain & 0x3U;
  first.block_class = past.block_class & 0xfU;
  return forgotten;
}

std::optional<BlockPast> DepartedBlocks::take(std::uint64_t digest) {
  Place* const place = place_of(digest);
  if (place == nullptr) return std::nullopt;
  const BlockPast past = past_of(*place);
  *place = Place{};
  return past;
}

std::optional<BlockPast> DepartedBlocks::find(std::uint64_t digest) const {
  const Place* const place = place_of(digest);
  return place == nullptr ? std::nullopt : std::optional(past_of(*place));
}

void DepartedBlocks::set_class(std::uint64_t digest, std::uint8_t block_class) {
  Place* const place = place_of(digest);
  KVTIER_CHECK(place != nullptr);
  place->block_class = block_class & 0xfU;
}

double DepartedBlocks::bytes_for(std::size_t capacity) {
  return static_cast<double>(num_buckets(capacity) * sizeof(Bucket));
}

}  // namespace kvtier
