#include "kvtier/platform/memory_limit.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace kvtier {
namespace {

using Version = MemoryCgroup::Version;

// A file tree under a fresh directory that stands for "/".
class FakeRoot {
 public:
  FakeRoot() {
    std::string name = (std::filesystem::temp_directory_path() / "kvtier_root_XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~FakeRoot() { std::filesystem::remove_all(path_); }

  void write(const std::string& file, const std::string& text) const {
    const std::filesystem::path path = path_ + file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

constexpr const char* kMeminfo =
    "MemTotal:       1000000 kB\n"
    "MemFree:         100000 kB\n"
    "MemAvailable:    800000 kB\n";

TEST(StatValue, finds_whole_keys_only) {
  EXPECT_EQ(stat_value(kMeminfo, "MemAvailable"), 800000U);
  EXPECT_EQ(stat_value("active_inactive_file 1\ninactive_file 2\n", "inactive_file"), 2U);
  EXPECT_EQ(stat_value("inactive_files 1\ninactive_file 2", "inactive_file"), 2U);
  EXPECT_EQ(stat_value(kMeminfo, "Mem"), std::nullopt);
  EXPECT_EQ(stat_value("inactive_file\n", "inactive_file"), std::nullopt);
  EXPECT_EQ(stat_value("inactive_file max\n", "inactive_file"), std::nullopt);
  EXPECT_EQ(stat_value("", "inactive_file"), std::nullopt);
}

TEST(MemoryCgroups, version_2_walks_up_to_the_mount_point) {
  const std::vector<MemoryCgroup> expected = {
      {Version::v2, "/sys/fs/cgroup/user.slice/job.scope"},
      {Version::v2, "/sys/fs/cgroup/user.slice"},
      {Version::v2, "/sys/fs/cgroup"},
  };
  EXPECT_EQ(memory_cgroups("0::/user.slice/job.scope\n",
                           "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
                           "31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n"),
            expected);
}

TEST(MemoryCgroups, version_1_uses_the_memory_hierarchy_only) {
  const std::vector<MemoryCgroup> expected = {
      {Version::v1, "/sys/fs/cgroup/memory/a:b"},  // a path may hold colons
      {Version::v1, "/sys/fs/cgroup/memory"},
  };
  EXPECT_EQ(memory_cgroups("5:cpu,cpuacct:/other\n4:memory:/a:b\n1:name=systemd:/\n",
                           "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
                           "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            expected);
}

TEST(MemoryCgroups, both_versions_at_once) {
  const std::vector<MemoryCgroup> expected = {
      {Version::v1, "/sys/fs/cgroup/memory/job"},
      {Version::v1, "/sys/fs/cgroup/memory"},
      {Version::v2, "/sys/fs/cgroup/unified"},
  };
  EXPECT_EQ(memory_cgroups("4:memory:/job\n0::/\n",
                           "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
                           "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"),
            expected);
}

// Docker on cgroup v1 without a cgroup namespace: the path is the host's, the mount shows a part of it.
TEST(MemoryCgroups, a_mounted_subtree_is_taken_off_the_path) {
  const std::vector<MemoryCgroup> expected = {
      {Version::v1, "/sys/fs/cgroup/memory/sub"},
      {Version::v1, "/sys/fs/cgroup/memory"},
  };
  EXPECT_EQ(memory_cgroups("4:memory:/docker/abc/sub\n",
                           "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"),
            expected);
}

TEST(MemoryCgroups, a_path_that_is_not_visible_falls_back_to_the_mount_point) {
  const std::vector<MemoryCgroup> expected = {{Version::v2, "/sys/fs/cgroup"}};
  const std::string whole = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
  const std::string part = "31 23 0:28 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
  EXPECT_EQ(memory_cgroups("0::/../other\n", whole), expected);
  EXPECT_EQ(memory_cgroups("0::/docker/abc\n", part), expected);
}

TEST(MemoryCgroups, nonsense_yields_nothing) {
  EXPECT_TRUE(memory_cgroups("", "").empty());
  EXPECT_TRUE(memory_cgroups("0::/a", "no such line\n - \n1 2 - cgroup2\n").empty());
  EXPECT_TRUE(memory_cgroups("0\n0:\n:\n", "31 23 0:28 / /c rw - cgroup2 cgroup2 rw\n").empty());
}

TEST(CgroupRoom, page_cache_that_can_go_counts_as_room) {
  FakeRoot root;
  root.write("/c/memory.max", "1000\n");
  root.write("/c/memory.current", "700\n");
  root.write("/c/memory.stat", "anon 400\nfile 300\ninactive_file 250\nactive_file 50\n");
  EXPECT_EQ(cgroup_room_bytes({Version::v2, "/c"}, root.path()), 550U);
}

TEST(CgroupRoom, version_1_counts_the_whole_subtree) {
  FakeRoot root;
  root.write("/c/memory.limit_in_bytes", "1000\n");
  root.write("/c/memory.usage_in_bytes", "700\n");
  root.write("/c/memory.stat", "inactive_file 1\ntotal_inactive_file 200\n");
  EXPECT_EQ(cgroup_room_bytes({Version::v1, "/c"}, root.path()), 500U);
}

TEST(CgroupRoom, the_throttle_binds_like_the_limit) {
  FakeRoot root;
  root.write("/c/memory.max", "max\n");
  root.write("/c/memory.high", "600\n");
  root.write("/c/memory.current", "100\n");
  EXPECT_EQ(cgroup_room_bytes({Version::v2, "/c"}, root.path()), 500U);
  root.write("/c/memory.max", "300\n");
  EXPECT_EQ(cgroup_room_bytes({Version::v2, "/c"}, root.path()), 200U);
}

TEST(CgroupRoom, nothing_is_left_above_the_limit_and_no_limit_is_no_number) {
  FakeRoot root;
  root.write("/full/memory.max", "100\n");
  root.write("/full/memory.current", "150\n");
  EXPECT_EQ(cgroup_room_bytes({Version::v2, "/full"}, root.path()), 0U);
  root.write("/free/memory.max", "max\n");
  root.write("/free/memory.current", "150\n");
  EXPECT_EQ(cgroup_room_bytes({Version::v2, "/free"}, root.path()), std::nullopt);
  EXPECT_EQ(cgroup_room_bytes({Version::v2, "/none"}, root.path()), std::nullopt);
}

class AvailableMemory : public ::testing::Test {
 protected:
  AvailableMemory() {
    root_.write("/proc/meminfo", kMeminfo);
    root_.write("/proc/self/cgroup", "0::/outer/inner\n");
    root_.write("/proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  }
  std::uint64_t available() const {
    const Result<std::uint64_t> bytes = available_memory_bytes(root_.path());
    EXPECT_TRUE(bytes.is_ok()) << bytes.status().message();
    return bytes.is_ok() ? bytes.value() : 0;
  }
  FakeRoot root_;
};

TEST_F(AvailableMemory, is_what_the_machine_has_without_limits) { EXPECT_EQ(available(), 800000U * 1024); }

TEST_F(AvailableMemory, an_ancestors_limit_binds) {
  root_.write("/sys/fs/cgroup/outer/inner/memory.max", "500000000\n");
  root_.write("/sys/fs/cgroup/outer/inner/memory.current", "1000\n");
  EXPECT_EQ(available(), 499999000U);
  root_.write("/sys/fs/cgroup/outer/memory.max", "600000000\n");
  root_.write("/sys/fs/cgroup/outer/memory.current", "599999000\n");
  EXPECT_EQ(available(), 1000U);
}

TEST_F(AvailableMemory, free_huge_pages_are_a_supply_of_their_own) {
  const std::string directory = "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  root_.write(directory + "free_hugepages", "1000\n");
  root_.write(directory + "resv_hugepages", "400\n");
  EXPECT_EQ(free_huge_page_bytes(root_.path()), 600 * kHugePageBytes);
  EXPECT_EQ(available(), 800000U * 1024) << "of ordinary pages";
  root_.write(directory + "resv_hugepages", "1001\n");
  EXPECT_EQ(free_huge_page_bytes(root_.path()), 0U);
  EXPECT_EQ(available(), 800000U * 1024);
}

TEST(AvailableMemoryErrors, a_machine_that_says_nothing_is_an_error) {
  FakeRoot root;
  const Result<std::uint64_t> bytes = available_memory_bytes(root.path());
  ASSERT_FALSE(bytes.is_ok());
  EXPECT_EQ(bytes.status().code(), StatusCode::resource);
  EXPECT_NE(bytes.status().message().find("MemAvailable"), std::string::npos);
}

TEST(AvailableMemoryOfThisMachine, is_between_nothing_and_everything) {
  const Result<std::uint64_t> bytes = available_memory_bytes();
  ASSERT_TRUE(bytes.is_ok()) << bytes.status().message();
  EXPECT_GT(bytes.value(), 0U);
  EXPECT_LT(bytes.value(), std::uint64_t{1} << 50);
}

}  // namespace
}  // namespace kvtier
