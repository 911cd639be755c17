// Doubles for the arena's tests: host memory with hooks, and a device that remembers its registrations.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "kvtier/core/mutex.h"
#include "kvtier/platform/device.h"
#include "kvtier/platform/host_memory.h"

namespace kvtier::fakes {

// Threads wait at it until it is opened, once and for all.
class Gate {
 public:
  void open() {
    MutexLock lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void pass() {
    MutexLock lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    while (!open_) changed_.wait(lock);
  }
  void wait_for_arrival() {
    MutexLock lock(mutex_);
    while (arrived_ == 0) changed_.wait(lock);
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool open_ = false;
  int arrived_ = 0;
};

// The real memory, with a say in every call. Hooks are set before the arena is made.
class HookedHostMemory final : public HostMemory {
 public:
  std::function<Status(int call)> on_available = [](int) { return Status::ok(); };
  std::function<Status()> on_create = [] { return Status::ok(); };
  std::function<Status()> on_map = [] { return Status::ok(); };
  std::function<Status(int node)> on_prefer_node = [](int) { return Status::ok(); };
  std::function<Status(int call)> on_populate = [](int) { return Status::ok(); };
  std::function<std::uint64_t(int call)> available = [](int) { return std::uint64_t{1} << 40; };

  Result<std::uint64_t> available_bytes() override {
    const int call = available_calls_++;
    KVTIER_RETURN_IF_ERROR(on_available(call));
    return available(call);
  }
  Result<int> create_shared(std::uint64_t bytes) override {
    KVTIER_RETURN_IF_ERROR(on_create());
    return linux_host_memory().create_shared(bytes);
  }
  Result<std::byte*> map_shared(int fd, std::uint64_t bytes) override {
    KVTIER_RETURN_IF_ERROR(on_map());
    return linux_host_memory().map_shared(fd, bytes);
  }
  Status prefer_node(std::byte* begin, std::uint64_t bytes, int node) override {
    KVTIER_RETURN_IF_ERROR(on_prefer_node(node));
    return linux_host_memory().prefer_node(begin, bytes, node);
  }
  void unmap(std::byte* begin, std::uint64_t bytes) override { linux_host_memory().unmap(begin, bytes); }
  Status populate(std::byte* begin, std::uint64_t bytes) override {
    KVTIER_RETURN_IF_ERROR(on_populate(populate_calls_++));
    return linux_host_memory().populate(begin, bytes);
  }

 private:
  int available_calls_ = 0;  // both: the arena's creator, then its thread
  int populate_calls_ = 0;
};

// Registers ranges and nothing else. A misuse is a test failure.
class RecordingDevice final : public Device {
 public:
  // What the n-th call (from 0) answers. Set before the device is used.
  std::function<Status(int call)> on_register = [](int) { return Status::ok(); };
  std::function<Status(int call)> on_unregister = [](int) { return Status::ok(); };

  ~RecordingDevice() override {
    if (!may_keep_ranges) {
      EXPECT_EQ(registered(), 0U) << "ranges left registered";
    }
  }
  bool may_keep_ranges = false;

  std::size_t registered() const {
    MutexLock lock(mutex_);
    return ranges_.size();
  }
  int register_calls() const {
    MutexLock lock(mutex_);
    return register_calls_;
  }
  void wait_for_register_calls(int calls) {
    MutexLock lock(mutex_);
    while (register_calls_ < calls) changed_.wait(lock);
  }
  bool covers(const std::byte* begin, std::size_t bytes) const {
    MutexLock lock(mutex_);
    auto after = ranges_.upper_bound(begin);
    if (after == ranges_.begin()) return false;
    const auto& [first, size] = *--after;
    return begin + bytes <= first + size;
  }

  Status register_host(void* begin, std::size_t bytes) override {
    int call = 0;
    {
      MutexLock lock(mutex_);
      call = register_calls_++;
      changed_.notify_all();
    }
    KVTIER_RETURN_IF_ERROR(on_register(call));
    MutexLock lock(mutex_);
    const auto* first = static_cast<const std::byte*>(begin);
    const auto next = ranges_.lower_bound(first);
    EXPECT_TRUE(next == ranges_.end() || first + bytes <= next->first) << "ranges overlap";
    if (next != ranges_.begin()) {
      EXPECT_LE(std::prev(next)->first + std::prev(next)->second, first) << "ranges overlap";
    }
    ranges_.emplace(first, bytes);
    return Status::ok();
  }
  Status unregister_host(void* begin) override {
    int call = 0;
    {
      MutexLock lock(mutex_);
      call = unregister_calls_++;
    }
    KVTIER_RETURN_IF_ERROR(on_unregister(call));
    MutexLock lock(mutex_);
    EXPECT_EQ(ranges_.erase(static_cast<const std::byte*>(begin)), 1U) << "not registered";
    return Status::ok();
  }

  DeviceKind kind() const override { return DeviceKind::simulated; }
  int ordinal() const override { return 0; }
  std::string name() const override { return "recording"; }
  Result<StreamHandle> create_stream() override { return unused(); }
  void destroy_stream(StreamHandle) override {}
  Result<std::unique_ptr<Event>> create_event() override { return unused(); }
  Status record(Event&, StreamHandle) override { return unused(); }
  Status wait(StreamHandle, Event&) override { return unused(); }
  Result<bool> query(Event&) override { return unused(); }
  Status synchronize(Event&) override { return unused(); }
  Status copy(StreamHandle, std::span<const CopyRun>, Direction) override { return unused(); }
  Status health() const override { return Status::ok(); }

 private:
  static Status unused() { return Status::unsupported("not in this test"); }

  mutable Mutex mutex_;
  CondVar changed_;
  std::map<const std::byte*, std::size_t> ranges_;
  int register_calls_ = 0;
  int unregister_calls_ = 0;
};

inline Status capture_conflict() { return Status::device("a graph is being captured", kCaptureConflict); }

}  // namespace kvtier::fakes
