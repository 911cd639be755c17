#include "kvtier/storage/checksum.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

namespace kvtier {
namespace {

// XXH3-128 of nothing is a constant of the algorithm; longer values are proved by the golden slot images,
// whose checksums Python computed from the specification.
TEST(Checksum, of_nothing_is_the_published_one) {
  EXPECT_EQ(checksum_of({}), (Checksum{.low = 0x6001c324468d497f, .high = 0x99aa06d3014798d8}));
}

TEST(Checksum, is_the_same_by_every_instruction_set_at_every_length_and_alignment) {
  if (!has_checksum_isa(ChecksumIsa::avx2)) GTEST_SKIP() << "this machine has no AVX2";
  std::vector<std::byte> bytes(70'000);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * 131 + (i >> 8));
  const auto expect_same = [&](std::size_t at, std::size_t size) {
    const auto part = std::span(bytes).subspan(at, size);
    ASSERT_EQ(checksum_of(part, ChecksumIsa::baseline), checksum_of(part, ChecksumIsa::avx2)) << size;
  };
  for (std::size_t size = 0; size < 2500; ++size) expect_same(size % 64, size);
  for (const std::size_t size : {4080UL, 4096UL, 65'535UL, 65'536UL, 69'900UL}) expect_same(1, size);
}

TEST(Checksum, uses_the_fastest_instruction_set_there_is) {
  EXPECT_TRUE(has_checksum_isa(best_checksum_isa()));
  EXPECT_EQ(best_checksum_isa() == ChecksumIsa::avx2, has_checksum_isa(ChecksumIsa::avx2));
}

TEST(Checksum, reads_no_byte_beyond_its_span) {  // AddressSanitizer says so
  for (std::size_t size = 1; size < 1500; ++size) {
    const auto exact = std::make_unique<std::byte[]>(size);
    std::memset(exact.get(), 7, size);
    ASSERT_NE(checksum_of({exact.get(), size}), Checksum{});
  }
}

}  // namespace
}  // namespace kvtier
