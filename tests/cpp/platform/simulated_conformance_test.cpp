#include "conformance/device_conformance.h"

#include "kvtier/platform/simulated_device.h"

namespace kvtier::conformance {
namespace {

template <std::uint64_t kSeed>
class SimulatedHarness final : public DeviceHarness {
 public:
  ~SimulatedHarness() override { EXPECT_EQ(device_.violations(), std::vector<std::string>{}); }
  Device& device() override { return device_; }
  std::byte* allocate(std::size_t bytes) override { return device_.allocate(bytes); }
  void free(std::byte* begin) override { device_.free(begin); }
  StreamHandle framework_stream() override { return stream_; }
  void launch(std::function<void()> kernel) override { device_.launch(stream_, std::move(kernel)); }
  void framework_synchronize() override { EXPECT_TRUE(ok(device_.host_synchronize(stream_))); }
  bool hold_framework() override { return device_.hold(stream_), true; }
  void release_framework() override { device_.release(stream_); }
  bool begin_capture() override { return device_.begin_capture(stream_).is_ok(); }
  void end_capture() override { static_cast<void>(device_.end_capture()); }

 private:
  SimulatedDevice device_{{.seed = kSeed}};
  StreamHandle stream_ = device_.create_framework_stream();
};

template <std::uint64_t kSeed>
Kind<DeviceHarness> seeded(const char* name) {
  return kind_of<DeviceHarness, SimulatedHarness<kSeed>>(name);
}

INSTANTIATE_TEST_SUITE_P(Simulated, DeviceConformance,
                         ::testing::Values(seeded<1>("seed_1"), seeded<2>("seed_2"), seeded<3>("seed_3"),
                                           seeded<4>("seed_4"), seeded<5>("seed_5"), seeded<6>("seed_6"),
                                           seeded<7>("seed_7"), seeded<8>("seed_8")),
                         kind_name<DeviceHarness>);

}  // namespace
}  // namespace kvtier::conformance
