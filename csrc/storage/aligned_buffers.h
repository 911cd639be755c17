// Memory that direct I/O takes: aligned to kSlotAlignment.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "kvtier/core/huge_vector.h"
#include "kvtier/core/layout.h"
#include "kvtier/core/status.h"

namespace kvtier {

// Of a part of a larger piece of memory it holds the piece; of memory of its own it frees that.
struct FreeDeleter {
  std::shared_ptr<void> piece;
  void operator()(std::byte* memory) const {
    if (piece == nullptr) std::free(memory);
  }
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

 protected:
  const std::uint64_t buffer_bytes_;
  std::vector<AlignedBuffer> free_;
};

// Large ones, several to a piece of memory in huge pages, which a queue can be told of as a whole. A piece
// lives as long as the pool or one of its buffers.
class PiecePool : public BufferPool {
 public:
  explicit PiecePool(std::uint64_t buffer_bytes)
      : BufferPool(round_up(buffer_bytes, kSlotAlignment)),
        piece_bytes_(round_up(std::max(kPieceBytes, buffer_bytes_), internal::kHugeArrayBytes)) {}

  // As BufferPool::take(). `made` is the piece that this call has made, else empty.
  AlignedBuffer take(std::span<std::byte>& made) {
    made = {};
    if (free_.empty()) made = make_piece();
    if (free_.empty()) return nullptr;
    return BufferPool::take();
  }

 private:
  static constexpr std::uint64_t kPieceBytes = std::uint64_t{16} << 20;

  std::span<std::byte> make_piece() try {
    const auto piece = std::make_shared<HugeVector<std::byte>>(piece_bytes_);
    for (std::uint64_t at = 0; at + buffer_bytes_ <= piece_bytes_; at += buffer_bytes_) {
      free_.push_back(AlignedBuffer(piece->data() + at, FreeDeleter{piece}));
    }
    return *piece;
  } catch (const std::bad_alloc&) {
    return {};
  }

  const std::uint64_t piece_bytes_;
};

}  // namespace kvtier
