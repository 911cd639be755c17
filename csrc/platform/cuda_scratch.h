// Scratch memory of calibration and measurements. Never a framework's.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "cuda_device_impl.h"

namespace kvtier::cuda {

// An event that tells time. Everything but the destructor requires a Scope.
class TimingEvent {
 public:
  TimingEvent() = default;
  TimingEvent(const TimingEvent&) = delete;
  TimingEvent& operator=(const TimingEvent&) = delete;
  ~TimingEvent() {
    if (event_ == nullptr) return;
    const Scope scope(*context_);
    if (scope.status()) static_cast<void>(cudaEventDestroy(event_));
  }
  Status create(std::shared_ptr<Context> context) {
    context_ = std::move(context);
    return to_status("cudaEventCreate", cudaEventCreateWithFlags(&event_, cudaEventBlockingSync));
  }
  Status record(cudaStream_t stream) { return to_status("cudaEventRecord", cudaEventRecord(event_, stream)); }
  // Waits for this event, then gives the time since `begin`.
  Result<double> seconds_since(const TimingEvent& begin) const {
    KVTIER_RETURN_IF_ERROR(to_status("cudaEventSynchronize", cudaEventSynchronize(event_)));
    float milliseconds = 0;
    KVTIER_RETURN_IF_ERROR(
        to_status("cudaEventElapsedTime", cudaEventElapsedTime(&milliseconds, begin.event_, event_)));
    return static_cast<double>(milliseconds) / 1e3;
  }

 private:
  std::shared_ptr<Context> context_;
  cudaEvent_t event_ = nullptr;
};

// Owns: device memory and registered host memory, given back by the destructor, which enters a Scope itself.
// Requires that no copy uses them then. Borrows: the device.
class Scratch {
 public:
  explicit Scratch(CudaDevice& device) : device_(device) {}
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Result<std::byte*> device_memory(std::size_t bytes);
  Result<std::byte*> host_memory(std::size_t bytes);

 private:
  CudaDevice& device_;
  std::vector<void*> on_device_;
  std::vector<std::pair<std::byte*, std::size_t>> on_host_;
};

inline cudaStream_t native_stream(StreamHandle handle) {
  return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(handle));  // NOLINT: a native handle
}

// Makes the native stream itself cover all copies that were given to it (the staged path uses another).
Status cover(CudaDevice& device, StreamHandle stream);

// Memory-bound kernels, one after another, of about the length that is asked for, in a stream of their own.
class DecodeLoad {
 public:
  static constexpr std::size_t kBytes = std::size_t{128} << 20;

  DecodeLoad(CudaDevice& device, Scratch& scratch) : device_(device), scratch_(scratch) {}
  // Warms up, measures, and chooses the number of passes for `seconds`. Blocks.
  Status prepare(double seconds);
  Status launch();
  // Of the kernels that launch() started. Blocks.
  Result<double> seconds() { return end_.seconds_since(begin_); }
  // How long they take now with nothing beside: a GPU's clocks change, so whoever compares measures this
  // each time. Blocks.
  Result<double> run();

 private:
  CudaDevice& device_;
  Scratch& scratch_;
  std::optional<OwnedStream> owner_;
  StreamHandle stream_{0};
  TimingEvent begin_;
  TimingEvent end_;
  std::byte* memory_ = nullptr;
  std::uint32_t* sink_ = nullptr;
  unsigned passes_ = 1;
};

}  // namespace kvtier::cuda
