#include "kvtier/platform/block_file.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/magic.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "support/temp_directory.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

Directory open_directory(const std::string& path) {
  Result<Directory> directory = Directory::open_or_create(path);
  EXPECT_TRUE(directory.is_ok()) << directory.status().message();
  return std::move(*directory);
}

std::unique_ptr<BlockFile> open_file(const Directory& directory, const std::string& name) {
  Result<std::unique_ptr<BlockFile>> file = BlockFile::open(directory, name);
  EXPECT_TRUE(file.is_ok()) << file.status().message();
  return std::move(*file);
}

struct stat stat_of(const std::string& path) {
  struct stat status{};
  EXPECT_EQ(::lstat(path.c_str(), &status), 0) << path;
  return status;
}

// On a drive, and in memory, where there is no direct I/O.
class BlockFileOn : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (::access(below().c_str(), W_OK) != 0) GTEST_SKIP() << below() << " cannot be written";
    temp_ = std::make_unique<TempDirectory>(below());
    directory_ = std::make_unique<Directory>(open_directory(temp_->path()));
  }
  static std::string below() { return std::string(GetParam()).empty() ? drive_path() : GetParam(); }

  std::unique_ptr<TempDirectory> temp_;
  std::unique_ptr<Directory> directory_;
};
INSTANTIATE_TEST_SUITE_P(All, BlockFileOn, ::testing::Values("", "/dev/shm"));

