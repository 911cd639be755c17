// The kernels of the cuda device, as functions that launch them. Nothing else of kvtier runs on a GPU.
//
// Every launch goes to the stream that is named, in the current context, and returns the launch's own error:
// cudaGetLastError() is not consulted, since it may hold what the framework has done in this thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kvtier/platform/rate_limit.h"
#include "kvtier/platform/run_table.h"

namespace kvtier::cuda {

// Loads every kernel into the current context. Lazy loading at a first launch may wait for the device, which
// must not happen beside a framework's kernels.
cudaError_t load_kernels();
// Lets the bulk kernel have its shared memory; fails where there is no bulk copy engine (below sm_90).
cudaError_t load_bulk_kernel();

// Copies the runs of a table with `num_sms` thread blocks, one for each SM that may be used.
template <typename Table>
cudaError_t launch_copy(cudaStream_t stream, const Table& table, unsigned num_sms);
// The same by the SMs' bulk copy engines. Every unit must suit it (suits_bulk).
template <typename Table>
cudaError_t launch_bulk_copy(cudaStream_t stream, const Table& table, unsigned num_sms);

// Keeps the stream from going on until `bytes` may move. `bucket` is device memory, of this stream only.
cudaError_t launch_pace(cudaStream_t stream, TokenBucket* bucket, RateLimit limit, std::uint64_t bytes);

// What a decode step does to HBM, with all SMs: `passes` kernels one after another, each of which reads
// `bytes`. As in a server, other streams' kernels get onto the SMs between them; one kernel as long as all
// would keep copies by kernels out until its end, and so would seem not to be slowed down by them. For
// measurements.
cudaError_t launch_decode(cudaStream_t stream, const void* memory, std::size_t bytes, unsigned passes,
                          unsigned num_sms, std::uint32_t* sink);

}  // namespace kvtier::cuda
