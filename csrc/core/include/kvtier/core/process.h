// After fork() the child has none of our threads: it must be told, never wait for them.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvtier {

// A number that differs in a child of fork() from its parent's. One relaxed load; from any thread.
std::uint64_t process_generation();

// The T of this process, made at its first use: a forked child has one of its own, since of its parent's a
// mutex may be locked for good. Never destroyed, the parent's neither: what it holds is the parent's. From
// any thread. Throws what T's constructor throws.
template <typename T>
T& of_this_process() {
  struct Mine {
    const std::uint64_t generation;
    Mine* const before;  // of the parent; in reach, so that a leak checker tells it from a leak
    T value{};
  };
  static std::atomic<Mine*> last{nullptr};
  Mine* mine = last.load(std::memory_order_acquire);
  while (mine == nullptr || mine->generation != process_generation()) {
    auto* const made = new Mine{process_generation(), mine};
    if (last.compare_exchange_strong(mine, made, std::memory_order_acq_rel)) return made->value;
    delete made;
  }
  return mine->value;
}

}  // namespace kvtier
