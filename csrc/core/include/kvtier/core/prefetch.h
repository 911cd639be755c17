// prefetch(): asks for memory that will be read or written soon, so that many misses of the caches overlap.
#pragma once

#include <cstddef>

namespace kvtier {

// All lines of [begin, begin + bytes). A hint: the memory need not be there.
inline void prefetch(const void* begin, std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  const auto* const first = static_cast<const std::byte*>(begin);
  for (std::size_t at = 0; at < bytes; at += kLine) __builtin_prefetch(first + at);
  if (bytes > 0) __builtin_prefetch(first + bytes - 1);  // they need not begin with a line
}

}  // namespace kvtier
