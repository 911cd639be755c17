#include "kvtier/platform/io_queue.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "conformance/io_queue_conformance.h"

#include "kvtier/platform/simulated_drive.h"

namespace kvtier::conformance {
namespace {

using internal::UringLevel;

template <UringLevel kHighest>
class UringHarness final : public IoQueueHarness {
 public:
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override {
    Result<std::unique_ptr<IoQueue>> queue = internal::make_uring_queue({.depth = depth}, kHighest);
    why_ = queue.status().message();
    return queue ? std::move(*queue) : nullptr;
  }
  std::string why() const override { return why_; }

 private:
  std::string why_;
};

template <std::uint32_t kThreads>
class ThreadsHarness final : public IoQueueHarness {
 public:
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override {
    Result<std::unique_ptr<IoQueue>> queue = make_thread_queue({.depth = depth, .threads = kThreads});
    EXPECT_TRUE(queue.is_ok()) << queue.status().message();
    return std::move(*queue);
  }
};

class SimulatedHarness final : public IoQueueHarness {
 public:
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) override { return drive_.make_queue(depth); }

 private:
  SimulatedDrive drive_{DriveFaults{.seed = 5, .delay = 0.2}};
};

template <UringLevel kHighest>
Kind<IoQueueHarness> uring(const char* name) {
  return kind_of<IoQueueHarness, UringHarness<kHighest>>(name);
}

INSTANTIATE_TEST_SUITE_P(Uring, IoQueueConformance,
                         ::testing::Values(uring<UringLevel::basic>("basic"),
                                           uring<UringLevel::timed_wait>("timed_wait"),
                                           uring<UringLevel::cooperative>("cooperative"),
                                           uring<UringLevel::single_owner>("single_owner"),
                                           uring<UringLevel::deferred>("deferred")),
                         kind_name<IoQueueHarness>);
INSTANTIATE_TEST_SUITE_P(Threads, IoQueueConformance,
                         ::testing::Values(kind_of<IoQueueHarness, ThreadsHarness<1>>("one"),
                                           kind_of<IoQueueHarness, ThreadsHarness<3>>("three"),
                                           kind_of<IoQueueHarness, ThreadsHarness<32>>("thirty_two")),
                         kind_name<IoQueueHarness>);
INSTANTIATE_TEST_SUITE_P(Simulated, IoQueueConformance,
                         ::testing::Values(kind_of<IoQueueHarness, SimulatedHarness>("drive")),
                         kind_name<IoQueueHarness>);

TEST(IoQueueOptions, out_of_bounds_are_refused) {
  for (const IoQueueOptions& options : {IoQueueOptions{.depth = 0}, IoQueueOptions{.depth = 4097},
                                        IoQueueOptions{.threads = 0}, IoQueueOptions{.threads = 257}}) {
    EXPECT_EQ(make_uring_queue(options).status().code(), StatusCode::invalid_argument);
    EXPECT_EQ(make_thread_queue(options).status().code(), StatusCode::invalid_argument);
    EXPECT_EQ(make_io_queue(options, nullptr).status().code(), StatusCode::invalid_argument);
  }
  EXPECT_TRUE(make_thread_queue({.depth = 4096, .threads = 1}).is_ok());
}

TEST(MakeIoQueue, says_why_it_is_not_io_uring) {
  std::string why = "not yet";
  const Result<std::unique_ptr<IoQueue>> queue = make_io_queue({}, &why);
  ASSERT_TRUE(queue.is_ok()) << queue.status().message();
  EXPECT_EQ(queue.value()->description(), why.empty() ? "io_uring" : "threads") << why;
  EXPECT_EQ(make_uring_queue({}).is_ok(), why.empty()) << why;
}

TEST(MakeIoQueue, the_deepest_ring_can_be_made) {
  const Result<std::unique_ptr<IoQueue>> queue = make_uring_queue({.depth = 4096});
  if (!queue.is_ok()) GTEST_SKIP() << queue.status().message();
  EXPECT_EQ(queue.value()->depth(), 4096U);
}

std::size_t entries_of(const char* directory) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++count;
  return count;
}

