// The compilations of XXH3-128: checksum.cpp has the baseline, checksum_avx2.cpp the other, with the flags
// that csrc/CMakeLists.txt gives it. That file includes nothing of the C++ library: an inline function
// compiled there could become the program's only copy, and then fault on a machine without those
// instructions.
#pragma once

#include <stddef.h>  // NOLINT(modernize-deprecated-headers): see above
#include <stdint.h>  // NOLINT(modernize-deprecated-headers)

namespace kvtier {

// low, high = XXH3-128 of `size` bytes at `data`.
void checksum_avx2(const void* data, size_t size, uint64_t* low, uint64_t* high);

}  // namespace kvtier
