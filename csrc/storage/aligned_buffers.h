// Memory that direct I/O takes: aligned to kSlotAlignment.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kvtier/core/layout.h"
#include "kvtier/core/status.h"

namespace kvtier {

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};
using AlignedBuffer = std::unique_ptr<std::byte, FreeDeleter>;

// Zeroed. Null when there is no memory. `bytes` is rounded up to the alignment.
inline AlignedBuffer make_aligned_buffer(std::uint64_t bytes) {
  const std::uint64_t rounded = round_up(bytes, kSlotAlignment);
  AlignedBuffer buffer(static_cast<std::byte*>(std::aligned_alloc(kSlotAlignment, rounded)));
  if (buffer) std::memset(buffer.get(), 0, rounded);
  return buffer;
}

// Buffers of one size, made when they are first needed and used again. At most as many as requests are under
// way at once. Threads: one.
class BufferPool {
 public:
  explicit BufferPool(std::uint64_t buffer_bytes) : buffer_bytes_(buffer_bytes) {}

  // Null when there is no memory.
  AlignedBuffer take() {
    if (free_.empty()) return make_aligned_buffer(buffer_bytes_);
    AlignedBuffer buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }
  void give_back(AlignedBuffer buffer) {
    if (buffer) free_.push_back(std::move(buffer));
  }

 private:
  const std::uint64_t buffer_bytes_;
  std::vector<AlignedBuffer> free_;
};

}  // namespace kvtier
