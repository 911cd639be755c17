#ifdef KVTIER_HAVE_CUDA

#include "cuda_paths.h"

#include <memory>
#include <vector>

#include "cuda_kernels.h"

namespace kvtier::cuda {
namespace {

cudaMemcpyKind kind_of(Direction direction) {
  return direction == Direction::load ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost;
}

// Whether [begin, begin + bytes) lies in one allocation of the device.
bool one_allocation(const Driver& driver, const std::byte* begin, std::size_t bytes) {
  CUdeviceptr base = 0;
  std::size_t size = 0;
  const auto address = reinterpret_cast<CUdeviceptr>(begin);
  if (driver.address_range(&base, &size, address) != CUDA_SUCCESS) return false;
  return address - base <= size && bytes <= size - (address - base);
}

template <typename Table>
Result<bool> launch_one(cudaStream_t stream, Table& table, std::span<const MappedRun> runs,
                        TableCursor& cursor, CopyKernel kernel, unsigned num_sms) {
  if (!fill_table(table, runs, cursor)) return false;
  const cudaError_t error = kernel == CopyKernel::lanes ? launch_copy(stream, table, num_sms)
                                                        : launch_bulk_copy(stream, table, num_sms);
  Status status = to_status("a copy kernel's launch", error);
  if (!status) return status;
  return true;
}

}  // namespace

Status submit_plain(cudaStream_t stream, std::span<const CopyRun> runs, Direction direction) {
  for (const CopyRun& run : runs) {
    KVTIER_RETURN_IF_ERROR(
        to_status("cudaMemcpyAsync",
                  cudaMemcpyAsync(run.destination, run.source, run.bytes, kind_of(direction), stream)));
  }
  return Status::ok();
}

Status submit_rows(cudaStream_t stream, const Rectangle& rectangle, Direction direction) {
  for (std::size_t row = 0; row < rectangle.height; ++row) {
    const CopyRun run{rectangle.destination + row * rectangle.destination_pitch,
                      rectangle.source + row * rectangle.source_pitch, rectangle.width_bytes};
    KVTIER_RETURN_IF_ERROR(submit_plain(stream, {&run, 1}, direction));
  }
  return Status::ok();
}

Status submit_rectangle(const Driver& driver, cudaStream_t stream, const Rectangle& rectangle,
                        Direction direction) {
  if (rectangle.height == 1) return submit_rows(stream, rectangle, direction);
  const bool load = direction == Direction::load;
  const std::byte* pages = load ? rectangle.destination : rectangle.source;
  const std::size_t pitch = load ? rectangle.destination_pitch : rectangle.source_pitch;
  if (!one_allocation(driver, pages, (rectangle.height - 1) * pitch + rectangle.width_bytes)) {
    return submit_rows(stream, rectangle, direction);
  }
  return to_status("cudaMemcpy2DAsync",
                   cudaMemcpy2DAsync(rectangle.destination, rectangle.destination_pitch, rectangle.source,
                                     rectangle.source_pitch, rectangle.width_bytes, rectangle.height,
                                     kind_of(direction), stream));
}

Status submit_batched(const Driver& driver, cudaStream_t stream, std::span<const CopyRun> runs) {
  if (runs.empty()) return Status::ok();
  std::vector<CUdeviceptr> to;
  std::vector<CUdeviceptr> from;
  std::vector<std::size_t> sizes;
  to.reserve(runs.size());
  from.reserve(runs.size());
  sizes.reserve(runs.size());
  for (const CopyRun& run : runs) {
    to.push_back(reinterpret_cast<CUdeviceptr>(run.destination));
    from.push_back(reinterpret_cast<CUdeviceptr>(run.source));
    sizes.push_back(run.bytes);
  }
  CUmemcpyAttributes attributes{};
  // In stream order: the host has not observed the end of every copy that may still write a source.
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  attributes.flags = CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
  std::size_t first = 0;
  if (driver.batch_without_fail_index != nullptr) {
    return to_status("cuMemcpyBatchAsync",
                     driver.batch_without_fail_index(to.data(), from.data(), sizes.data(), sizes.size(),
                                                     &attributes, &first, 1, stream));
  }
  std::size_t fail_index = 0;
  return to_status("cuMemcpyBatchAsync",
                   driver.batch_with_fail_index(to.data(), from.data(), sizes.data(), sizes.size(),
                                                &attributes, &first, 1, &fail_index, stream));
}

Status submit_kernel(cudaStream_t stream, std::span<const MappedRun> runs, CopyKernel kernel,
                     unsigned num_sms) {
  constexpr std::size_t kFewRuns = 120;
  constexpr std::size_t kFewPieces = 40;
  // Of the four kinds one is used at a time; 32 KiB are too much for some threads' stacks.
  struct Tables {
    SmallCompactRuns small_compact;
    LargeCompactRuns large_compact;
    SmallWideRuns small_wide;
    LargeWideRuns large_wide;
  };
  const auto tables = std::make_unique_for_overwrite<Tables>();
  TableCursor cursor;
  while (cursor.run < runs.size()) {
    const std::size_t alike = compact_prefix(runs, cursor);
    const std::size_t left = runs.size() - cursor.run;
    Result<bool> done = false;
    if (alike >= std::min<std::size_t>(left, kFewPieces)) {
      done = alike <= kFewRuns ? launch_one(stream, tables->small_compact, runs, cursor, kernel, num_sms)
                               : launch_one(stream, tables->large_compact, runs, cursor, kernel, num_sms);
    } else if (left <= kFewPieces && runs[cursor.run].bytes <= kWideUnitBytes) {
      done = launch_one(stream, tables->small_wide, runs, cursor, kernel, num_sms);
    } else {
      done = launch_one(stream, tables->large_wide, runs, cursor, kernel, num_sms);
    }
    if (!done) return done.status();
    if (!*done) break;  // nothing but runs of 0 bytes was left
  }
  return Status::ok();
}

}  // namespace kvtier::cuda

#endif
