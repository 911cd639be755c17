// What tests of eviction policies share: blocks told by number.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "kvtier/core/status.h"
#include "kvtier/index/eviction.h"

namespace kvtier {

inline BlockKey numbered_key(std::uint64_t n) {
  BlockKey key{};
  std::memcpy(key.bytes.data(), &n, sizeof n);
  return key;
}

// A policy for blocks whose EntryIds and keys are their numbers, unless a key is given.
class NumberedPolicy {
 public:
  NumberedPolicy(std::string_view name, std::size_t blocks) : NumberedPolicy(name, blocks, blocks) {}
  NumberedPolicy(std::string_view name, std::size_t blocks, std::size_t records) {
    const EvictionChoice* choice = find_eviction(name);
    KVTIER_CHECK(choice != nullptr);
    policy_ = choice->make({.records = records, .blocks = blocks, .block_bytes = 4096, .seed = 7});
  }

  void insert(std::uint32_t id) { insert(id, id); }
  void insert(std::uint32_t id, std::uint64_t key, std::uint32_t depth = 0) {
    const BlockKey named = numbered_key(key);
    key_of_[id] = key;
    policy_->insert(EntryId{id}, {.key = named, .group = GroupId{0}, .depth = depth, .parent = std::nullopt});
  }
  void touch(std::uint32_t id) { policy_->touch(EntryId{id}); }
  void hold(std::uint32_t id) { policy_->hold(EntryId{id}); }
  void let_go(std::uint32_t id) { policy_->let_go(EntryId{id}); }
  void erase(std::uint32_t id, Departure why) {
    const BlockKey named = numbered_key(key_of_[id]);
    policy_->erase(EntryId{id}, {.key = named, .group = GroupId{0}}, why);
  }
  void drop(std::uint32_t id) { erase(id, Departure::dropped); }
  std::optional<std::uint32_t> victim() {
    const std::optional<EntryId> found = policy_->victim();
    return found ? std::optional(raw(*found)) : std::nullopt;
  }
  std::optional<std::uint32_t> evict() {
    const std::optional<std::uint32_t> found = victim();
    if (found) erase(*found, Departure::evicted);
    return found;
  }
  EvictionPolicy& policy() { return *policy_; }

 private:
  std::unique_ptr<EvictionPolicy> policy_;
  std::unordered_map<std::uint32_t, std::uint64_t> key_of_;
};

}  // namespace kvtier
