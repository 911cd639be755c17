// DepartedBlocks: what is still known of blocks that may have gone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "kvtier/core/huge_vector.h"
#include "kvtier/index/return_hazards.h"

namespace kvtier {

// What ReturnHazardPolicy and ReturnBook know of a block.
struct BlockPast {
  Tick used = 0;             // when last
  std::uint8_t returns = 0;  // uses after the first, at most 255
  std::uint8_t chain = 0;    // what its first use followed on: see return_classes.h
  std::uint8_t block_class = 0;
};

// A ring of the last `capacity` blocks that left, found by digest.
//
// Memory: at most 32 bytes per block of capacity, allocated at the start. Threads: none of its own. Every
// operation is O(1).
class DepartedBlocks {
 public:
  explicit DepartedBlocks(std::size_t capacity);

  // Remembers a block that is not remembered. Returns what is forgotten for it: of the block that left
  // longest ago, or nothing while there is room. Requires a capacity.
  std::optional<BlockPast> add(std::uint64_t digest, const BlockPast& past);
  // Forgets it, and says what was known.
  std::optional<BlockPast> take(std::uint64_t digest);

  // What is known of it, to be changed in place, until the next add() or take(); or null.
  BlockPast* find(std::uint64_t digest);

  static double bytes_for(std::size_t capacity);

 private:
  static constexpr std::uint32_t kNone = 0xffffffffU;
  struct Departed {
    std::uint64_t digest = 0;
    BlockPast past;
  };

  static constexpr std::uint8_t kVacant = 0xff;  // as block_class
  std::size_t home(std::uint64_t digest) const { return static_cast<std::size_t>(digest >> 7) & mask_; }
  std::size_t bucket_of(std::uint64_t digest) const;  // its own, or the free one where it would stand
  void clear_bucket(std::size_t hole);

  HugeVector<Departed> ring_;
  std::size_t next_ = 0;             // place in the ring of the next one
  HugeVector<std::uint32_t> table_;  // places by digest, open-addressed at a load of at most one half
  std::size_t mask_;
};

}  // namespace kvtier
