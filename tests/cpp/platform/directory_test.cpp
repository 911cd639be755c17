#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "support/temp_directory.h"

#include "kvtier/platform/block_file.h"

namespace kvtier {
namespace {

using Names = std::vector<std::string>;

std::vector<std::byte> bytes(const std::string& text) {
  std::vector<std::byte> result(text.size());
  if (!text.empty()) std::memcpy(result.data(), text.data(), text.size());
  return result;
}

class DirectoryTest : public ::testing::Test {
 protected:
  DirectoryTest() : root_(open(temp_.path())) {}

  static Directory open(const std::string& path) {
    Result<Directory> directory = Directory::open_or_create(path);
    EXPECT_TRUE(directory.is_ok()) << directory.status().message();
    return std::move(*directory);
  }
  std::string at(const std::string& name) const { return temp_.path() + "/" + name; }
  void put(const std::string& name, const std::string& content = "x") const {
    const FileHandle file(::open(at(name).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
    EXPECT_EQ(::write(file.fd(), content.data(), content.size()), static_cast<ssize_t>(content.size()));
  }
  unsigned mode(const std::string& name) const {
    struct stat status{};
    EXPECT_EQ(::lstat(at(name).c_str(), &status), 0);
    return status.st_mode & 07777;
  }

  TempDirectory temp_;
  Directory root_;
};

TEST_F(DirectoryTest, is_made_private_and_opened_again) {
  open(at("made") + "//");
  EXPECT_EQ(mode("made"), 0700U);
  EXPECT_EQ(open(at("made")).path(), at("made"));
  EXPECT_EQ(Directory::open_or_create(at("no/parent")).status().native_code(), ENOENT);
  EXPECT_EQ(Directory::open_or_create("").status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(Directory::open_existing(at("missing")).status().native_code(), ENOENT);
}

TEST_F(DirectoryTest, refuses_links_files_and_directories_that_others_may_write_into) {
  open(at("real"));
  ASSERT_EQ(::symlink("real", at("link").c_str()), 0);
  EXPECT_EQ(Directory::open_or_create(at("link")).status().code(), StatusCode::io);
  EXPECT_EQ(Directory::open_or_create(at("link/")).status().code(), StatusCode::io);
  EXPECT_EQ(root_.subdirectory("link").status().code(), StatusCode::io);
  EXPECT_EQ(root_.existing_subdirectory("link").status().code(), StatusCode::io);
  put("file");
  EXPECT_EQ(Directory::open_or_create(at("file")).status().native_code(), ENOTDIR);
  for (const mode_t open_to_others : {0770U, 0707U, 01777U}) {
    ASSERT_EQ(::chmod(at("real").c_str(), open_to_others), 0);
    EXPECT_EQ(Directory::open_or_create(at("real")).status().native_code(), EPERM) << open_to_others;
  }
  ASSERT_EQ(::chmod(at("real").c_str(), 0755), 0);
  EXPECT_TRUE(Directory::open_or_create(at("real")).is_ok());
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(at("real").c_str(), 1234, 1234), 0);
    const Status strange = Directory::open_or_create(at("real")).status();
    EXPECT_EQ(strange.native_code(), EPERM);
    EXPECT_NE(strange.message().find(at("real")), std::string::npos);
  }
}

TEST_F(DirectoryTest, stays_the_same_when_it_is_renamed) {
  const Directory inner = open(at("a"));
  ASSERT_TRUE(root_.rename("a", "b").is_ok());
  ASSERT_TRUE(inner.replace_file("f", bytes("1")).is_ok());
  EXPECT_TRUE(std::filesystem::exists(at("b/f")));
  EXPECT_EQ(root_.existing_subdirectory("a").status().native_code(), ENOENT);
}

TEST_F(DirectoryTest, lists_sorted_and_again) {
  EXPECT_EQ(root_.list().value(), Names{});
  put("b");
  put("a");
  ASSERT_TRUE(root_.subdirectory("c").is_ok());
  for (int i = 0; i < 2; ++i) EXPECT_EQ(root_.list().value(), (Names{"a", "b", "c"}));
}

TEST_F(DirectoryTest, takes_names_of_one_component_only) {
  for (const std::string& name : {std::string(), std::string("."), std::string(".."), std::string("a/b"),
                                  std::string("/tmp"), std::string("a\0b", 3)}) {
    EXPECT_EQ(root_.subdirectory(name).status().code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.existing_subdirectory(name).status().code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.remove_file(name).code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.remove_tree(name).code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.rename(name, "x").code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.rename("x", name).code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.read_file(name).status().code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(root_.replace_file(name, {}).code(), StatusCode::invalid_argument) << name;
    EXPECT_EQ(FileLock::try_lock(root_, name).status().code(), StatusCode::invalid_argument) << name;
  }
}

TEST_F(DirectoryTest, removes_a_tree_and_nothing_that_a_link_points_to) {
  ASSERT_TRUE(root_.subdirectory("keep").is_ok());
  put("keep/me");
  ASSERT_TRUE(root_.subdirectory("tree").is_ok());
  std::filesystem::create_directories(at("tree/x/y/z"));
  put("tree/x/y/z/f");
  ASSERT_EQ(::symlink("../../keep", at("tree/x/link").c_str()), 0);
  ASSERT_EQ(::symlink("keep", at("top").c_str()), 0);
  ASSERT_TRUE(root_.remove_tree("tree").is_ok());
  ASSERT_TRUE(root_.remove_tree("top").is_ok());
  ASSERT_TRUE(root_.remove_tree("never there").is_ok());
  EXPECT_EQ(root_.list().value(), Names{"keep"});
  EXPECT_TRUE(std::filesystem::exists(at("keep/me")));

  EXPECT_TRUE(root_.remove_file("never there").is_ok());
  EXPECT_FALSE(root_.remove_file("keep").is_ok());
}

TEST_F(DirectoryTest, measures_what_is_allocated_below_and_follows_no_link) {
  const std::uint64_t before = root_.allocated_bytes().value();
  ASSERT_TRUE(root_.subdirectory("a").is_ok());
  const Directory inner = open(at("a"));
  ASSERT_TRUE(BlockFile::open(inner, "slots").value()->grow(1 << 20).is_ok());
  ASSERT_EQ(::symlink("/", at("a/link").c_str()), 0);
  const FileHandle sparse(::open(at("a/sparse").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(sparse.fd(), off_t{1} << 30), 0);
  const std::uint64_t bytes = root_.allocated_bytes().value() - before;
  EXPECT_GE(bytes, std::uint64_t{1} << 20);
  EXPECT_LT(bytes, std::uint64_t{2} << 20);
  EXPECT_GT(root_.free_bytes().value(), 0U);
}

TEST_F(DirectoryTest, small_files_come_back_whole) {
  EXPECT_EQ(root_.read_file("f").status().native_code(), ENOENT);
  for (const std::string& content : {std::string("first"), std::string(), std::string(1 << 20, 'x')}) {
    ASSERT_TRUE(root_.replace_file("f", bytes(content)).is_ok());
    EXPECT_EQ(root_.read_file("f").value(), bytes(content));
    EXPECT_EQ(mode("f"), 0600U);
    EXPECT_EQ(root_.list().value(), Names{"f"});
  }
  EXPECT_EQ(root_.replace_file("f", std::vector<std::byte>((1 << 20) + 1)).native_code(), EFBIG);
  put("large", std::string((1 << 20) + 1, 'x'));
  EXPECT_EQ(root_.read_file("large").status().native_code(), EFBIG);
}

TEST_F(DirectoryTest, small_files_follow_no_link_and_replace_a_link_itself) {
  put("target", "untouched");
  ASSERT_EQ(::symlink("target", at("f").c_str()), 0);
  EXPECT_EQ(root_.read_file("f").status().native_code(), ELOOP);
  ASSERT_EQ(::symlink("target", at("f.new").c_str()), 0);
  ASSERT_TRUE(root_.replace_file("f", bytes("new")).is_ok());
  EXPECT_EQ(root_.read_file("f").value(), bytes("new"));
  EXPECT_EQ(root_.read_file("target").value(), bytes("untouched"));
  ASSERT_EQ(::mkfifo(at("fifo").c_str(), 0600), 0);
  EXPECT_EQ(root_.read_file("fifo").status().code(), StatusCode::io);
}

// Readers see one whole content or the other, whoever writes.
TEST_F(DirectoryTest, replacement_is_atomic_among_threads) {
  const std::vector<std::byte> contents[] = {bytes(std::string(5000, 'a')), bytes(std::string(3000, 'b'))};
  ASSERT_TRUE(root_.replace_file("f", contents[0]).is_ok());
  std::atomic<int> writing{2};
  std::vector<std::thread> writers;
  for (const auto& content : contents) {
    writers.emplace_back([&] {
      for (int i = 0; i < 20; ++i) EXPECT_TRUE(root_.replace_file("f", content).is_ok());
      --writing;
    });
  }
  while (writing > 0) {
    const Result<std::vector<std::byte>> found = root_.read_file("f");
    ASSERT_TRUE(found.is_ok()) << found.status().message();
    EXPECT_TRUE(found.value() == contents[0] || found.value() == contents[1]);
  }
  for (std::thread& writer : writers) writer.join();
}

// Bytes of a file that are in the page cache.
std::size_t cached_bytes(int fd, std::size_t size) {
  constexpr std::size_t kPage = 4096;
  void* const map = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  EXPECT_NE(map, MAP_FAILED);
  std::vector<unsigned char> pages((size + kPage - 1) / kPage);
  EXPECT_EQ(::mincore(map, size, pages.data()), 0);
  ::munmap(map, size);
  return kPage *
         static_cast<std::size_t>(std::ranges::count_if(pages, [](unsigned char p) { return p & 1; }));
}

TEST_F(DirectoryTest, reads_a_file_ahead_into_the_page_cache) {
  constexpr std::size_t kSize = (std::size_t{7} << 20) + 4096;
  put("f", std::string(kSize, 'x'));
  const FileHandle file(::open(at("f").c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(::fsync(file.fd()), 0);
  ASSERT_EQ(::posix_fadvise(file.fd(), 0, 0, POSIX_FADV_DONTNEED), 0);
  if (cached_bytes(file.fd(), kSize) == kSize) GTEST_SKIP() << "this file system has no page cache beside it";
  root_.read_ahead("f", kSize - 1);
  EXPECT_EQ(cached_bytes(file.fd(), kSize), 0U) << "it is larger than what was asked for";
  root_.read_ahead("f", kSize);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (cached_bytes(file.fd(), kSize) < kSize && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_EQ(cached_bytes(file.fd(), kSize), kSize);
}

TEST_F(DirectoryTest, what_cannot_be_read_ahead_is_left) {
  put("empty", "");
  ASSERT_EQ(::mkfifo(at("fifo").c_str(), 0600), 0);
  ASSERT_EQ(::symlink("/dev/zero", at("link").c_str()), 0);
  for (const char* name : {"empty", "fifo", "link", "missing", ".", "a/b"}) root_.read_ahead(name, 1 << 20);
}

// Killed anywhere within a replacement: old or new, and the next replacement works.
TEST_F(DirectoryTest, a_killed_replacement_leaves_the_old_or_the_new) {
  const auto content = [](int i) { return bytes(std::string(20'000, static_cast<char>('a' + i % 26))); };
  ASSERT_TRUE(root_.replace_file("f", content(0)).is_ok());
  for (int round = 0; round < 20; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (int i = 0;; ++i) static_cast<void>(root_.replace_file("f", content(i)));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500 * (round % 8) + 100));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    const Result<std::vector<std::byte>> found = root_.read_file("f");
    ASSERT_TRUE(found.is_ok()) << found.status().message();
    ASSERT_EQ(found.value().size(), 20'000U);
    EXPECT_TRUE(found.value() == std::vector<std::byte>(20'000, found.value()[0]));
  }
  ASSERT_TRUE(root_.replace_file("f", bytes("end")).is_ok());
  EXPECT_EQ(root_.list().value(), Names{"f"});
}

}  // namespace
}  // namespace kvtier
