// UseObserver: who wants to know how the blocks of a tier are used.
#pragma once

#include <cstdint>
#include <span>

#include "kvtier/core/types.h"
#include "kvtier/index/eviction.h"

namespace kvtier {

class UseObserver {
 public:
  virtual ~UseObserver() = default;
  // The time of what follows: see EvictionPolicy::advance().
  virtual void advance(std::int64_t now_us) = 0;
  // A slot was reserved for it; those of a prompt come head first. `parent`: the block that it hangs on, of
  // the same group, or null. Valid during the call. What arrives ahead is not used yet.
  virtual void appears(const BlockKey& key, GroupId group, const BlockKey* parent, Arrival arrival) = 0;
  // EvictionPolicy::fetch() of those that are about to appear or to be used.
  virtual void fetch(std::span<const BlockKey> keys, GroupId group) const = 0;
  // It is there, and was used.
  virtual void used(const BlockKey& key, GroupId group) = 0;
};

}  // namespace kvtier
