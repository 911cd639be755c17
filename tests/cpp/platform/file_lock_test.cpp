#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "support/temp_directory.h"

#include "kvtier/platform/block_file.h"

namespace kvtier {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

class FileLockTest : public ::testing::Test {
 protected:
  std::unique_ptr<FileLock> try_lock() const {
    Result<std::unique_ptr<FileLock>> lock = FileLock::try_lock(root_, "lock");
    EXPECT_TRUE(lock.is_ok()) << lock.status().message();
    return std::move(*lock);
  }
  bool is_locked() const {
    const Result<bool> locked = FileLock::is_locked(root_, "lock");
    EXPECT_TRUE(locked.is_ok()) << locked.status().message();
    return locked.value();
  }
  // Asked by another process, which is who it is about.
  bool is_locked_for_others() const {
    const pid_t child = ::fork();
    if (child == 0) {
      const FileHandle file(::openat(root_.fd(), "lock", O_RDWR | O_CLOEXEC));
      struct flock range{};
      range.l_type = F_WRLCK;
      if (::fcntl(file.fd(), F_GETLK, &range) != 0) ::_exit(2);
      ::_exit(range.l_type == F_UNLCK ? 0 : 1);
    }
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) < 2) << status;
    return WEXITSTATUS(status) == 1;
  }

  TempDirectory temp_;
  Directory root_ = std::move(Directory::open_or_create(temp_.path())).value();
};

// A process that locks, says so, and then does what it is told by one letter: 'u'nlock, 'f'ork
// a child that lives as long as the Holder.
class Holder {
 public:
  explicit Holder(const Directory& directory) {
    std::array<int, 2> down{};
    std::array<int, 2> up{};
    EXPECT_EQ(::pipe2(down.data(), O_CLOEXEC), 0);
    EXPECT_EQ(::pipe2(up.data(), O_CLOEXEC), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::close(down[1]);
      ::close(up[0]);
      run(directory, down[0], up[1]);
    }
    ::close(down[0]);
    ::close(up[1]);
    commands_ = FileHandle(down[1]);
    answers_ = FileHandle(up[0]);
    EXPECT_EQ(answer(), 'l');
  }
  ~Holder() {
    if (pid_ > 0) kill();
  }

  void tell(char command) const { EXPECT_EQ(::write(commands_.fd(), &command, 1), 1); }
  char answer() const {
    char c = '?';
    EXPECT_EQ(::read(answers_.fd(), &c, 1), 1);
    return c;
  }
  void kill() {
    EXPECT_EQ(::kill(pid_, SIGKILL), 0);
    EXPECT_EQ(::waitpid(pid_, nullptr, 0), pid_);
    pid_ = -1;
  }

 private:
  [[noreturn]] static void run(const Directory& directory, int commands, int answers) {
    Result<std::unique_ptr<FileLock>> lock = FileLock::try_lock(directory, "lock");
    char c = lock && lock.value() != nullptr ? 'l' : '!';
    while (::write(answers, &c, 1) == 1 && ::read(commands, &c, 1) == 1) {
      if (c == 'u') lock.value().reset();
      if (c == 'f' && ::fork() == 0) {
        while (::read(commands, &c, 1) == 1) {
        }
        ::_exit(0);
      }
    }
    ::_exit(0);
  }

  pid_t pid_ = -1;
  FileHandle commands_;
  FileHandle answers_;
};

TEST_F(FileLockTest, is_exclusive_within_the_process) {
  EXPECT_FALSE(is_locked());
  auto first = try_lock();
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(try_lock(), nullptr);
  EXPECT_TRUE(is_locked());
  // Another name and another descriptor of the directory: the file is what counts.
  ASSERT_EQ(::link((temp_.path() + "/lock").c_str(), (temp_.path() + "/same").c_str()), 0);
  EXPECT_EQ(FileLock::try_lock(root_, "same").value(), nullptr);
  EXPECT_TRUE(FileLock::is_locked(root_, "same").value());
  first.reset();
  EXPECT_FALSE(is_locked());
  EXPECT_NE(try_lock(), nullptr);
}

