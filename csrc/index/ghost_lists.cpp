#include "kvtier/index/ghost_lists.h"

#include <algorithm>
#include <bit>

#include "kvtier/core/status.h"

namespace kvtier {
namespace {

std::size_t table_size(std::size_t capacity) { return std::bit_ceil(std::max<std::size_t>(capacity, 4) * 2); }

}  // namespace

GhostLists::GhostLists(std::size_t capacity, std::uint32_t num_lists)
    : num_lists_(num_lists),
      nodes_(capacity + num_lists),
      table_(table_size(capacity), kNone),
      mask_(table_.size() - 1),
      list_of_(capacity + num_lists, 0),
      sizes_(num_lists, 0) {
  for (std::uint32_t list = 0; list < num_lists; ++list) nodes_[list].older = nodes_[list].younger = list;
  free_.reserve(capacity);
  for (std::size_t n = nodes_.size(); n-- > num_lists;) free_.push_back(static_cast<std::uint32_t>(n));
}

std::size_t GhostLists::bucket_of(std::uint64_t digest) const {
  std::size_t at = home(digest);
  while (table_[at] != kNone && nodes_[table_[at]].digest != digest) at = (at + 1) & mask_;
  return at;
}

void GhostLists::unlink(std::uint32_t index) {
  nodes_[nodes_[index].older].younger = nodes_[index].younger;
  nodes_[nodes_[index].younger].older = nodes_[index].older;
}

// Backward shift (Knuth 6.4, algorithm R), as in Index.
void GhostLists::clear_bucket(std::size_t hole) {
  for (std::size_t at = (hole + 1) & mask_; table_[at] != kNone; at = (at + 1) & mask_) {
    const std::size_t from_home = (at - home(nodes_[table_[at]].digest)) & mask_;
    if (from_home >= ((at - hole) & mask_)) {
      table_[hole] = table_[at];
      hole = at;
    }
  }
  table_[hole] = kNone;
}

void GhostLists::remove(std::size_t bucket) {
  const std::uint32_t index = table_[bucket];
  clear_bucket(bucket);
  unlink(index);
  --sizes_[list_of_[index]];
  free_.push_back(index);
}

void GhostLists::add(std::uint64_t digest, std::uint32_t list) {
  if (nodes_.size() == num_lists_) return;  // no capacity at all
  if (const std::size_t at = bucket_of(digest); table_[at] != kNone) remove(at);
  if (free_.empty()) {
    const auto longest = std::max_element(sizes_.begin(), sizes_.end());
    drop_oldest(static_cast<std::uint32_t>(longest - sizes_.begin()));
  }
  const std::uint32_t index = free_.back();
  free_.pop_back();
  nodes_[index] = {digest, nodes_[list].older, list};
  nodes_[nodes_[list].older].younger = index;
  nodes_[list].older = index;
  list_of_[index] = static_cast<std::uint8_t>(list);
  ++sizes_[list];
  table_[bucket_of(digest)] = index;
}

std::optional<std::uint32_t> GhostLists::take(std::uint64_t digest) {
  const std::size_t at = bucket_of(digest);
  if (table_[at] == kNone) return std::nullopt;
  const std::uint32_t list = list_of_[table_[at]];
  remove(at);
  return list;
}

void GhostLists::drop_oldest(std::uint32_t list) {
  const std::uint32_t oldest = nodes_[list].younger;
  KVTIER_CHECK(oldest != list);
  remove(bucket_of(nodes_[oldest].digest));
}

double GhostLists::bytes_for(std::size_t capacity) {
  return static_cast<double>(capacity * (sizeof(Node) + sizeof(std::uint32_t) + 1) +
                             table_size(capacity) * sizeof(std::uint32_t));
}

}  // namespace kvtier
