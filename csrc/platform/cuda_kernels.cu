#include <type_traits>

#include "cuda_kernels.h"

namespace kvtier::cuda {
namespace {

constexpr unsigned kCopyThreads = 512;
constexpr unsigned kDecodeThreads = 256;
constexpr unsigned kDecodeBlocksPerSm = 4;  // half of what fits, also by registers: others find room beside
constexpr unsigned kLanes = 32;
constexpr std::size_t kBulkSharedBytes = std::size_t{kBulkStages} * kWideUnitBytes;

template <typename Table>
__global__ void __launch_bounds__(kCopyThreads) copy_kernel(const __grid_constant__ Table table) {
  const unsigned thread = blockIdx.x * kCopyThreads + threadIdx.x;
  copy_table(table, thread / kLanes, gridDim.x * (kCopyThreads / kLanes), thread % kLanes, kLanes);
}

// --- the bulk copy engine (PTX ISA, "Data movement and conversion: asynchronous copy", mbarrier) ---

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void begin_load(std::uint32_t stage, std::uint32_t barrier, const Unit& unit) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(unit.bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage),
      "l"(unit.source), "r"(unit.bytes), "r"(barrier)
      : "memory");
}

__device__ void wait_for_load(std::uint32_t barrier, std::uint32_t parity) {
  std::uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ void begin_store(std::uint32_t stage, const Unit& unit) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(unit.destination),
               "r"(stage), "r"(unit.bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

template <typename Table>
__device__ void bulk_copy_table(const Table& table, std::uint32_t worker, std::uint32_t workers) {
  extern __shared__ __align__(128) std::byte stages[];
  __shared__ __align__(8) std::uint64_t barriers[kBulkStages];
  const std::uint32_t first_stage = shared_address(stages);
  const std::uint32_t first_barrier = shared_address(barriers);
  for (std::uint32_t s = 0; s < kBulkStages; ++s) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(first_barrier + s * 8) : "memory");
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");

  const std::uint32_t all = table.num_units(kWideUnitBytes);
  const std::uint32_t mine = worker < all ? (all - worker + workers - 1) / workers : 0;
  const auto unit = [&](std::uint32_t k) { return table.unit(worker + k * workers, kWideUnitBytes); };
  const auto load = [&](std::uint32_t k) {
    begin_load(first_stage + bulk_stage(k) * kWideUnitBytes, first_barrier + bulk_stage(k) * 8, unit(k));
  };
  for (std::uint32_t k = 0; k < kBulkAhead && k < mine; ++k) load(k);
  for (std::uint32_t k = 0; k < mine; ++k) {
    wait_for_load(first_barrier + bulk_stage(k) * 8, bulk_parity(k));
    begin_store(first_stage + bulk_stage(k) * kWideUnitBytes, unit(k));
    if (k + kBulkAhead < mine) {
      asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kBulkStages - kBulkAhead) : "memory");
      load(k + kBulkAhead);
    }
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");  // all bytes are written when the kernel ends
}

#endif

// One thread of each block works: it only issues, the engine moves.
template <typename Table>
__global__ void __launch_bounds__(kLanes) bulk_kernel(const __grid_constant__ Table table) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) bulk_copy_table(table, blockIdx.x, gridDim.x);
#else
  static_cast<void>(table);
  __trap();  // never launched: load_bulk_kernel() refuses
#endif
}

__device__ std::uint64_t now_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__global__ void __launch_bounds__(1) pace_kernel(TokenBucket* bucket, RateLimit limit, std::uint64_t bytes) {
  const std::uint64_t start = admit(*bucket, limit, now_ns(), bytes);
  constexpr std::uint64_t kNap = 20000;
  for (std::uint64_t now = now_ns(); now < start; now = now_ns()) {
    __nanosleep(static_cast<unsigned>(start - now < kNap ? start - now : kNap));
  }
}

__global__ void __launch_bounds__(kDecodeThreads, 2 * kDecodeBlocksPerSm)
    decode_kernel(const uint4* memory, std::size_t count, std::uint32_t* sink) {
  std::uint32_t sum = 0;
  const std::size_t step = std::size_t{gridDim.x} * kDecodeThreads;
#pragma unroll 4
  for (std::size_t i = std::size_t{blockIdx.x} * kDecodeThreads + threadIdx.x; i < count; i += step) {
    const uint4 value = memory[i];
    sum += value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum == 0x12345678U) *sink = sum;  // so that nothing is optimised away
}

