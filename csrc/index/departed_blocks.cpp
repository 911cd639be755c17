#include "kvtier/index/departed_blocks.h"

#include <algorithm>
#include <array>

#include "kvtier/core/status.h"

namespace kvtier {

DepartedBlocks::DepartedBlocks(std::size_t capacity) : ring_(capacity), last_of_(capacity, kNone) {
  KVTIER_CHECK(capacity > 0 && capacity < kNone);
}

BlockPast DepartedBlocks::past_of(const Place& place) {
  return {.used = place.used,
          .returns = static_cast<std::uint8_t>(place.returns),
          .chain = static_cast<std::uint8_t>(place.chain),
          .block_class = static_cast<std::uint8_t>(place.block_class)};
}

// kNone when it is not remembered.
std::uint32_t DepartedBlocks::place_of(std::uint64_t digest) {
  // Whatever is added in its place is the last one then.
  if (digest == last_digest_ && !ring_[last_place_].vacant()) return last_place_;
  std::size_t since = 0;
  for (std::uint32_t at = last_of_[bucket_of(digest)]; at != kNone; at = ring_[at].before) {
    const std::size_t since_here = added_since(at);
    if (since_here <= since) return kNone;  // it was added anew since the link was made
    since = since_here;
    if (ring_[at].label == label(digest) && !ring_[at].vacant()) {
      last_digest_ = digest;
      return last_place_ = at;
    }
  }
  return kNone;
}

std::optional<BlockPast> DepartedBlocks::add(std::uint64_t digest, const BlockPast& past) {
  Place& place = ring_[next_];
  const std::optional<BlockPast> forgotten = place.vacant() ? std::nullopt : std::optional(past_of(place));
  std::uint32_t& last = last_of_[bucket_of(digest)];
  place.used = past.used;
  place.label = label(digest) & 0xfffffU;
  place.returns = std::min(past.returns, BlockPast::kMostReturns) & 0x3fU;
  place.chain = past.chain & 0x3U;
  place.block_class = past.block_class & 0xfU;
  place.before = last;
  last = static_cast<std::uint32_t>(next_);
  last_digest_ = digest;
  last_place_ = last;
  if (++next_ == ring_.size()) next_ = 0;
  return forgotten;
}

std::optional<BlockPast> DepartedBlocks::take(std::uint64_t digest) {
  const std::uint32_t at = place_of(digest);
  if (at == kNone) return std::nullopt;
  const BlockPast past = past_of(ring_[at]);
  ring_[at].block_class = kVacantClass;
  return past;
}

std::optional<BlockPast> DepartedBlocks::find(std::uint64_t digest) {
  const std::uint32_t at = place_of(digest);
  return at == kNone ? std::nullopt : std::optional(past_of(ring_[at]));
}

void DepartedBlocks::fetch(std::span<const BlockKey> keys, GroupId group, std::uint64_t seed) const {
  std::array<const std::uint32_t*, 32> last;
  while (!keys.empty()) {
    const std::size_t n = std::min(keys.size(), last.size());
    for (std::size_t i = 0; i < n; ++i) {
      last[i] = &last_of_[bucket_of(block_digest(keys[i], group, seed))];
      __builtin_prefetch(last[i], 1);
    }
    for (std::size_t i = 0; i < n; ++i) {
      if (*last[i] != kNone) __builtin_prefetch(&ring_[*last[i]]);
    }
    keys = keys.subspan(n);
  }
}

void DepartedBlocks::set_class(std::uint64_t digest, std::uint8_t block_class) {
  const std::uint32_t at = place_of(digest);
  KVTIER_CHECK(at != kNone);
  ring_[at].block_class = block_class & 0xfU;
}

double DepartedBlocks::bytes_for(std::size_t capacity) {
  return static_cast<double>(capacity * (sizeof(Place) + sizeof(std::uint32_t)));
}

}  // namespace kvtier
