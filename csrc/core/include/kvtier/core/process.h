// After fork() the child has none of our threads: it must be told, never wait for them.
#pragma once

#include <cstdint>

namespace kvtier {

// A number that differs in a child of fork() from its parent's. One relaxed load; from any thread.
std::uint64_t process_generation();

}  // namespace kvtier
