#include "kvtier/replay/belady.h"

#include <algorithm>
#include <queue>
#include <utility>
#include <vector>

namespace kvtier::replay {
namespace {

constexpr std::uint64_t kNever = ~std::uint64_t{0};

// For every reference, the position of the next one to the same block.
std::vector<std::uint64_t> next_uses(std::span<const std::uint32_t> blocks, std::size_t num_blocks) {
  std::vector<std::uint64_t> last(num_blocks, kNever);
  std::vector<std::uint64_t> next(blocks.size());
  for (std::size_t i = blocks.size(); i-- > 0;) next[i] = std::exchange(last[blocks[i]], i);
  return next;
}

class Cache {
 public:
  Cache(std::size_t num_blocks, std::uint64_t capacity)
      : next_use_(num_blocks, kAbsent), capacity_(capacity) {}

  bool holds(std::uint32_t block) const { return next_use_[block] != kAbsent; }
  void use(std::uint32_t block, std::uint64_t next) {
    if (!holds(block)) {
      if (size_ == capacity_) {
        drop_stale();
        if (capacity_ == 0 || farthest_.top().first <= next) return;
        next_use_[farthest_.top().second] = kAbsent;
        farthest_.pop();
        --size_;
      }
      ++size_;
    }
    next_use_[block] = next;
    farthest_.emplace(next, block);
  }

 private:
  static constexpr std::uint64_t kAbsent = kNever - 1;
  void drop_stale() {
    while (!farthest_.empty() && next_use_[farthest_.top().second] != farthest_.top().first) farthest_.pop();
  }

  std::vector<std::uint64_t> next_use_;
  std::priority_queue<std::pair<std::uint64_t, std::uint32_t>> farthest_;
  std::uint64_t capacity_;
  std::uint64_t size_ = 0;
};

}  // namespace

std::uint64_t belady_hits(const TraceView& trace, std::uint64_t capacity) {
  std::size_t num_blocks = 0;
  for (const std::uint32_t block : trace.blocks) num_blocks = std::max(num_blocks, std::size_t{block} + 1);
  const std::vector<std::uint64_t> next = next_uses(trace.blocks, num_blocks);
  Cache cache(num_blocks, capacity);
  std::uint64_t hits = 0;
  for (std::size_t r = 0; r < trace.num_requests(); ++r) {
    const std::span<const std::uint32_t> blocks = trace.request(r);
    for (std::size_t i = 0; i < blocks.size() && cache.holds(blocks[i]); ++i) ++hits;
    for (std::size_t i = 0; i < blocks.size(); ++i) cache.use(blocks[i], next[trace.begins[r] + i]);
  }
  return hits;
}

}  // namespace kvtier::replay
