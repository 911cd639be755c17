// CudaDevice::copy(): which path, at what rate, and what happens when a part of it fails.
#ifdef KVTIER_HAVE_CUDA

#include <algorithm>
#include <cstring>

#include "cuda_device_impl.h"
#include "cuda_kernels.h"

namespace kvtier::cuda {
namespace {

// Of a limited direction: what passes between two looks at the clock.
constexpr std::size_t kBurstBytes = std::size_t{2} << 20;

std::size_t index_of(Direction direction) { return direction == Direction::store ? 0 : 1; }

}  // namespace

Status CudaDevice::copy(StreamHandle handle, std::span<const CopyRun> runs, Direction direction) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  Result<StreamPtr> stream = stream_of(handle);
  if (!stream) return stream.status();
  return copy_checked(**stream, runs, direction, std::nullopt);
}

Status CudaDevice::copy_by(StreamHandle handle, std::span<const CopyRun> runs, Direction direction,
                           CopyPath path) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  Result<StreamPtr> stream = stream_of(handle);
  if (!stream) return stream.status();
  return copy_checked(**stream, runs, direction, path);
}

Status CudaDevice::copy_checked(Stream& stream, std::span<const CopyRun> runs, Direction direction,
                                std::optional<CopyPath> path) {
  Result<HostRegions::Split> split = regions_.split(runs, direction);
  if (!split) return split.status();
  MutexLock lock(stream.mutex);
  Status status = copy_registered(stream, split->registered, direction, path);
  if (status && !split->pageable.empty()) status = copy_pageable(stream, split->pageable, direction);
  if (status) return status;
  status = noted(std::move(status));
  // "On failure nothing of this call will run later": what was submitted of it has to be over.
  if (health() && !drain(stream)) {
    mark_lost(Status::device("copies that failed cannot be proved to be over: " + status.message(),
                             kCopiesUnproved));
  }
  return status;
}

Status CudaDevice::drain(Stream& stream) {
  Status status = Status::ok();
  if (stream.lane) {
    status = noted(to_status("cudaStreamSynchronize", cudaStreamSynchronize(stream.lane->side())));
    stream.lane->fork_again();
  }
  const Status main = noted(to_status("cudaStreamSynchronize", cudaStreamSynchronize(stream.native)));
  return status ? main : status;
}

Status CudaDevice::join_lane(Stream& stream) {
  return stream.lane ? noted(stream.lane->join()) : Status::ok();
}

// --- which path ---

CopyPath CudaDevice::chosen(Direction direction, std::uint64_t run_bytes) const {
  if (options_.path && paths_.has(*options_.path)) return *options_.path;
  const std::optional<CopyLimit>& limit = limit_of(direction);
  const auto* share = limit ? std::get_if<DecodeShare>(&*limit) : nullptr;
  return choose_path(calibration_, paths_, direction, run_bytes,
                     share != nullptr ? std::optional(*share) : std::nullopt);
}

CopyPath CudaDevice::usable(const Stream& stream, CopyPath path, std::uint64_t run_bytes) const {
  CopyPaths here = paths_;
  if (!stream.lane) here.remove(CopyPath::staged);
  // A framework's stream may be the legacy default one, which the batched copy refuses.
  if (!stream.own) here.remove(CopyPath::batched);
  return here.has(path) ? path : default_path(here, run_bytes);
}

// --- registered memory ---

std::optional<RateLimit> CudaDevice::rate_of(Direction direction, CopyPath path,
                                             std::uint64_t run_bytes) const {
  const std::optional<CopyLimit>& limit = limit_of(direction);
  if (!limit) return std::nullopt;
  if (const auto* rate = std::get_if<std::uint64_t>(&*limit)) return RateLimit{*rate, kBurstBytes};
  const std::optional<std::uint64_t> rate =
      rate_within(calibration_, path, direction, run_bytes, std::get<DecodeShare>(*limit));
  return rate ? std::optional(RateLimit{*rate, kBurstBytes}) : std::nullopt;
}

Status CudaDevice::copy_registered(Stream& stream, std::span<const CopyRun> runs, Direction direction,
                                   std::optional<CopyPath> path) {
  if (runs.empty()) return Status::ok();
  if (!path && is_limited(stream, direction)) return copy_limited(stream, runs, direction);
  const std::uint64_t mean = total_bytes(runs) / runs.size();
  const CopyPath way = usable(stream, path.value_or(chosen(direction, mean)), mean);
  if (path && way != *path) {
    return Status::unsupported("path " + std::string(to_string(*path)) + " cannot be used in this stream");
  }
  return submit(stream, runs, direction, way);
}

Status CudaDevice::copy_limited(Stream& stream, std::span<const CopyRun> runs, Direction direction) {
  const std::vector<CopyRun> pieces = split_runs(runs, kBurstBytes);
  std::span<const CopyRun> left = pieces;
  while (!left.empty()) {
    const std::span<const CopyRun> burst = left.first(burst_runs(left, kBurstBytes));
    left = left.subspan(burst.size());
    const std::uint64_t mean = total_bytes(burst) / burst.size();
    const CopyPath path = usable(stream, chosen(direction, mean), mean);
    KVTIER_RETURN_IF_ERROR(pace(stream, burst, direction, path));
    KVTIER_RETURN_IF_ERROR(submit(stream, burst, direction, path));
  }
  return Status::ok();
}

