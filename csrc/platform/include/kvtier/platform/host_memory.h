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

  // Bytes of ordinary pages that this process may still take: the least of what its cgroups (v1 and v2) and
  // the machine leave (platform/memory_limit.h).
  virtual Result<std::uint64_t> available_bytes() = 0;
  // A new anonymous shared file of exactly `bytes`, close-on-exec, of huge pages if `bytes` is a multiple
  // of theirs and enough are reserved. Its size can never change again. The caller closes it.
  virtual Result<int> create_shared(std::uint64_t bytes) = 0;
  // Maps it whole at a multiple of 2 MiB, shared, not inherited by fork(); transparent huge pages advised.
  virtual Result<std::byte*> map_shared(int fd, std::uint64_t bytes) = 0;
  // Pages of the range that are not there yet will come from this NUMA node as long as it has free ones
  // (mbind, MPOL_PREFERRED), whoever maps the file. Errors also: a node that there is not; a sandbox that
  // forbids the call.
  virtual Status prefer_node(std::byte* begin, std::uint64_t bytes, int node) = 0;
  virtual void unmap(std::byte* begin, std::uint64_t bytes) = 0;
  // Makes the pages of the range present and writable; their bytes stay what they are.
  virtual Status populate(std::byte* begin, std::uint64_t bytes) = 0;
};

// The real one. Lives as long as the process.
HostMemory& linux_host_memory();

namespace internal {
// populate() for kernels that cannot do it in one call. Memory that runs out here ends the process.
void touch_pages(std::byte* begin, std::uint64_t bytes);
}  // namespace internal

}  // namespace kvtier