TEST(IoQueue, leaves_no_thread_and_no_descriptor_behind) {
  ASSERT_TRUE(make_io_queue({}, nullptr).is_ok());  // what the first call keeps for good
  const std::size_t descriptors = entries_of("/proc/self/fd");
  const std::size_t threads = entries_of("/proc/self/task");
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(make_io_queue({}, nullptr).is_ok());
    ASSERT_TRUE(make_thread_queue({}).is_ok());
    static_cast<void>(make_uring_queue({}));
  }
  EXPECT_EQ(entries_of("/proc/self/fd"), descriptors);
  // A thread that was joined may be listed for a moment yet, also at the first count.
  for (int i = 0; i < 1000 && entries_of("/proc/self/task") > threads; ++i) std::this_thread::yield();
  EXPECT_LE(entries_of("/proc/self/task"), threads);
}

// Runs `check` in a forked child, whose limits then are its own; returns its exit status.
template <typename Check>
int in_child(Check check) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(check());
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

int error_of(IoQueue& queue, const IoRequest& request) {
  queue.submit({&request, 1});
  std::vector<IoCompletion> completions;
  while (completions.empty()) {
    if (!queue.wait(completions, std::nullopt)) return -1;
  }
  return completions[0].error;
}

std::vector<Result<std::unique_ptr<IoQueue>> (*)()> real_queues() {
  return {[] { return make_uring_queue({}); }, [] { return make_thread_queue({}); }};
}

// The kernel writes up to the limit and says so; only the rest fails.
TEST(IoQueue, the_rest_of_a_short_write_is_tried_and_its_error_reported) {
  for (const auto& make : real_queues()) {
    const TempDirectory temp;
    EXPECT_EQ(in_child([&] {
                ::signal(SIGXFSZ, SIG_IGN);
                const rlimit limit{64 * 1024, 64 * 1024};
                if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
                const FileHandle file(::open((temp.path() + "/f").c_str(), O_RDWR | O_CREAT, 0600));
                const IoBuffer from(128 * 1024);
                Result<std::unique_ptr<IoQueue>> queue = make();
                if (!queue) return queue.status().code() == StatusCode::unsupported ? 0 : 2;
                const IoRequest write{IoOp::write, file.fd(), 0, from.data(), 128 * 1024, 0};
                if (error_of(*queue.value(), write) != EFBIG) return 3;
                struct stat status{};
                return ::fstat(file.fd(), &status) == 0 && status.st_size == 64 * 1024 ? 0 : 4;
              }),
              0);
  }
}

// The kernel moves less than 2 GiB in one call. Pages that nobody has written cost no memory.
#if !defined(__SANITIZE_THREAD__)  // which marks every byte that a thread hands to the kernel
TEST(IoQueue, a_request_of_more_than_2_GiB_is_whole) {
  constexpr std::uint64_t kBytes = (std::uint64_t{2} << 30) + 4096;
  void* mapped = ::mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(mapped, MAP_FAILED);
  for (const auto& make : real_queues()) {
    Result<std::unique_ptr<IoQueue>> queue = make();
    if (!queue) continue;
    const FileHandle null(::open("/dev/null", O_WRONLY | O_CLOEXEC));
    EXPECT_EQ(
        error_of(*queue.value(), {IoOp::write, null.fd(), 0, static_cast<std::byte*>(mapped), kBytes, 0}), 0);
  }
  ::munmap(mapped, kBytes);
}
#endif

// Pages are charged to the user (RLIMIT_MEMLOCK) unless the process is privileged.
TEST(IoQueue, a_refused_registration_is_a_status_and_ordinary_buffers_go_on) {
  const TempDirectory temp;
  EXPECT_EQ(in_child([&] {
              const rlimit limit{64 * 1024, 64 * 1024};
              if (::setrlimit(RLIMIT_MEMLOCK, &limit) != 0) return 1;
              if (::geteuid() == 0 && ::setresuid(65534, 65534, 65534) != 0) return 2;
              Result<std::unique_ptr<IoQueue>> queue = make_uring_queue({.depth = 4});
              if (!queue) return 0;
              const IoBuffer buffer(8 << 20);
              const Status status = queue.value()->register_buffer(buffer.bytes());
              if (status.is_ok()) return 3;
              if (status.code() != StatusCode::resource || status.native_code() != ENOMEM) return 4;
              const FileHandle zero(::open("/dev/zero", O_RDONLY | O_CLOEXEC));
              return error_of(*queue.value(), {IoOp::read, zero.fd(), 0, buffer.data(), 4096, 0}) == 0 ? 0
                                                                                                       : 5;
            }),
            0);
}

}  // namespace
}  // namespace kvtier::conformance