Status CudaDevice::pace(Stream& stream, std::span<const CopyRun> burst, Direction direction, CopyPath path) {
  const std::uint64_t bytes = total_bytes(burst);
  const std::optional<RateLimit> rate = rate_of(direction, path, bytes / burst.size());
  if (!rate) return Status::ok();
  cudaStream_t at = stream.native;
  if (path == CopyPath::staged) {
    if (direction == Direction::load) {
      KVTIER_RETURN_IF_ERROR(stream.lane->join());
      KVTIER_RETURN_IF_ERROR(stream.lane->fork());
    }
    at = stream.lane->bus_stream(direction);
  }
  return to_status("the pacing kernel", launch_pace(at, &stream.buckets[index_of(direction)], *rate, bytes));
}

Status CudaDevice::submit(Stream& stream, std::span<const CopyRun> runs, Direction direction, CopyPath path) {
  if (path == CopyPath::staged) return stream.lane->copy(runs, direction, options_.max_sms);
  if (stream.lane) {
    KVTIER_RETURN_IF_ERROR(stream.lane->join());
    stream.lane->fork_again();
  }
  switch (path) {
    case CopyPath::merged:
      return submit_merged(
          context_->driver(), stream.native, runs, direction,
          [this](const std::byte* begin, std::size_t bytes) { return regions_.holds(begin, bytes); });
    case CopyPath::batched: return submit_batched(context_->driver(), stream.native, runs);
    case CopyPath::kernel:
      return submit_kernel(stream.native, regions_.mapped(runs, direction), CopyKernel::lanes,
                           options_.max_sms);
    case CopyPath::bulk: {
      std::vector<MappedRun> mapped = regions_.mapped(runs, direction);
      const auto rest = std::partition(mapped.begin(), mapped.end(), suits_bulk);
      KVTIER_RETURN_IF_ERROR(
          submit_kernel(stream.native, {mapped.begin(), rest}, CopyKernel::bulk, options_.max_sms));
      return submit_kernel(stream.native, {rest, mapped.end()}, CopyKernel::lanes, options_.max_sms);
    }
    default: return submit_plain(stream.native, runs, direction);
  }
}

// --- memory that is not registered ---

Status CudaDevice::copy_pageable(Stream& stream, std::span<const CopyRun> runs, Direction direction) {
  if (stream.lane) {
    KVTIER_RETURN_IF_ERROR(stream.lane->join());
    stream.lane->fork_again();
  }
  BounceRing& ring = bounce_[index_of(direction)];
  MutexLock lock(ring.mutex());
  return ring.is_ready() ? bounce(stream, runs, direction, ring) : copy_by_driver(stream, runs, direction);
}

// By the driver's own staging, one run after another: nobody said that this memory would be copied, or not
// even a few megabytes could be pinned.
Status CudaDevice::copy_by_driver(Stream& stream, std::span<const CopyRun> runs, Direction direction) {
  const std::vector<CopyRun> pieces = split_runs(runs, kBurstBytes);
  std::span<const CopyRun> left = pieces;
  while (!left.empty()) {
    const std::span<const CopyRun> burst = left.first(burst_runs(left, kBurstBytes));
    left = left.subspan(burst.size());
    if (is_limited(stream, direction)) {
      KVTIER_RETURN_IF_ERROR(pace(stream, burst, direction, CopyPath::plain));
    }
    KVTIER_RETURN_IF_ERROR(submit_plain(stream.native, burst, direction));
  }
  return to_status("cudaStreamSynchronize", cudaStreamSynchronize(stream.native));
}

Status CudaDevice::bounce(Stream& stream, std::span<const CopyRun> runs, Direction direction,
                          BounceRing& ring) {
  const bool load = direction == Direction::load;
  const CopyPath path = context_->driver().has_batch() && stream.own ? CopyPath::batched : CopyPath::plain;
  const std::vector<CopyRun> pieces = split_runs(runs, BounceRing::kPartBytes);
  std::span<const CopyRun> left = pieces;
  while (!left.empty()) {
    const std::span<const CopyRun> burst = left.first(burst_runs(left, BounceRing::kPartBytes));
    left = left.subspan(burst.size());
    Result<std::byte*> part = ring.next_part();
    if (!part) return part.status();
    std::vector<CopyRun> pinned;
    pinned.reserve(burst.size());
    std::byte* at = *part;
    for (const CopyRun& run : burst) {
      if (load) std::memcpy(at, run.source, run.bytes);
      pinned.push_back(load ? CopyRun{run.destination, at, run.bytes} : CopyRun{at, run.source, run.bytes});
      at += run.bytes;
    }
    if (is_limited(stream, direction)) KVTIER_RETURN_IF_ERROR(pace(stream, pinned, direction, path));
    KVTIER_RETURN_IF_ERROR(submit(stream, pinned, direction, path));
    KVTIER_RETURN_IF_ERROR(ring.in_use(stream.native));
    if (load) continue;
    KVTIER_RETURN_IF_ERROR(ring.finish_part());
    for (std::size_t i = 0; i < burst.size(); ++i) {
      std::memcpy(burst[i].destination, pinned[i].destination, burst[i].bytes);
    }
  }
  return Status::ok();
}

}  // namespace kvtier::cuda

#endif
