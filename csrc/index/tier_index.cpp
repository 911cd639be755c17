#include "kvtier/index/tier_index.h"

#include <algorithm>
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
    case Departure::expired: return EventKind::expired;
  }
  return EventKind::dropped;
}

// The queues of Class::others.
constexpr std::uint32_t kNumQueues = 2;
std::uint32_t queue_of(Priority priority) { return priority == Priority::low ? 0 : 1; }

}  // namespace

TierIndex::TierIndex(const Options& options)
    : class_of_group_(options.class_of_group),
      classes_per_volume_(options.slots_per_class.size() / options.num_volumes),
      leaf_first_(options.leaf_first.value_or(chosen(options.eviction).leaf_first)),
      index_(std::accumulate(options.slots_per_class.begin(), options.slots_per_class.end(), std::size_t{0}),
             options.hash_seed) {
  const bool one_class = options.slots_per_class.size() == 1;
  for (const std::uint32_t slots : options.slots_per_class) {
    EvictionOptions policy{.records = slots, .blocks = slots, .seed = options.hash_seed};
    if (!options.block_bytes.empty()) {
      policy.block_bytes = options.block_bytes[classes_.size() % classes_per_volume_];
    }
    classes_.push_back(
        {SlotPool(slots),
         options.make_eviction ? options.make_eviction(policy) : chosen(options.eviction).make(policy),
         nullptr, HugeVector<EntryId>(one_class ? 0 : slots)});
  }
}

TierIndex::Reservation TierIndex::reserve(const BlockKey& key, GroupId group, NamespaceId name_space,
                                          std::uint32_t depth, Entry* parent, std::uint32_t volume,
                                          Priority priority, Arrival arrival) {
  if (Entry* found = index_.find(key, group)) {
    return {found->state == SlotState::ready ? ReserveOutcome::present : ReserveOutcome::pending, found};
  }
  Class& tier_class = classes_[class_of(group, volume)];
  make_queues(tier_class, priority);
  std::optional<SlotId> slot = tier_class.slots.take();
  if (!slot) {
    // The parent has no child yet to hold it, and must not be the victim of its own child.
    const bool hold_parent = parent != nullptr && tracked(*parent) && evictable(*parent);
    if (hold_parent) hold(*parent);
    if (evict_one(tier_class, priority)) slot = tier_class.slots.take();
    if (hold_parent) let_go(*parent);
  }
  if (!slot) return {ReserveOutcome::declined, nullptr};

  Entry& entry = index_.insert(key, group);
  entry.name_space = name_space;
  entry.depth = depth;
  entry.volume = static_cast<std::uint8_t>(volume & 0x7fU);
  put_into(tier_class, entry, *slot);
  entry.priority = priority;
  entry.ahead = arrival == Arrival::ahead;
  if (parent != nullptr) link_parent(entry, *parent);
  if (observer_ != nullptr) {
    observer_->appears(entry.key, group, parent == nullptr ? nullptr : &parent->key, arrival);
  }
  return {ReserveOutcome::reserved, &entry};
}

void TierIndex::link_parent(Entry& child, Entry& parent) {
  if (leaf_first_ && tracked(parent) && evictable(parent)) hold(parent);
  index_.set_parent(child, parent);
}

void TierIndex::adopt(Entry& child, Entry& parent) {
  if (index_.forget_erased_parent(child)) link_parent(child, parent);
}

void TierIndex::fetch(std::span<const BlockKey> keys, GroupId group) const {
  for (const BlockKey& key : keys) index_.fetch(key, group);
  for (std::size_t of = class_of_group_[raw(group)]; of < classes_.size(); of += classes_per_volume_) {
    classes_[of].policy->fetch(keys, group);
  }
  if (observer_ != nullptr) observer_->fetch(keys, group);
}

Entry* TierIndex::restore(const BlockKey& key, GroupId group, NamespaceId name_space, std::uint32_t depth,
                          std::uint32_t volume, SlotId slot) {
  Class& tier_class = classes_[class_of(group, volume)];
  if (index_.find(key, group) != nullptr || !tier_class.slots.take_at(slot)) return nullptr;
  Entry& entry = index_.insert(key, group);
  entry.name_space = name_space;
  entry.depth = depth;
  entry.volume = static_cast<std::uint8_t>(volume & 0x7fU);
  put_into(tier_class, entry, slot);
  make_ready(entry);
  return &entry;
}

const Entry* TierIndex::next_victim(std::size_t class_index, Priority priority) {
  const std::optional<EntryId> found = victim(classes_[class_index], priority);
  return found ? &known_as(classes_[class_index], *found) : nullptr;
}

