// The kernels of csrc/platform/cuda_kernels.cu, run by the CPU: the same host-device functions, worker by
// worker in any order and lane by lane.
#include <algorithm>
#include <numeric>
#include <thread>

#include "cuda_kernels.h"
#include "machine.h"

namespace kvtier::cuda {
namespace {

using fake_cuda::Machine;

constexpr std::uint32_t kLanes = 32;

const void* pointer(std::uint64_t address) {
  return reinterpret_cast<const void*>(address);  // NOLINT: tables hold addresses as the GPU uses them
}

template <typename Table>
void check(const Table& table, std::uint32_t unit_bytes, std::uint32_t least_access) {
  for (std::uint32_t i = 0; i < table.num_units(unit_bytes); ++i) {
    const Unit unit = table.unit(i, unit_bytes);
    if (!Machine::get().reaches(pointer(unit.destination), unit.bytes) ||
        !Machine::get().reaches(pointer(unit.source), unit.bytes)) {
      fake_cuda::illegal("a kernel touches memory that is neither allocated nor registered");
    }
    if (access_bytes(unit.destination, unit.source, unit.bytes) < least_access) {
      fake_cuda::illegal("the bulk copy engine is given what is no multiple of 16");
    }
  }
}

}  // namespace

cudaError_t load_kernels() { return cudaSuccess; }
cudaError_t load_bulk_kernel() { return cudaSuccess; }

template <typename Table>
cudaError_t launch_copy(cudaStream_t stream, const Table& table, unsigned num_sms) {
  if (num_sms == 0 || table.num_units(kUnitBytes) == 0) return cudaErrorInvalidConfiguration;
  check(table, kUnitBytes, 1);
  std::vector<std::uint32_t> workers(num_sms);
  std::iota(workers.begin(), workers.end(), 0U);
  std::shuffle(workers.begin(), workers.end(), std::mt19937(Machine::get().random()));
  const auto run = [table = std::make_shared<Table>(table), workers] {
    const auto count = static_cast<std::uint32_t>(workers.size());
    for (const std::uint32_t worker : workers) {
      for (std::uint32_t lane = 0; lane < kLanes; ++lane) copy_table(*table, worker, count, lane, kLanes);
    }
  };
  Machine::get().submit(stream, {run, nullptr, nullptr});
  return cudaSuccess;
}

template <typename Table>
cudaError_t launch_bulk_copy(cudaStream_t stream, const Table& table, unsigned num_sms) {
  if (num_sms == 0 || table.num_units(kWideUnitBytes) == 0) return cudaErrorInvalidConfiguration;
  check(table, kWideUnitBytes, 16);
  const auto run = [table = std::make_shared<Table>(table)] {
    for (std::uint32_t i = table->num_units(kWideUnitBytes); i-- > 0;) {
      const Unit unit = table->unit(i, kWideUnitBytes);
      std::copy_n(static_cast<const std::byte*>(pointer(unit.source)), unit.bytes,
                  static_cast<std::byte*>(const_cast<void*>(pointer(unit.destination))));
    }
  };
  Machine::get().submit(stream, {run, nullptr, nullptr});
  return cudaSuccess;
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
  if (!Machine::get().reaches(bucket, sizeof *bucket))
    fake_cuda::illegal("a bucket outside of device memory");
  const auto run = [=] {
    using std::chrono::nanoseconds;
    using std::chrono::steady_clock;
    const auto now = std::chrono::duration_cast<nanoseconds>(steady_clock::now().time_since_epoch());
    const std::uint64_t start = admit(*bucket, limit, static_cast<std::uint64_t>(now.count()), bytes);
    std::this_thread::sleep_until(steady_clock::time_point(nanoseconds(start)));
  };
  Machine::get().submit(stream, {run, nullptr, nullptr});
  return cudaSuccess;
}

cudaError_t launch_decode(cudaStream_t stream, const void* memory, std::size_t bytes, unsigned passes,
                          unsigned, std::uint32_t*) {
  if (!Machine::get().reaches(memory, bytes)) fake_cuda::illegal("the decode kernel reads beyond its memory");
  const auto run = [=] { std::this_thread::sleep_for(std::chrono::microseconds(10) * passes); };
  Machine::get().submit(stream, {run, nullptr, nullptr});
  return cudaSuccess;
}

}  // namespace kvtier::cuda
