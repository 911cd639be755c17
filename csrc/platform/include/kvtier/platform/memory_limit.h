// How much memory this process may still take: what its cgroups (v1 and v2) and the machine leave.
//
// The parsers are pure. `root` is put before every path that is read: "" is the machine itself, tests
// pass a directory of fixtures.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kvtier/core/status.h"

namespace kvtier {

// The only size of huge page that is used: enough for DMA and direct I/O, and finely divisible.
inline constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

// A directory of a cgroup hierarchy that accounts for this process's memory.
struct MemoryCgroup {
  enum class Version : std::uint8_t { v1, v2 };
  Version version;
  std::string path;

  friend bool operator==(const MemoryCgroup&, const MemoryCgroup&) = default;
};

// The number behind `key` in lines of "key value" or "key: value kB"; the unit is not applied.
std::optional<std::uint64_t> stat_value(std::string_view text, std::string_view key);

// The cgroups that hold this process, its own first, then each ancestor up to the mount point: a limit
// on any of them binds. Takes the text of /proc/self/cgroup and of /proc/self/mountinfo.
std::vector<MemoryCgroup> memory_cgroups(std::string_view self_cgroup, std::string_view mountinfo);

// Limit less usage, page cache that the kernel gives up first counted as unused; nullopt when unlimited.
std::optional<std::uint64_t> cgroup_room_bytes(const MemoryCgroup& cgroup, const std::string& root = "");

// Huge pages that are reserved for the machine and promised to nobody yet.
std::uint64_t free_huge_page_bytes(const std::string& root = "");

// The most that a new mapping of ordinary pages may take. Huge pages are a supply of their own, which neither
// this nor a cgroup's usage counts.
Result<std::uint64_t> available_memory_bytes(const std::string& root = "");

}  // namespace kvtier
