#include "kvtier/engine/hop_meter.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr double kMemory = 128;        // transfers over which the fit forgets
constexpr std::uint64_t kFewest = 4;   // transfers before it says anything
constexpr double kLeastSpread = 0.05;  // of the sizes, before latency and bandwidth are told apart

}  // namespace

HopMeter::Flight HopMeter::begin(std::uint64_t bytes, std::int64_t now_us) {
  const Flight flight{now_us, bytes, counts_.running_bytes};
  counts_.running_bytes += bytes;
  return flight;
}

void HopMeter::end(const Flight& flight, bool good, std::int64_t now_us) {
  counts_.running_bytes -= std::min(flight.bytes, counts_.running_bytes);
  const double seconds = static_cast<double>(now_us - flight.begun_us) * 1e-6;
  if (!good || seconds <= 0) return;
  ++counts_.transfers;
  counts_.bytes += flight.bytes;
  counts_.seconds += seconds;
  const auto x = static_cast<double>(flight.bytes + flight.ahead_bytes);
  weight_ = std::min(weight_ + 1, kMemory);
  const double share = 1 / weight_;
  x_ += share * (x - x_);
  y_ += share * (seconds - y_);
  xx_ += share * (x * x - xx_);
  xy_ += share * (x * seconds - xy_);
}

HopStats HopMeter::stats() const {
  HopStats stats = counts_;
  if (stats.transfers < kFewest || x_ <= 0 || y_ <= 0) return stats;
  // Through the origin, unless sizes differ enough for a line and it is one that time can follow.
  double seconds_per_byte = xy_ / xx_;
  double latency = 0;
  const double spread = xx_ - x_ * x_;
  if (spread > kLeastSpread * kLeastSpread * x_ * x_) {
    const double slope = (xy_ - x_ * y_) / spread;
    const double intercept = y_ - slope * x_;
    if (slope > 0 && intercept > 0) {
      seconds_per_byte = slope;
      latency = intercept;
    }
  }
  stats.latency_seconds = latency;
  stats.bytes_per_second = 1 / seconds_per_byte;
  return stats;
}

}  // namespace kvtier
