// Expiries: which entries have a time to live, and whose ends first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

#include "kvtier/index/eviction.h"

namespace kvtier {

// Threads: none of its own; guarded by its owner. Every operation is O(log n). Memory: about 120 bytes for an
// entry that has a time to live, nothing for the others.
class Expiries {
 public:
  // Instead of what was said of it before.
  void set(EntryId id, std::int64_t at_us);
  void erase(EntryId id);
  // nullopt: it has none.
  std::optional<std::int64_t> of(EntryId id) const;
  // When the first of all ends.
  std::optional<std::int64_t> next_us() const;
  // The first of all.
  std::optional<EntryId> first() const;
  std::size_t size() const { return times_.size(); }

  static constexpr std::size_t kBytesPerEntry = 120;

 private:
  std::set<std::pair<std::int64_t, std::uint32_t>> by_time_;
  std::unordered_map<std::uint32_t, std::int64_t> times_;
};

}  // namespace kvtier
