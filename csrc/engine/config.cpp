#include <algorithm>
#include <map>

#include "kvtier/engine/engine.h"

namespace kvtier {
namespace {

constexpr std::size_t kMaxGroups = 64;
constexpr std::uint64_t kMaxSlots = std::uint64_t{1} << 31;  // of all classes: EntryId has 32 bits
constexpr std::uint64_t kMaxHostBytes = std::uint64_t{1} << 46;

// Groups whose slots have the same stride share a size class. Ordered, so every process agrees.
std::map<std::uint64_t, std::uint32_t> groups_by_stride(const std::vector<GroupSpec>& groups) {
  std::map<std::uint64_t, std::uint32_t> count;
  for (const GroupSpec& group : groups) ++count[group.slot_stride_bytes()];
  return count;
}

std::uint64_t bytes_of_one_block_each(const std::vector<GroupSpec>& groups) {
  std::uint64_t bytes = 0;
  for (const GroupSpec& group : groups) bytes += group.slot_stride_bytes();
  return bytes;
}

Status check_eviction(const std::string& key, const std::string& name) {
  if (find_eviction(name) != nullptr) return Status::ok();
  std::string allowed;
  for (const EvictionChoice& choice : eviction_choices()) {
    allowed += (allowed.empty() ? "" : ", ") + std::string(choice.name);
  }
  return Status::invalid_argument(key + " is '" + name + "'; allowed: " + allowed);
}

}  // namespace

Status EngineConfig::validate() const {
  if (groups.empty() || groups.size() > kMaxGroups) {
    return Status::invalid_argument("groups has " + std::to_string(groups.size()) +
                                    " entries; allowed: 1 to " + std::to_string(kMaxGroups));
  }
  for (const GroupSpec& group : groups) {
    KVTIER_RETURN_IF_ERROR(group.validate());
    if (group.block_tokens != groups[0].block_tokens) {
      return Status::invalid_argument(
          "group '" + group.name + "': block_tokens is " + std::to_string(group.block_tokens) +
          "; every group has that of the first, " + std::to_string(groups[0].block_tokens));
    }
  }
  const std::uint64_t least = bytes_of_one_block_each(groups);
  if (host_bytes < least || host_bytes > kMaxHostBytes) {
    return Status::invalid_argument("host is " + std::to_string(host_bytes) +
                                    " bytes; allowed: " + std::to_string(least) +
                                    " (one block of every group) to " + std::to_string(kMaxHostBytes));
  }
  KVTIER_RETURN_IF_ERROR(check_eviction("eviction", eviction));
  return check_eviction("disk eviction", disk.eviction);
}

std::uint64_t EngineConfig::host_bytes_for(std::uint64_t blocks) const {
  return blocks * bytes_of_one_block_each(groups);
}

ArenaGeometry EngineConfig::geometry() const {
  const std::uint64_t blocks = host_bytes / std::max<std::uint64_t>(1, bytes_of_one_block_each(groups));
  ArenaGeometry geometry;
  geometry.chunk_bytes = chunk_bytes;
  const std::map<std::uint64_t, std::uint32_t> classes = groups_by_stride(groups);
  for (const auto& [stride, count] : classes) {
    const std::uint64_t slots =
        std::min(blocks * count, kMaxSlots / std::max<std::size_t>(1, classes.size()));
    geometry.classes.push_back({stride, static_cast<std::uint32_t>(slots)});
  }
  return geometry;
}

std::vector<std::size_t> EngineConfig::class_of_group() const {
  const std::map<std::uint64_t, std::uint32_t> classes = groups_by_stride(groups);
  std::vector<std::size_t> of_group;
  for (const GroupSpec& group : groups) {
    const auto found = classes.find(group.slot_stride_bytes());
    of_group.push_back(static_cast<std::size_t>(std::distance(classes.begin(), found)));
  }
  return of_group;
}

}  // namespace kvtier
