// DepartedBlocks: what is still known of blocks that may have gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "kvtier/core/huge_vector.h"
#include "kvtier/core/types.h"
#include "kvtier/index/eviction.h"
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

// A ring of the last `capacity` blocks that were added, found by digest.
//
// They are forgotten strictly in the order in which they were added. A prompt hits as far as its first
// missing block, so of a prompt that is remembered but for some of its blocks little is left
// (docs/policies.md has what a table that forgets by bucket loses).
//
// Each place of the ring is linked to the one added before it to its bucket. Nothing is unlinked: a link, or
// a bucket's first place, that was added to another bucket since is followed as if it were the bucket's own,
// and a chain ends where it would go to a later place. Two or three places are looked at, whatever the load.
// A digest is kept as 20 bits beside its bucket: about one block in three hundred thousand is taken for
// another.
//
// Memory: 16 bytes per block of capacity, allocated at the start. Threads: none of its own. add() and
// set_class() apart, every operation reads two or three cache lines.
class DepartedBlocks {
 public:
  // Requires a capacity below 2^32 - 1.
  explicit DepartedBlocks(std::size_t capacity);

  // Remembers a block that is not remembered. Returns what is forgotten for it, of the block that was added
  // first, or nothing while there is room.
  std::optional<BlockPast> add(std::uint64_t digest, const BlockPast& past);
  // Forgets it, and says what was known. Its place stays empty until its turn comes.
  std::optional<BlockPast> take(std::uint64_t digest);
  std::optional<BlockPast> find(std::uint64_t digest);
  // These are about to be searched: asks for the places where that begins, many at a time.
  void fetch(std::span<const BlockKey> keys, GroupId group, std::uint64_t seed) const;
  // Requires one that is remembered.
  void set_class(std::uint64_t digest, std::uint8_t block_class);

  static double bytes_for(std::size_t capacity);

 private:
  static constexpr std::uint32_t kNone = 0xffffffffU;
  static constexpr std::uint32_t kVacantClass = 15;
  struct Place {
    Tick used = 0;
    std::uint32_t label : 20 = 0;
    std::uint32_t returns : 6 = 0;
    std::uint32_t chain : 2 = 0;
    std::uint32_t block_class : 4 = kVacantClass;
    std::uint32_t before = kNone;  // the place added before it to its bucket
    bool vacant() const { return block_class == kVacantClass; }
  };
  static_assert(sizeof(Place) == 12);

  static std::uint32_t label(std::uint64_t digest) { return static_cast<std::uint32_t>(digest) & 0xfffffU; }
  std::size_t bucket_of(std::uint64_t digest) const {
    return static_cast<std::size_t>(((digest >> 32) * last_of_.size()) >> 32);
  }
  static BlockPast past_of(const Place& place);
  std::uint32_t place_of(std::uint64_t digest);
  // How many were added since, and itself.
  std::size_t added_since(std::uint32_t place) const {
    return place < next_ ? next_ - place : next_ + ring_.size() - place;
  }

  HugeVector<Place> ring_;
  HugeVector<std::uint32_t> last_of_;  // by bucket: the place added last, or kNone
  std::size_t next_ = 0;               // place in the ring of the next one
  // What was added or found last: a prompt's next block asks for it, and who found one takes it.
  std::uint64_t last_digest_ = 0;
  std::uint32_t last_place_ = 0;
};

}  // namespace kvtier
