#include "kvtier/platform/copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "support/turns.h"

#include "kvtier/core/layout.h"

namespace kvtier {
namespace {

using support::random_bytes;

using Copy = std::function<void(void*, const void*, std::size_t)>;

constexpr std::size_t kGuardBytes = 192;  // a stray store of the widest kind lands inside
constexpr std::byte kUntouched{0xa5};

// Memory whose beginning is aligned to a page, so that offsets are alignments.
class Pages {
 public:
  explicit Pages(std::size_t bytes)
      : bytes_((bytes + 4095) / 4096 * 4096),
        begin_(static_cast<std::byte*>(std::aligned_alloc(4096, bytes_))) {
    std::fill_n(begin_.get(), bytes_, kUntouched);
  }
  std::byte* data() const { return begin_.get(); }
  std::size_t size() const { return bytes_; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> begin_;
};

std::vector<std::pair<std::string, Copy>> all_copies() {
  std::vector<std::pair<std::string, Copy>> copies;
  for (const StreamIsa isa : {StreamIsa::none, StreamIsa::sse2, StreamIsa::avx2, StreamIsa::avx512}) {
    if (!has_stream_isa(isa)) continue;
    copies.emplace_back(to_string(isa), [isa](void* to, const void* from, std::size_t bytes) {
      stream_copy(to, from, bytes, isa);
    });
  }
  copies.emplace_back("copy_bytes", copy_bytes);
  for (const CopyMethod method : {CopyMethod::cached, CopyMethod::streaming}) {
    copies.emplace_back("copy_runs", [method](void* to, const void* from, std::size_t bytes) {
      const CopyRun run{to, from, bytes};
      copy_runs({&run, 1}, method);
    });
  }
  return copies;
}

// Copies `bytes` between the given alignments and looks at every byte of the destination and its guards.
void check_exact(const Copy& copy, const std::vector<std::byte>& source, Pages& destination,
                 std::size_t bytes, std::size_t to_alignment, std::size_t from_alignment) {
  std::byte* const to = destination.data() + 256 + to_alignment;
  const std::byte* const from = source.data() + from_alignment;
  std::fill(to - kGuardBytes, to + bytes + kGuardBytes, kUntouched);
  copy(to, from, bytes);
  ASSERT_TRUE(std::equal(to, to + bytes, from))
      << bytes << " bytes to " << to_alignment << " from " << from_alignment;
  ASSERT_TRUE(std::all_of(to - kGuardBytes, to, [](std::byte b) { return b == kUntouched; }))
      << "before " << bytes << " bytes at " << to_alignment;
  ASSERT_TRUE(std::all_of(to + bytes, to + bytes + kGuardBytes, [](std::byte b) { return b == kUntouched; }))
      << "behind " << bytes << " bytes at " << to_alignment;
}

TEST(Copy, is_exact_for_every_short_length_and_alignment) {
  const std::vector<std::byte> source = random_bytes(1024, 1);
  Pages destination(4096);
  for (const auto& [name, copy] : all_copies()) {
    SCOPED_TRACE(name);
    for (std::size_t bytes = 0; bytes <= 300; ++bytes) {
      for (std::size_t alignment = 0; alignment < 64; ++alignment) {
        ASSERT_NO_FATAL_FAILURE(check_exact(copy, source, destination, bytes, alignment, 0));
        ASSERT_NO_FATAL_FAILURE(
            check_exact(copy, source, destination, bytes, alignment, (alignment * 7 + bytes) % 64));
      }
    }
  }
}

TEST(Copy, is_exact_around_its_boundaries) {
  const std::vector<std::byte> source = random_bytes((1 << 18) + 1024, 2);
  Pages destination((1 << 18) + 4096);
  for (const auto& [name, copy] : all_copies()) {
    SCOPED_TRACE(name);
    for (const std::size_t boundary : {512, 1024, 4096, 8192, 12288, 18432, 1 << 18}) {
      for (std::size_t bytes = boundary - 2; bytes <= boundary + 2; ++bytes) {
        for (const std::size_t alignment : {0, 1, 15, 31, 32, 33, 63}) {
          ASSERT_NO_FATAL_FAILURE(check_exact(copy, source, destination, bytes, alignment, 63 - alignment));
          ASSERT_NO_FATAL_FAILURE(check_exact(copy, source, destination, bytes, 0, alignment));
        }
      }
    }
  }
}

TEST(Copy, large_copies_are_exact) {
  const std::vector<std::byte> source = random_bytes(kStreamingBatchBytes + 4096, 3);
  Pages destination(source.size() + 4096);
  for (const auto& [name, copy] : all_copies()) {
    SCOPED_TRACE(name);
    ASSERT_NO_FATAL_FAILURE(check_exact(copy, source, destination, kStreamingBatchBytes + 123, 5, 77));
    ASSERT_NO_FATAL_FAILURE(check_exact(copy, source, destination, kStreamingBatchBytes - 1, 0, 0));
  }
}

// `sizes` scattered over both sides, in different orders, with gaps that must stay as they are.
void check_runs(const std::vector<std::size_t>& sizes, std::size_t pitch, std::size_t misalignment,
                unsigned seed) {
  const std::vector<std::byte> source = random_bytes(sizes.size() * pitch + 64, seed);
  Pages destination(sizes.size() * pitch + 64);
  std::vector<std::byte> expected(destination.size(), kUntouched);
  std::vector<std::size_t> places(sizes.size());
  for (std::size_t i = 0; i < places.size(); ++i) places[i] = i;
  std::ranges::shuffle(places, std::mt19937(seed));

  std::vector<CopyRun> runs;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const std::size_t to = places[i] * pitch + misalignment;
    const std::size_t from = (sizes.size() - 1 - i) * pitch + misalignment;
    runs.push_back({destination.data() + to, source.data() + from, sizes[i]});
    std::copy_n(source.data() + from, sizes[i], expected.data() + to);
  }
  copy_runs(runs, CopyMethod::streaming);
  ASSERT_TRUE(std::equal(expected.begin(), expected.end(), destination.data()))
      << sizes.size() << " runs, first " << sizes[0] << " bytes, misaligned by " << misalignment;
}

TEST(CopyRuns, scattered_runs_of_one_size_are_exact) {
  for (const std::size_t bytes :
       {255, 256, 319, 512, 768, 1024, 4000, 4096, 4352, 8192, 36864, 65536, 65792}) {
    for (const std::size_t count : {1, 7, 8, 9, 15, 16, 17, 25, 40}) {  // around whole groups of lanes
      for (const std::size_t misalignment : {0, 1, 16, 63}) {
        ASSERT_NO_FATAL_FAILURE(check_runs(std::vector<std::size_t>(count, bytes), round_up(bytes + 64, 64),
                                           misalignment, static_cast<unsigned>(bytes + count)));
      }
    }
  }
}

TEST(CopyRuns, mixtures_of_all_sizes_are_exact) {
  std::mt19937 random(5);
  const std::size_t kinds[] = {0, 1, 63, 64, 255, 256, 300, 1024, 4096, 4096, 4096, 4097, 8192};
  for (unsigned round = 0; round < 30; ++round) {
    std::vector<std::size_t> sizes;
    while (sizes.size() < 60) {
      // Stretches of one size, so that lanes begin and end anywhere in the list.
      sizes.insert(sizes.end(), 1 + random() % 20, kinds[random() % std::size(kinds)]);
    }
    ASSERT_NO_FATAL_FAILURE(check_runs(sizes, 8192 + 64, round % 3, round));
  }
}

TEST(CopyRuns, contiguous_sources_into_scattered_pages_are_exact) {
  // Taken one by one, each asking for the next; pages may begin anywhere in a line.
  for (const std::size_t bytes : {4096, 16384, 36864, 131072, 135168}) {
    for (const std::size_t misalignment : {0, 16}) {
      constexpr std::size_t kRuns = 20;
      const std::vector<std::byte> slot = random_bytes(kRuns * bytes, 6);
      Pages pages(kRuns * bytes + 64);
      std::vector<std::byte> expected(pages.size(), kUntouched);
      std::vector<CopyRun> runs;
      for (std::size_t i = 0; i < kRuns; ++i) {
        const std::size_t to = (i * 7 % kRuns) * bytes + misalignment;
        runs.push_back({pages.data() + to, slot.data() + i * bytes, bytes});
        std::copy_n(slot.data() + i * bytes, bytes, expected.data() + to);
      }
      copy_runs(runs, CopyMethod::streaming);
      EXPECT_TRUE(std::equal(expected.begin(), expected.end(), pages.data()))
          << bytes << " bytes, misaligned by " << misalignment;
    }
  }
}

TEST(CopyRuns, empty_lists_and_empty_runs_are_nothing) {
  const CopyRun nothing{nullptr, nullptr, 0};
  for (const CopyMethod method : {CopyMethod::cached, CopyMethod::streaming}) {
    copy_runs({}, method);
    copy_runs({&nothing, 1}, method);
  }
}

TEST(CopyMethod, streams_only_what_the_caches_would_not_keep) {
  EXPECT_EQ(choose_copy_method(0), CopyMethod::cached);
  EXPECT_EQ(choose_copy_method(kStreamingBatchBytes - 1), CopyMethod::cached);
  EXPECT_EQ(choose_copy_method(kStreamingBatchBytes), CopyMethod::streaming);
}

TEST(StreamIsa, the_best_is_one_that_this_machine_has) {
  EXPECT_TRUE(has_stream_isa(best_stream_isa()));
  EXPECT_TRUE(has_stream_isa(StreamIsa::none));
  EXPECT_NE(to_string(best_stream_isa()), "unknown");
#if defined(__x86_64__)
  EXPECT_NE(best_stream_isa(), StreamIsa::none);
#endif
}

}  // namespace
}  // namespace kvtier
