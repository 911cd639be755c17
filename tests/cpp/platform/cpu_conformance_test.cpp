#include "conformance/device_conformance.h"

#include "kvtier/platform/cpu_device.h"

namespace kvtier::conformance {
namespace {

// The framework's stream is the calling thread: a kernel runs when it is launched.
template <unsigned kThreads>
class CpuHarness final : public DeviceHarness {
 public:
  Device& device() override { return *device_; }
  std::byte* allocate(std::size_t bytes) override { return static_cast<std::byte*>(std::malloc(bytes)); }
  void free(std::byte* begin) override { std::free(begin); }
  StreamHandle framework_stream() override { return StreamHandle{0}; }
  void launch(std::function<void()> kernel) override { kernel(); }
  void framework_synchronize() override {}

 private:
  std::unique_ptr<Device> device_ = make_cpu_device({.copy_threads = kThreads});
};

INSTANTIATE_TEST_SUITE_P(Cpu, DeviceConformance,
                         ::testing::Values(kind_of<DeviceHarness, CpuHarness<1>>("threads_1"),
                                           kind_of<DeviceHarness, CpuHarness<2>>("threads_2"),
                                           kind_of<DeviceHarness, CpuHarness<8>>("threads_8")),
                         kind_name<DeviceHarness>);

}  // namespace
}  // namespace kvtier::conformance
