// A trace of requests as the replay sees it: which blocks, when. Values only.
//
//   replay/simulation.h   the trace through the tiers and policies of index/, without bytes or drives
//   replay/belady.h       what a cache of the same size could have hit, knowing the future
//
// The same TierIndex, EvictionPolicy, AdmissionPolicy and WriteBudget run in the engine: what is simulated
// here is what they decide there (tests/py/replay holds the two together, block for block).
#pragma once

#include <cstdint>
#include <cstring>
#include <span>

#include "kvtier/core/types.h"

namespace kvtier::replay {

// Borrows the arrays. Request r has blocks [begins[r], begins[r + 1]), head first.
struct TraceView {
  // Dense numbers from 0: equal numbers are equal content with an equal prefix before it.
  std::span<const std::uint32_t> blocks;
  std::span<const std::uint64_t> begins;  // of every request, and the end
  std::span<const std::int64_t> at_us;    // of every request; never goes back

  std::size_t num_requests() const { return at_us.size(); }
  std::span<const std::uint32_t> request(std::size_t r) const {
    return blocks.subspan(begins[r], begins[r + 1] - begins[r]);
  }
};

// The key under which a block of a trace is stored, here and in a real replay.
inline BlockKey key_of(std::uint32_t block) {
  std::uint64_t words[4];
  std::uint64_t x = block;
  for (std::uint64_t& word : words) {  // splitmix64
    x += 0x9e3779b97f4a7c15ULL;
    std::uint64_t z = x;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    word = z ^ (z >> 31);
  }
  BlockKey key;
  std::memcpy(key.bytes.data(), words, sizeof words);
  return key;
}

}  // namespace kvtier::replay
