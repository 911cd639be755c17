#include "kvtier/core/process.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

namespace kvtier {
namespace {

// Runs `check` in a forked child; its exit status is 0 if it returned true.
template <typename Check>
int exit_status_of_child(Check check) {
  const pid_t child = fork();
  if (child == 0) _exit(check() ? 0 : 1);
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

TEST(ProcessGeneration, is_the_same_in_all_threads) {
  const std::uint64_t mine = process_generation();
  std::uint64_t theirs = 0;
  std::thread([&] { theirs = process_generation(); }).join();
  EXPECT_EQ(theirs, mine);
  EXPECT_EQ(process_generation(), mine);
}

TEST(ProcessGeneration, differs_in_a_child_and_in_its_child_and_stays_in_the_parent) {
  const std::uint64_t mine = process_generation();
  EXPECT_EQ(exit_status_of_child([&] {
              const std::uint64_t child = process_generation();
              if (child == mine || child != process_generation()) return false;
              return exit_status_of_child(
                         [&] { return process_generation() != child && process_generation() != mine; }) == 0;
            }),
            0);
  EXPECT_EQ(process_generation(), mine);
}

}  // namespace
}  // namespace kvtier
