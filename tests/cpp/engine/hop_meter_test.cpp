#include "kvtier/engine/hop_meter.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace kvtier {
namespace {

// A hop as the meter supposes it: one transfer at a time, each after `latency_us`.
std::int64_t duration_us(const HopMeter::Flight& flight, double latency_us, double bytes_per_us) {
  const auto bytes = static_cast<double>(flight.bytes + flight.ahead_bytes);
  return std::llround(latency_us + bytes / bytes_per_us);
}

void one_by_one(HopMeter& meter, const std::vector<std::uint64_t>& sizes, double latency_us,
                double bytes_per_us) {
  std::int64_t now_us = 0;
  for (const std::uint64_t bytes : sizes) {
    const HopMeter::Flight flight = meter.begin(bytes, now_us);
    now_us += duration_us(flight, latency_us, bytes_per_us);
    meter.end(flight, true, now_us);
  }
}

TEST(HopMeter, says_nothing_before_it_has_seen_a_few) {
  HopMeter meter;
  one_by_one(meter, {1 << 20, 2 << 20, 3 << 20}, 100, 1000);
  EXPECT_EQ(meter.stats().bytes_per_second, 0);
  EXPECT_EQ(meter.stats().transfers, 3U);
  one_by_one(meter, {4 << 20}, 100, 1000);
  EXPECT_GT(meter.stats().bytes_per_second, 0);
}

TEST(HopMeter, tells_latency_from_bandwidth_where_sizes_differ) {
  HopMeter meter;
  one_by_one(meter, {1 << 20, 8 << 20, 2 << 20, 64 << 20, 1 << 20, 16 << 20}, 2000, 5000);
  EXPECT_NEAR(meter.stats().bytes_per_second, 5e9, 1e7);
  EXPECT_NEAR(meter.stats().latency_seconds, 2e-3, 2e-5);
}

TEST(HopMeter, with_one_size_all_is_bandwidth) {
  HopMeter meter;
  one_by_one(meter, std::vector<std::uint64_t>(10, 1 << 20), 1000, 1e9);
  EXPECT_EQ(meter.stats().latency_seconds, 0);
  EXPECT_NEAR(meter.stats().bytes_per_second, (1 << 20) / 1e-3, 1e6);
}

TEST(HopMeter, a_queue_is_no_lower_bandwidth) {
  HopMeter meter;
  std::vector<HopMeter::Flight> flights;
  flights.reserve(64);
  for (int i = 0; i < 64; ++i) flights.push_back(meter.begin(2 << 20, 0));
  EXPECT_EQ(meter.stats().running_bytes, std::uint64_t{64} * (2 << 20));
  for (const HopMeter::Flight& flight : flights) meter.end(flight, true, duration_us(flight, 80, 3000));
  EXPECT_EQ(meter.stats().running_bytes, 0U);
  EXPECT_NEAR(meter.stats().bytes_per_second, 3e9, 3e7);
}

TEST(HopMeter, forgets_how_fast_it_was) {
  HopMeter meter;
  std::vector<std::uint64_t> sizes;
  sizes.reserve(1000);
  for (std::uint64_t i = 0; i < 1000; ++i) sizes.push_back((i % 7 + 1) << 20);
  one_by_one(meter, sizes, 100, 8000);
  one_by_one(meter, sizes, 100, 1000);
  EXPECT_NEAR(meter.stats().bytes_per_second, 1e9, 2e7);
}

TEST(HopMeter, a_failed_transfer_teaches_nothing_and_is_not_under_way_any_more) {
  HopMeter meter;
  one_by_one(meter, {1 << 20, 2 << 20, 3 << 20, 4 << 20}, 0, 1000);
  const HopStats before = meter.stats();
  const HopMeter::Flight flight = meter.begin(1 << 20, 0);
  meter.end(flight, false, 1'000'000'000);
  EXPECT_EQ(meter.stats().bytes_per_second, before.bytes_per_second);
  EXPECT_EQ(meter.stats().transfers, before.transfers);
  EXPECT_EQ(meter.stats().running_bytes, 0U);
}

}  // namespace
}  // namespace kvtier
