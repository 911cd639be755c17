#ifdef KVTIER_HAVE_CUDA

#include "cuda_scratch.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "cuda_kernels.h"

namespace kvtier::cuda {
namespace {

constexpr std::chrono::milliseconds kWarmUp{40};
constexpr double kMaxPasses = 512;  // a stream takes about a thousand launches before launching waits

}  // namespace

Scratch::~Scratch() {
  for (auto& [begin, bytes] : on_host_) {
    if (device_.unregister_host(begin)) std::free(begin);
  }
  const Scope scope(*device_.context());
  if (!scope.status()) return;
  for (void* memory : on_device_) static_cast<void>(cudaFree(memory));
}

Result<std::byte*> Scratch::device_memory(std::size_t bytes) {
  const Scope scope(*device_.context());
  KVTIER_RETURN_IF_ERROR(scope.status());
  void* memory = nullptr;
  KVTIER_RETURN_IF_ERROR(to_status("cudaMalloc", cudaMalloc(&memory, bytes)));
  on_device_.push_back(memory);
  return static_cast<std::byte*>(memory);
}

Result<std::byte*> Scratch::host_memory(std::size_t bytes) {
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  const std::size_t rounded = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kHugePage, rounded));
  if (memory == nullptr) return Status::resource("no host memory for measurements");
  std::memset(memory, 1, rounded);
  if (const Status status = device_.register_host(memory, rounded); !status) {
    std::free(memory);
    return status;
  }
  on_host_.emplace_back(memory, rounded);
  return memory;
}

Status cover(CudaDevice& device, StreamHandle stream) {
  Result<std::unique_ptr<Event>> event = device.create_event();
  if (!event) return event.status();
  return device.record(**event, stream);
}

Status DecodeLoad::prepare(double seconds) {
  Result<OwnedStream> stream = OwnedStream::create(device_);
  if (!stream) return stream.status();
  stream_ = owner_.emplace(std::move(*stream)).handle();
  Result<std::byte*> memory = scratch_.device_memory(kBytes);
  if (!memory) return memory.status();
  memory_ = *memory;
  Result<std::byte*> sink = scratch_.device_memory(256);
  if (!sink) return sink.status();
  sink_ = reinterpret_cast<std::uint32_t*>(*sink);
  const Scope scope(*device_.context());
  KVTIER_RETURN_IF_ERROR(scope.status());
  KVTIER_RETURN_IF_ERROR(begin_.create(device_.context()));
  KVTIER_RETURN_IF_ERROR(end_.create(device_.context()));
  KVTIER_RETURN_IF_ERROR(
      to_status("cudaMemset", cudaMemsetAsync(memory_, 7, kBytes, native_stream(stream_))));
  passes_ = 8;
  // An idle GPU runs at a fraction of its clocks and takes some milliseconds to raise them.
  const auto warm = std::chrono::steady_clock::now() + kWarmUp;
  Result<double> once = run();
  while (once && std::chrono::steady_clock::now() < warm) once = run();
  if (!once) return once.status();
  const double per_pass = std::max(*once / passes_, 1e-6);
  passes_ = static_cast<unsigned>(std::clamp(seconds / per_pass, 1.0, kMaxPasses));
  return Status::ok();
}

Status DecodeLoad::launch() {
  const cudaStream_t stream = native_stream(stream_);
  KVTIER_RETURN_IF_ERROR(begin_.record(stream));
  KVTIER_RETURN_IF_ERROR(to_status(
      "the decode kernel", launch_decode(stream, memory_, kBytes, passes_, device_.num_sms(), sink_)));
  return end_.record(stream);
}

Result<double> DecodeLoad::run() {
  KVTIER_RETURN_IF_ERROR(launch());
  return seconds();
}

std::vector<CopyRun> scattered_runs(std::byte* host, std::byte* pages, std::size_t run_bytes,
                                    std::size_t count, Direction direction) {
  std::vector<CopyRun> runs;
  runs.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    // 1237 is prime: every page once, no two in a row that would merge.
    std::byte* page = pages + (count % 1237 == 0 ? i : i * 1237 % count) * run_bytes;
    std::byte* slot = host + i * run_bytes;
    runs.push_back(direction == Direction::load ? CopyRun{page, slot, run_bytes}
                                                : CopyRun{slot, page, run_bytes});
  }
  return runs;
}

}  // namespace kvtier::cuda

#endif
