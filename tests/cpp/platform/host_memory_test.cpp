#include "kvtier/platform/host_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/magic.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "kvtier/platform/memory_limit.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kBytes = 4 * kHugePageBytes;

// A shared file, mapped; both given back at the end.
class MappedFile {
 public:
  explicit MappedFile(std::uint64_t size) : bytes(size) {
    Result<int> created = linux_host_memory().create_shared(bytes);
    EXPECT_TRUE(created.is_ok()) << created.status().message();
    fd = created.value();
    Result<std::byte*> mapped = linux_host_memory().map_shared(fd, bytes);
    EXPECT_TRUE(mapped.is_ok()) << mapped.status().message();
    begin = mapped.value();
  }
  ~MappedFile() {
    linux_host_memory().unmap(begin, bytes);
    ::close(fd);
  }

  // Pages of the mapping that are present.
  std::size_t resident(std::byte* from, std::uint64_t size) const {
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    std::vector<unsigned char> present((size + page - 1) / page);
    EXPECT_EQ(::mincore(from, size, present.data()), 0);
    return static_cast<std::size_t>(
        std::count_if(present.begin(), present.end(), [](unsigned char flags) { return (flags & 1) != 0; }));
  }

  const std::uint64_t bytes;
  int fd = -1;
  std::byte* begin = nullptr;
};

std::size_t open_descriptors() {
  std::size_t count = 0;
  for (int fd = 0; fd < 1024; ++fd) count += ::fcntl(fd, F_GETFD) != -1 ? 1U : 0U;
  return count;
}

std::size_t arena_mappings() {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);)
    count += line.find("kvtier-arena") != std::string::npos ? 1U : 0U;
  return count;
}

