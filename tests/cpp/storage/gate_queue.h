// GateQueue: an IoQueue over real files whose requests wait at a gate until the test lets them through, so
// that a test sees what is in flight and in which order it came.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/platform/io_queue.h"

namespace kvtier::store_world {

// Shared by the test and its queues. Threads: any.
class Gate {
 public:
  void shut() {
    MutexLock lock(mutex_);
    open_ = false;
  }
  void open() {
    MutexLock lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // Lets through what waits there and is meant.
  void pass(const std::function<bool(const IoRequest&)>& meant) {
    MutexLock lock(mutex_);
    for (Held& held : held_) held.passes = held.passes || meant(held.request);
    changed_.notify_all();
  }
  // What waits there and is meant ends with this errno, undone.
  void fail(const std::function<bool(const IoRequest&)>& meant, int error) {
    MutexLock lock(mutex_);
    for (Held& held : held_) {
      if (!meant(held.request)) continue;
      held.passes = true;
      held.error = error;
    }
    changed_.notify_all();
  }
  void pass_all() {
    pass([](const IoRequest&) { return true; });
  }
  // The queue itself fails from now on, as a ring that the kernel has closed.
  void break_queue() {
    MutexLock lock(mutex_);
    broken_ = true;
    changed_.notify_all();
  }
  // Everything that was ever submitted while the gate was shut.
  std::vector<IoRequest> seen() const {
    MutexLock lock(mutex_);
    return seen_;
  }
  std::size_t num_held() const {
    MutexLock lock(mutex_);
    return held_.size();
  }

 private:
  friend class GateQueue;
  struct Held {
    IoRequest request;
    bool passes = false;
    int error = 0;
  };
  mutable Mutex mutex_;
  CondVar changed_;
  bool open_ KVTIER_GUARDED_BY(mutex_) = true;
  bool woken_ KVTIER_GUARDED_BY(mutex_) = false;
  bool broken_ KVTIER_GUARDED_BY(mutex_) = false;
  std::vector<Held> held_ KVTIER_GUARDED_BY(mutex_);
  std::vector<IoRequest> seen_ KVTIER_GUARDED_BY(mutex_);
};

class GateQueue final : public IoQueue {
 public:
  GateQueue(std::shared_ptr<Gate> gate, std::uint32_t depth) : gate_(std::move(gate)), depth_(depth) {}

  std::string description() const override { return "gate"; }
  std::uint32_t depth() const override { return depth_; }
  std::uint32_t in_flight() const override { return in_flight_; }
  void submit(std::span<const IoRequest> requests) override {
    MutexLock lock(gate_->mutex_);
    for (const IoRequest& request : requests) {
      gate_->held_.push_back({request, gate_->open_});
      if (!gate_->open_) gate_->seen_.push_back(request);
      ++in_flight_;
    }
  }
  Status wait(std::vector<IoCompletion>& completions, std::optional<TimePoint> deadline) override {
    MutexLock lock(gate_->mutex_);
    for (;;) {
      const std::size_t before = completions.size();
      std::erase_if(gate_->held_, [&](const Gate::Held& held) {
        if (!held.passes && !gate_->open_) return false;
        const int error = held.error != 0 ? held.error : perform(held.request);
        completions.push_back({held.request.tag, error});
        return true;
      });
      in_flight_ -= static_cast<std::uint32_t>(completions.size() - before);
      if (completions.size() > before || gate_->woken_) break;
      if (gate_->broken_) return Status::io("the gate fell down");
      if (!deadline) {
        gate_->changed_.wait(lock);
      } else if (!gate_->changed_.wait_until(lock, *deadline)) {
        break;
      }
    }
    gate_->woken_ = false;
    return Status::ok();
  }
  void wake() override {
    MutexLock lock(gate_->mutex_);
    gate_->woken_ = true;
    gate_->changed_.notify_all();
  }
  Status register_buffer(std::span<std::byte>) override {
    return Status::unsupported("a gate knows no buffers");
  }
  Status register_file(int) override { return Status::unsupported("a gate knows no files"); }

 private:
  static int perform(const IoRequest& request) {
    const auto offset = static_cast<off_t>(request.offset);
    ssize_t done = 0;
    switch (request.op) {
      case IoOp::read: done = ::pread(request.fd, request.data, request.bytes, offset); break;
      case IoOp::write: done = ::pwrite(request.fd, request.data, request.bytes, offset); break;
      case IoOp::sync: return ::fdatasync(request.fd) == 0 ? 0 : errno;
    }
    if (done < 0) return errno;
    return static_cast<std::uint64_t>(done) == request.bytes ? 0 : ENODATA;
  }

  const std::shared_ptr<Gate> gate_;
  const std::uint32_t depth_;
  std::uint32_t in_flight_ = 0;  // of the owner
};

}  // namespace kvtier::store_world
