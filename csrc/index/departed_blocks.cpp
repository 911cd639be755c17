#include "kvtier/index/departed_blocks.h"

#include <algorithm>
#include <bit>

namespace kvtier {
namespace {

std::size_t table_size(std::size_t capacity) { return std::bit_ceil(std::max<std::size_t>(capacity, 4) * 2); }

}  // namespace

DepartedBlocks::DepartedBlocks(std::size_t capacity)
    : ring_(capacity), table_(table_size(capacity), kNone), mask_(table_.size() - 1) {
  for (Departed& each : ring_) each.past.block_class = kVacant;
}

std::size_t DepartedBlocks::bucket_of(std::uint64_t digest) const {
  std::size_t at = home(digest);
  while (table_[at] != kNone && ring_[table_[at]].digest != digest) at = (at + 1) & mask_;
  return at;
}

// Backward shift (Knuth 6.4, algorithm R), as in Index.
void DepartedBlocks::clear_bucket(std::size_t hole) {
  for (std::size_t at = (hole + 1) & mask_; table_[at] != kNone; at = (at + 1) & mask_) {
    const std::size_t from_home = (at - home(ring_[table_[at]].digest)) & mask_;
    if (from_home >= ((at - hole) & mask_)) {
      table_[hole] = table_[at];
      hole = at;
    }
  }
  table_[hole] = kNone;
}

std::optional<BlockPast> DepartedBlocks::add(std::uint64_t digest, const BlockPast& past) {
  Departed& place = ring_[next_];
  std::optional<BlockPast> forgotten;
  if (place.past.block_class != kVacant) {
    forgotten = place.past;
    clear_bucket(bucket_of(place.digest));
  }
  place = {digest, past};
  table_[bucket_of(digest)] = static_cast<std::uint32_t>(next_);
  next_ = (next_ + 1) % ring_.size();
  return forgotten;
}

std::optional<BlockPast> DepartedBlocks::take(std::uint64_t digest) {
  const std::size_t bucket = bucket_of(digest);
  if (table_[bucket] == kNone) return std::nullopt;
  Departed& place = ring_[table_[bucket]];
  const BlockPast past = place.past;
  clear_bucket(bucket);
  place.past.block_class = kVacant;
  return past;
}

BlockPast* DepartedBlocks::find(std::uint64_t digest) {
  const std::size_t bucket = bucket_of(digest);
  return table_[bucket] == kNone ? nullptr : &ring_[table_[bucket]].past;
}

double DepartedBlocks::bytes_for(std::size_t capacity) {
  return static_cast<double>(capacity * sizeof(Departed) + table_size(capacity) * sizeof(std::uint32_t));
}

}  // namespace kvtier