TEST(LinuxHostMemory, file_has_exactly_the_size_and_is_closed_on_exec) {
  MappedFile file(kBytes);
  struct stat status{};
  ASSERT_EQ(::fstat(file.fd, &status), 0);
  EXPECT_EQ(static_cast<std::uint64_t>(status.st_size), kBytes);
  EXPECT_EQ(::fcntl(file.fd, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
}

// Otherwise any process that got the descriptor could turn our next access into a SIGBUS.
TEST(LinuxHostMemory, nobody_can_change_the_size_or_the_seals) {
  MappedFile file(kBytes);
  EXPECT_EQ(::ftruncate(file.fd, 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::ftruncate(file.fd, 2 * kBytes), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(::fcntl(file.fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_EQ(errno, EPERM);
}

TEST(LinuxHostMemory, mapping_is_aligned_to_huge_pages_whatever_its_size) {
  for (const std::uint64_t bytes : {std::uint64_t{4096}, kHugePageBytes + 4096, kBytes}) {
    MappedFile file(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(file.begin) % kHugePageBytes, 0U) << bytes;
    file.begin[0] = file.begin[bytes - 1] = std::byte{7};
  }
}

TEST(LinuxHostMemory, populate_makes_pages_present_and_keeps_their_bytes) {
  MappedFile file(kBytes);
  file.begin[kHugePageBytes + 5] = std::byte{42};
  ASSERT_TRUE(linux_host_memory().populate(file.begin + kHugePageBytes, kHugePageBytes).is_ok());
  EXPECT_EQ(file.resident(file.begin + kHugePageBytes, kHugePageBytes),
            kHugePageBytes / static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)));
  EXPECT_EQ(file.begin[kHugePageBytes + 5], std::byte{42});
  EXPECT_EQ(file.begin[kHugePageBytes + 6], std::byte{0});
}

// Asks the kernel, which answers where the policy of an address and the page behind it are.
TEST(LinuxHostMemory, pages_come_from_the_preferred_node) {
  MappedFile file(kBytes);
  ASSERT_TRUE(linux_host_memory().prefer_node(file.begin, kBytes, 0).is_ok());
  int mode = -1;
  std::array<unsigned long, 1024 / 64> nodes{};
  ASSERT_EQ(::syscall(SYS_get_mempolicy, &mode, nodes.data(), 1024UL, file.begin + kHugePageBytes,
                      static_cast<unsigned long>(MPOL_F_ADDR)),
            0);
  EXPECT_EQ(mode, MPOL_PREFERRED);
  EXPECT_EQ(nodes[0], 1UL);
  ASSERT_TRUE(linux_host_memory().populate(file.begin, kBytes).is_ok());
  int node = -1;
  ASSERT_EQ(::syscall(SYS_get_mempolicy, &node, nullptr, 0UL, file.begin + kHugePageBytes,
                      static_cast<unsigned long>(MPOL_F_NODE | MPOL_F_ADDR)),
            0);
  EXPECT_EQ(node, 0);
}

TEST(LinuxHostMemory, refuses_a_node_that_there_is_not) {
  MappedFile file(kBytes);
  for (const int node : {-1, 1024, 1'000'000}) {
    const Status status = linux_host_memory().prefer_node(file.begin, kBytes, node);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << node;
    EXPECT_NE(status.message().find(std::to_string(node)), std::string::npos) << status.message();
  }
  const Status status = linux_host_memory().prefer_node(file.begin, kBytes, 1023);  // no machine has it
  EXPECT_EQ(status.code(), StatusCode::resource);
  EXPECT_NE(status.message().find("NUMA node 1023"), std::string::npos) << status.message();
}

TEST(LinuxHostMemory, touching_does_the_same_for_old_kernels) {
  MappedFile file(kBytes);
  file.begin[12345] = std::byte{42};
  internal::touch_pages(file.begin + 100, kHugePageBytes);  // one page more than it has bytes for
  EXPECT_EQ(file.resident(file.begin, kHugePageBytes + 4096),
            (kHugePageBytes + 4096) / static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)));
  EXPECT_EQ(file.begin[12345], std::byte{42});
  EXPECT_EQ(file.begin[12346], std::byte{0});
}

TEST(LinuxHostMemory, two_mappings_show_the_same_bytes) {
  MappedFile file(kBytes);
  Result<std::byte*> second = linux_host_memory().map_shared(file.fd, kBytes);
  ASSERT_TRUE(second.is_ok());
  std::memset(file.begin, 0x5a, 100);
  EXPECT_EQ(std::memcmp(file.begin, second.value(), 100), 0);
  linux_host_memory().unmap(second.value(), kBytes);
}

TEST(LinuxHostMemory, forked_child_does_not_inherit_the_mapping) {
  MappedFile file(kBytes);
  file.begin[0] = std::byte{1};
  ASSERT_GT(arena_mappings(), 0U);
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) ::_exit(arena_mappings() == 0 ? 0 : 1);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(LinuxHostMemory, leaves_nothing_behind) {
  const std::size_t descriptors = open_descriptors();
  const std::size_t mappings = arena_mappings();
  for (int i = 0; i < 3; ++i) MappedFile file(kBytes + 4096);
  EXPECT_EQ(open_descriptors(), descriptors);
  EXPECT_EQ(arena_mappings(), mappings);
}

TEST(LinuxHostMemory, failures_name_the_size_and_the_errno) {
  const std::size_t descriptors = open_descriptors();
  const std::uint64_t too_large = ~std::uint64_t{0} - 4095;
  const Result<int> created = linux_host_memory().create_shared(too_large);
  ASSERT_FALSE(created.is_ok());
  EXPECT_EQ(created.status().code(), StatusCode::resource);
  EXPECT_EQ(created.status().native_code(), EINVAL);
  EXPECT_NE(created.status().message().find(std::to_string(too_large)), std::string::npos);

  const Result<std::byte*> mapped = linux_host_memory().map_shared(-1, kBytes);
  ASSERT_FALSE(mapped.is_ok());
  EXPECT_EQ(mapped.status().native_code(), EBADF);
  EXPECT_EQ(open_descriptors(), descriptors);
}

bool is_hugetlb(int fd) {
  struct statfs filesystem{};
  return ::fstatfs(fd, &filesystem) == 0 && filesystem.f_type == HUGETLBFS_MAGIC;
}

// The pool is the machine's: the test takes part of what is free and skips when that is nothing.
TEST(LinuxHostMemory, huge_pages_are_used_when_they_are_free) {
  if (free_huge_page_bytes() < kBytes) {
    GTEST_SKIP() << "needs 4 free huge pages of 2 MiB (/proc/sys/vm/nr_hugepages)";
  }
  MappedFile file(kBytes);
  EXPECT_TRUE(is_hugetlb(file.fd));
  EXPECT_TRUE(linux_host_memory().populate(file.begin + 4096, kBytes - 8192).is_ok());
  EXPECT_EQ(::ftruncate(file.fd, 0), -1);
  MappedFile odd(kBytes + 4096);
  EXPECT_FALSE(is_hugetlb(odd.fd)) << "not a multiple of a huge page";
}

}  // namespace
}  // namespace kvtier
