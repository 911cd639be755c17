// The CUDA runtime's functions that kvtier and its tests call.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "machine.h"

using fake_cuda::Machine;
using fake_cuda::Moment;

namespace {

struct Event {
  std::mutex mutex;
  std::shared_ptr<Moment> last;  // null: never recorded
};

Event* own(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

std::shared_ptr<Moment> last_of(cudaEvent_t event) {
  const std::lock_guard lock(own(event)->mutex);
  return own(event)->last;
}

thread_local int device_of_thread = 0;

const void* host_side(void* to, const void* from, cudaMemcpyKind kind) {
  return kind == cudaMemcpyHostToDevice ? from : to;
}

const void* device_side(void* to, const void* from, cudaMemcpyKind kind) {
  return kind == cudaMemcpyHostToDevice ? to : from;
}

}  // namespace

#define UNSAFE_CALL() \
  if (!Machine::get().may_do_unsafe()) return cudaErrorStreamCaptureUnsupported

extern "C" {

// --- devices and errors ---

cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake_cuda::kNumGpus;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= fake_cuda::kNumGpus) return cudaErrorInvalidDevice;
  device_of_thread = device;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  const std::vector<CUcontext>& stack = fake_cuda::context_stack();
  *device =
      stack.empty() ? device_of_thread : static_cast<int>(reinterpret_cast<std::uintptr_t>(stack.back())) - 1;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "Host memory as a GPU");
  properties->major = 9;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = std::size_t{1} << 30;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  std::snprintf(id, static_cast<std::size_t>(length), "ffff:ff:%02d.0", device);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
  *lowest = 0;
  *highest = -5;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the fake CUDA"; }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake_cuda::capture_mode());
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  UNSAFE_CALL();
  Machine::get().finish_all();
  return cudaSuccess;
}

// --- memory ---

cudaError_t cudaMalloc(void** begin, std::size_t bytes) {
  UNSAFE_CALL();
  *begin = Machine::get().allocate(bytes);
  return *begin == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void* begin) {
  UNSAFE_CALL();
  return begin == nullptr || Machine::get().free(begin) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *total = std::size_t{1} << 40;
  *free = *total - Machine::get().allocated_bytes();
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* begin, std::size_t bytes, unsigned) {
  UNSAFE_CALL();
  return Machine::get().pin(begin, bytes);
}

cudaError_t cudaHostUnregister(void* begin) {
  UNSAFE_CALL();
  return Machine::get().unpin(begin) ? cudaSuccess : cudaErrorHostMemoryNotRegistered;
}

cudaError_t cudaHostAlloc(void** begin, std::size_t bytes, unsigned) {
  UNSAFE_CALL();
  *begin = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  std::memset(*begin, 0xcd, bytes);
  return Machine::get().pin(*begin, bytes);
}

cudaError_t cudaFreeHost(void* begin) {
  UNSAFE_CALL();
  Machine::get().finish_all();
  if (!Machine::get().unpin(begin)) return cudaErrorInvalidValue;
  std::free(begin);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return Machine::get().is_pinned(host, 1) ? cudaSuccess : cudaErrorInvalidValue;
}

// --- streams and events ---

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = Machine::get().create_stream();
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Machine::get().destroy_stream(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  UNSAFE_CALL();
  Machine::get().finish(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = Machine::get().captures(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  Machine::get().begin_capture(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  return Machine::get().end_capture(stream) ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}

cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  Machine::get().submit(stream, {nullptr, last_of(event), nullptr});
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  Machine::get().submit(stream, {[=] { function(data); }, nullptr, nullptr});
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete own(event);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  auto moment = std::make_shared<Moment>();
  {
    const std::lock_guard lock(own(event)->mutex);
    own(event)->last = moment;
  }
  Machine::get().submit(stream, {nullptr, nullptr, std::move(moment)});
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  UNSAFE_CALL();
  return Machine::get().is_done(last_of(event)) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  UNSAFE_CALL();
  Machine::get().finish(last_of(event));
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const std::shared_ptr<Moment> from = last_of(begin);
  const std::shared_ptr<Moment> to = last_of(end);
  if (!Machine::get().is_done(from) || !Machine::get().is_done(to)) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(to->at - from->at).count();
  return cudaSuccess;
}

// --- copies ---

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  const bool load = kind == cudaMemcpyHostToDevice;
  const std::size_t host_span = (height - 1) * (load ? from_pitch : to_pitch) + width;
  const std::size_t device_span = (height - 1) * (load ? to_pitch : from_pitch) + width;
  const auto [begin, bytes] = Machine::get().allocation_of(device_side(to, from, kind));
  if (begin == nullptr || !Machine::get().reaches(device_side(to, from, kind), device_span)) {
    return cudaErrorInvalidValue;
  }
  const auto rows = [=](const std::byte* source) {
    for (std::size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<std::byte*>(to) + row * to_pitch, source + row * from_pitch, width);
    }
  };
  const auto* source = static_cast<const std::byte*>(from);
  const void* host = host_side(to, from, kind);
  if (Machine::get().is_pinned(host, host_span)) {
    Machine::get().submit(stream, {[=] { rows(source); }, nullptr, nullptr});
    return cudaSuccess;
  }
  if (Machine::get().is_pinned(host, 1)) return cudaErrorInvalidValue;  // across two registrations
  if (load) {
    const auto staged = std::make_shared<std::vector<std::byte>>(source, source + host_span);
    Machine::get().submit(stream, {[=] { rows(staged->data()); }, nullptr, nullptr});
  } else {
    Machine::get().submit(stream, {[=] { rows(source); }, nullptr, nullptr});
    Machine::get().finish(stream);
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (bytes == 0) return cudaSuccess;
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  UNSAFE_CALL();
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  Machine::get().finish(cudaStream_t{nullptr});
  return error;
}

cudaError_t cudaMemsetAsync(void* begin, int value, std::size_t bytes, cudaStream_t stream) {
  if (!Machine::get().reaches(begin, bytes)) return cudaErrorInvalidValue;
  Machine::get().submit(stream, {[=] { std::memset(begin, value, bytes); }, nullptr, nullptr});
  return cudaSuccess;
}

cudaError_t cudaMemset(void* begin, int value, std::size_t bytes) {
  return cudaMemsetAsync(begin, value, bytes, nullptr);
}

}  // extern "C"
