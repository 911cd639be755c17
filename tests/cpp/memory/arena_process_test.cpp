// The arena and other processes: forked children, which must come to no harm, and peers that map it.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "arena_fakes.h"

#include "kvtier/memory/arena.h"

namespace kvtier {
namespace {

using fakes::Gate;
using fakes::HookedHostMemory;
using fakes::RecordingDevice;

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

ArenaGeometry geometry() { return {{{kMiB, 6}, {4096, 10}}, 2 * kMiB}; }

// Runs `body` in a forked child and returns its exit status; a child that hangs is ended by a signal.
int in_child(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    ::_exit(body());
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool arena_is_mapped() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (line.find("kvtier-arena") != std::string::npos) return true;
  }
  return false;
}

// Each number names what was wrong.
int use_inherited(std::unique_ptr<Arena>& arena, RecordingDevice& device) {
  if (arena_is_mapped()) return 1;
  if (arena->wait_until_whole().code() != StatusCode::closed) return 2;
  arena->register_with(device);
  arena->unregister_from(device);
  if (arena->stats().total_bytes != 0) return 3;
  if (arena->geometry().total_bytes() != geometry().total_bytes()) return 4;
  const int fd = arena->fd();
  arena.reset();
  if (::fcntl(fd, F_GETFD) != -1) return 5;
  return 0;
}

TEST(ArenaFork, child_of_a_whole_arena_is_told_and_ends) {
  RecordingDevice device;
  auto arena = Arena::create(geometry(), linux_host_memory(), nullptr, nullptr);
  ASSERT_TRUE(arena.is_ok());
  arena.value()->register_with(device);
  ASSERT_TRUE(arena.value()->wait_until_whole().is_ok());
  arena.value()->slot(0, SlotId{5})[0] = std::byte{9};
  EXPECT_EQ(in_child([&] { return use_inherited(arena.value(), device); }), 0);
  EXPECT_EQ(arena.value()->slot(0, SlotId{5})[0], std::byte{9}) << "the parent's arena is as before";
  EXPECT_EQ(device.registered(), geometry().chunks().size());
}

TEST(ArenaFork, child_forked_while_prefaulting_is_told_and_ends) {
  HookedHostMemory memory;
  Gate gate;
  memory.on_populate = [&](int call) {
    if (call == 1) gate.pass();
    return Status::ok();
  };
  RecordingDevice device;
  auto arena = Arena::create(geometry(), memory, nullptr, nullptr);
  ASSERT_TRUE(arena.is_ok());
  gate.wait_for_arrival();
  EXPECT_EQ(in_child([&] { return use_inherited(arena.value(), device); }), 0);
  gate.open();
  EXPECT_TRUE(arena.value()->wait_until_whole().is_ok());
}

TEST(ArenaFork, child_does_not_close_a_descriptor_that_has_become_another) {
  auto arena = Arena::create(geometry(), linux_host_memory(), nullptr, nullptr);
  ASSERT_TRUE(arena.is_ok());
  EXPECT_EQ(in_child([&] {
              const int fd = arena.value()->fd();
              const int other = ::open("/dev/null", O_RDONLY);
              if (::dup2(other, fd) != fd) return 1;
              arena.value().reset();
              return ::fcntl(fd, F_GETFD) != -1 ? 0 : 2;
            }),
            0);
}

// --- a peer: this program again, which finds the descriptor's number in its environment ---

constexpr const char* kPeerVariable = "KVTIER_TEST_ARENA_FD";

TEST(ArenaPeer, DISABLED_answers) {
  RecordingDevice device;  // outlives the arena
  const char* number = std::getenv(kPeerVariable);
  ASSERT_NE(number, nullptr);
  const int fd = std::atoi(number);
  auto arena = Arena::map(geometry(), fd, linux_host_memory());
  ASSERT_TRUE(arena.is_ok()) << arena.status().message();
  EXPECT_NE(::ftruncate(fd, 0), 0) << "a peer must not be able to take the pages away";
  arena.value()->register_with(device);
  ASSERT_TRUE(arena.value()->wait_until_whole().is_ok());
  EXPECT_EQ(device.registered(), geometry().chunks().size());
  for (std::uint64_t i = 0; i < kMiB; ++i) ASSERT_EQ(arena.value()->slot(0, SlotId{5})[i], std::byte{0x31});
  std::memset(arena.value()->slot(1, SlotId{9}), 0x64, 4096);
}

TEST(ArenaPeer, another_process_maps_the_descriptor_and_sees_the_bytes) {
  auto arena = Arena::create(geometry(), linux_host_memory(), nullptr, nullptr);
  ASSERT_TRUE(arena.is_ok());
  ASSERT_TRUE(arena.value()->wait_until_whole().is_ok());
  std::memset(arena.value()->slot(0, SlotId{5}), 0x31, kMiB);

  const int inherited = ::dup(arena.value()->fd());  // without close-on-exec
  ASSERT_GE(inherited, 0);
  const std::string variable = std::string(kPeerVariable) + "=" + std::to_string(inherited);
  std::vector<char*> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const bool shard = std::string_view(*entry).starts_with("GTEST_");  // which may leave the peer no test
    if (!shard) environment.push_back(*entry);
  }
  std::string own = variable;
  environment.push_back(own.data());
  environment.push_back(nullptr);
  std::string program = "/proc/self/exe";
  std::string filter = "--gtest_filter=ArenaPeer.DISABLED_answers";
  std::string also = "--gtest_also_run_disabled_tests";
  char* arguments[] = {program.data(), filter.data(), also.data(), nullptr};

  pid_t peer = 0;
  ASSERT_EQ(::posix_spawn(&peer, program.c_str(), nullptr, nullptr, arguments, environment.data()), 0);
  ::close(inherited);
  int status = 0;
  ASSERT_EQ(::waitpid(peer, &status, 0), peer);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(arena.value()->slot(1, SlotId{9})[4095], std::byte{0x64});
}

}  // namespace
}  // namespace kvtier
