// The host memory that a cuda device knows: registered (pinned and mapped), portable between GPUs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "cuda_driver.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/types.h"
#include "kvtier/platform/device.h"
#include "kvtier/platform/run_table.h"

namespace kvtier::cuda {

// One device's registrations. The driver pins a range once for all GPUs, so several devices (and several
// engines) that register the same range share that: the first pins it, the last lets go.
// Threads: any. add() and remove() require a Scope.
class HostRegions {
 public:
  Status add(void* begin, std::size_t bytes);
  Status remove(void* begin);

  // Whether [begin, begin + bytes) lies within one registration.
  bool holds(const void* begin, std::size_t bytes) const;

  // Splits a batch by what its host side is; runs of 0 bytes vanish. Errors: invalid_argument for a null.
  struct Split {
    std::vector<CopyRun> registered;
    std::vector<CopyRun> pageable;
  };
  Result<Split> split(std::span<const CopyRun> runs, Direction direction) const;
  // The same runs by the addresses that the GPU uses for their host side. Requires that all are registered.
  std::vector<MappedRun> mapped(std::span<const CopyRun> runs, Direction direction) const;

 private:
  struct Region {
    std::uintptr_t begin;
    std::size_t bytes;
    std::uint64_t device_address;  // of its first byte
    bool holds(std::uintptr_t address, std::size_t length) const {
      return address >= begin && length <= bytes && address - begin <= bytes - length;
    }
  };
  const Region* find(const MutexLock&, std::uintptr_t address, std::size_t bytes, const Region* guess) const
      KVTIER_REQUIRES(mutex_);

  mutable Mutex mutex_;
  std::map<std::uintptr_t, Region> regions_ KVTIER_GUARDED_BY(mutex_);
};

}  // namespace kvtier::cuda
