#include "kvtier/index/ghost_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "kvtier/core/status.h"

namespace kvtier {
namespace {

// Samples of one capacity. 1,000 put the borders within a few percent of where they should be; beyond that
// an eighth of all blocks is as much as a lookup does not notice, and 4,000 as precise as anybody needs.
constexpr double kFewSamples = 1000;
constexpr double kManySamples = 4000;
constexpr double kUsualRate = 1.0 / 8;

double rate_for(std::uint64_t capacity) {
  const auto blocks = static_cast<double>(capacity);
  return std::min(1.0, std::max(kFewSamples / blocks, std::min(kUsualRate, kManySamples / blocks)));
}

}  // namespace

GhostCache::GhostCache(std::uint64_t capacity)
    : capacity_(std::max<std::uint64_t>(1, capacity)), rate_(rate_for(capacity_)) {
  threshold_ = rate_ >= 1 ? kNoHash : static_cast<std::uint64_t>(std::ldexp(rate_, 64));
  last_.fill(kNone);
  std::uint32_t before = 0;
  for (std::size_t k = 0; k < kNumPoints; ++k) {
    const double scaled = std::round(static_cast<double>(capacity_) * kFactors[k] * rate_);
    const std::uint32_t end = std::max(before + 1, static_cast<std::uint32_t>(scaled));
    most_[k] = end - before;
    before = end;
  }
  nodes_.resize(before + 1);  // one more than stay: a use is put in before the oldest goes
  for (std::size_t i = nodes_.size(); i-- > 0;) {
    nodes_[i].newer = free_;
    free_ = static_cast<Id>(i);
  }
  table_.assign(std::bit_ceil(nodes_.size() * 2), kNone);
  mask_ = table_.size() - 1;
  KVTIER_CHECK(bytes() <= kMostBytes);
}

std::size_t GhostCache::bytes() const {
  return nodes_.capacity() * sizeof(Node) + table_.capacity() * sizeof(Id);
}

std::size_t GhostCache::place(std::uint64_t hash) const {
  std::size_t at = home(hash);
  while (table_[at] != kNone && nodes_[table_[at]].hash != hash) at = (at + 1) & mask_;
  return at;
}

void GhostCache::put_first(Id id) {
  Node& node = nodes_[id];
  node.newer = kNone;
  node.older = first_;
  node.segment = 0;
  if (first_ != kNone) nodes_[first_].newer = id;
  first_ = id;
  if (size_[0]++ == 0) last_[0] = id;
}

void GhostCache::unlink(Id id) {
  const Node& node = nodes_[id];
  const std::size_t segment = node.segment;
  if (node.newer == kNone) {
    first_ = node.older;
  } else {
    nodes_[node.newer].older = node.older;
  }
  if (node.older != kNone) nodes_[node.older].newer = node.newer;
  --size_[segment];
  if (last_[segment] == id) last_[segment] = size_[segment] == 0 ? kNone : node.newer;
}

void GhostCache::settle(std::size_t end) {
  for (std::size_t k = 0; k < end && size_[k] > most_[k]; ++k) {
    const Id id = last_[k];
    if (k + 1 == kNumPoints) {
      forget(place(nodes_[id].hash));
      return;
    }
    // It stays where it is in the list: the border moves.
    last_[k] = nodes_[id].newer;
    --size_[k];
    nodes_[id].segment = static_cast<std::uint32_t>(k + 1);
    if (size_[k + 1]++ == 0) last_[k + 1] = id;
  }
}

void GhostCache::use(std::uint64_t hash) {
  const std::size_t at = place(hash);
  if (table_[at] != kNone) {
    const Id id = table_[at];
    const std::size_t segment = nodes_[id].segment;
    unlink(id);
    put_first(id);
    settle(segment);
    return;
  }
  const Id id = free_;
  free_ = nodes_[id].newer;
  nodes_[id].hash = hash;
  table_[at] = id;
  put_first(id);
  settle(kNumPoints);
}

void GhostCache::touch(std::uint64_t hash) {
  if (table_[place(hash)] != kNone) use(hash);
}

void GhostCache::erase(std::uint64_t hash) {
  const std::size_t at = place(hash);
  if (table_[at] != kNone) forget(at);
}

void GhostCache::forget(std::size_t at) {
  const Id id = table_[at];
  unlink(id);
  nodes_[id].newer = free_;
  free_ = id;
  // What was pushed on by it moves back, so that no probe ends too early (Knuth, vol. 3, 6.4, algorithm R).
  std::size_t hole = at;
  for (std::size_t next = (at + 1) & mask_; table_[next] != kNone; next = (next + 1) & mask_) {
    if (((next - home(nodes_[table_[next]].hash)) & mask_) >= ((next - hole) & mask_)) {
      table_[hole] = table_[next];
      hole = next;
    }
  }
  table_[hole] = kNone;
}

void GhostCache::look(std::span<const std::uint64_t> hashes, std::uint64_t num_blocks) {
  constexpr std::size_t kAhead = 8;
  std::size_t deepest = 0;
  for (std::size_t i = 0; i < hashes.size() && deepest < kNumPoints; ++i) {
    if (i + kAhead < hashes.size()) __builtin_prefetch(&table_[home(hashes[i + kAhead])]);
    const Id id = table_[place(hashes[i])];
    deepest = std::max<std::size_t>(deepest, id == kNone ? kNumPoints : nodes_[id].segment);
    ++found_in_[deepest];
  }
  asked_ += num_blocks;
  looked_ += hashes.size();
}

std::array<GhostCache::Point, GhostCache::kNumPoints> GhostCache::points() const {
  std::array<Point, kNumPoints> points{};
  const double expected = static_cast<double>(asked_) * rate_;
  double found = expected - static_cast<double>(looked_);
  for (std::size_t k = 0; k < kNumPoints; ++k) {
    found += static_cast<double>(found_in_[k]);
    const double blocks = std::round(static_cast<double>(capacity_) * kFactors[k]);
    points[k].factor = kFactors[k];
    points[k].capacity_blocks = std::max<std::uint64_t>(1, static_cast<std::uint64_t>(blocks));
    points[k].hit_rate = asked_ == 0 ? 0 : std::clamp(found / expected, 0.0, 1.0);
  }
  return points;
}

}  // namespace kvtier
