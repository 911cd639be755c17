#include "kvtier/platform/rate_limit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace kvtier {
namespace {

constexpr std::uint64_t kMiB = 1 << 20;
constexpr std::uint64_t kSecond = 1'000'000'000;

TEST(RateLimit, the_first_burst_passes_at_once) {
  TokenBucket bucket;
  EXPECT_EQ(admit(bucket, {kMiB, kMiB}, 5 * kSecond, kMiB), 5 * kSecond);
}

TEST(RateLimit, what_exceeds_the_burst_waits_for_its_share_of_time) {
  TokenBucket bucket;
  const RateLimit limit{kMiB, kMiB};  // one burst a second
  EXPECT_EQ(admit(bucket, limit, 10 * kSecond, kMiB), 10 * kSecond);
  EXPECT_EQ(admit(bucket, limit, 10 * kSecond, kMiB), 10 * kSecond);
  EXPECT_EQ(admit(bucket, limit, 10 * kSecond, kMiB), 11 * kSecond);
  EXPECT_EQ(admit(bucket, limit, 11 * kSecond, kMiB), 12 * kSecond);
}

TEST(RateLimit, a_pause_saves_up_one_burst_and_no_more) {
  TokenBucket bucket;
  const RateLimit limit{kMiB, 2 * kMiB};
  static_cast<void>(admit(bucket, limit, kSecond, kMiB));
  const std::uint64_t later = 1000 * kSecond;
  std::uint64_t at_once = 0;
  while (admit(bucket, limit, later, kMiB) == later) ++at_once;
  EXPECT_EQ(at_once, 3U);  // the burst, and the piece that exceeds it
}

TEST(RateLimit, over_any_span_no_more_is_admitted_than_the_rate_allows) {
  constexpr RateLimit kLimit{100 * kMiB, 2 * kMiB};
  constexpr std::uint64_t kLargest = kMiB;
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937_64 random(seed);
    TokenBucket bucket;
    struct Admission {
      std::uint64_t at;
      std::uint64_t bytes;
    };
    std::vector<Admission> admitted;
    std::uint64_t now = 0;
    for (int i = 0; i < 200; ++i) {
      const std::uint64_t bytes = 1 + random() % kLargest;
      const std::uint64_t start = admit(bucket, kLimit, now, bytes);
      ASSERT_GE(start, now);
      admitted.push_back({start, bytes});
      now = start + (random() % 4 == 0 ? random() % (kSecond / 20) : 0);
    }
    for (std::size_t first = 0; first < admitted.size(); ++first) {
      std::uint64_t sum = 0;
      for (std::size_t last = first; last < admitted.size(); ++last) {
        sum += admitted[last].bytes;
        const double span = static_cast<double>(admitted[last].at - admitted[first].at) / 1e9;
        const double most = static_cast<double>(kLimit.burst_bytes + kLargest) +
                            span * static_cast<double>(kLimit.bytes_per_second);
        ASSERT_LE(static_cast<double>(sum), most + 4096) << seed;
      }
    }
  }
}

TEST(RateLimit, a_steady_stream_gets_all_of_the_rate) {
  TokenBucket bucket;
  const RateLimit limit{1000 * kMiB, 2 * kMiB};
  std::uint64_t now = kSecond;
  for (int i = 0; i < 1000; ++i) now = admit(bucket, limit, now, kMiB);
  EXPECT_NEAR(static_cast<double>(now - kSecond), 1e9, 5e6);
}

}  // namespace
}  // namespace kvtier
