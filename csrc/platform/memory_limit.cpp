#include "kvtier/platform/memory_limit.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <iterator>

namespace kvtier {
namespace {

// Calls fn(line) for each line until it returns true.
template <typename Fn>
void each_line(std::string_view text, Fn fn) {
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    if (fn(text.substr(0, end))) return;
    text.remove_prefix(std::min(end + 1, text.size()));
  }
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos) return parts;
    text.remove_prefix(end + 1);
  }
}

bool contains(const std::vector<std::string_view>& parts, std::string_view part) {
  return std::find(parts.begin(), parts.end(), part) != parts.end();
}

std::optional<std::uint64_t> number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{}) return std::nullopt;
  return value;
}

// Empty when there is no such file. Files of procfs and cgroupfs tell no size, so read to the end.
std::string read_text(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

struct CgroupMount {
  MemoryCgroup::Version version;
  std::string_view root;   // which cgroup is mounted: not "/" in a container without a cgroup namespace
  std::string_view point;  // where
};

// A line reads: id parent major:minor root point options [tag...] - type source super_options
std::optional<CgroupMount> parse_mount(std::string_view line) {
  const std::size_t dash = line.find(" - ");
  if (dash == std::string_view::npos) return std::nullopt;
  const std::vector<std::string_view> left = split(line.substr(0, dash), ' ');
  const std::vector<std::string_view> right = split(line.substr(dash + 3), ' ');
  if (left.size() < 5 || right.size() < 3) return std::nullopt;
  if (right[0] == "cgroup2") return CgroupMount{MemoryCgroup::Version::v2, left[3], left[4]};
  if (right[0] == "cgroup" && contains(split(right[2], ','), "memory")) {
    return CgroupMount{MemoryCgroup::Version::v1, left[3], left[4]};
  }
  return std::nullopt;
}

// The part of `path` below the mount's root; nullopt when the path is not inside of it.
std::optional<std::string_view> below(std::string_view path, std::string_view root) {
  if (root == "/") root = "";
  if (path.substr(0, root.size()) != root) return std::nullopt;
  path.remove_prefix(root.size());
  if (!path.empty() && path.front() != '/') return std::nullopt;
  if (path.substr(0, 3) == "/..") return std::nullopt;  // outside of our cgroup namespace
  return path == "/" ? std::string_view{} : path;
}

void append_hierarchy(MemoryCgroup::Version version, std::string_view self_path,
                      const std::vector<CgroupMount>& mounts, std::vector<MemoryCgroup>& out) {
  const CgroupMount* mount = nullptr;
  std::string_view rest;
  for (const CgroupMount& candidate : mounts) {
    if (candidate.version != version) continue;
    if (mount == nullptr) mount = &candidate;  // without a better one, its mount point is all we can see
    if (const auto inside = below(self_path, candidate.root)) {
      mount = &candidate;
      rest = *inside;
      break;
    }
  }
  if (mount == nullptr) return;
  for (;;) {
    out.push_back({version, std::string(mount->point) + std::string(rest)});
    if (rest.empty()) return;
    rest = rest.substr(0, rest.rfind('/'));
  }
}

}  // namespace

std::optional<std::uint64_t> stat_value(std::string_view text, std::string_view key) {
  std::optional<std::uint64_t> value;
  each_line(text, [&](std::string_view line) {
    if (line.substr(0, key.size()) != key) return false;
    line.remove_prefix(key.size());
    const std::size_t begin = line.find_first_not_of(": \t");
    if (begin == 0 || begin == std::string_view::npos) return false;  // a longer key, or no value
    value = number(line.substr(begin));
    return true;
  });
  return value;
}

std::vector<MemoryCgroup> memory_cgroups(std::string_view self_cgroup, std::string_view mountinfo) {
  std::vector<CgroupMount> mounts;
  each_line(mountinfo, [&](std::string_view line) {
    if (const auto mount = parse_mount(line)) mounts.push_back(*mount);
    return false;
  });

  // A line reads: hierarchy:controllers:path, and "0::path" is version 2. A machine may have both; then
  // only one of them has the memory files, and the directories of the other say nothing.
  std::vector<MemoryCgroup> found;
  each_line(self_cgroup, [&](std::string_view line) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string_view::npos ? first : line.find(':', first + 1);
    if (second == std::string_view::npos) return false;
    const std::string_view controllers = line.substr(first + 1, second - first - 1);
    const std::string_view path = line.substr(second + 1);
    if (controllers.empty()) append_hierarchy(MemoryCgroup::Version::v2, path, mounts, found);
    if (contains(split(controllers, ','), "memory")) {
      append_hierarchy(MemoryCgroup::Version::v1, path, mounts, found);
    }
    return false;
  });
  return found;
}

std::optional<std::uint64_t> cgroup_room_bytes(const MemoryCgroup& cgroup, const std::string& root) {
  const std::string directory = root + cgroup.path + "/";
  const bool v1 = cgroup.version == MemoryCgroup::Version::v1;
  std::optional<std::uint64_t> limit =
      number(read_text(directory + (v1 ? "memory.limit_in_bytes" : "memory.max")));
  if (!v1) {
    // Above `high` nothing is killed, but every allocation stalls in reclaim, and an arena cannot be
    // reclaimed.
    const std::optional<std::uint64_t> high = number(read_text(directory + "memory.high"));
    if (high) limit = std::min(*high, limit.value_or(*high));
  }
  if (!limit) return std::nullopt;  // "max", or no such file

  const std::uint64_t usage =
      number(read_text(directory + (v1 ? "memory.usage_in_bytes" : "memory.current"))).value_or(0);
  const std::uint64_t cache =
      stat_value(read_text(directory + "memory.stat"), v1 ? "total_inactive_file" : "inactive_file")
          .value_or(0);
  const std::uint64_t used = usage - std::min(usage, cache);
  return *limit - std::min(*limit, used);
}

std::uint64_t free_huge_page_bytes(const std::string& root) {
  const std::string directory = root + "/sys/kernel/mm/hugepages/hugepages-2048kB/";
  const std::uint64_t free = number(read_text(directory + "free_hugepages")).value_or(0);
  const std::uint64_t promised = number(read_text(directory + "resv_hugepages")).value_or(0);
  return (free - std::min(free, promised)) * kHugePageBytes;
}

Result<std::uint64_t> available_memory_bytes(const std::string& root) {
  const std::optional<std::uint64_t> machine_kib =
      stat_value(read_text(root + "/proc/meminfo"), "MemAvailable");
  if (!machine_kib) return Status::resource("cannot read MemAvailable from " + root + "/proc/meminfo");
  std::uint64_t available = *machine_kib * 1024;
  for (const MemoryCgroup& cgroup :
       memory_cgroups(read_text(root + "/proc/self/cgroup"), read_text(root + "/proc/self/mountinfo"))) {
    if (const auto room = cgroup_room_bytes(cgroup, root)) available = std::min(available, *room);
  }
  return available;
}

}  // namespace kvtier
