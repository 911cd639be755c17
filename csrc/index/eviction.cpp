#include "kvtier/index/eviction.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {
namespace {

// std::*_heap keep the greatest in front; we want the oldest.
constexpr auto kYoungerFirst = [](const auto& a, const auto& b) { return a.last_use > b.last_use; };

constexpr std::size_t kStaleAllowed = 64;  // beside as many as are not: compacting stays rare

constexpr std::uint64_t kUseMask = (std::uint64_t{1} << 62) - 1;  // that many uses outlast any machine

}  // namespace

LruPolicy::LruPolicy(std::size_t capacity) {
  nodes_.reserve(capacity + 1);
  nodes_.emplace_back();
}

LruPolicy::Node& LruPolicy::node(EntryId id) {
  KVTIER_CHECK(std::size_t{raw(id)} + 1 < nodes_.size());
  return nodes_[std::size_t{raw(id)} + 1];
}

void LruPolicy::link_behind(std::uint32_t at, std::uint32_t older) {
  const std::uint32_t younger = nodes_[older].younger;
  nodes_[at].older = older;
  nodes_[at].younger = younger;
  nodes_[older].younger = at;
  nodes_[younger].older = at;
}

void LruPolicy::unlink(std::uint32_t at) {
  nodes_[nodes_[at].older].younger = nodes_[at].younger;
  nodes_[nodes_[at].younger].older = nodes_[at].older;
}

// A waiting entry stays in the heap's array; drop_stale_waiting() skips it when it comes up.
void LruPolicy::leave(EntryId id) {
  if (where(node(id)) == Where::list) unlink(raw(id) + 1);
  if (where(node(id)) == Where::heap) --in_heap_;
  place(node(id), Where::nowhere);
}

void LruPolicy::insert(EntryId id) {
  const std::size_t at = std::size_t{raw(id)} + 1;
  if (at >= nodes_.size()) nodes_.resize(at + 1);
  Node& n = nodes_[at];
  KVTIER_CHECK(where(n) == Where::nowhere);
  n.last_use = ++uses_ & kUseMask;
  place(n, Where::list);
  link_behind(raw(id) + 1, nodes_[0].older);
}

void LruPolicy::touch(EntryId id) {
  Node& n = node(id);
  KVTIER_CHECK(where(n) != Where::nowhere);
  if (where(n) == Where::held) {
    n.last_use = ++uses_ & kUseMask;
    return;
  }
  leave(id);
  insert(id);
}

void LruPolicy::hold(EntryId id) {
  KVTIER_CHECK(where(node(id)) == Where::list || where(node(id)) == Where::heap);
  leave(id);
  place(node(id), Where::held);
}

void LruPolicy::let_go(EntryId id) {
  Node& n = node(id);
  KVTIER_CHECK(where(n) == Where::held);
  const std::uint32_t oldest = nodes_[0].younger;
  const std::uint32_t youngest = nodes_[0].older;
  if (oldest == 0 || n.last_use < nodes_[oldest].last_use) {
    place(n, Where::list);
    link_behind(raw(id) + 1, 0);
  } else if (n.last_use > nodes_[youngest].last_use) {
    place(n, Where::list);
    link_behind(raw(id) + 1, youngest);
  } else {
    if (waiting_.size() > 2 * in_heap_ + kStaleAllowed) compact_waiting();
    waiting_.push_back({n.last_use, id});
    std::push_heap(waiting_.begin(), waiting_.end(), kYoungerFirst);
    place(n, Where::heap);
    ++in_heap_;
  }
}

void LruPolicy::erase(EntryId id) {
  KVTIER_CHECK(where(node(id)) != Where::nowhere);
  leave(id);
}

bool LruPolicy::is_stale(const Waiting& waiting) {
  const Node& n = node(waiting.id);
  return where(n) != Where::heap || n.last_use != waiting.last_use;
}

// Where nothing is ever evicted nobody pops the heap, and it would grow with every entry let go. An entry
// that was held and let go again without a use stands in it twice.
void LruPolicy::compact_waiting() {
  std::erase_if(waiting_, [this](const Waiting& each) { return is_stale(each); });
  std::sort(waiting_.begin(), waiting_.end(),
            [](const Waiting& a, const Waiting& b) { return a.last_use < b.last_use; });  // which is a heap
  const auto same = [](const Waiting& a, const Waiting& b) { return a.last_use == b.last_use; };
  waiting_.erase(std::unique(waiting_.begin(), waiting_.end(), same), waiting_.end());
}

void LruPolicy::drop_stale_waiting() {
  while (!waiting_.empty()) {
    if (!is_stale(waiting_.front())) return;
    std::pop_heap(waiting_.begin(), waiting_.end(), kYoungerFirst);
    waiting_.pop_back();
  }
}

std::optional<EntryId> LruPolicy::victim() {
  drop_stale_waiting();
  const std::uint32_t oldest = nodes_[0].younger;
  const bool listed = oldest != 0;
  if (!waiting_.empty() && (!listed || waiting_.front().last_use < nodes_[oldest].last_use)) {
    return waiting_.front().id;
  }
  if (!listed) return std::nullopt;
  return EntryId{oldest - 1};
}

}  // namespace kvtier
