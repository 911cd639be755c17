#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace fake_cuda {
namespace {

constexpr int kWorkers = 4;  // one may be held by a test's host function
// A stream falls asleep now and then, and the others get far ahead of it: until then, or until nothing else
// goes on and the host waits.
constexpr std::chrono::milliseconds kSleep{20};
constexpr unsigned kOperationsPerSleep = 12;
constexpr std::size_t kPage = 4096;

std::size_t whole_pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Without touching it.
bool is_readable(const void* at) {
  int ends[2];
  if (::pipe(ends) != 0) return false;
  const bool readable = ::write(ends[1], at, 1) == 1;
  ::close(ends[0]);
  ::close(ends[1]);
  return readable;
}

}  // namespace

void illegal(const char* what) {
  std::fprintf(stderr, "fake CUDA: %s\n", what);
  std::abort();
}

cudaStreamCaptureMode& capture_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

std::vector<CUcontext>& context_stack() {
  thread_local std::vector<CUcontext> stack;
  return stack;
}

Machine& Machine::get() {
  static auto* const machine = new Machine;  // its threads outlive static destruction
  return *machine;
}

Machine::Machine() {
  for (const std::uintptr_t handle : {0, 1, 2}) streams_.emplace(handle, std::make_unique<Stream>());
  for (int i = 0; i < kWorkers; ++i) std::thread([this] { work(); }).detach();
}

std::byte* Machine::allocate(std::size_t bytes) {
  const std::size_t size = whole_pages(bytes);
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  std::memset(memory, 0xcd, size);
  const std::lock_guard lock(mutex_);
  device_[reinterpret_cast<std::uintptr_t>(memory)] = bytes;
  return static_cast<std::byte*>(memory);
}

bool Machine::free(void* begin) {
  finish_all();
  std::size_t bytes = 0;
  {
    const std::lock_guard lock(mutex_);
    const auto found = device_.find(reinterpret_cast<std::uintptr_t>(begin));
    if (found == device_.end()) return false;
    bytes = found->second;
    device_.erase(found);
  }
  ::munmap(begin, whole_pages(bytes));
  return true;
}

std::size_t Machine::allocated_bytes() {
  const std::lock_guard lock(mutex_);
  std::size_t sum = 0;
  for (const auto& [begin, bytes] : device_) sum += whole_pages(bytes);
  return sum;
}

cudaError_t Machine::pin(void* begin, std::size_t bytes) {
  auto* const last = static_cast<std::byte*>(begin) + bytes - 1;
  if (bytes == 0 || !is_readable(begin) || !is_readable(last)) return cudaErrorInvalidValue;
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::lock_guard lock(mutex_);
  const auto next = pinned_.lower_bound(address);
  if ((next != pinned_.end() && next->first < address + bytes) ||
      (next != pinned_.begin() && std::prev(next)->first + std::prev(next)->second > address)) {
    return cudaErrorHostMemoryAlreadyRegistered;
  }
  pinned_[address] = bytes;
  return cudaSuccess;
}

bool Machine::unpin(void* begin) {
  const std::lock_guard lock(mutex_);
  return pinned_.erase(reinterpret_cast<std::uintptr_t>(begin)) == 1;
}

std::pair<std::byte*, std::size_t> Machine::allocation_of(const void* address) {
  const std::lock_guard lock(mutex_);
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  auto found = device_.upper_bound(at);
  if (found == device_.begin()) return {nullptr, 0};
  --found;
  if (at - found->first >= found->second) return {nullptr, 0};
  return {reinterpret_cast<std::byte*>(found->first), found->second};  // NOLINT: of the map
}

bool Machine::within(const std::map<std::uintptr_t, std::size_t>& ranges, const void* begin,
                     std::size_t bytes) const {
  const auto at = reinterpret_cast<std::uintptr_t>(begin);
  auto found = ranges.upper_bound(at);
  if (found == ranges.begin()) return false;
  --found;
  return at - found->first <= found->second && bytes <= found->second - (at - found->first);
}

bool Machine::is_pinned(const void* begin, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  return within(pinned_, begin, bytes);
}

bool Machine::reaches(const void* begin, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  return within(device_, begin, bytes) || within(pinned_, begin, bytes);
}