std::optional<EntryId> TierIndex::victim(Class& tier_class, Priority newcomer) {
  AgeQueues* const others = tier_class.others.get();
  if (others != nullptr) {
    if (const std::optional<EntryId> low = others->oldest(queue_of(Priority::low))) return low;
  }
  if (newcomer == Priority::low) return std::nullopt;
  if (const std::optional<EntryId> normal = tier_class.policy->victim()) return normal;
  if (newcomer == Priority::normal || others == nullptr) return std::nullopt;
  return others->oldest(queue_of(Priority::high));
}

bool TierIndex::evict_one(Class& tier_class, Priority newcomer) {
  const std::optional<EntryId> found = victim(tier_class, newcomer);
  if (!found) return false;
  Entry& entry = known_as(tier_class, *found);
  KVTIER_CHECK(entry.state == SlotState::ready && entry.pins == 0);
  orphans_ += entry.children;
  remove(entry, Departure::evicted);
  ++evictions_;
  return true;
}

void TierIndex::set_priority(Entry& entry, Priority priority) {
  KVTIER_CHECK(entry.linked);
  if (entry.priority == priority) return;
  make_queues(class_for(entry), priority);                 // may throw, and nothing has changed
  if (tracked(entry)) untrack(entry, Departure::dropped);  // by one policy; the block stays
  entry.priority = priority;
  if (tracked(entry)) track(entry);
}

void TierIndex::make_queues(Class& tier_class, Priority priority) {
  if (priority == Priority::normal || tier_class.others) return;
  tier_class.others = std::make_unique<AgeQueues>(tier_class.slots.capacity(), kNumQueues);
  has_priorities_ = true;
}

void TierIndex::let_expire(Entry& entry, std::int64_t at_us) {
  KVTIER_CHECK(entry.linked);
  expiries_.set(index_.id(entry), at_us);
  entry.expires = true;
}

void TierIndex::lengthen(Entry& entry, std::optional<std::int64_t> at_us) {
  if (!entry.expires) return;
  const std::optional<std::int64_t> before = expiries_.of(index_.id(entry));
  if (!at_us) {
    expiries_.erase(index_.id(entry));
    entry.expires = false;
  } else if (!before || *at_us > *before) {
    expiries_.set(index_.id(entry), *at_us);
  }
}

Entry* TierIndex::due(std::int64_t now_us) {
  const std::optional<std::int64_t> next = expiries_.next_us();
  const std::optional<EntryId> first = expiries_.first();
  return next && first && *next <= now_us ? &index_.at(*first) : nullptr;
}

void TierIndex::put_into(Class& tier_class, Entry& entry, SlotId slot) {
  entry.slot = slot;
  if (!tier_class.in_slot.empty()) tier_class.in_slot[raw(slot)] = index_.id(entry);
}

EntryId TierIndex::known_id(const Entry& entry) const {
  return classes_.size() == 1 ? index_.id(entry) : EntryId{raw(entry.slot)};
}

Entry& TierIndex::known_as(const Class& tier_class, EntryId id) {
  return index_.at(classes_.size() == 1 ? id : tier_class.in_slot[raw(id)]);
}

void TierIndex::track(Entry& entry) {
  Class& tier_class = class_for(entry);
  if (entry.priority != Priority::normal) {
    tier_class.others->push(known_id(entry), queue_of(entry.priority));
  } else {
    const Entry* parent = index_.parent(entry);
    const bool is_known = parent != nullptr && parent->priority == Priority::normal &&
                          parent->volume == entry.volume;  // a group is of one class in each
    if (!is_known) parent = nullptr;
    tier_class.policy->insert(known_id(entry),
                              {.key = entry.key,
                               .group = entry.group,
                               .depth = entry.depth,
                               .parent = parent == nullptr ? std::nullopt : std::optional(known_id(*parent)),
                               .expected = is_expected(entry),
                               .arrival = entry.ahead ? Arrival::ahead : Arrival::used});
  }
  // Children may have been reserved, even committed, before their parent's own copy was over.
  if (!evictable(entry)) hold(entry);
}

void TierIndex::untrack(Entry& entry, Departure why) {
  if (entry.priority != Priority::normal) {
    class_for(entry).others->erase(known_id(entry));
  } else {
    class_for(entry).policy->erase(known_id(entry), {entry.key, entry.group}, why);
  }
}

