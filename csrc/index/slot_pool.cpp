#include "kvtier/index/slot_pool.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {

SlotPool::SlotPool(std::uint32_t capacity) : states_(capacity, SlotState::free) {
  counts_[static_cast<int>(SlotState::free)] = capacity;
  recycled_.reserve(capacity);  // so that freeing never allocates
}

void SlotPool::grow(std::uint32_t usable) { usable_ = std::max(usable_, std::min(usable, capacity())); }

std::optional<SlotId> SlotPool::take() {
  SlotId slot;
  if (!recycled_.empty()) {
    slot = recycled_.back();
    recycled_.pop_back();
  } else if (next_unused_ < usable_) {
    slot = SlotId{next_unused_++};
  } else {
    return std::nullopt;
  }
  set(slot, SlotState::filling);
  return slot;
}

void SlotPool::step(SlotId slot, SlotState to) {
  KVTIER_CHECK(to != SlotState::filling);
  KVTIER_CHECK(raw(slot) < capacity());
  set(slot, to);
}

void SlotPool::set(SlotId slot, SlotState to) {
  SlotState& state = states_[raw(slot)];
  KVTIER_CHECK(slot_step_allowed(state, to));
  --counts_[static_cast<int>(state)];
  ++counts_[static_cast<int>(to)];
  state = to;
  if (to == SlotState::free) recycled_.push_back(slot);
}

SlotPool::Counts SlotPool::counts() const {
  return {counts_[static_cast<int>(SlotState::free)], counts_[static_cast<int>(SlotState::filling)],
          counts_[static_cast<int>(SlotState::ready)], counts_[static_cast<int>(SlotState::leaving)]};
}

}  // namespace kvtier
