#include "kvtier/platform/faulty_device.h"

#include <utility>

namespace kvtier {

std::string_view to_string(FaultCall call) {
  switch (call) {
    case FaultCall::create_stream: return "create_stream";
    case FaultCall::create_event: return "create_event";
    case FaultCall::record: return "record";
    case FaultCall::wait: return "wait";
    case FaultCall::query: return "query";
    case FaultCall::synchronize: return "synchronize";
    case FaultCall::copy: return "copy";
    case FaultCall::register_host: return "register_host";
    case FaultCall::unregister_host: return "unregister_host";
    case FaultCall::available_bytes: return "available_bytes";
    case FaultCall::create_shared: return "create_shared";
    case FaultCall::map_shared: return "map_shared";
    case FaultCall::prefer_node: return "prefer_node";
    case FaultCall::populate: return "populate";
    case FaultCall::count_: break;
  }
  return "?";
}

void FaultPlan::fail(FaultCall call, std::uint64_t n, Status status, FaultSpan span) {
  KVTIER_CHECK(n >= 1 && !status);
  MutexLock lock(mutex_);
  faults_.push_back({call, n, std::move(status), span});
}

void FaultPlan::fail(std::uint64_t n, Status status, FaultSpan span) {
  KVTIER_CHECK(n >= 1 && !status);
  MutexLock lock(mutex_);
  faults_.push_back({std::nullopt, n, std::move(status), span});
}

void FaultPlan::reset() {
  MutexLock lock(mutex_);
  faults_.clear();
  seen_.fill(0);
  seen_in_all_ = 0;
  injected_ = 0;
}

std::uint64_t FaultPlan::seen() const {
  MutexLock lock(mutex_);
  return seen_in_all_;
}

std::uint64_t FaultPlan::seen(FaultCall call) const {
  MutexLock lock(mutex_);
  return seen_.at(static_cast<std::size_t>(call));
}

std::uint64_t FaultPlan::injected() const {
  MutexLock lock(mutex_);
  return injected_;
}

Status FaultPlan::next(FaultCall call) {
  if (watcher_) watcher_(call);
  MutexLock lock(mutex_);
  const std::uint64_t of_kind = ++seen_.at(static_cast<std::size_t>(call));
  const std::uint64_t of_all = ++seen_in_all_;
  for (const Fault& fault : faults_) {
    if (fault.call && *fault.call != call) continue;
    const std::uint64_t count = fault.call ? of_kind : of_all;
    if (count == fault.n || (count > fault.n && fault.span == FaultSpan::from_then_on)) {
      ++injected_;
      return fault.status;
    }
  }
  return Status::ok();
}

Result<StreamHandle> FaultyDevice::create_stream() {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::create_stream));
  return inner_.create_stream();
}

Result<std::unique_ptr<Event>> FaultyDevice::create_event() {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::create_event));
  return inner_.create_event();
}

Status FaultyDevice::record(Event& event, StreamHandle stream) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::record));
  return inner_.record(event, stream);
}

Status FaultyDevice::wait(StreamHandle stream, Event& event) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::wait));
  return inner_.wait(stream, event);
}

Result<bool> FaultyDevice::query(Event& event) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::query));
  return inner_.query(event);
}

Status FaultyDevice::synchronize(Event& event) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::synchronize));
  return inner_.synchronize(event);
}

Status FaultyDevice::copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::copy));
  return inner_.copy(stream, runs, direction);
}

Status FaultyDevice::register_host(void* begin, std::size_t bytes) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::register_host));
  return inner_.register_host(begin, bytes);
}

Status FaultyDevice::unregister_host(void* begin) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::unregister_host));
  return inner_.unregister_host(begin);
}

Result<std::uint64_t> FaultyHostMemory::available_bytes() {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::available_bytes));
  return inner_.available_bytes();
}

Result<int> FaultyHostMemory::create_shared(std::uint64_t bytes) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::create_shared));
  return inner_.create_shared(bytes);
}

Result<std::byte*> FaultyHostMemory::map_shared(int fd, std::uint64_t bytes) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::map_shared));
  return inner_.map_shared(fd, bytes);
}

Status FaultyHostMemory::prefer_node(std::byte* begin, std::uint64_t bytes, int node) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::prefer_node));
  return inner_.prefer_node(begin, bytes, node);
}

Status FaultyHostMemory::populate(std::byte* begin, std::uint64_t bytes) {
  KVTIER_RETURN_IF_ERROR(plan_.next(FaultCall::populate));
  return inner_.populate(begin, bytes);
}

}  // namespace kvtier
