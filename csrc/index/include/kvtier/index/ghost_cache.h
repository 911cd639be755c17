// GhostCache: what hit rate a tier would have with half, the same, twice and four times its capacity.
//
// It keeps no blocks: only 64-bit hashes of a sample of them, in the order of their last use. In an LRU stack
// the block at position d is found by every cache of more than d blocks (Mattson et al., 1970), so one stack
// answers for all capacities at once. Keys are sampled by a threshold on their hash and positions scaled by
// the same rate (SHARDS: Waldspurger et al., FAST 2015; Waldspurger et al., ATC 2017).
//
//   most recent  [ segment 0 | segment 1 | segment 2   | segment 3                 ]  least
//                0         1/2           1             2                           4   x capacity
//
// A use moves a hash to the front and the last of each segment that overflows into the next one: O(segments).
// Prefix semantics: a block counts as found only where all sampled blocks before it in the same lookup are.
// Uses arrive tail first, so a prefix lies in front of what hangs on it, and sampling each block by itself
// loses nothing but precision.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

// Threads: none of its own; guarded by its owner. Memory: at most kMostBytes, taken at construction.
class GhostCache {
 public:
  static constexpr std::size_t kNumPoints = 4;
  static constexpr std::array<double, kNumPoints> kFactors{0.5, 1, 2, 4};
  static constexpr std::size_t kMostBytes = std::size_t{512} << 10;

  // `capacity`: of the tier, in blocks, at least 1.
  explicit GhostCache(std::uint64_t capacity);

  // Hashes below it are sampled; all others are to be left out by the caller. Never above kNoHash.
  std::uint64_t threshold() const { return threshold_; }
  static constexpr std::uint64_t kNoHash = ~std::uint64_t{0};  // is never sampled
  // Sampled hashes over all.
  double rate() const { return rate_; }

  // All take sampled hashes only.
  // The blocks were stored or loaded. Of one request the tail comes first.
  void use(std::uint64_t hash);
  // Refreshes it where it is known.
  void touch(std::uint64_t hash);
  // It was dropped: every capacity has a place more.
  void erase(std::uint64_t hash);
  // A request asked for `num_blocks`, of which these are the sampled ones, in the order of its prompt.
  // Counts, and changes nothing else.
  void look(std::span<const std::uint64_t> hashes, std::uint64_t num_blocks);

  struct Point {
    double factor;
    std::uint64_t capacity_blocks;
    double hit_rate;  // of the blocks asked for; 0 before the first
  };
  // A few blocks that every prompt begins with make up much of what is asked for, and are in the sample or
  // not: by as much as the sample has too few or too many, blocks are taken to be found at once, as those
  // would be (SHARDS-adj of the paper).
  std::array<Point, kNumPoints> points() const;
  std::uint64_t asked() const { return asked_; }    // blocks asked for
  std::uint64_t looked() const { return looked_; }  // sampled ones of these
  std::size_t bytes() const;                        // allocated

 private:
  using Id = std::uint32_t;
  static constexpr Id kNone = 0xffffffffU;
  struct Node {
    std::uint64_t hash;
    Id newer;  // kNone: the most recent; of a free node: the next free one
    Id older;
    std::uint32_t segment;
  };

  std::size_t home(std::uint64_t hash) const { return static_cast<std::size_t>(hash) & mask_; }
  std::size_t place(std::uint64_t hash) const;  // of its bucket, or of the empty one where it would stand
  void put_first(Id id);
  void unlink(Id id);
  // Passes one block on from every overflowing segment from the first to before `end`.
  void settle(std::size_t end);
  void forget(std::size_t at);

  std::uint64_t capacity_;
  double rate_;
  std::uint64_t threshold_;
  std::array<std::uint32_t, kNumPoints> most_{};  // of each segment
  std::array<std::uint32_t, kNumPoints> size_{};
  std::array<Id, kNumPoints> last_;  // of each segment that is not empty
  Id first_ = kNone;
  Id free_ = kNone;
  std::vector<Node> nodes_;
  std::vector<Id> table_;
  std::size_t mask_ = 0;
  std::uint64_t asked_ = 0;
  std::uint64_t looked_ = 0;
  std::array<std::uint64_t, kNumPoints + 1> found_in_{};  // by the deepest segment so far in the prompt
};

}  // namespace kvtier
