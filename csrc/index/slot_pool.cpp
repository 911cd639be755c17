#include "kvtier/index/slot_pool.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {

SlotPool::SlotPool(std::uint32_t capacity)
    : states_(capacity, SlotState::free), is_recycled_(capacity, false) {
  counts_[static_cast<int>(SlotState::free)] = capacity;
  recycled_.reserve(capacity);  // so that freeing never allocates
}

void SlotPool::grow(std::uint32_t usable) { usable_ = std::max(usable_, std::min(usable, capacity())); }

std::optional<SlotId> SlotPool::take() {
  while (!recycled_.empty()) {
    const SlotId slot = recycled_.back();
    recycled_.pop_back();
    is_recycled_[raw(slot)] = false;
    if (states_[raw(slot)] != SlotState::free) continue;  // take_at() was faster
    set(slot, SlotState::filling);
    return slot;
  }
  while (next_unused_ < usable_) {
    const SlotId slot{next_unused_++};
    if (states_[raw(slot)] != SlotState::free) continue;
    set(slot, SlotState::filling);
    return slot;
  }
  return std::nullopt;
}

bool SlotPool::take_at(SlotId slot) {
  if (raw(slot) >= usable_ || states_[raw(slot)] != SlotState::free) return false;
  set(slot, SlotState::filling);
  return true;
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
  // A slot that take_at() took from those never used is still to be handed out by take().
  if (to == SlotState::free && raw(slot) < next_unused_ && !is_recycled_[raw(slot)]) {
    recycled_.push_back(slot);
    is_recycled_[raw(slot)] = true;
  }
}

SlotPool::Counts SlotPool::counts() const {
  return {counts_[static_cast<int>(SlotState::free)], counts_[static_cast<int>(SlotState::filling)],
          counts_[static_cast<int>(SlotState::ready)], counts_[static_cast<int>(SlotState::leaving)]};
}

}  // namespace kvtier
