// IoQueue with pread, pwrite and fdatasync on a few threads: for machines where io_uring is forbidden.
#include <pthread.h>

#include <algorithm>
#include <deque>
#include <string>
#include <system_error>
#include <thread>

#include "io_transfer.h"

#include "kvtier/core/mutex.h"
#include "kvtier/platform/io_queue.h"

namespace kvtier {
namespace {

// Owns: its threads. One mutex, never held during I/O.
class ThreadQueue final : public IoQueue {
 public:
  explicit ThreadQueue(std::uint32_t depth) : depth_(depth) {}

  // The threads take what is left of the queue before they end.
  ~ThreadQueue() override {
    {
      const MutexLock lock(mutex_);
      closing_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  // Called once, first. On failure some of the threads may have started.
  Status start(std::uint32_t num_threads) {
    try {
      for (std::uint32_t i = 0; i < num_threads; ++i) {
        threads_.emplace_back([this] { run(); });
        static_cast<void>(pthread_setname_np(threads_.back().native_handle(), "kvtier-io"));
      }
    } catch (const std::system_error& error) {
      return Status::resource("I/O queue: " + std::to_string(threads_.size()) + " of " +
                                  std::to_string(num_threads) + " threads started: " + error.what(),
                              error.code().value());
    }
    return Status::ok();
  }

  std::string description() const override { return "threads"; }
  std::uint32_t depth() const override { return depth_; }
  std::uint32_t in_flight() const override { return in_flight_; }

  void submit(std::span<const IoRequest> requests) override {
    KVTIER_CHECK(in_flight_ + requests.size() <= depth_);
    {
      const MutexLock lock(mutex_);
      requests_.insert(requests_.end(), requests.begin(), requests.end());
    }
    in_flight_ += static_cast<std::uint32_t>(requests.size());
    const std::size_t num_woken = std::min(requests.size(), threads_.size());
    for (std::size_t i = 0; i < num_woken; ++i) work_.notify_one();
  }

  Status wait(std::vector<IoCompletion>& completions, std::optional<TimePoint> deadline) override {
    MutexLock lock(mutex_);
    while (completions_.empty() && !woken_) {
      if (!deadline) {
        ended_.wait(lock);
      } else if (!ended_.wait_until(lock, *deadline)) {
        break;
      }
    }
    woken_ = false;
    completions.insert(completions.end(), completions_.begin(), completions_.end());
    in_flight_ -= static_cast<std::uint32_t>(completions_.size());
    completions_.clear();
    return Status::ok();
  }

  void wake() override {
    {
      const MutexLock lock(mutex_);
      woken_ = true;
    }
    ended_.notify_one();
  }

  Status register_buffer(std::span<std::byte>) override {
    return Status::unsupported("the I/O queue of threads has no use for registered buffers");
  }
  Status register_file(int) override {
    return Status::unsupported("the I/O queue of threads has no use for registered files");
  }

 private:
  void run() {
    for (;;) {
      IoRequest request;
      {
        MutexLock lock(mutex_);
        while (requests_.empty() && !closing_) work_.wait(lock);
        if (requests_.empty()) return;
        request = requests_.front();
        requests_.pop_front();
      }
      const int error = perform(request);
      {
        const MutexLock lock(mutex_);
        completions_.push_back({.tag = request.tag, .error = error});
      }
      ended_.notify_one();
    }
  }

  const std::uint32_t depth_;
  std::uint32_t in_flight_ = 0;  // the owner's
  Mutex mutex_;
  CondVar work_;   // requests_ has one, or the end has come
  CondVar ended_;  // completions_ has one, or woken_
  std::deque<IoRequest> requests_ KVTIER_GUARDED_BY(mutex_);
  std::vector<IoCompletion> completions_ KVTIER_GUARDED_BY(mutex_);
  bool woken_ KVTIER_GUARDED_BY(mutex_) = false;
  bool closing_ KVTIER_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<IoQueue>> make_thread_queue(const IoQueueOptions& options) {
  if (const Status valid = internal::check(options); !valid) return valid;
  auto queue = std::make_unique<ThreadQueue>(options.depth);
  KVTIER_RETURN_IF_ERROR(queue->start(std::min(options.threads, options.depth)));
  return std::unique_ptr<IoQueue>(std::move(queue));
}

}  // namespace kvtier