TEST_P(BlockFileOn, is_direct_where_the_file_system_is_a_drive_s) {
  const auto file = open_file(*directory_, "slots");
  struct statfs filesystem{};
  ASSERT_EQ(::fstatfs(file->fd(), &filesystem), 0);
  EXPECT_EQ(file->is_direct(), (::fcntl(file->fd(), F_GETFL) & O_DIRECT) != 0);
  EXPECT_EQ(::fcntl(file->fd(), F_GETFL) & O_NONBLOCK, 0);
  EXPECT_EQ(::fcntl(file->fd(), F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  if (filesystem.f_type == TMPFS_MAGIC) {
    EXPECT_EQ(file->alignment(), 1U);
  } else if (filesystem.f_type == EXT4_SUPER_MAGIC || filesystem.f_type == XFS_SUPER_MAGIC) {
    EXPECT_TRUE(file->is_direct());
  }
}

// What alignment() says is enough for the file system, at every multiple.
TEST_P(BlockFileOn, transfers_aligned_as_it_says_are_taken) {
  const auto file = open_file(*directory_, "slots");
  ASSERT_TRUE(file->grow(kMiB).is_ok());
  const std::uint64_t a = file->alignment();
  void* memory = std::aligned_alloc(4096, 8192);
  auto* const data = static_cast<std::byte*>(memory) + a;
  std::memset(memory, 0x5a, 8192);
  EXPECT_EQ(::pwrite(file->fd(), data, a, static_cast<off_t>(3 * a)), static_cast<ssize_t>(a));
  std::memset(memory, 0, 8192);
  EXPECT_EQ(::pread(file->fd(), data, a, static_cast<off_t>(3 * a)), static_cast<ssize_t>(a));
  EXPECT_EQ(data[0], std::byte{0x5a});
  EXPECT_EQ(data[a - 1], std::byte{0x5a});
  std::free(memory);
}

TEST_P(BlockFileOn, grows_to_reserved_zeros_and_keeps_what_was_there) {
  const auto file = open_file(*directory_, "slots");
  EXPECT_EQ(file->size_bytes().value(), 0U);
  ASSERT_TRUE(file->grow(kMiB).is_ok());
  EXPECT_EQ(file->size_bytes().value(), kMiB);
  const auto full = static_cast<std::byte*>(std::aligned_alloc(4096, kMiB));
  std::memset(full, 0x11, kMiB);
  ASSERT_EQ(::pwrite(file->fd(), full, kMiB, 0), static_cast<ssize_t>(kMiB));
  ASSERT_TRUE(file->grow(3 * kMiB).is_ok());
  ASSERT_TRUE(file->grow(2 * kMiB).is_ok());  // never shrinks
  EXPECT_EQ(file->size_bytes().value(), 3 * kMiB);
  EXPECT_GE(static_cast<std::uint64_t>(stat_of(temp_->path() + "/slots").st_blocks) * 512, 3 * kMiB);
  const auto is_all = [&](std::uint64_t offset, int value) {
    EXPECT_EQ(::pread(file->fd(), full, kMiB, static_cast<off_t>(offset)), static_cast<ssize_t>(kMiB));
    return std::all_of(full, full + kMiB, [&](std::byte b) { return b == static_cast<std::byte>(value); });
  };
  EXPECT_TRUE(is_all(0, 0x11));
  EXPECT_TRUE(is_all(kMiB, 0));
  EXPECT_TRUE(is_all(2 * kMiB, 0));
  std::free(full);
}

TEST_P(BlockFileOn, prewrite_asks_before_each_piece_and_touches_only_its_range) {
  const auto file = open_file(*directory_, "slots");
  ASSERT_TRUE(file->grow(8 * kMiB).is_ok());
  const FileHandle plain(::open((temp_->path() + "/slots").c_str(), O_RDWR | O_CLOEXEC));
  const std::vector<char> ones(8 * kMiB, 1);
  ASSERT_EQ(::pwrite(plain.fd(), ones.data(), ones.size(), 0), static_cast<ssize_t>(ones.size()));

  int pieces = 0;
  ASSERT_TRUE(file->prewrite(kMiB, 5 * kMiB, [&] { return ++pieces <= 2; }).is_ok());
  EXPECT_EQ(pieces, 3);
  std::vector<char> found(8 * kMiB);
  ASSERT_EQ(::pread(plain.fd(), found.data(), found.size(), 0), static_cast<ssize_t>(found.size()));
  const auto zeros = std::count(found.begin(), found.end(), 0);
  EXPECT_GT(zeros, 0);
  EXPECT_LT(zeros, static_cast<std::ptrdiff_t>(4 * kMiB));
  const auto first = std::find(found.begin(), found.end(), 0);
  EXPECT_EQ(first - found.begin(), static_cast<std::ptrdiff_t>(kMiB));
  EXPECT_TRUE(std::all_of(first, first + zeros, [](char c) { return c == 0; }));

  ASSERT_TRUE(file->prewrite(kMiB, 5 * kMiB, [] { return true; }).is_ok());
  ASSERT_EQ(::pread(plain.fd(), found.data(), found.size(), 0), static_cast<ssize_t>(found.size()));
  EXPECT_EQ(std::count(found.begin(), found.end(), 0), static_cast<std::ptrdiff_t>(4 * kMiB));
}

TEST_P(BlockFileOn, is_private_and_follows_no_link) {
  const auto file = open_file(*directory_, "slots");
  EXPECT_EQ(stat_of(temp_->path() + "/slots").st_mode & 07777, 0600U);
  ASSERT_EQ(::symlink("slots", (temp_->path() + "/link").c_str()), 0);
  EXPECT_EQ(BlockFile::open(*directory_, "link").status().native_code(), ELOOP);
  ASSERT_EQ(::mkfifo((temp_->path() + "/fifo").c_str(), 0600), 0);
  EXPECT_EQ(BlockFile::open(*directory_, "fifo").status().code(), StatusCode::io);
  for (const char* name : {"", ".", "..", "a/b", "/etc/passwd"}) {
    EXPECT_EQ(BlockFile::open(*directory_, name).status().code(), StatusCode::invalid_argument) << name;
  }
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

TEST_P(BlockFileOn, growing_beyond_a_limit_fails_and_gives_back_what_it_had_reserved) {
  EXPECT_EQ(in_child([&] {
              ::signal(SIGXFSZ, SIG_IGN);
              const rlimit limit{2 * kMiB, 2 * kMiB};
              if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
              Result<std::unique_ptr<BlockFile>> file = BlockFile::open(*directory_, "slots");
              if (!file || !file.value()->grow(kMiB)) return 2;
              const Status status = file.value()->grow(4 * kMiB);
              if (status.code() != StatusCode::io || status.native_code() != EFBIG) return 3;
              return file.value()->size_bytes().value() == kMiB ? 0 : 4;
            }),
            0);
}

TEST(BlockFile, a_full_file_system_is_ENOSPC_and_later_writes_meet_none) {
  const TempDirectory temp;
  if (::mount("kvtier-test", temp.path().c_str(), "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,mode=0700") != 0) {
    const int error = errno;
    const char* const required = std::getenv("KVTIER_REQUIRE_MOUNTS");
    if (required != nullptr && std::string(required) == "1") {
      FAIL() << "KVTIER_REQUIRE_MOUNTS=1, but nothing can be mounted: " << std::strerror(error);
    }
    GTEST_SKIP() << "needs the right to mount a small file system: " << std::strerror(error);
  }
  {
    const Directory directory = open_directory(temp.path());
    const auto file = open_file(directory, "slots");
    const Status full = file->grow(8 * kMiB);
    EXPECT_EQ(full.code(), StatusCode::io);
    EXPECT_EQ(full.native_code(), ENOSPC);
    EXPECT_EQ(file->size_bytes().value(), 0U);
    EXPECT_GT(directory.free_bytes().value(), 3 * kMiB) << "what was reserved in vain is given back";
    ASSERT_TRUE(file->grow(2 * kMiB).is_ok());
    EXPECT_LE(directory.free_bytes().value(), 2 * kMiB);
    const auto filler = open_file(directory, "filler");
    EXPECT_FALSE(filler->prewrite(0, 8 * kMiB, [] { return true; }).is_ok());
    EXPECT_TRUE(file->prewrite(0, 2 * kMiB, [] { return true; }).is_ok());
    EXPECT_EQ(directory.replace_file("small", std::vector<std::byte>(4096)).native_code(), ENOSPC);
    EXPECT_EQ(directory.list().value(), (std::vector<std::string>{"filler", "slots"}));
  }
  EXPECT_EQ(::umount2(temp.path().c_str(), MNT_DETACH), 0);
}

TEST(BlockFile, size_is_asked_anew) {
  const TempDirectory temp;
  const Directory directory = open_directory(temp.path());
  const auto file = open_file(directory, "slots");
  ASSERT_TRUE(file->grow(kMiB).is_ok());
  ASSERT_EQ(::truncate((temp.path() + "/slots").c_str(), 4096), 0);
  EXPECT_EQ(file->size_bytes().value(), 4096U);
}

TEST(FileHandle, closes_once_what_it_owns) {
  const int fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  {
    FileHandle first(fd);
    FileHandle second(std::move(first));
    EXPECT_EQ(second.fd(), fd);
    FileHandle third;
    third = std::move(second);
    EXPECT_EQ(third.fd(), fd);
    third = FileHandle(third.release());
    EXPECT_TRUE(third.is_open());
  }
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
}

}  // namespace
}  // namespace kvtier
