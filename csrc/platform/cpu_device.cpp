#include "kvtier/platform/cpu_device.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <thread>
#include <utility>

#include "cpu_executor.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"

namespace kvtier {
namespace {

constexpr unsigned kMaxCopyThreads = 64;

class CpuEvent final : public Event {
 public:
  explicit CpuEvent(const Device* device) : device_(device) {}
  const Device* device() const { return device_; }
  CpuExecutor::EventState state;

 private:
  const Device* device_;
};

// The ranges the caller registered: nothing here needs them, but misuse must show on this device too.
class Registrations {
 public:
  Status add(void* begin, std::size_t bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    if (begin == nullptr || bytes == 0 || address + bytes < address) {
      return Status::invalid_argument("register_host: " + range(address, bytes) +
                                      " is not a range of memory");
    }
    const MutexLock lock(mutex_);
    auto next = bytes_at_.lower_bound(address);
    if (next != bytes_at_.begin() && std::prev(next)->first + std::prev(next)->second > address) --next;
    if (next != bytes_at_.end() && next->first < address + bytes) {
      return Status::invalid_argument("register_host: " + range(address, bytes) + " overlaps " +
                                      range(next->first, next->second) + ", which is registered already");
    }
    bytes_at_.emplace(address, bytes);
    return Status::ok();
  }

  Status remove(void* begin) {
    const auto address = reinterpret_cast<std::uintptr_t>(begin);
    const MutexLock lock(mutex_);
    if (bytes_at_.erase(address) == 1) return Status::ok();
    return Status::invalid_argument("unregister_host: no registered range begins at " + hex(address));
  }

 private:
  static std::string hex(std::uintptr_t address) {
    char text[2 + 2 * sizeof(address) + 1];
    std::snprintf(text, sizeof(text), "0x%jx", static_cast<std::uintmax_t>(address));
    return text;
  }
  static std::string range(std::uintptr_t begin, std::size_t bytes) {
    return "[" + hex(begin) + ", " + hex(begin + bytes) + ")";
  }

  Mutex mutex_;
  std::map<std::uintptr_t, std::size_t> bytes_at_ KVTIER_GUARDED_BY(mutex_);
};

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(const CpuDeviceOptions& options) {
    if (options.copy_threads < 1 || options.copy_threads > kMaxCopyThreads) {
      error_ =
          Status::invalid_argument("cpu device: copy_threads is " + std::to_string(options.copy_threads) +
                                   ", allowed is 1 to " + std::to_string(kMaxCopyThreads));
    } else {
      error_ = executor_->start(options.copy_threads);
    }
  }
  ~CpuDevice() override {
    // In a child of fork() the threads are gone and the mutex may be held for ever by one of them.
    if (in_child()) static_cast<void>(executor_.release());
  }

  DeviceKind kind() const override { return DeviceKind::cpu; }
  int ordinal() const override { return 0; }
  std::string name() const override { return "cpu"; }

  Result<StreamHandle> create_stream() override {
    KVTIER_RETURN_IF_ERROR(health());
    return executor_->create_stream();
  }
  void destroy_stream(StreamHandle stream) override {
    if (health()) executor_->destroy_stream(stream);
  }

  Result<std::unique_ptr<Event>> create_event() override {
    KVTIER_RETURN_IF_ERROR(health());
    return std::unique_ptr<Event>(std::make_unique<CpuEvent>(this));
  }
  Status record(Event& event, StreamHandle stream) override {
    KVTIER_RETURN_IF_ERROR(health());
    return executor_->record(state_of(event), stream);
  }
  Status wait(StreamHandle stream, Event& event) override {
    KVTIER_RETURN_IF_ERROR(health());
    return executor_->wait(stream, state_of(event));
  }
  Result<bool> query(Event& event) override {
    KVTIER_RETURN_IF_ERROR(health());
    return executor_->query(state_of(event));
  }
  Status synchronize(Event& event) override {
    KVTIER_RETURN_IF_ERROR(health());
    executor_->synchronize(state_of(event));
    return Status::ok();
  }

  Status copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) override {
    KVTIER_RETURN_IF_ERROR(health());
    return executor_->copy(stream, runs, direction);
  }

  Status register_host(void* begin, std::size_t bytes) override {
    KVTIER_RETURN_IF_ERROR(health());
    return registrations_.add(begin, bytes);
  }
  Status unregister_host(void* begin) override {
    KVTIER_RETURN_IF_ERROR(health());
    return registrations_.remove(begin);
  }

  Status check_stream(StreamHandle stream) const override {
    if (stream == StreamHandle{0}) return Status::ok();
    return Status::invalid_argument("stream is " + std::to_string(static_cast<std::uintptr_t>(stream)) +
                                    "; allowed for pages on the CPU: None, or 0");
  }

  Status health() const override {
    if (in_child()) return Status::closed("this cpu device belongs to the parent process");
    return error_;
  }

 private:
  bool in_child() const { return process_generation() != generation_; }
  CpuExecutor::EventState& state_of(Event& event) const {
    auto& mine = static_cast<CpuEvent&>(event);
    KVTIER_CHECK(mine.device() == this);
    return mine.state;
  }

  const std::uint64_t generation_ = process_generation();
  std::unique_ptr<CpuExecutor> executor_ = std::make_unique<CpuExecutor>();
  Registrations registrations_;
  Status error_;
};

}  // namespace

unsigned default_copy_threads() { return std::clamp(std::thread::hardware_concurrency(), 1U, 2U); }

std::unique_ptr<Device> make_cpu_device(const CpuDeviceOptions& options) {
  return std::make_unique<CpuDevice>(options);
}

}  // namespace kvtier
