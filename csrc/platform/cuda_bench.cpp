// CudaBench: what `kvtier bench device` measures with.
#ifdef KVTIER_HAVE_CUDA

#include <algorithm>
#include <chrono>

#include "cuda_scratch.h"

namespace kvtier {
namespace {

using cuda::CudaDevice;
using cuda::DecodeLoad;
using cuda::native_stream;
using cuda::Scope;
using cuda::Scratch;
using cuda::TimingEvent;

// Shorter than the copies that run beside it.
constexpr double kDecodeSeconds = 2.5e-3;

class Bench final : public CudaBench {
 public:
  explicit Bench(std::unique_ptr<CudaDevice> device) : device_(std::move(device)) {}

  Status start() {
    device_->set_measuring(true);
    for (auto [stream, handle] : {std::pair{&store_owner_, &store_stream_}, {&load_owner_, &load_stream_}}) {
      Result<OwnedStream> made = OwnedStream::create(*device_);
      if (!made) return made.status();
      *handle = stream->emplace(std::move(*made)).handle();
    }
    return decode_.prepare(kDecodeSeconds);
  }

  Device& device() override { return *device_; }
  Result<std::byte*> device_memory(std::size_t bytes) override { return scratch_.device_memory(bytes); }
  Result<std::byte*> host_memory(std::size_t bytes) override { return scratch_.host_memory(bytes); }
  Result<double> decode_alone() override {
    const Scope scope(*device_->context());
    KVTIER_RETURN_IF_ERROR(scope.status());
    return decode_.run();
  }
  CopyPaths paths() const override { return device_->paths(); }
  CopyPath chosen(Direction direction, std::uint64_t run_bytes) const override {
    return device_->chosen(direction, run_bytes);
  }

  Status fill_device(std::byte* begin, std::byte value, std::size_t bytes) override {
    const Scope scope(*device_->context());
    KVTIER_RETURN_IF_ERROR(scope.status());
    const cudaStream_t stream = native_stream(load_stream_);
    KVTIER_RETURN_IF_ERROR(
        cuda::to_status("cudaMemset", cudaMemsetAsync(begin, static_cast<int>(value), bytes, stream)));
    return cuda::to_status("cudaStreamSynchronize", cudaStreamSynchronize(stream));
  }
  Status read_device(std::byte* to, const std::byte* from, std::size_t bytes) override {
    const Scope scope(*device_->context());
    KVTIER_RETURN_IF_ERROR(scope.status());
    const cudaStream_t stream = native_stream(store_stream_);
    KVTIER_RETURN_IF_ERROR(
        cuda::to_status("cudaMemcpy", cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream)));
    return cuda::to_status("cudaStreamSynchronize", cudaStreamSynchronize(stream));
  }

  Result<Timing> time(std::span<const CopyRun> stores, std::span<const CopyRun> loads,
                      std::size_t runs_per_batch, std::optional<CopyPath> path, Beside beside) override;

 private:
  Status submit(std::span<const CopyRun> runs, Direction direction, std::optional<CopyPath> path) {
    const StreamHandle stream = direction == Direction::store ? store_stream_ : load_stream_;
    return path ? device_->copy_by(stream, runs, direction, *path) : device_->copy(stream, runs, direction);
  }

  std::unique_ptr<CudaDevice> device_;
  Scratch scratch_{*device_};
  DecodeLoad decode_{*device_, scratch_};
  std::optional<OwnedStream> store_owner_;
  std::optional<OwnedStream> load_owner_;
  StreamHandle store_stream_{0};
  StreamHandle load_stream_{0};
};

Result<CudaBench::Timing> Bench::time(std::span<const CopyRun> stores, std::span<const CopyRun> loads,
                                      std::size_t runs_per_batch, std::optional<CopyPath> path,
                                      Beside beside) {
  if (runs_per_batch == 0) return Status::invalid_argument("runs_per_batch is 0; allowed: 1 or more");
  const Scope scope(*device_->context());
  KVTIER_RETURN_IF_ERROR(scope.status());
  TimingEvent begin;
  TimingEvent store_end;
  TimingEvent load_end;
  for (TimingEvent* event : {&begin, &store_end, &load_end})
    KVTIER_RETURN_IF_ERROR(event->create(device_->context()));
  Timing timing;
  if (beside == Beside::decode) KVTIER_RETURN_IF_ERROR(decode_.launch());
  KVTIER_RETURN_IF_ERROR(begin.record(native_stream(load_stream_)));
  const auto submission = std::chrono::steady_clock::now();
  // The directions take turns, as two requests of a server would.
  for (std::size_t at = 0; at < std::max(stores.size(), loads.size()); at += runs_per_batch) {
    const auto batch = [&](std::span<const CopyRun> runs) {
      return at < runs.size() ? runs.subspan(at, std::min(runs_per_batch, runs.size() - at))
                              : std::span<const CopyRun>();
    };
    for (const auto& [runs, direction] :
         {std::pair{batch(stores), Direction::store}, std::pair{batch(loads), Direction::load}}) {
      if (!runs.empty()) KVTIER_RETURN_IF_ERROR(submit(runs, direction, path));
    }
  }
  timing.submit_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - submission).count();
  for (const auto& [stream, end] : {std::pair{&store_stream_, &store_end}, {&load_stream_, &load_end}}) {
    KVTIER_RETURN_IF_ERROR(cuda::cover(*device_, *stream));
    KVTIER_RETURN_IF_ERROR(end->record(native_stream(*stream)));
  }
  if (!stores.empty()) {
    Result<double> seconds = store_end.seconds_since(begin);
    if (!seconds) return seconds.status();
    timing.copy_seconds = *seconds;
  }
  if (!loads.empty()) {
    Result<double> seconds = load_end.seconds_since(begin);
    if (!seconds) return seconds.status();
    timing.copy_seconds = std::max(timing.copy_seconds, *seconds);
  }
  if (beside == Beside::decode) {
    Result<double> seconds = decode_.seconds();
    if (!seconds) return seconds.status();
    timing.decode_seconds = *seconds;
  }
  return timing;
}

}  // namespace

Result<std::unique_ptr<CudaBench>> CudaBench::create(const CudaOptions& options) {
  Result<std::unique_ptr<CudaDevice>> device = CudaDevice::create(options);
  if (!device) return device.status();
  auto bench = std::make_unique<Bench>(std::move(*device));
  KVTIER_RETURN_IF_ERROR(bench->start());
  return std::unique_ptr<CudaBench>(std::move(bench));
}

}  // namespace kvtier

#endif
