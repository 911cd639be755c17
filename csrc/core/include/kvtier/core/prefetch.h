// prefetch(): asks for memory that will be read or written soon, so that many misses of the caches overlap.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvtier {

// All lines of [begin, begin + bytes). A hint: the memory need not be there.
inline void prefetch(const void* begin, std::size_t bytes) {
  constexpr std::uintptr_t kLine = 64;
  const auto at = reinterpret_cast<std::uintptr_t>(begin);
  for (std::uintptr_t line = at & ~(kLine - 1); line < at + bytes; line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

}  // namespace kvtier