template <typename Kernel>
cudaError_t load(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

template <typename Kernel>
cudaError_t load_bulk(Kernel* kernel) {
  if (const cudaError_t error = load(kernel); error != cudaSuccess) return error;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(kBulkSharedBytes));
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t stream, const Arguments&... arguments) {
  const void* addresses[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, const_cast<void**>(addresses),
                          shared, stream);
}

template <typename Table>
unsigned blocks_for(const Table& table, std::uint32_t unit_bytes, unsigned units_per_block,
                    unsigned num_sms) {
  const unsigned wanted = (table.num_units(unit_bytes) + units_per_block - 1) / units_per_block;
  return wanted < num_sms ? wanted : num_sms;
}

}  // namespace

cudaError_t load_kernels() {
  for (const cudaError_t error : {load(&copy_kernel<SmallCompactRuns>), load(&copy_kernel<LargeCompactRuns>),
                                  load(&copy_kernel<SmallWideRuns>), load(&copy_kernel<LargeWideRuns>),
                                  load(&pace_kernel), load(&decode_kernel)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t load_bulk_kernel() {
  for (const cudaError_t error :
       {load_bulk(&bulk_kernel<SmallCompactRuns>), load_bulk(&bulk_kernel<LargeCompactRuns>),
        load_bulk(&bulk_kernel<SmallWideRuns>), load_bulk(&bulk_kernel<LargeWideRuns>)}) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Table>
cudaError_t launch_copy(cudaStream_t stream, const Table& table, unsigned num_sms) {
  const unsigned blocks = blocks_for(table, kUnitBytes, kCopyThreads / kLanes, num_sms);
  if (blocks == 0) return cudaSuccess;
  return launch(&copy_kernel<Table>, dim3(blocks), dim3(kCopyThreads), 0, stream, table);
}

template <typename Table>
cudaError_t launch_bulk_copy(cudaStream_t stream, const Table& table, unsigned num_sms) {
  const unsigned blocks = blocks_for(table, kWideUnitBytes, 1, num_sms);
  if (blocks == 0) return cudaSuccess;
  return launch(&bulk_kernel<Table>, dim3(blocks), dim3(kLanes), kBulkSharedBytes, stream, table);
}

template cudaError_t launch_copy(cudaStream_t, const SmallCompactRuns&, unsigned);
template cudaError_t launch_copy(cudaStream_t, const LargeCompactRuns&, unsigned);
template cudaError_t launch_copy(cudaStream_t, const SmallWideRuns&, unsigned);
template cudaError_t launch_copy(cudaStream_t, const LargeWideRuns&, unsigned);
template cudaError_t launch_bulk_copy(cudaStream_t, const SmallCompactRuns&, unsigned);
template cudaError_t launch_bulk_copy(cudaStream_t, const LargeCompactRuns&, unsigned);
template cudaError_t launch_bulk_copy(cudaStream_t, const SmallWideRuns&, unsigned);
template cudaError_t launch_bulk_copy(cudaStream_t, const LargeWideRuns&, unsigned);

cudaError_t launch_pace(cudaStream_t stream, TokenBucket* bucket, RateLimit limit, std::uint64_t bytes) {
  return launch(&pace_kernel, dim3(1), dim3(1), 0, stream, bucket, limit, bytes);
}

cudaError_t launch_decode(cudaStream_t stream, const void* memory, std::size_t bytes, unsigned passes,
                          unsigned num_sms, std::uint32_t* sink) {
  const auto* vectors = static_cast<const uint4*>(memory);
  const std::size_t count = bytes / sizeof(uint4);
  for (unsigned pass = 0; pass < passes; ++pass) {
    const cudaError_t error = launch(&decode_kernel, dim3(num_sms * kDecodeBlocksPerSm), dim3(kDecodeThreads),
                                     0, stream, vectors, count, sink);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace kvtier::cuda
