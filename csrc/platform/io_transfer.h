// One request on its way, for queues whose calls may do a part of it.
#pragma once

#include <cstdint>
#include <optional>

#include "kvtier/platform/io_queue.h"

namespace kvtier {

class IoTransfer {
 public:
  IoTransfer() = default;
  explicit IoTransfer(const IoRequest& request) : request_(request) {}

  const IoRequest& request() const { return request_; }
  // What to ask of the kernel next: the rest, or the first 1 GiB of it (one call moves less than 2 GiB).
  IoRequest next_piece() const;
  // Takes what the kernel said to next_piece(): bytes, or a negative errno. Returns how the request ended (0
  // or an errno), or nullopt when there is another piece.
  std::optional<int> advance(std::int64_t result);

 private:
  IoRequest request_;
  std::uint64_t done_ = 0;      // where the next piece begins
  std::uint64_t furthest_ = 0;  // bytes that were moved at least once
  unsigned repeats_ = 0;        // EINTR and EAGAIN without progress
};

// Performs it with blocking calls. Returns 0 or an errno.
int perform(const IoRequest& request);

}  // namespace kvtier
