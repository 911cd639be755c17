// FaultyDevice and FaultyHostMemory: let the n-th call fail, of one kind or of all (SQLite's habit:
// "fail the n-th call, for every n").
//
//   FaultPlan plan;                      for (n = 1;; ++n) {
//   FaultyDevice device(inner, plan);      plan.reset(); plan.fail(n, status); run the scenario; check;
//   FaultyHostMemory memory(host, plan);   if (plan.injected() == 0) break;  // n is past the last call
//                                        }
// A fault has no half effect: the inner object is not called. For a copy that is accepted and fails while
// it runs there is SimulatedDevice::fail_sticky_at_copy().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/status.h"
#include "kvtier/platform/device.h"
#include "kvtier/platform/host_memory.h"

namespace kvtier {

// The calls that can fail. The void ones (destroy_stream, unmap) and health() cannot and are not counted.
enum class FaultCall : std::uint8_t {
  create_stream,
  create_event,
  record,
  wait,
  query,
  synchronize,
  copy,
  register_host,
  unregister_host,
  available_bytes,
  create_shared,
  map_shared,
  prefer_node,
  populate,
  count_,
};

std::string_view to_string(FaultCall call);

enum class FaultSpan : std::uint8_t { once, from_then_on };

// Which calls fail, and how many there were. Shared by any number of decorators. Threads: any.
class FaultPlan {
 public:
  // The n-th call counted since reset() fails with `status` (n >= 1): of one kind, or of all together.
  // Several faults may be planned; the first planned that matches decides.
  void fail(FaultCall call, std::uint64_t n, Status status, FaultSpan span = FaultSpan::once);
  void fail(std::uint64_t n, Status status, FaultSpan span = FaultSpan::once);
  // Is told of every call before it is counted, on the thread that makes it and with no lock held. Before the
  // first call; null for nobody.
  void watch(std::function<void(FaultCall)> watcher) { watcher_ = std::move(watcher); }
  // Forgets all faults and counts.
  void reset();

  std::uint64_t seen() const;
  std::uint64_t seen(FaultCall call) const;
  // Calls that were made to fail.
  std::uint64_t injected() const;

  // For decorators: counts a call; an error is what it must return at once.
  Status next(FaultCall call);

 private:
  struct Fault {
    std::optional<FaultCall> call;  // nullopt: any
    std::uint64_t n;
    Status status;
    FaultSpan span;
  };

  std::function<void(FaultCall)> watcher_;
  mutable Mutex mutex_;
  std::vector<Fault> faults_ KVTIER_GUARDED_BY(mutex_);
  std::array<std::uint64_t, static_cast<std::size_t>(FaultCall::count_)> seen_ KVTIER_GUARDED_BY(mutex_){};
  std::uint64_t seen_in_all_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint64_t injected_ KVTIER_GUARDED_BY(mutex_) = 0;
};

// Borrows: the inner device and the plan. Its streams and events are the inner device's own.
class FaultyDevice final : public Device {
 public:
  FaultyDevice(Device& inner, FaultPlan& plan) : inner_(inner), plan_(plan) {}

  DeviceKind kind() const override { return inner_.kind(); }
  int ordinal() const override { return inner_.ordinal(); }
  std::string name() const override { return inner_.name(); }
  Result<StreamHandle> create_stream() override;
  void destroy_stream(StreamHandle stream) override { inner_.destroy_stream(stream); }
  Result<std::unique_ptr<Event>> create_event() override;
  Status record(Event& event, StreamHandle stream) override;
  Status wait(StreamHandle stream, Event& event) override;
  Result<bool> query(Event& event) override;
  Status synchronize(Event& event) override;
  Status copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) override;
  Status register_host(void* begin, std::size_t bytes) override;
  Status unregister_host(void* begin) override;
  Status check_stream(StreamHandle stream) const override { return inner_.check_stream(stream); }
  Status health() const override { return inner_.health(); }

 private:
  Device& inner_;
  FaultPlan& plan_;
};

// Borrows: the inner memory and the plan.
class FaultyHostMemory final : public HostMemory {
 public:
  FaultyHostMemory(HostMemory& inner, FaultPlan& plan) : inner_(inner), plan_(plan) {}

  Result<std::uint64_t> available_bytes() override;
  Result<int> create_shared(std::uint64_t bytes) override;
  Result<std::byte*> map_shared(int fd, std::uint64_t bytes) override;
  Status prefer_node(std::byte* begin, std::uint64_t bytes, int node) override;
  void unmap(std::byte* begin, std::uint64_t bytes) override { inner_.unmap(begin, bytes); }
  Status populate(std::byte* begin, std::uint64_t bytes) override;

 private:
  HostMemory& inner_;
  FaultPlan& plan_;
};

}  // namespace kvtier
