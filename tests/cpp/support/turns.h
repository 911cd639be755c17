// How often a loop of a test goes round.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace kvtier::support {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitizer = true;
#else
inline constexpr bool kSanitizer = false;
#endif

// `all`; under a sanitizer, which sees in a few turns what it sees in many and is up to fifty times slower,
// `few`.
constexpr std::uint64_t turns(std::uint64_t all, std::uint64_t few) { return kSanitizer ? few : all; }

inline std::vector<std::byte> random_bytes(std::size_t bytes, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::byte> result(bytes);
  for (std::size_t at = 0; at < bytes; at += sizeof(std::uint64_t)) {
    const std::uint64_t word = random();
    std::memcpy(result.data() + at, &word, std::min(sizeof(word), bytes - at));
  }
  return result;
}

}  // namespace kvtier::support
