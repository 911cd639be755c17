// The device under test as the conformance tests (device_conformance.h) see it, and what tests of devices
// share.
//
// The framework's memory is touched only through fill() and snapshot(), at their place in the framework's
// stream: the host need not be able to address it.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvtier/platform/device.h"

namespace kvtier::conformance {

// The device under test and the framework's side of it.
class DeviceHarness {
 public:
  virtual ~DeviceHarness() = default;
  // Why this implementation cannot be tested on this machine; nothing else is called then.
  virtual std::optional<std::string> missing() { return std::nullopt; }
  virtual Device& device() = 0;

  virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void free(std::byte* begin) = 0;

  // Where the caller itself is the framework's stream (cpu), launch() just runs the kernel, and
  // Device::wait() on that stream has to block the caller: nothing else could order its later work.
  virtual StreamHandle framework_stream() = 0;
  // Runs `kernel` at its place in the framework's stream. It must not touch device memory nor call the
  // device.
  virtual void launch(std::function<void()> kernel) = 0;
  virtual void framework_synchronize() = 0;

  // Kernels on device memory. The defaults suit memory that the host can address.
  virtual void fill(std::byte* begin, std::byte value, std::size_t bytes) {
    launch([=] { std::memset(begin, static_cast<int>(value), bytes); });
  }
  // Borrows `host` until framework_synchronize().
  virtual void snapshot(std::byte* host, const std::byte* begin, std::size_t bytes) {
    launch([=] { std::memcpy(host, begin, bytes); });
  }

  // Stops the framework's stream behind what it has been given, until release. False: cannot.
  virtual bool hold_framework() { return false; }
  virtual void release_framework() {}  // a no-op when nothing is held

  // The framework begins to capture a graph (global mode). False: there is no such thing.
  virtual bool begin_capture() { return false; }
  virtual void end_capture() {}
};

inline ::testing::AssertionResult ok(const Status& status) {
  if (status.is_ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << to_string(status.code()) << " (" << status.native_code() << "): " << status.message();
}

template <typename T>
::testing::AssertionResult ok(const Result<T>& result) {
  return ok(result.status());
}

// Bytes that differ from place to place and from seed to seed.
inline std::vector<std::byte> pattern(std::size_t bytes, unsigned seed) {
  std::vector<std::byte> result(bytes);
  for (std::size_t i = 0; i < bytes; ++i)
    result[i] = static_cast<std::byte>((i * 131 + i / 256 + seed * 29 + 7) & 0xff);
  return result;
}

// Page-aligned host memory, since that is what registration is about.
class HostBuffer {
 public:
  static constexpr std::size_t kPage = 4096;

  explicit HostBuffer(std::size_t bytes)
      : bytes_((bytes + kPage - 1) / kPage * kPage),
        begin_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_))) {
    std::memset(begin_.get(), 0, bytes_);
  }
  std::byte* data() const { return begin_.get(); }
  std::size_t size() const { return bytes_; }
  void assign(std::span<const std::byte> bytes) { std::memcpy(data(), bytes.data(), bytes.size()); }
  std::vector<std::byte> first(std::size_t bytes) const { return {data(), data() + bytes}; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> begin_;
};

}  // namespace kvtier::conformance
