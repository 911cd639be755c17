// DepartedBlocks: what is still known of blocks that may have gone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "kvtier/core/huge_vector.h"
#include "kvtier/index/return_hazards.h"

namespace kvtier {

// What ReturnHazardPolicy and ReturnBook know of a block.
struct BlockPast {
  Tick used = 0;                 // when last
  std::uint8_t returns = 0;      // uses after the first, at most kMostReturns
  std::uint8_t chain = 0;        // what its first use followed on: see return_classes.h
  std::uint8_t block_class = 0;  // at most kMostClass
  static constexpr std::uint8_t kMostReturns = 63;
  static constexpr std::uint8_t kMostChain = 3;
  static constexpr std::uint8_t kMostClass = 14;
};

// The last blocks that were added, `capacity` of them and some more, found by digest.
//
// A hash table whose buckets are one cache line and remember the last eight blocks that fell into them. With
// places for half as many blocks again 97 in 100 of the last `capacity` are known, and of the older ones
// some; nothing that is counted from them depends on which. A digest is kept as 20 bits beside its bucket:
// one in a hundred thousand blocks is taken for another.
//
// Memory: 12 bytes per block of capacity, allocated at the start. Threads: none of its own. Every operation
// is O(1), one cache miss.
class DepartedBlocks {
 public:
  // Requires a capacity.
  explicit DepartedBlocks(std::size_t capacity);

  // Remembers a block that is not remembered. Returns what is forgotten for it, of the block of its bucket
  // that was added first, or nothing while there is room.
  std::optional<BlockPast> add(std::uint64_t digest, const BlockPast& past);
  // Forgets it, and says what was known.
  std::optional<BlockPast> take(std::uint64_t digest);
  std::optional<BlockPast> find(std::uint64_t digest) const;
  // Requires one that is remembered.
  void set_class(std::uint64_t digest, std::uint8_t block_class);

  static double bytes_for(std::size_t capacity);

 private:
  static constexpr std::size_t kPlaces = 8;
  static constexpr std::uint32_t kVacantClass = 15;
  struct Place {
    Tick used = 0;
    std::uint32_t label : 20 = 0;
    std::uint32_t returns : 6 = 0;
    std::uint32_t chain : 2 = 0;
    std::uint32_t block_class : 4 = kVacantClass;
    bool vacant() const { return block_class == kVacantClass; }
  };
  struct alignas(64) Bucket {
    std::array<Place, kPlaces> places;  // the last one added first; vacant ones anywhere
  };
  static_assert(sizeof(Bucket) == 64);

  static std::size_t num_buckets(std::size_t capacity) { return (capacity * 3 / 2 + kPlaces - 1) / kPlaces; }
  static std::uint32_t label(std::uint64_t digest) { return static_cast<std::uint32_t>(digest) & 0xfffffU; }
  std::size_t bucket_of(std::uint64_t digest) const {
    return static_cast<std::size_t>(((digest >> 32) * buckets_.size()) >> 32);
  }
  static BlockPast past_of(const Place& place);
  const Place* place_of(std::uint64_t digest) const;
  Place* place_of(std::uint64_t digest) {
    return const_cast<Place*>(static_cast<const DepartedBlocks*>(this)->place_of(digest));  // NOLINT
  }

  HugeVector<Bucket> buckets_;
};

}  // namespace kvtier
