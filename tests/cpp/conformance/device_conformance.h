// What every Device must do (kvtier/platform/device.h), written once, in
// platform/device_conformance_test.cpp.
//
// An implementation derives a harness from DeviceHarness, and its test file instantiates DeviceConformance
// (conformance/kind.h).
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "conformance/device_harness.h"
#include "conformance/kind.h"

namespace kvtier::conformance {

class DeviceConformance : public ::testing::TestWithParam<Kind<DeviceHarness>> {
 protected:
  static constexpr std::size_t kBytes = 96 * 1024;

  Device& device() { return harness_->device(); }
  StreamHandle framework() { return harness_->framework_stream(); }

  std::byte* allocate(std::size_t bytes = kBytes) {
    std::byte* begin = harness_->allocate(bytes);
    allocations_.push_back(begin);
    return begin;
  }
  std::byte* new_host(std::size_t bytes = kBytes) {
    HostBuffer& buffer = host_.emplace_back(bytes);
    EXPECT_TRUE(ok(device().register_host(buffer.data(), buffer.size())));
    registered_.push_back(buffer.data());
    return buffer.data();
  }
  StreamHandle new_stream() { return streams_.emplace_back(OwnedStream::create(device()).value()).handle(); }
  std::unique_ptr<Event> new_event() { return device().create_event().value(); }

  Status copy(StreamHandle stream, void* destination, const void* source, Direction direction,
              std::size_t bytes = kBytes) {
    const CopyRun run{destination, source, bytes};
    return device().copy(stream, {&run, 1}, direction);
  }
  // Waits for everything submitted to `stream` so far.
  void finish(StreamHandle stream) {
    std::unique_ptr<Event> done = new_event();
    ASSERT_TRUE(ok(device().record(*done, stream)));
    ASSERT_TRUE(ok(device().synchronize(*done)));
  }
  void write(std::byte* begin, std::byte value, std::size_t bytes = kBytes) {
    harness_->fill(begin, value, bytes);
    harness_->framework_synchronize();
  }
  std::vector<std::byte> read(const std::byte* begin, std::size_t bytes = kBytes) {
    std::vector<std::byte> result(bytes);
    harness_->snapshot(result.data(), begin, bytes);
    harness_->framework_synchronize();
    return result;
  }
  static std::vector<std::byte> filled(std::byte value, std::size_t bytes = kBytes) { return {bytes, value}; }
  static std::vector<std::byte> bytes_at(const std::byte* begin, std::size_t bytes = kBytes) {
    return {begin, begin + bytes};
  }

  void SetUp() override {
    if (const std::optional<std::string> why = harness_->missing()) GTEST_SKIP() << *why;
  }

  // Every test ends with all work completed, as the contract asks of its callers.
  void TearDown() override {
    if (harness_->missing()) return;
    harness_->release_framework();  // a failed test may have left it held
    harness_->framework_synchronize();
    for (const OwnedStream& each : streams_) finish(each.handle());
    for (void* begin : registered_) EXPECT_TRUE(ok(device().unregister_host(begin)));
    for (std::byte* begin : allocations_) harness_->free(begin);
    EXPECT_TRUE(ok(device().health()));
  }

  std::unique_ptr<DeviceHarness> harness_ = GetParam().make();
  std::vector<std::byte*> allocations_;
  std::vector<HostBuffer> host_;
  std::vector<void*> registered_;
  std::vector<OwnedStream> streams_;  // destroyed before the device
};

}  // namespace kvtier::conformance
