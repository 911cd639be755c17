// Numbered points at which a process kills itself: store_kill_test.cpp counts the calls that change a drive.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <functional>

namespace kvtier::kill_points {

inline std::atomic<int> calls_until_kill{-1};  // below zero: never

inline void count_call() {
  if (calls_until_kill.load(std::memory_order_relaxed) < 0) return;
  if (calls_until_kill.fetch_sub(1) == 0) ::kill(::getpid(), SIGKILL);
}

// Runs `live` in a child that dies before its call number `point`, from 0. Whether it did; false when it was
// through before. `live` returns 0, or the step that failed.
inline bool is_killed_at(int point, const std::function<int()>& live) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    calls_until_kill.store(point);
    ::_exit(live());
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  if (WIFSIGNALED(status)) {
    EXPECT_EQ(WTERMSIG(status), SIGKILL);
    return true;
  }
  EXPECT_EQ(WEXITSTATUS(status), 0) << "the step that failed";
  return false;
}

}  // namespace kvtier::kill_points
