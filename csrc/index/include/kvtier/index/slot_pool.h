// SlotPool: which slots of one size class are free, and in which state the others are (I1, I2).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvtier/core/huge_vector.h"
#include "kvtier/core/types.h"

namespace kvtier {

// A slot's life. Only these steps are allowed (slot_step_allowed; the table is in docs/invariants.md):
//
//   free -> filling -> ready -> free          stored, then evicted or dropped
//           filling -> free                   the copy failed, or its block was dropped meanwhile
//           filling -> leaving -> free        the copy failed and may still be running: quarantined
//                      ready -> leaving -> free   dropped while pinned: freed with its last pin
enum class SlotState : std::uint8_t { free, filling, ready, leaving };

constexpr bool slot_step_allowed(SlotState from, SlotState to) {
  switch (from) {
    case SlotState::free: return to == SlotState::filling;
    case SlotState::filling: return to != SlotState::filling;
    case SlotState::ready: return to == SlotState::free || to == SlotState::leaving;
    case SlotState::leaving: return to == SlotState::free;
  }
  return false;
}

// Threads: none of its own; guarded by its owner. A step that is not allowed is a bug (KVTIER_CHECK).
class SlotPool {
 public:
  struct Counts {
    std::uint32_t free = 0;
    std::uint32_t filling = 0;
    std::uint32_t ready = 0;
    std::uint32_t leaving = 0;
  };

  // `capacity` slots in all, none usable yet.
  explicit SlotPool(std::uint32_t capacity);

  // The first `usable` slots may be handed out; never shrinks.
  void grow(std::uint32_t usable);
  // A free slot, now filling; nullopt when there is none.
  std::optional<SlotId> take();
  // That very slot, now filling; false when it is not free or not usable. For slots whose blocks were found
  // again after a restart.
  bool take_at(SlotId slot);
  // To `filling` only take() goes: it knows which slots are usable and free.
  void step(SlotId slot, SlotState to);

  // Whether take() would find one.
  bool has_free() const { return counts_[static_cast<int>(SlotState::free)] > capacity() - usable_; }
  SlotState state(SlotId slot) const { return states_[raw(slot)]; }
  std::uint32_t capacity() const { return static_cast<std::uint32_t>(states_.size()); }
  std::uint32_t usable() const { return usable_; }
  // Slots that are not usable yet count as free: the sum is always the capacity (I1).
  Counts counts() const;

 private:
  void set(SlotId slot, SlotState to);

  HugeVector<SlotState> states_;
  // Freed slots, last one first: its lines are the warmest. One that take_at() took may still stand here.
  HugeVector<SlotId> recycled_;
  std::vector<bool> is_recycled_;  // so that none stands there twice
  std::uint32_t next_unused_ = 0;  // slots from here to usable_ were never taken by take()
  std::uint32_t usable_ = 0;
  std::uint32_t counts_[4] = {};
};

}  // namespace kvtier
