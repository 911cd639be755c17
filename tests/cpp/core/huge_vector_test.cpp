#include "kvtier/core/huge_vector.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <new>
#include <utility>

namespace kvtier {
namespace {

constexpr std::size_t kHuge = internal::kHugeArrayBytes;

TEST(HugeVector, large_arrays_begin_with_a_huge_page_and_hold_what_they_are_given) {
  for (const std::size_t bytes : {kHuge, kHuge + 1, 3 * kHuge - 1, 5 * kHuge}) {
    HugeVector<std::uint8_t> vector(bytes, 7);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(vector.data()) % kHuge, 0U) << bytes;
    vector.front() = 1;
    vector.back() = 2;
    EXPECT_EQ(vector[bytes / 2], 7);
    EXPECT_EQ(vector.front() + vector.back(), 3);
  }
}

TEST(HugeVector, grows_over_the_boundary_and_moves) {
  HugeVector<std::uint64_t> vector;
  const std::size_t count = 3 * kHuge / sizeof(std::uint64_t);
  for (std::size_t i = 0; i < count; ++i) vector.push_back(i);
  const std::uint64_t* data = vector.data();
  const HugeVector<std::uint64_t> moved = std::move(vector);
  EXPECT_EQ(moved.data(), data);
  for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(moved[i], i);
}

#if !defined(__SANITIZE_THREAD__)  // which maps a shadow for each: half a minute for what one thread does
TEST(HugeVector, what_it_no_longer_needs_is_given_back) {
  // Altogether more addresses than a process has.
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  constexpr std::size_t kTimes = (std::size_t{1} << 47) / kBytes + 1;
  HugePageAllocator<std::byte> allocator;
  for (std::size_t i = 0; i < kTimes; ++i) allocator.deallocate(allocator.allocate(kBytes), kBytes);
}
#endif

TEST(HugeVector, memory_that_cannot_be_had_is_bad_alloc) {
  HugePageAllocator<std::uint64_t> allocator;
  EXPECT_THROW(static_cast<void>(allocator.allocate(std::size_t{1} << 52)), std::bad_alloc);
  EXPECT_THROW(static_cast<void>(allocator.allocate(std::numeric_limits<std::size_t>::max() / 4)),
               std::bad_alloc);
}

}  // namespace
}  // namespace kvtier
