// Regions: the address ranges that a SimulatedDevice knows, allocations or registrations. None overlap.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>

#include "simulated_schedule.h"

namespace kvtier::simulated {

class Regions {
 public:
  void add(std::byte* begin, std::size_t bytes) {
    regions_[address(begin)] = std::make_shared<Region>(Region{begin, bytes});
  }
  // Null if no region begins there.
  std::shared_ptr<Region> take(const void* begin) {
    auto node = regions_.extract(address(begin));
    if (node.empty()) return nullptr;
    node.mapped()->alive = false;
    return node.mapped();
  }
  std::shared_ptr<Region> take_any() {
    return regions_.empty() ? nullptr : take(regions_.begin()->second->begin);
  }
  // The region that holds all of [begin, begin + bytes), or null.
  std::shared_ptr<Region> holding(const void* begin, std::size_t bytes) const {
    const auto after = regions_.upper_bound(address(begin));
    if (after == regions_.begin()) return nullptr;
    const std::shared_ptr<Region>& region = std::prev(after)->second;
    const std::size_t offset = address(begin) - address(region->begin);
    return offset <= region->bytes && bytes <= region->bytes - offset ? region : nullptr;
  }
  bool overlap(const void* begin, std::size_t bytes) const {
    const auto after = regions_.lower_bound(address(begin));
    if (after != regions_.end() && after->first - address(begin) < bytes) return true;
    return after != regions_.begin() &&
           address(begin) - std::prev(after)->first < std::prev(after)->second->bytes;
  }

 private:
  static std::uintptr_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }
  std::map<std::uintptr_t, std::shared_ptr<Region>> regions_;
};

}  // namespace kvtier::simulated
