// What the cuda device needs of the driver itself: contexts, address ranges, the batched copy. The driver is
// opened at run time. Errors become Status here, with CUDA's number.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <string>

#include "kvtier/core/status.h"
#include "kvtier/platform/cuda_codes.h"
#include "kvtier/platform/cuda_device.h"

namespace kvtier::cuda {

// Ok for success; kCaptureConflict for whatever a capture refuses; unsupported for a missing driver or GPU.
Status to_status(const char* what, cudaError_t error);
Status to_status(const char* what, CUresult error);

// The driver's functions. Immutable.
struct Driver {
  // The one of this process. Errors: unsupported, saying what is missing. Tried once.
  static const Result<Driver>& get();

  using BatchWithFailIndex = CUresult (*)(CUdeviceptr*, CUdeviceptr*, std::size_t*, std::size_t,
                                          CUmemcpyAttributes*, std::size_t*, std::size_t, std::size_t*,
                                          CUstream);
  using BatchWithoutFailIndex = CUresult (*)(CUdeviceptr*, CUdeviceptr*, std::size_t*, std::size_t,
                                             CUmemcpyAttributes*, std::size_t*, std::size_t, CUstream);

  int version = 0;
  CUresult (*device_get)(CUdevice*, int) = nullptr;
  CUresult (*primary_retain)(CUcontext*, CUdevice) = nullptr;
  CUresult (*primary_release)(CUdevice) = nullptr;
  CUresult (*push)(CUcontext) = nullptr;
  CUresult (*pop)(CUcontext*) = nullptr;
  CUresult (*address_range)(CUdeviceptr*, std::size_t*, CUdeviceptr) = nullptr;
  CUresult (*pointer_attribute)(void*, CUpointer_attribute, CUdeviceptr) = nullptr;
  // At most one of the two is there.
  BatchWithFailIndex batch_with_fail_index = nullptr;
  BatchWithoutFailIndex batch_without_fail_index = nullptr;

  bool has_batch() const { return batch_with_fail_index != nullptr || batch_without_fail_index != nullptr; }
};

// The primary context of one GPU, which the framework uses as well. Retained while this lives.
class Context {
 public:
  static Result<std::shared_ptr<Context>> open(int ordinal);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Driver& driver() const { return driver_; }
  int ordinal() const { return ordinal_; }

 private:
  friend class Scope;
  Context(const Driver& driver, int ordinal, CUdevice device, CUcontext context);
  const Driver& driver_;
  const int ordinal_;
  const CUdevice device_;
  const CUcontext context_;
  const std::uint64_t born_in_;
};

// While it lives the calling thread works on that context, in relaxed capture mode. Restores both.
class Scope {
 public:
  explicit Scope(const Context& context);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

  // Whether the context could be made current; nothing may be called otherwise.
  const Status& status() const { return status_; }

 private:
  const Context& context_;
  Status status_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool exchanged_ = false;
};

// An event for ordering and for sleeping until it completes. Requires a Scope, also to destroy.
class RawEvent {
 public:
  RawEvent() = default;
  RawEvent(RawEvent&& other) noexcept : event_(other.event_) { other.event_ = nullptr; }
  RawEvent& operator=(RawEvent&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~RawEvent() {
    if (event_ != nullptr) static_cast<void>(cudaEventDestroy(event_));
  }
  Status create() {
    return to_status("cudaEventCreate",
                     cudaEventCreateWithFlags(&event_, cudaEventBlockingSync | cudaEventDisableTiming));
  }
  cudaEvent_t get() const { return event_; }
  // Gives it up without destroying it.
  void abandon() { event_ = nullptr; }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace kvtier::cuda
