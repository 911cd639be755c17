// The checksum of everything kvtier writes to a drive: XXH3-128, seed 0. It finds accidents (every flip of a
// few bits, torn and misplaced writes), not forgery: that is what SlotCipher's tags are for.
//
// The xxhash library is used as a header, compiled for SSE2 and for AVX2 and chosen at run time, since a
// wheel is built for any x86-64. EPYC, one core: 28 GB/s from memory by either (memcpy there: 13), 28 and 47
// from the cache; AVX-512 was no faster than AVX2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvtier {

// On a drive: `low`, then `high`, each little-endian: 16 bytes.
struct Checksum {
  std::uint64_t low = 0;
  std::uint64_t high = 0;
  friend bool operator==(const Checksum&, const Checksum&) = default;
};

// `baseline` is what every machine of the architecture has (SSE2; NEON on arm64).
enum class ChecksumIsa : std::uint8_t { baseline, avx2 };
std::string_view to_string(ChecksumIsa isa);

// The fastest of this machine, which checksum_of() uses unless told otherwise. All give the same result.
ChecksumIsa best_checksum_isa();
bool has_checksum_isa(ChecksumIsa isa);

// Threads: any. Reads exactly `bytes`. `isa` must be one that this machine has.
Checksum checksum_of(std::span<const std::byte> bytes, ChecksumIsa isa = best_checksum_isa());

}  // namespace kvtier
