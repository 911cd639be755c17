#ifdef KVTIER_HAVE_CUDA

#include "cuda_regions.h"

#include <utility>

namespace kvtier::cuda {
namespace {

// What this process has pinned, by range: how many devices use it.
struct Pinned {
  Mutex mutex;
  std::map<std::pair<std::uintptr_t, std::size_t>, unsigned> users KVTIER_GUARDED_BY(mutex);
};

Pinned& pinned() {
  static auto* const all = new Pinned;  // devices may end after static destruction
  return *all;
}

Status pin(void* begin, std::size_t bytes) {
  Pinned& all = pinned();
  MutexLock lock(all.mutex);
  unsigned& users = all.users[{reinterpret_cast<std::uintptr_t>(begin), bytes}];
  if (users == 0) {
    Status status =
        to_status("cudaHostRegister",
                  cudaHostRegister(begin, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped));
    if (!status) {
      all.users.erase({reinterpret_cast<std::uintptr_t>(begin), bytes});
      return status;
    }
  }
  ++users;
  return Status::ok();
}

Status unpin(void* begin, std::size_t bytes) {
  Pinned& all = pinned();
  MutexLock lock(all.mutex);
  const auto found = all.users.find({reinterpret_cast<std::uintptr_t>(begin), bytes});
  KVTIER_CHECK(found != all.users.end());
  if (found->second == 1) {
    KVTIER_RETURN_IF_ERROR(to_status("cudaHostUnregister", cudaHostUnregister(begin)));
    all.users.erase(found);
  } else {
    --found->second;
  }
  return Status::ok();
}

const void* host_side(const CopyRun& run, Direction direction) {
  return direction == Direction::load ? run.source : run.destination;
}

}  // namespace

Status HostRegions::add(void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  if (begin == nullptr || bytes == 0 || address + bytes < address) {
    return Status::invalid_argument("register_host: not a range of memory");
  }
  MutexLock lock(mutex_);
  auto next = regions_.lower_bound(address);
  const bool below =
      next != regions_.begin() && std::prev(next)->first + std::prev(next)->second.bytes > address;
  if (below || (next != regions_.end() && next->first < address + bytes)) {
    return Status::device("register_host: the range overlaps one that is registered",
                          cudaErrorHostMemoryAlreadyRegistered);
  }
  KVTIER_RETURN_IF_ERROR(pin(begin, bytes));
  void* mapped = nullptr;
  Status status = to_status("cudaHostGetDevicePointer", cudaHostGetDevicePointer(&mapped, begin, 0));
  if (!status) {
    static_cast<void>(unpin(begin, bytes));
    return status;
  }
  regions_.emplace(address, Region{address, bytes, reinterpret_cast<std::uint64_t>(mapped)});
  return Status::ok();
}

Status HostRegions::remove(void* begin) {
  MutexLock lock(mutex_);
  const auto found = regions_.find(reinterpret_cast<std::uintptr_t>(begin));
  if (found == regions_.end()) {
    return Status::device("unregister_host: no registered range begins there",
                          cudaErrorHostMemoryNotRegistered);
  }
  KVTIER_RETURN_IF_ERROR(unpin(begin, found->second.bytes));
  regions_.erase(found);
  return Status::ok();
}

const HostRegions::Region* HostRegions::find(const MutexLock&, std::uintptr_t address, std::size_t bytes,
                                             const Region* guess) const {
  if (guess != nullptr && guess->holds(address, bytes)) return guess;
  auto next = regions_.upper_bound(address);
  if (next == regions_.begin()) return nullptr;
  const Region& region = std::prev(next)->second;
  return region.holds(address, bytes) ? &region : nullptr;
}

bool HostRegions::holds(const void* begin, std::size_t bytes) const {
  MutexLock lock(mutex_);
  return find(lock, reinterpret_cast<std::uintptr_t>(begin), bytes, nullptr) != nullptr;
}

Result<HostRegions::Split> HostRegions::split(std::span<const CopyRun> runs, Direction direction) const {
  Split split;
  split.registered.reserve(runs.size());
  MutexLock lock(mutex_);
  const Region* region = nullptr;
  for (const CopyRun& run : runs) {
    if (run.bytes == 0) continue;
    if (run.destination == nullptr || run.source == nullptr) {
      return Status::invalid_argument("copy: a run of " + std::to_string(run.bytes) + " bytes has a null " +
                                      (run.source == nullptr ? "source" : "destination"));
    }
    const Region* found =
        find(lock, reinterpret_cast<std::uintptr_t>(host_side(run, direction)), run.bytes, region);
    (found != nullptr ? split.registered : split.pageable).push_back(run);
    if (found != nullptr) region = found;
  }
  return split;
}

std::vector<MappedRun> HostRegions::mapped(std::span<const CopyRun> runs, Direction direction) const {
  std::vector<MappedRun> result;
  result.reserve(runs.size());
  MutexLock lock(mutex_);
  const Region* region = nullptr;
  for (const CopyRun& run : runs) {
    const auto host = reinterpret_cast<std::uintptr_t>(host_side(run, direction));
    region = find(lock, host, run.bytes, region);
    KVTIER_CHECK(region != nullptr);
    const std::uint64_t mapped = region->device_address + (host - region->begin);
    const auto to = reinterpret_cast<std::uint64_t>(run.destination);
    const auto from = reinterpret_cast<std::uint64_t>(run.source);
    result.push_back(direction == Direction::load ? MappedRun{to, mapped, run.bytes}
                                                  : MappedRun{mapped, from, run.bytes});
  }
  return result;
}

}  // namespace kvtier::cuda

#endif
