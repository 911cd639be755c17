#include "kvtier/index/tier_index.h"

#include <numeric>

#include "kvtier/core/status.h"

namespace kvtier {

namespace {

const EvictionChoice& chosen(std::string_view name) {
  const EvictionChoice* choice = find_eviction(name);
  KVTIER_CHECK(choice != nullptr);  // EngineConfig::validate() has seen to it
  return *choice;
}

EventKind event_of(Departure why) {
  switch (why) {
    case Departure::evicted: return EventKind::evicted;
    case Departure::dropped: return EventKind::dropped;
    case Departure::failed: return EventKind::failed;
  }
  return EventKind::dropped;
}

}  // namespace

TierIndex::TierIndex(const Options& options)
    : class_of_group_(options.class_of_group),
      classes_per_volume_(options.slots_per_class.size() / options.num_volumes),
      leaf_first_(options.leaf_first.value_or(chosen(options.eviction).leaf_first)),
      index_(std::accumulate(options.slots_per_class.begin(), options.slots_per_class.end(), std::size_t{0}),
             options.hash_seed) {
  for (const std::uint32_t slots : options.slots_per_class) {
    EvictionOptions policy{.records = index_.capacity(), .blocks = slots, .seed = options.hash_seed};
    if (!options.block_bytes.empty()) {
      policy.block_bytes = options.block_bytes[classes_.size() % classes_per_volume_];
    }
    classes_.push_back({SlotPool(slots), chosen(options.eviction).make(policy)});
  }
}

TierIndex::Reservation TierIndex::reserve(const BlockKey& key, GroupId group, NamespaceId name_space,
                                          std::uint32_t depth, Entry* parent, std::uint32_t volume) {
  if (Entry* found = index_.find(key, group)) {
    return {found->state == SlotState::ready ? ReserveOutcome::present : ReserveOutcome::pending, found};
  }
  Class& tier_class = classes_[class_of(group, volume)];
  std::optional<SlotId> slot = tier_class.slots.take();
  if (!slot) {
    // The parent has no child yet to hold it, and must not be the victim of its own child.
    const bool hold_parent = parent != nullptr && tracked(*parent) && evictable(*parent);
    if (hold_parent) class_for(*parent).policy->hold(index_.id(*parent));
    if (evict_one(tier_class)) slot = tier_class.slots.take();
    if (hold_parent) class_for(*parent).policy->let_go(index_.id(*parent));
  }
  if (!slot) return {ReserveOutcome::declined, nullptr};

  Entry& entry = index_.insert(key, group);
  entry.name_space = name_space;
  entry.depth = depth;
  entry.slot = *slot;
  entry.volume = static_cast<std::uint8_t>(volume & 0x7fU);
  if (parent != nullptr) link_parent(entry, *parent);
  return {ReserveOutcome::reserved, &entry};
}

void TierIndex::link_parent(Entry& child, Entry& parent) {
  if (leaf_first_ && tracked(parent) && evictable(parent)) class_for(parent).policy->hold(index_.id(parent));
  index_.set_parent(child, parent);
}

void TierIndex::adopt(Entry& child, Entry& parent) {
  if (index_.forget_erased_parent(child)) link_parent(child, parent);
}

Entry* TierIndex::restore(const BlockKey& key, GroupId group, NamespaceId name_space, std::uint32_t depth,
                          std::uint32_t volume, SlotId slot) {
  Class& tier_class = classes_[class_of(group, volume)];
  if (index_.find(key, group) != nullptr || !tier_class.slots.take_at(slot)) return nullptr;
  Entry& entry = index_.insert(key, group);
  entry.name_space = name_space;
  entry.depth = depth;
  entry.slot = slot;
  entry.volume = static_cast<std::uint8_t>(volume & 0x7fU);
  make_ready(entry);
  return &entry;
}

const Entry* TierIndex::next_victim(std::size_t class_index) {
  const std::optional<EntryId> victim = classes_[class_index].policy->victim();
  return victim ? &index_.at(*victim) : nullptr;
}

bool TierIndex::evict_one(Class& tier_class) {
  const std::optional<EntryId> victim = tier_class.policy->victim();
  if (!victim) return false;
  KVTIER_CHECK(index_.at(*victim).state == SlotState::ready && index_.at(*victim).pins == 0);
  orphans_ += index_.at(*victim).children;
  remove(index_.at(*victim), Departure::evicted);
  ++evictions_;
  return true;
}

bool TierIndex::commit(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::filling);
  if (!entry.linked) {
    free_slot(entry);
    return false;
  }
  make_ready(entry);
  if (feed_ != nullptr) feed_->push(entry.key, entry.group, tier_, EventKind::stored);
  return true;
}

