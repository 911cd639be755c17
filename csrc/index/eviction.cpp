#include "kvtier/index/eviction.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {

LruPolicy::LruPolicy(std::size_t capacity) {
  nodes_.reserve(capacity + 1);
  nodes_.push_back({0, 0});
}

void LruPolicy::link_youngest(std::uint32_t at) {
  const std::uint32_t youngest = nodes_[0].older;
  nodes_[at] = {youngest, 0};
  nodes_[youngest].younger = at;
  nodes_[0].older = at;
}

void LruPolicy::unlink(std::uint32_t at) {
  nodes_[nodes_[at].older].younger = nodes_[at].younger;
  nodes_[nodes_[at].younger].older = nodes_[at].older;
}

void LruPolicy::insert(EntryId id) {
  const std::uint32_t at = position(id);
  if (at >= nodes_.size()) nodes_.resize(at + 1, Node{kNowhere, kNowhere});
  KVTIER_CHECK(nodes_[at].older == kNowhere);
  link_youngest(at);
  ++size_;
}

void LruPolicy::touch(EntryId id) {
  KVTIER_CHECK(contains(id));
  unlink(position(id));
  link_youngest(position(id));
}

void LruPolicy::erase(EntryId id) {
  KVTIER_CHECK(contains(id));
  unlink(position(id));
  nodes_[position(id)] = {kNowhere, kNowhere};
  --size_;
}

std::optional<EntryId> LruPolicy::victim(const MayEvict& may_evict) {
  const std::uint32_t candidates = std::min(size_, kMaxSearch);
  for (std::uint32_t seen = 0; seen < candidates; ++seen) {
    const EntryId oldest{nodes_[0].younger - 1};
    if (may_evict(oldest)) return oldest;
    touch(oldest);
  }
  return std::nullopt;
}

}  // namespace kvtier
