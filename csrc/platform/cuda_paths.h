// How one batch is submitted by each copy path but `staged` (cuda_staging.h). Each function puts copies into
// a stream and waits for nothing. Require a Scope. After a failure a part of the batch may have been
// submitted: the caller drains the stream.
#pragma once

#include <span>

#include "cuda_driver.h"

#include "kvtier/core/types.h"
#include "kvtier/platform/run_plan.h"
#include "kvtier/platform/run_table.h"

namespace kvtier::cuda {

Status submit_plain(cudaStream_t stream, std::span<const CopyRun> runs, Direction direction);

// `one_registration(begin, bytes)` says whether a stretch of host memory lies in one registration: rows that
// span two, or two allocations of the device, go one by one, for a 2D copy knows one of each.
template <typename OneRegistration>
Status submit_merged(const Driver& driver, cudaStream_t stream, std::span<const CopyRun> runs,
                     Direction direction, const OneRegistration& one_registration);

// Requires driver.has_batch().
Status submit_batched(const Driver& driver, cudaStream_t stream, std::span<const CopyRun> runs);

enum class CopyKernel : std::uint8_t { lanes, bulk };
// For `bulk`, every run must suit it.
Status submit_kernel(cudaStream_t stream, std::span<const MappedRun> runs, CopyKernel kernel,
                     unsigned num_sms);

// --- of submit_merged ---

Status submit_rectangle(const Driver& driver, cudaStream_t stream, const Rectangle& rectangle,
                        Direction direction);
Status submit_rows(cudaStream_t stream, const Rectangle& rectangle, Direction direction);

template <typename OneRegistration>
Status submit_merged(const Driver& driver, cudaStream_t stream, std::span<const CopyRun> runs,
                     Direction direction, const OneRegistration& one_registration) {
  for (const Rectangle& rectangle : merge_runs(runs)) {
    const bool load = direction == Direction::load;
    const std::byte* host = load ? rectangle.source : rectangle.destination;
    const std::size_t pitch = load ? rectangle.source_pitch : rectangle.destination_pitch;
    const std::size_t span = (rectangle.height - 1) * pitch + rectangle.width_bytes;
    KVTIER_RETURN_IF_ERROR(one_registration(host, span)
                               ? submit_rectangle(driver, stream, rectangle, direction)
                               : submit_rows(stream, rectangle, direction));
  }
  return Status::ok();
}

}  // namespace kvtier::cuda