void TierIndex::make_ready(Entry& entry) {
  entry.state = SlotState::ready;
  class_for(entry).slots.step(entry.slot, SlotState::ready);
  const Entry* parent = index_.parent(entry);
  class_for(entry).policy->insert(
      index_.id(entry), {.key = entry.key,
                         .group = entry.group,
                         .depth = entry.depth,
                         .parent = parent == nullptr ? std::nullopt : std::optional(index_.id(*parent))});
  // Children may have been reserved, even committed, before their parent's own copy was over.
  if (!evictable(entry)) class_for(entry).policy->hold(index_.id(entry));
}

void TierIndex::abort(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::filling);
  if (entry.linked) index_.unlink(entry);
  free_slot(entry);
}

void TierIndex::quarantine(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::filling);
  if (entry.linked) index_.unlink(entry);
  entry.state = SlotState::leaving;
  class_for(entry).slots.step(entry.slot, SlotState::leaving);
}

void TierIndex::release_quarantined(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::leaving && entry.pins == 0);  // pinned ones go with their last pin
  free_slot(entry);
}

void TierIndex::pin(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::ready);
  if (tracked(entry) && evictable(entry)) class_for(entry).policy->hold(index_.id(entry));
  if (entry.pins++ == 0) ++pinned_blocks_;
  ++pins_;
}

void TierIndex::unpin(Entry& entry) {
  KVTIER_CHECK(entry.pins > 0);
  --pins_;
  if (--entry.pins > 0) return;
  --pinned_blocks_;
  if (entry.state == SlotState::leaving) {
    free_slot(entry);
  } else if (tracked(entry) && evictable(entry)) {
    class_for(entry).policy->let_go(index_.id(entry));
  }
}

void TierIndex::touch(Entry& entry) {
  KVTIER_CHECK(entry.linked && entry.state == SlotState::ready);
  class_for(entry).policy->touch(index_.id(entry));
}

void TierIndex::remove(Entry& entry, Departure why) {
  index_.unlink(entry);
  if (entry.state == SlotState::filling) return;  // commit() or abort() frees the slot
  class_for(entry).policy->erase(index_.id(entry), why);
  if (feed_ != nullptr) feed_->push(entry.key, entry.group, tier_, event_of(why));
  if (entry.pins > 0) {
    entry.state = SlotState::leaving;
    class_for(entry).slots.step(entry.slot, SlotState::leaving);
  } else {
    free_slot(entry);
  }
}

void TierIndex::free_slot(Entry& entry) {
  class_for(entry).slots.step(entry.slot, SlotState::free);
  entry.state = SlotState::free;
  Entry* parent = index_.erase(entry);  // non-null: it was its last child
  if (leaf_first_ && parent != nullptr && tracked(*parent) && evictable(*parent)) {
    class_for(*parent).policy->let_go(index_.id(*parent));
  }
}

void TierIndex::advance(std::int64_t now_us) {
  for (Class& each : classes_) each.policy->advance(now_us);
}

void TierIndex::expect(const BlockKey& key, GroupId group) {
  for (std::size_t c = class_of(group); c < classes_.size(); c += classes_per_volume_) {
    classes_[c].policy->expect(key, group);
  }
}

void TierIndex::expect_no_more(const BlockKey& key, GroupId group) {
  for (std::size_t c = class_of(group); c < classes_.size(); c += classes_per_volume_) {
    classes_[c].policy->expect_no_more(key, group);
  }
}

double TierIndex::bytes_per_block() const {
  double bytes = index_.bytes_per_entry() + sizeof(SlotState) + sizeof(SlotId);
  for (const Class& each : classes_) bytes += each.policy->bytes_per_record();
  return bytes;
}

}  // namespace kvtier