// fcntl locks die with any descriptor of the file that is closed: what asks must not close one.
TEST_F(FileLockTest, questions_and_refusals_in_this_process_do_not_end_it) {
  const auto lock = try_lock();
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(is_locked());
    EXPECT_EQ(try_lock(), nullptr);
    EXPECT_EQ(FileLock::lock(root_, "lock", Clock::now()).status().code(), StatusCode::timeout);
    EXPECT_TRUE(is_locked_for_others());
  }
}

TEST_F(FileLockTest, is_exclusive_among_processes_until_given_up) {
  const Holder holder(root_);
  EXPECT_TRUE(is_locked());
  EXPECT_EQ(try_lock(), nullptr);
  holder.tell('u');
  EXPECT_EQ(holder.answer(), 'u');
  EXPECT_FALSE(is_locked());
  EXPECT_NE(try_lock(), nullptr);
}

TEST_F(FileLockTest, ends_with_its_process_killed_or_not) {
  {
    Holder holder(root_);
    EXPECT_EQ(try_lock(), nullptr);
    holder.kill();
  }
  EXPECT_NE(try_lock(), nullptr);
}

TEST_F(FileLockTest, a_forked_child_has_not_got_it_and_does_not_end_it) {
  auto lock = try_lock();
  const pid_t child = ::fork();
  if (child == 0) {
    // Destroys its copy, too.
    const bool refused = FileLock::try_lock(root_, "lock").value() == nullptr;
    const bool locked = FileLock::is_locked(root_, "lock").value();
    lock.reset();
    ::_exit(refused && locked ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(is_locked_for_others());
  EXPECT_EQ(try_lock(), nullptr);
}

// It has inherited a descriptor of its parent's lock: to close that would drop its own.
TEST_F(FileLockTest, a_forked_child_that_locks_behind_its_parent_has_it_for_all_to_see) {
  auto parents = FileLock::try_lock(root_, "lock").value();
  ASSERT_NE(parents, nullptr);
  std::array<int, 2> down{};
  std::array<int, 2> up{};
  ASSERT_EQ(::pipe2(down.data(), O_CLOEXEC), 0);
  ASSERT_EQ(::pipe2(up.data(), O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::close(down[1]);
    char c = 'l';
    if (::read(down[0], &c, 1) != 1) ::_exit(2);
    const auto own = FileLock::try_lock(root_, "lock");
    if (!own || own.value() == nullptr) ::_exit(3);
    if (::write(up[1], &c, 1) != 1) ::_exit(4);
    while (::read(down[0], &c, 1) == 1) {
    }
    ::_exit(0);
  }
  ::close(down[0]);
  parents.reset();
  char c = 'l';
  EXPECT_EQ(::write(down[1], &c, 1), 1);
  EXPECT_EQ(::read(up[0], &c, 1), 1);
  EXPECT_TRUE(is_locked_for_others());
  EXPECT_EQ(FileLock::try_lock(root_, "lock").value(), nullptr);
  ::close(down[1]);
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST_F(FileLockTest, waiting_ends_when_another_process_gives_it_up) {
  const Holder holder(root_);
  std::thread waiter([&] {
    const Result<std::unique_ptr<FileLock>> lock = FileLock::lock(root_, "lock", Clock::now() + seconds(60));
    EXPECT_TRUE(lock.is_ok()) << lock.status().message();
  });
  std::this_thread::sleep_for(milliseconds(20));
  holder.tell('u');
  waiter.join();
}

TEST_F(FileLockTest, waiting_ends_when_another_process_is_killed_though_its_child_has_its_descriptors) {
  Holder holder(root_);
  holder.tell('f');
  ASSERT_EQ(holder.answer(), 'f');
  std::thread waiter([&] {
    const Result<std::unique_ptr<FileLock>> lock = FileLock::lock(root_, "lock", Clock::now() + seconds(60));
    EXPECT_TRUE(lock.is_ok()) << lock.status().message();
  });
  std::this_thread::sleep_for(milliseconds(20));
  holder.kill();
  waiter.join();
}

TEST_F(FileLockTest, waiting_ends_when_another_thread_gives_it_up) {
  auto lock = try_lock();
  std::atomic<bool> given_up{false};
  std::thread waiter([&] {
    const Result<std::unique_ptr<FileLock>> mine = FileLock::lock(root_, "lock", Clock::now() + seconds(60));
    EXPECT_TRUE(mine.is_ok()) << mine.status().message();
    EXPECT_TRUE(given_up);
  });
  std::this_thread::sleep_for(milliseconds(20));
  given_up = true;
  lock.reset();
  waiter.join();
}

TEST_F(FileLockTest, waiting_ends_at_the_deadline) {
  const Holder holder(root_);
  const auto start = Clock::now();
  EXPECT_EQ(FileLock::lock(root_, "lock", start + milliseconds(30)).status().code(), StatusCode::timeout);
  EXPECT_GE(Clock::now() - start, milliseconds(30));
  EXPECT_EQ(FileLock::lock(root_, "lock", start).status().code(), StatusCode::timeout);
  EXPECT_TRUE(FileLock::lock(root_, "another", start).is_ok()) << "what is free needs no time";
}

// A waiter that opened the file before must not end, by closing it, the lock that a thread beside it then
// took.
TEST_F(FileLockTest, waiters_that_give_up_do_not_end_the_lock_of_another_thread) {
  const Holder holder(root_);
  std::atomic<bool> waiter_has_it{false};
  std::thread waiter(
      [&] { waiter_has_it = FileLock::lock(root_, "lock", Clock::now() + milliseconds(150)).is_ok(); });
  std::this_thread::sleep_for(milliseconds(30));
  // Taken as soon as it is free, by one thread or the other; most often by this one, which asks all the time.
  std::unique_ptr<FileLock> lock;
  holder.tell('u');
  while (lock == nullptr && !waiter_has_it) lock = try_lock();
  waiter.join();
  EXPECT_EQ(is_locked_for_others(), lock != nullptr);
}

TEST_F(FileLockTest, one_at_a_time_among_threads_and_processes) {
  constexpr int kTurns = 40;
  const FileHandle counter(::open((temp_.path() + "/counter").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  const auto add_all = [&] {
    for (int i = 0; i < kTurns; ++i) {
      const Result<std::unique_ptr<FileLock>> lock =
          FileLock::lock(root_, "lock", Clock::now() + seconds(60));
      if (!lock) return false;
      int value = 0;
      static_cast<void>(::pread(counter.fd(), &value, sizeof value, 0));
      std::this_thread::yield();
      ++value;
      if (::pwrite(counter.fd(), &value, sizeof value, 0) != ssize_t{sizeof value}) return false;
    }
    return true;
  };
  std::vector<pid_t> children;
  for (int i = 0; i < 3; ++i) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(add_all() ? 0 : 1);
    children.push_back(child);
  }
  std::vector<std::thread> threads;
  threads.reserve(2);
  for (int i = 0; i < 2; ++i) threads.emplace_back([&] { EXPECT_TRUE(add_all()); });
  for (std::thread& thread : threads) thread.join();
  for (const pid_t child : children) {
    int status = -1;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
  }
  int value = 0;
  ASSERT_EQ(::pread(counter.fd(), &value, sizeof value, 0), ssize_t{sizeof value});
  EXPECT_EQ(value, 5 * kTurns);
}

// A lock on a file that has lost its name keeps nobody out of the new one.
TEST_F(FileLockTest, is_of_the_file_that_has_the_name) {
  const auto old = try_lock();
  ASSERT_TRUE(root_.remove_file("lock").is_ok());
  EXPECT_FALSE(is_locked());
  const auto fresh = try_lock();
  EXPECT_NE(fresh, nullptr);
  EXPECT_TRUE(is_locked_for_others());
}

TEST_F(FileLockTest, the_file_is_private_and_no_link_is_followed) {
  const auto lock = try_lock();
  struct stat status{};
  ASSERT_EQ(::stat((temp_.path() + "/lock").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777, 0600U);
  ASSERT_EQ(::symlink("elsewhere", (temp_.path() + "/link").c_str()), 0);
  EXPECT_EQ(FileLock::try_lock(root_, "link").status().native_code(), ELOOP);
  EXPECT_FALSE(FileLock::is_locked(root_, "link").is_ok());
}

}  // namespace
}  // namespace kvtier
