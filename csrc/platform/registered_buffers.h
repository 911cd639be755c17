// RegisteredBuffers: which of the buffers that the kernel knows a request lies in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <span>
#include <vector>

namespace kvtier {

class RegisteredBuffers {
 public:
  // The kernel's numbers are those of the order in which it was told of them.
  void add(std::span<std::byte> buffer) {
    const auto after = std::upper_bound(
        buffers_.begin(), buffers_.end(), buffer.data(),
        [](const std::byte* data, const Buffer& other) { return data < other.bytes.data(); });
    buffers_.insert(after, {.bytes = buffer, .index = static_cast<int>(buffers_.size())});
  }

  bool empty() const { return buffers_.empty(); }
  std::size_t size() const { return buffers_.size(); }

  // The kernel's number of the buffer that has all of it, or -1.
  int index_of(std::span<const std::byte> bytes) const {
    const auto after =
        std::upper_bound(buffers_.begin(), buffers_.end(), bytes.data(),
                         [](const std::byte* data, const Buffer& b) { return data < b.bytes.data(); });
    if (after == buffers_.begin()) return -1;
    const Buffer& buffer = *std::prev(after);
    const auto skipped = static_cast<std::size_t>(bytes.data() - buffer.bytes.data());
    return skipped <= buffer.bytes.size() && bytes.size() <= buffer.bytes.size() - skipped ? buffer.index
                                                                                           : -1;
  }

 private:
  struct Buffer {
    std::span<std::byte> bytes;
    int index = 0;
  };
  std::vector<Buffer> buffers_;  // by address
};

}  // namespace kvtier
