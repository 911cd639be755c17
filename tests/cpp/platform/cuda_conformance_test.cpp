#ifdef KVTIER_HAVE_CUDA

#include <cuda_runtime_api.h>

#include <condition_variable>
#include <mutex>

#include "conformance/device_conformance.h"
#include "support/gpu.h"

#include "kvtier/platform/cuda_device.h"

namespace kvtier::conformance {
namespace {

// The framework is this thread, with the runtime's own calls and a stream of its own.
template <CopyPath kPath>
class CudaHarness final : public DeviceHarness {
 public:
  CudaHarness() {
    if (gpu_missing()) return;
    EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  ~CudaHarness() override {
    if (stream_ != nullptr) {
      EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
    }
  }
  std::optional<std::string> missing() override { return gpu_missing(); }

  // One device for all tests: it is the driver's context that costs time.
  Device& device() override {
    static const std::unique_ptr<Device> device = [] {
      CudaOptions options;
      options.calibration = CalibrationUse::none;
      options.path = kPath;
      Result<std::unique_ptr<Device>> made = make_cuda_device(options);
      EXPECT_TRUE(ok(made));
      return std::move(made).value();
    }();
    return *device;
  }
  std::byte* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes), cudaSuccess);
    return static_cast<std::byte*>(memory);
  }
  void free(std::byte* begin) override { EXPECT_EQ(cudaFree(begin), cudaSuccess); }
  StreamHandle framework_stream() override { return StreamHandle{reinterpret_cast<std::uintptr_t>(stream_)}; }
  void launch(std::function<void()> kernel) override {
    auto* kept = new std::function<void()>(std::move(kernel));
    const auto run = [](void* data) {
      const std::unique_ptr<std::function<void()>> function(static_cast<std::function<void()>*>(data));
      (*function)();
    };
    EXPECT_EQ(cudaLaunchHostFunc(stream_, run, kept), cudaSuccess);
  }
  void framework_synchronize() override { EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess); }
  void fill(std::byte* begin, std::byte value, std::size_t bytes) override {
    EXPECT_EQ(cudaMemsetAsync(begin, static_cast<int>(value), bytes, stream_), cudaSuccess);
  }
  void snapshot(std::byte* host, const std::byte* begin, std::size_t bytes) override {
    EXPECT_EQ(cudaMemcpyAsync(host, begin, bytes, cudaMemcpyDeviceToHost, stream_), cudaSuccess);
  }

  bool hold_framework() override {
    held_ = true;
    launch([this] {
      std::unique_lock lock(mutex_);
      released_.wait(lock, [this] { return !held_; });
    });
    return true;
  }
  void release_framework() override {
    const std::lock_guard lock(mutex_);
    held_ = false;
    released_.notify_all();
  }
  bool begin_capture() override {
    return cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal) == cudaSuccess;
  }
  void end_capture() override {
    cudaGraph_t graph = nullptr;
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  }

 private:
  cudaStream_t stream_ = nullptr;
  std::mutex mutex_;
  std::condition_variable released_;
  bool held_ = false;
};

template <CopyPath kPath>
Kind<DeviceHarness> along(const char* name) {
  return kind_of<DeviceHarness, CudaHarness<kPath>>(name);
}

INSTANTIATE_TEST_SUITE_P(Cuda, DeviceConformance,
                         ::testing::Values(along<CopyPath::plain>("plain"), along<CopyPath::merged>("merged"),
                                           along<CopyPath::batched>("batched"),
                                           along<CopyPath::kernel>("kernel"),
                                           along<CopyPath::staged>("staged"), along<CopyPath::bulk>("bulk")),
                         kind_name<DeviceHarness>);

}  // namespace
}  // namespace kvtier::conformance

#endif
