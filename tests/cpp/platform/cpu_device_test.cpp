// What is special to the `cpu` device; what it shares with the others is in cpu_conformance_test.cpp.
#include "kvtier/platform/cpu_device.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "support/turns.h"

namespace kvtier {
namespace {

using support::random_bytes;

constexpr StreamHandle kCaller{0};
constexpr std::size_t kMiB = std::size_t{1} << 20;

::testing::AssertionResult ok(const Status& status) {
  if (status) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << to_string(status.code()) << ": " << status.message();
}

class CpuDevice : public ::testing::TestWithParam<unsigned> {
 protected:
  std::unique_ptr<Device> device_ = make_cpu_device({.copy_threads = GetParam()});

  StreamHandle stream() { return device_->create_stream().value(); }
  std::unique_ptr<Event> event() { return device_->create_event().value(); }
  Status copy(StreamHandle stream, void* to, const void* from, std::size_t bytes,
              Direction direction = Direction::store) {
    const CopyRun run{to, from, bytes};
    return device_->copy(stream, {&run, 1}, direction);
  }
  void finish(StreamHandle stream) {
    const std::unique_ptr<Event> done = event();
    ASSERT_TRUE(ok(device_->record(*done, stream)));
    ASSERT_TRUE(ok(device_->synchronize(*done)));
  }
};
INSTANTIATE_TEST_SUITE_P(Threads, CpuDevice, ::testing::Values(1U, 2U, 8U));

TEST(CpuDeviceOptions, by_default_two_threads_or_as_many_as_there_are_processors) {
  EXPECT_GE(default_copy_threads(), 1U);
  EXPECT_LE(default_copy_threads(), 2U);
  EXPECT_TRUE(ok(make_cpu_device()->health()));
  EXPECT_TRUE(ok(make_cpu_device({.copy_threads = 64})->health()));
}

TEST(CpuDeviceOptions, a_refused_number_of_threads_is_a_sticky_error) {
  for (const unsigned threads : {0U, 65U}) {
    const std::unique_ptr<Device> device = make_cpu_device({.copy_threads = threads});
    const Status health = device->health();
    EXPECT_EQ(health.code(), StatusCode::invalid_argument);
    EXPECT_NE(health.message().find(std::to_string(threads)), std::string::npos) << health.message();
    EXPECT_EQ(device->create_stream().status().code(), StatusCode::invalid_argument);
    EXPECT_EQ(device->create_event().status().code(), StatusCode::invalid_argument);
    EXPECT_EQ(device->copy(kCaller, {}, Direction::load).code(), StatusCode::invalid_argument);
  }
}

// The processors that each copy thread of this process may use.
std::vector<cpu_set_t> processors_of_copy_threads() {
  std::vector<cpu_set_t> all;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    cpu_set_t set;
    const int id = std::stoi(task.path().filename().string());
    if (name == "kvtier-copy" && sched_getaffinity(id, sizeof(set), &set) == 0) all.push_back(set);
  }
  return all;
}

TEST(CpuDeviceOptions, on_few_processors_each_copy_thread_has_its_own) {
  cpu_set_t allowed;
  ASSERT_EQ(sched_getaffinity(0, sizeof(allowed), &allowed), 0);
  const auto threads = static_cast<unsigned>(std::min(64, CPU_COUNT(&allowed)));
  const std::unique_ptr<Device> device = make_cpu_device({.copy_threads = threads});
  const std::vector<cpu_set_t> shares = processors_of_copy_threads();
  ASSERT_EQ(shares.size(), threads);
  cpu_set_t all;
  CPU_ZERO(&all);
  int sum = 0;
  for (const cpu_set_t& share : shares) {
    CPU_OR(&all, &all, &share);
    sum += CPU_COUNT(&share);
  }
  EXPECT_TRUE(CPU_EQUAL(&all, &allowed));
  const bool few = CPU_COUNT(&allowed) <= 2 * static_cast<int>(threads);
  EXPECT_EQ(sum, few ? CPU_COUNT(&allowed) : static_cast<int>(threads) * CPU_COUNT(&allowed));
}

TEST_P(CpuDevice, says_what_it_is) {
  EXPECT_EQ(device_->kind(), DeviceKind::cpu);
  EXPECT_EQ(device_->ordinal(), 0);
  EXPECT_EQ(device_->name(), "cpu");
}

TEST_P(CpuDevice, refuses_every_other_handle_and_names_it) {
  const StreamHandle mine = stream();
  const StreamHandle gone = stream();
  device_->destroy_stream(gone);
  const std::unique_ptr<Event> recorded = event();
  ASSERT_TRUE(ok(device_->record(*recorded, mine)));
  std::byte byte{1};
  std::byte copied{0};
  for (const StreamHandle handle : {StreamHandle{1}, StreamHandle{2}, StreamHandle{0x7f0012345678}, gone}) {
    const std::string value = std::to_string(static_cast<std::uintptr_t>(handle));
    for (const Status& status : {copy(handle, &copied, &byte, 1), device_->record(*recorded, handle),
                                 device_->wait(handle, *recorded)}) {
      EXPECT_EQ(status.code(), StatusCode::invalid_argument);
      EXPECT_NE(status.message().find("stream " + value + " "), std::string::npos) << status.message();
    }
    device_->destroy_stream(handle);  // nothing happens
  }
  finish(mine);
  EXPECT_EQ(copied, std::byte{0});
}

TEST_P(CpuDevice, the_callers_stream_is_what_the_caller_has_done) {
  const StreamHandle own = stream();
  const std::vector<std::byte> source = random_bytes(8 * kMiB, 1);
  std::vector<std::byte> there(source.size());
  std::vector<std::byte> back(source.size());
  const std::unique_ptr<Event> before = event();
  const std::unique_ptr<Event> copied = event();

  ASSERT_TRUE(ok(device_->record(*before, kCaller)));
  EXPECT_TRUE(device_->query(*before).value());
  ASSERT_TRUE(ok(device_->wait(own, *before)));
  ASSERT_TRUE(ok(copy(own, there.data(), source.data(), source.size())));
  ASSERT_TRUE(ok(device_->record(*copied, own)));
  ASSERT_TRUE(ok(device_->wait(kCaller, *copied)));
  EXPECT_EQ(there, source);
  ASSERT_TRUE(ok(copy(kCaller, back.data(), there.data(), there.size())));
  EXPECT_EQ(back, source);
}

TEST_P(CpuDevice, a_refused_batch_copies_nothing) {
  const StreamHandle own = stream();
  const std::byte from{1};
  std::byte to{0};
  const std::array<CopyRun, 3> runs{{{&to, &from, 1}, {nullptr, nullptr, 0}, {&to, nullptr, 7}}};
  const Status status = device_->copy(own, runs, Direction::load);
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_NE(status.message().find("null source"), std::string::npos) << status.message();
  EXPECT_EQ(copy(own, nullptr, &from, 1).code(), StatusCode::invalid_argument);
  finish(own);
  EXPECT_EQ(to, std::byte{0});
}

TEST_P(CpuDevice, an_overlapping_registration_names_both_ranges) {
  std::byte* const begin = reinterpret_cast<std::byte*>(std::uintptr_t{0x100000});  // never touched
  ASSERT_TRUE(ok(device_->register_host(begin, 0x1000)));
  for (const Status& status :
       {device_->register_host(begin - 0x800, 0x801), device_->register_host(begin + 0xfff, 0x1000),
        device_->register_host(begin - 1, 0x2000), device_->register_host(begin + 1, 1)}) {
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_NE(status.message().find("[0x100000, 0x101000)"), std::string::npos) << status.message();
  }
  EXPECT_NE(device_->register_host(begin + 0xfff, 0x1000).message().find("[0x100fff, 0x101fff)"),
            std::string::npos);
  EXPECT_TRUE(ok(device_->register_host(begin - 0x1000, 0x1000)));
  EXPECT_TRUE(ok(device_->register_host(begin + 0x1000, 0x1000)));
  EXPECT_NE(device_->unregister_host(begin + 1).message().find("0x100001"), std::string::npos);
  EXPECT_TRUE(ok(device_->unregister_host(begin)));
  EXPECT_TRUE(ok(device_->register_host(begin + 1, 0xffe)));
  for (const Status& status : {device_->register_host(nullptr, 1), device_->register_host(begin - 0x8000, 0),
                               device_->register_host(begin, ~std::size_t{0})}) {
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << status.message();
  }
}

// A batch that many threads work on: every byte arrives, and nothing is written once the event has completed.
TEST_P(CpuDevice, a_divided_batch_is_copied_completely_and_only_once) {
  const StreamHandle own = stream();
  const std::size_t unit = std::size_t{256} << 10;
  const std::vector<std::size_t> sizes{1, unit - 1, unit, unit + 1, 4096, 9 * unit + 17, 0, 3, 2 * unit};
  const std::size_t total = std::accumulate(sizes.begin(), sizes.end(), std::size_t{0});
  const std::vector<std::byte> source = random_bytes(total, 2);
  std::vector<std::byte> destination(total);
  std::vector<CopyRun> runs;
  std::size_t offset = 0;
  for (const std::size_t bytes : sizes) {
    runs.push_back({destination.data() + offset, source.data() + offset, bytes});
    offset += bytes;
  }
  for (int round = 0; round < 8; ++round) {
    std::ranges::fill(destination, std::byte{0});
    std::ranges::shuffle(runs, std::mt19937(static_cast<unsigned>(round)));
    ASSERT_TRUE(ok(device_->copy(own, runs, Direction::load)));
    finish(own);
    ASSERT_EQ(destination, source);
  }
}

TEST_P(CpuDevice, one_stream_keeps_the_order_of_its_batches) {
  const StreamHandle own = stream();
  constexpr std::size_t kBytes = kMiB + 7;
  const std::vector<std::byte> source = random_bytes(kBytes, 3);
  std::vector<std::vector<std::byte>> hops(30, std::vector<std::byte>(kBytes));
  ASSERT_TRUE(ok(copy(own, hops[0].data(), source.data(), kBytes)));
  for (std::size_t i = 1; i < hops.size(); ++i) {
    const Direction direction = i % 2 == 0 ? Direction::store : Direction::load;
    ASSERT_TRUE(ok(copy(own, hops[i].data(), hops[i - 1].data(), kBytes, direction)));
  }
  finish(own);
  for (const std::vector<std::byte>& hop : hops) ASSERT_EQ(hop, source);
}

// Parts of all sizes, of one direction and of the other in turn: each turn reads what the one before wrote.
TEST_P(CpuDevice, a_move_in_parts_is_whole_before_what_follows) {
  constexpr std::size_t kBytes = 12 * kMiB + 5;
  constexpr std::size_t kTurns = support::turns(6, 2);
  const StreamHandle own = stream();
  std::mt19937 random(4);
  std::uniform_int_distribution<std::size_t> exponent(0, 22);
  std::vector<std::vector<std::byte>> turns{random_bytes(kBytes, 4)};
  turns.resize(kTurns + 1, std::vector<std::byte>(kBytes));
  for (std::size_t turn = 1; turn <= kTurns; ++turn) {
    const Direction direction = turn % 2 == 0 ? Direction::store : Direction::load;
    for (std::size_t begin = 0; begin < kBytes;) {
      const std::size_t bytes = std::min(kBytes - begin, std::size_t{1} << exponent(random));
      ASSERT_TRUE(
          ok(copy(own, turns[turn].data() + begin, turns[turn - 1].data() + begin, bytes, direction)));
      begin += bytes;
    }
  }
  finish(own);
  for (const std::vector<std::byte>& turn : turns) ASSERT_EQ(turn, turns.front());
}

TEST_P(CpuDevice, events_order_a_long_chain_of_streams) {
  constexpr std::size_t kStreams = 2000;  // advancing them must not recurse
  constexpr std::size_t kBytes = 1000;
  const std::vector<std::byte> source = random_bytes(kMiB, 4);
  std::vector<std::byte> first(kMiB);
  std::vector<std::byte> hops((kStreams + 1) * kBytes);
  std::vector<StreamHandle> streams;
  for (std::size_t i = 0; i <= kStreams; ++i) streams.push_back(stream());
  const std::unique_ptr<Event> moved = event();  // one for all: earlier waits keep the earlier record

  ASSERT_TRUE(ok(copy(streams[0], first.data(), source.data(), kMiB)));
  ASSERT_TRUE(ok(copy(streams[0], hops.data(), first.data() + 5, kBytes, Direction::load)));
  for (std::size_t i = 1; i <= kStreams; ++i) {
    ASSERT_TRUE(ok(device_->record(*moved, streams[i - 1])));
    ASSERT_TRUE(ok(device_->wait(streams[i], *moved)));
    if (i % 2 == 1) continue;  // waits behind waits
    ASSERT_TRUE(ok(copy(streams[i], &hops[i * kBytes], &hops[(i - 2) * kBytes], kBytes)));
  }
  finish(streams.back());
  EXPECT_TRUE(std::equal(hops.end() - kBytes, hops.end(), source.begin() + 5));
}

// One thread, so that what the short copy sees of the long one is no data race: a stream that waited for the
// other to end would never see the old byte.
TEST(CpuDeviceStreams, share_one_thread) {
  const std::unique_ptr<Device> device = make_cpu_device({.copy_threads = 1});
  const StreamHandle long_stream = device->create_stream().value();
  const StreamHandle short_stream = device->create_stream().value();
  const std::vector<std::byte> source(32 * kMiB, std::byte{1});
  std::vector<std::byte> destination(32 * kMiB);
  bool side_by_side = false;
  for (int attempt = 0; attempt < 50 && !side_by_side; ++attempt) {  // the long copy may be over before
    destination.back() = std::byte{0};
    std::byte seen{1};
    const CopyRun all{destination.data(), source.data(), source.size()};
    const CopyRun peek{&seen, &destination.back(), 1};
    const std::unique_ptr<Event> all_done = device->create_event().value();
    const std::unique_ptr<Event> peek_done = device->create_event().value();
    ASSERT_TRUE(ok(device->copy(long_stream, {&all, 1}, Direction::load)));
    ASSERT_TRUE(ok(device->copy(short_stream, {&peek, 1}, Direction::load)));
    ASSERT_TRUE(ok(device->record(*all_done, long_stream)));
    ASSERT_TRUE(ok(device->record(*peek_done, short_stream)));
    ASSERT_TRUE(ok(device->synchronize(*peek_done)));
    ASSERT_TRUE(ok(device->synchronize(*all_done)));
    side_by_side = seen == std::byte{0};
  }
  EXPECT_TRUE(side_by_side);
}

TEST_P(CpuDevice, many_threads_submit_at_once) {
  constexpr std::size_t kThreads = 8;
  constexpr std::size_t kRounds = 50;
  constexpr std::size_t kBytes = 100'000;
  const StreamHandle shared = stream();
  const std::vector<std::byte> source = random_bytes(kBytes * kThreads, 5);
  std::vector<std::byte> middle(source.size());
  std::vector<std::byte> destination(source.size());
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (std::size_t round = 0; round < kRounds; ++round) {
        const StreamHandle own = stream();
        const std::unique_ptr<Event> copied = event();
        ASSERT_TRUE(ok(copy(own, &middle[t * kBytes], &source[t * kBytes], kBytes)));
        ASSERT_TRUE(ok(device_->record(*copied, own)));
        ASSERT_TRUE(ok(device_->wait(shared, *copied)));
        ASSERT_TRUE(ok(copy(shared, &destination[t * kBytes], &middle[t * kBytes], kBytes)));
        ASSERT_TRUE(ok(device_->record(*copied, shared)));
        ASSERT_TRUE(ok(device_->synchronize(*copied)));
        ASSERT_TRUE(device_->query(*copied).value());
        device_->destroy_stream(own);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(destination, source);
}

TEST_P(CpuDevice, a_stream_destroyed_with_work_left_still_does_it) {
  const StreamHandle own = stream();
  const std::unique_ptr<Event> done = event();
  const std::vector<std::byte> source = random_bytes(16 * kMiB, 6);
  std::vector<std::byte> destination(source.size());
  ASSERT_TRUE(ok(copy(own, destination.data(), source.data(), source.size())));
  ASSERT_TRUE(ok(device_->record(*done, own)));
  device_->destroy_stream(own);
  ASSERT_TRUE(ok(device_->synchronize(*done)));
  EXPECT_EQ(destination, source);
}

TEST_P(CpuDevice, dropping_everything_with_work_queued_runs_that_work) {
  const std::vector<std::byte> source = random_bytes(4 * kMiB, 7);
  std::vector<std::vector<std::byte>> destinations(8, std::vector<std::byte>(source.size()));
  std::unique_ptr<Event> gate = event();
  const StreamHandle first = stream();
  ASSERT_TRUE(ok(copy(first, destinations[0].data(), source.data(), source.size())));
  ASSERT_TRUE(ok(device_->record(*gate, first)));
  for (std::size_t i = 1; i < destinations.size(); ++i) {
    const StreamHandle own = stream();
    ASSERT_TRUE(ok(device_->wait(own, *gate)));
    ASSERT_TRUE(ok(copy(own, destinations[i].data(), destinations[0].data(), source.size())));
    if (i % 2 == 0) device_->destroy_stream(own);
  }
  gate.reset();
  device_.reset();
  for (const std::vector<std::byte>& destination : destinations) EXPECT_EQ(destination, source);
}

TEST_P(CpuDevice, a_device_without_work_goes_at_once) { device_.reset(); }

TEST_P(CpuDevice, a_child_of_fork_is_told_and_does_not_hang) {
  const StreamHandle own = stream();
  const std::unique_ptr<Event> pending = event();
  const std::vector<std::byte> source(32 * kMiB, std::byte{1});
  std::vector<std::byte> destination(source.size());
  ASSERT_TRUE(ok(copy(own, destination.data(), source.data(), source.size())));
  ASSERT_TRUE(ok(device_->record(*pending, own)));
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);
    const bool told = device_->health().code() == StatusCode::closed &&
                      device_->synchronize(*pending).code() == StatusCode::closed &&
                      device_->query(*pending).status().code() == StatusCode::closed &&
                      device_->create_stream().status().code() == StatusCode::closed &&
                      copy(kCaller, destination.data(), source.data(), 1).code() == StatusCode::closed;
    device_->destroy_stream(own);
    device_.reset();
    _exit(told ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
  EXPECT_TRUE(ok(device_->synchronize(*pending)));
  EXPECT_EQ(destination, source);
}

}  // namespace
}  // namespace kvtier