Machine::Stream& Machine::of(cudaStream_t stream) {
  const auto found = streams_.find(reinterpret_cast<std::uintptr_t>(stream));
  if (found == streams_.end() || found->second->destroyed) illegal("a stream that is not there");
  return *found->second;
}

cudaStream_t Machine::create_stream() {
  const std::lock_guard lock(mutex_);
  const std::uintptr_t handle = next_stream_++;
  streams_.emplace(handle, std::make_unique<Stream>());
  return reinterpret_cast<cudaStream_t>(handle);  // NOLINT: a handle, never followed
}

void Machine::destroy_stream(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  of(stream).destroyed = true;  // what is in it still runs
}

void Machine::submit(cudaStream_t stream, Operation operation) {
  {
    const std::lock_guard lock(mutex_);
    Stream& to = of(stream);
    if (to.capturing) return;  // into the graph, which nobody launches
    to.queue.push_back(std::move(operation));
  }
  changed_.notify_all();
}

void Machine::work() {
  std::unique_lock lock(mutex_);
  while (true) {
    std::vector<Stream*> able;
    std::vector<Stream*> asleep;
    bool running = false;
    const auto now = std::chrono::steady_clock::now();
    for (const auto& [handle, stream] : streams_) {
      running |= stream->running;
      if (stream->running || stream->queue.empty()) continue;
      const Operation& first = stream->queue.front();
      if (first.waits_for != nullptr && !first.waits_for->done) continue;
      (stream->sleeps_until > now ? asleep : able).push_back(stream.get());
    }
    if (able.empty()) {
      if (asleep.empty()) {
        changed_.wait(lock);
        continue;
      }
      if (running || waiting_hosts_ == 0) {
        changed_.wait_for(lock, kSleep / 20);
        continue;
      }
      able = asleep;
    }
    Stream& stream = *able[random_() % able.size()];
    if (asleep.empty() && random_() % kOperationsPerSleep == 0) {
      stream.sleeps_until = now + kSleep;
      continue;
    }
    stream.sleeps_until = {};
    Operation operation = std::move(stream.queue.front());
    stream.queue.pop_front();
    stream.running = true;
    lock.unlock();
    if (operation.run) operation.run();
    lock.lock();
    stream.running = false;
    if (operation.is_done_for != nullptr) {
      operation.is_done_for->done = true;
      operation.is_done_for->at = std::chrono::steady_clock::now();
    }
    changed_.notify_all();
  }
}

void Machine::finish(cudaStream_t stream) {
  auto end = std::make_shared<Moment>();
  submit(stream, {nullptr, nullptr, end});
  finish(end);
}

void Machine::finish_all() {
  std::unique_lock lock(mutex_);
  ++waiting_hosts_;
  changed_.wait(lock, [this] {
    for (const auto& [handle, stream] : streams_) {
      if (!stream->idle()) return false;
    }
    return true;
  });
  --waiting_hosts_;
}

void Machine::finish(const std::shared_ptr<Moment>& moment) {
  if (moment == nullptr) return;
  std::unique_lock lock(mutex_);
  ++waiting_hosts_;
  changed_.wait(lock, [&] { return moment->done; });
  --waiting_hosts_;
}

bool Machine::is_done(const std::shared_ptr<Moment>& moment) {
  const std::lock_guard lock(mutex_);
  return moment == nullptr || moment->done;
}

std::uint32_t Machine::random() {
  const std::lock_guard lock(mutex_);
  return static_cast<std::uint32_t>(random_());
}

void Machine::begin_capture(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  of(stream).capturing = true;
  of(stream).spoilt = false;
}

bool Machine::end_capture(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  of(stream).capturing = false;
  return !of(stream).spoilt;
}

bool Machine::captures(cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  return of(stream).capturing;
}

bool Machine::may_do_unsafe() {
  if (capture_mode() == cudaStreamCaptureModeRelaxed) return true;
  const std::lock_guard lock(mutex_);
  bool may = true;
  for (const auto& [handle, stream] : streams_) {
    if (!stream->capturing) continue;
    stream->spoilt = true;
    may = false;
  }
  return may;
}

}  // namespace fake_cuda
