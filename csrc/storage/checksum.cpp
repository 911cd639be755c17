#include "kvtier/storage/checksum.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "checksum_isa.h"

#include "kvtier/core/status.h"

namespace kvtier {

std::string_view to_string(ChecksumIsa isa) {
  switch (isa) {
    case ChecksumIsa::baseline: return "baseline";
    case ChecksumIsa::avx2: return "avx2";
  }
  return "unknown";
}

bool has_checksum_isa(ChecksumIsa isa) {
#if defined(__x86_64__)
  if (isa == ChecksumIsa::avx2) return __builtin_cpu_supports("avx2");  // asks the kernel's support, too
#endif
  return isa == ChecksumIsa::baseline;
}

ChecksumIsa best_checksum_isa() {
  static const ChecksumIsa best =
      has_checksum_isa(ChecksumIsa::avx2) ? ChecksumIsa::avx2 : ChecksumIsa::baseline;
  return best;
}

Checksum checksum_of(std::span<const std::byte> bytes, ChecksumIsa isa) {
  KVTIER_CHECK(has_checksum_isa(isa));
  Checksum checksum;
#if defined(__x86_64__)
  if (isa == ChecksumIsa::avx2) {
    checksum_avx2(bytes.data(), bytes.size(), &checksum.low, &checksum.high);
    return checksum;
  }
#endif
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  checksum.low = hash.low64;
  checksum.high = hash.high64;
  return checksum;
}

}  // namespace kvtier
