#include "checksum_isa.h"

#if defined(__x86_64__)

#if !defined(__AVX2__)
#error "csrc/CMakeLists.txt compiles this file with -mavx2"
#endif

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvtier {

void checksum_avx2(const void* data, size_t size, uint64_t* low, uint64_t* high) {
  const XXH128_hash_t hash = XXH3_128bits(data, size);
  *low = hash.low64;
  *high = hash.high64;
}

}  // namespace kvtier

#endif
