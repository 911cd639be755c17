// Worker: one thread that runs tasks one after another, for calls that block (the catalog, the ledger).
#pragma once

#include <pthread.h>

#include <deque>
#include <functional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "kvtier/core/mutex.h"
#include "kvtier/core/status.h"

namespace kvtier {

// Owns its thread. Threads: run() from any; start() and stop() once each.
class Worker {
 public:
  Status start(const char* name) {
    try {
      thread_ = std::thread([this, name] {
        ::pthread_setname_np(::pthread_self(), name);
        loop();
      });
    } catch (const std::system_error& error) {
      return Status::resource(std::string("cannot start the thread ") + name + ": " + error.what(),
                              error.code().value());
    }
    return Status::ok();
  }
  ~Worker() { stop(); }

  void run(std::function<void()> task) {
    MutexLock lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_one();
  }
  // Runs what was given before, then ends the thread.
  void stop() {
    {
      MutexLock lock(mutex_);
      stopping_ = true;
      changed_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  void loop() {
    for (;;) {
      std::function<void()> task;
      {
        MutexLock lock(mutex_);
        while (tasks_.empty() && !stopping_) changed_.wait(lock);
        if (tasks_.empty()) return;
        task = std::move(tasks_.front());
        tasks_.pop_front();
      }
      task();
    }
  }

  Mutex mutex_;
  CondVar changed_;
  std::deque<std::function<void()>> tasks_ KVTIER_GUARDED_BY(mutex_);
  bool stopping_ KVTIER_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace kvtier
