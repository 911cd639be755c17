// GhostLists: digests of blocks that left not long ago, for policies that learn from what they evicted.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvtier/core/huge_vector.h"

namespace kvtier {

// Lists ordered by when a digest was added. A digest stands in at most one of them.
//
// Memory: at most 37 bytes per digest of capacity, allocated at the start. Threads: none of its own.
class GhostLists {
 public:
  // At most `capacity` digests in all.
  GhostLists(std::size_t capacity, std::uint32_t num_lists);

  // Adds it as the youngest of the list, wherever it stood before. When there is no room the oldest of the
  // longest list goes.
  void add(std::uint64_t digest, std::uint32_t list);
  // Removes it; says in which list it was.
  std::optional<std::uint32_t> take(std::uint64_t digest);
  // Requires a list that is not empty.
  void drop_oldest(std::uint32_t list);
  std::size_t size(std::uint32_t list) const { return sizes_[list]; }

  static double bytes_for(std::size_t capacity);

 private:
  static constexpr std::uint32_t kNone = 0xffffffffU;
  struct Node {
    std::uint64_t digest = 0;
    std::uint32_t older = 0;
    std::uint32_t younger = 0;
  };
  std::size_t home(std::uint64_t digest) const { return static_cast<std::size_t>(digest >> 7) & mask_; }
  std::size_t bucket_of(std::uint64_t digest) const;  // its own, or the free one where it would stand
  void unlink(std::uint32_t index);
  void clear_bucket(std::size_t hole);
  void remove(std::size_t bucket);

  std::uint32_t num_lists_;
  HugeVector<Node> nodes_;  // sentinels of the lists first: .younger is the oldest
  std::vector<std::uint32_t> free_;
  HugeVector<std::uint32_t> table_;  // node numbers by digest, open-addressed at a load of at most one half
  std::size_t mask_;
  HugeVector<std::uint8_t> list_of_;  // of each node
  std::vector<std::size_t> sizes_;
};

}  // namespace kvtier
