// The classes of blocks that ReturnHazards tells apart: by how often a block was used again; where it never
// was, by what it hangs on, and whether it was the last of its prompt. docs/policies.md says why these.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvtier/index/departed_blocks.h"

namespace kvtier::internal {

// Hardly later it is the same use: a request looks up, loads and stores.
inline constexpr Tick kSameUseTicks = 2;

// What a block's first use followed on: nothing that had been there (a new prompt), a conversation's first
// return, a later one, or a prefix shared by many (a system prompt).
inline constexpr std::uint8_t kNew = 0;
inline constexpr std::uint8_t kFirstReturn = 1;
inline constexpr std::uint8_t kLaterReturn = 2;
inline constexpr std::uint8_t kShared = 3;
inline constexpr std::uint32_t kNumChains = 4;
inline constexpr std::uint32_t kSharedReturns = 33;  // a conversation hardly has as many turns

inline constexpr std::uint32_t kReturnClasses = 5;  // 1, 2, 3-4, 5-8, more
inline constexpr std::uint32_t kNumBlockClasses = 2 * kNumChains + kReturnClasses;
static_assert(kNumChains - 1 <= BlockPast::kMostChain && kNumBlockClasses - 1 <= BlockPast::kMostClass &&
              kSharedReturns <= BlockPast::kMostReturns);

inline std::uint8_t chain_after(std::uint32_t returns) {
  if (returns < 2) return kFirstReturn;
  return returns < kSharedReturns ? kLaterReturn : kShared;
}

inline std::uint8_t one_more(std::uint8_t returns) {
  return static_cast<std::uint8_t>(std::min<std::uint32_t>(returns + 1U, BlockPast::kMostReturns));
}

inline std::uint32_t return_class(std::uint32_t returns) {
  if (returns <= 2) return returns - 1;
  return returns <= 4 ? 2 : returns <= 8 ? 3 : 4;
}

// `had_child`: it was not the last of its prompt.
inline std::uint8_t class_of(const BlockPast& past, bool had_child) {
  if (past.returns > 0) return static_cast<std::uint8_t>(2 * kNumChains + return_class(past.returns));
  return static_cast<std::uint8_t>(2 * past.chain + (had_child ? 0 : 1));
}

}  // namespace kvtier::internal
