#include "kvtier/index/expiries.h"

namespace kvtier {

void Expiries::set(EntryId id, std::int64_t at_us) {
  erase(id);
  times_.emplace(raw(id), at_us);  // first: if the other throws, the entry only never ends
  by_time_.emplace(at_us, raw(id));
}

void Expiries::erase(EntryId id) {
  const auto found = times_.find(raw(id));
  if (found == times_.end()) return;
  by_time_.erase({found->second, raw(id)});
  times_.erase(found);
}

std::optional<std::int64_t> Expiries::of(EntryId id) const {
  const auto found = times_.find(raw(id));
  return found == times_.end() ? std::nullopt : std::optional(found->second);
}

std::optional<std::int64_t> Expiries::next_us() const {
  return by_time_.empty() ? std::nullopt : std::optional(by_time_.begin()->first);
}

std::optional<EntryId> Expiries::first() const {
  return by_time_.empty() ? std::nullopt : std::optional(EntryId{by_time_.begin()->second});
}

}  // namespace kvtier
