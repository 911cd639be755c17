#include "kvtier/core/process.h"

#include <pthread.h>

#include <atomic>

namespace kvtier {
namespace {
std::atomic<std::uint64_t> generation{1};
void bump_in_child() { generation.fetch_add(1, std::memory_order_relaxed); }
const int kRegistered = pthread_atfork(nullptr, nullptr, bump_in_child);
}  // namespace

std::uint64_t process_generation() {
  static_cast<void>(kRegistered);
  return generation.load(std::memory_order_relaxed);
}

}  // namespace kvtier
