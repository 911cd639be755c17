// HostMemory: the seam to the kernel's memory calls, so that the n-th of them can be made to fail.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvtier/core/status.h"

namespace kvtier {

// Threads: any. Errors: StatusCode::resource with errno. Blocks: populate() touches every page.
class HostMemory {
 public:
  virtual ~HostMemory() = default;

  // Bytes that this process may still take: the least of what its cgroup (v1 or v2) and the machine leave.
  virtual Result<std::uint64_t> available_bytes() = 0;
  // A new anonymous shared file of exactly `bytes`, close-on-exec, of huge pages if enough are reserved.
  virtual Result<int> create_shared(std::uint64_t bytes) = 0;
  // Maps it whole, shared, not inherited by fork(); transparent huge pages advised.
  virtual Result<std::byte*> map_shared(int fd, std::uint64_t bytes) = 0;
  virtual void unmap(std::byte* begin, std::uint64_t bytes) = 0;
  // Makes the pages of the range present and writable.
  virtual Status populate(std::byte* begin, std::uint64_t bytes) = 0;
};

// The real one. Lives as long as the process.
HostMemory& linux_host_memory();

}  // namespace kvtier
