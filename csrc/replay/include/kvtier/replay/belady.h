// Belady's MIN: the ceiling of every policy.
#pragma once

#include <cstdint>

#include "kvtier/replay/trace.h"

namespace kvtier::replay {

// Blocks that a cache of `capacity` blocks hits when it evicts the block whose next use is farthest away, and
// does not take in one whose next use is farther still (Belady, A study of replacement algorithms for a
// virtual-storage computer, IBM Systems Journal 5(2), 1966; Mattson et al. 1970 for the proof). Blocks of a
// request are used head first, so a block is never needed later than what hangs on it: the cache keeps whole
// prefixes by itself. O(references log capacity).
std::uint64_t belady_hits(const TraceView& trace, std::uint64_t capacity);

}  // namespace kvtier::replay