void TierIndex::hold(Entry& entry) {
  if (entry.priority != Priority::normal) {
    class_for(entry).others->hold(known_id(entry));
  } else {
    class_for(entry).policy->hold(known_id(entry));
  }
}

void TierIndex::let_go(Entry& entry) {
  if (entry.priority != Priority::normal) {
    class_for(entry).others->let_go(known_id(entry));
  } else {
    class_for(entry).policy->let_go(known_id(entry));
  }
}

void TierIndex::unlink(Entry& entry) {
  if (entry.expires) expiries_.erase(index_.id(entry));
  entry.expires = false;
  index_.unlink(entry);
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
  track(entry);
}

void TierIndex::abort(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::filling);
  if (entry.linked) unlink(entry);
  free_slot(entry);
}

void TierIndex::quarantine(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::filling);
  if (entry.linked) unlink(entry);
  entry.state = SlotState::leaving;
  class_for(entry).slots.step(entry.slot, SlotState::leaving);
}

void TierIndex::release_quarantined(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::leaving && entry.pins == 0);  // pinned ones go with their last pin
  free_slot(entry);
}

void TierIndex::pin(Entry& entry) {
  KVTIER_CHECK(entry.state == SlotState::ready);
  if (tracked(entry) && evictable(entry)) hold(entry);
  if (entry.pins++ == 0) ++pinned_blocks_;
  ++pins_;
}

void TierIndex::unpin(Entry& entry) {
  KVTIER_CHECK(entry.pins > 0);
  --pins_;
  --entry.pins;
  if (entry.pins > 0) return;
  --pinned_blocks_;
  if (entry.state == SlotState::leaving) {
    free_slot(entry);
  } else if (tracked(entry) && evictable(entry)) {
    let_go(entry);
  }
}

void TierIndex::arrive(Entry& filling) {
  if (!filling.ahead) return;
  filling.ahead = false;
  if (observer_ != nullptr) observer_->used(filling.key, filling.group);
}

void TierIndex::touch(Entry& entry) {
  KVTIER_CHECK(entry.linked && entry.state == SlotState::ready);
  entry.ahead = false;
  if (entry.priority != Priority::normal) {
    class_for(entry).others->move(known_id(entry), queue_of(entry.priority));
  } else {
    class_for(entry).policy->touch(known_id(entry));
  }
  if (observer_ != nullptr) observer_->used(entry.key, entry.group);
}

void TierIndex::remove(Entry& entry, Departure why) {
  unlink(entry);
  if (entry.state == SlotState::filling) return;  // commit() or abort() frees the slot
  untrack(entry, why);
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
    index_.fetch_for_removal(*parent);  // a prompt goes tail first: this is likely the next victim
    let_go(*parent);
  }
}

void TierIndex::advance(std::int64_t now_us) {
  for (Class& each : classes_) each.policy->advance(now_us);
  if (observer_ != nullptr) observer_->advance(now_us);
}

void TierIndex::expect(const BlockKey& key, GroupId group) {
  if (++expected_[index_.hash(key, group)] > 1) return;
  if (Entry* const entry = in_policy(key, group)) class_for(*entry).policy->expect(known_id(*entry));
}

void TierIndex::expect_no_more(const BlockKey& key, GroupId group) {
  const auto found = expected_.find(index_.hash(key, group));
  if (found == expected_.end() || --found->second > 0) return;
  expected_.erase(found);
  if (Entry* const entry = in_policy(key, group)) class_for(*entry).policy->expect_no_more(known_id(*entry));
}

bool TierIndex::is_expected(const Entry& entry) const {
  return !expected_.empty() && expected_.contains(index_.hash(entry.key, entry.group));
}

Entry* TierIndex::in_policy(const BlockKey& key, GroupId group) {
  Entry* const entry = index_.find(key, group);
  return entry != nullptr && tracked(*entry) && entry->priority == Priority::normal ? entry : nullptr;
}

double TierIndex::bytes_per_block() const {
  auto bytes = static_cast<double>(expiries_.size() * Expiries::kBytesPerEntry);
  for (const Class& each : classes_) {
    double per_slot = each.policy->bytes_per_record();
    if (each.others) per_slot += AgeQueues::kBytesPerRecord;
    if (!each.in_slot.empty()) per_slot += sizeof(EntryId);
    bytes += per_slot * each.slots.capacity();
  }
  return index_.bytes_per_entry() + sizeof(SlotState) + sizeof(SlotId) +
         bytes / static_cast<double>(std::max<std::size_t>(1, index_.capacity()));
}

}  // namespace kvtier
