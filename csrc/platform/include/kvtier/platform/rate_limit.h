// RateLimit: how fast one direction may use the bus, for servers that must protect their decode latency.
//
// A token bucket in its scheduling form (GCRA): the bucket is one number, the time until which what was
// admitted is paid for. On a GPU it is kept in device memory, and a kernel of one thread sleeps in the stream
// until a burst may begin: the host never waits, and all events stay recorded at submission.
#pragma once

#include <cstdint>

#include "kvtier/platform/host_device.h"

namespace kvtier {

struct RateLimit {
  std::uint64_t bytes_per_second;  // at least 1
  std::uint64_t burst_bytes;       // may pass at once after a pause
};

struct TokenBucket {
  std::uint64_t paid_until_ns = 0;
};

KVTIER_HOST_DEVICE inline std::uint64_t duration_ns(const RateLimit& limit, std::uint64_t bytes) {
  return static_cast<std::uint64_t>(static_cast<double>(bytes) * 1e9 /
                                    static_cast<double>(limit.bytes_per_second));
}

// Admits `bytes` and returns when they may begin to move, `now_ns` or later. Calls are in order of time. Over
// any span that begins at an admission, at most burst_bytes + rate x span (+ the last piece) are admitted.
KVTIER_HOST_DEVICE inline std::uint64_t admit(TokenBucket& bucket, const RateLimit& limit,
                                              std::uint64_t now_ns, std::uint64_t bytes) {
  const std::uint64_t burst_ns = duration_ns(limit, limit.burst_bytes);
  const std::uint64_t earliest = bucket.paid_until_ns > burst_ns ? bucket.paid_until_ns - burst_ns : 0;
  const std::uint64_t start = now_ns > earliest ? now_ns : earliest;
  const std::uint64_t from = bucket.paid_until_ns > now_ns ? bucket.paid_until_ns : now_ns;
  bucket.paid_until_ns = from + duration_ns(limit, bytes);
  return start;
}

}  // namespace kvtier
