// HopMeter: how fast bytes go over one hop (host -> device, disk -> host), learned from what went over it.
//
// A transfer of b bytes that starts behind q bytes under way takes  latency + (q + b) / bandwidth.  Both are
// fitted by least squares over the last transfers, each of which weighs a little less than the next.
#pragma once

#include <cstdint>
#include <optional>

#include "kvtier/engine/stats.h"

namespace kvtier {

// Threads: none of its own; guarded by the engine's mutex. Takes less than 20 ns a call.
class HopMeter {
 public:
  struct Flight {
    std::int64_t begun_us = 0;
    std::uint64_t bytes = 0;
    std::uint64_t ahead_bytes = 0;
  };
  Flight begin(std::uint64_t bytes, std::int64_t now_us);
  // Exactly once for each begin(). One that failed or was given up teaches nothing.
  void end(const Flight& flight, bool good, std::int64_t now_us);
  HopStats stats() const;

 private:
  HopStats counts_;
  // Weighted means of x = bytes ahead and own, y = seconds, and of their products.
  double weight_ = 0;
  double x_ = 0;
  double y_ = 0;
  double xx_ = 0;
  double xy_ = 0;
};

}  // namespace kvtier
