#include "slot_table.h"

#include <algorithm>
#include <numeric>

namespace kvtier {
namespace {

bool is_uncatalogued(SlotContent content) {
  return content == SlotContent::writing || content == SlotContent::written ||
         content == SlotContent::doubtful;
}

std::uint32_t seconds(std::int64_t unix_s) {
  return static_cast<std::uint32_t>(std::clamp<std::int64_t>(unix_s, 0, UINT32_MAX));
}

}  // namespace

void SlotTable::grow(std::uint32_t class_index, std::uint32_t num_slots) {
  classes_[class_index].resize(num_slots);
  MutexLock lock(mutex_);
  uses_[class_index].last_s.resize(num_slots);
  uses_[class_index].noted.resize(num_slots);
}

void SlotTable::clear() {
  for (std::vector<SlotState>& slots : classes_) std::ranges::fill(slots, SlotState{});
  std::ranges::fill(used_, 0U);
  tags_.clear();
  uncatalogued_ = 0;
}

void SlotTable::set_content(const SlotPlace& place, SlotContent content) {
  SlotState& state = at(place);
  uncatalogued_ -= is_uncatalogued(state.content) ? 1 : 0;
  uncatalogued_ += is_uncatalogued(content) ? 1 : 0;
  doubts_ += content == SlotContent::doubtful ? 1 : 0;
  used_[place.class_index] -= state.content != SlotContent::unknown ? 1 : 0;
  used_[place.class_index] += content != SlotContent::unknown ? 1 : 0;
  state.content = content;
}

void SlotTable::set_record(const CatalogRecord& record, SlotContent content) {
  set_block(record, content);
  set_uses({&record, 1});
}

void SlotTable::set_block(const CatalogRecord& record, SlotContent content) {
  SlotState& state = at(record.place);
  state.key = record.block.key;
  state.has_parent = record.block.parent.has_value();
  state.parent = record.block.parent.value_or(BlockKey{});
  state.generation = record.generation;
  state.payload_bytes = record.payload_bytes;
  state.depth = record.block.depth;
  state.name_space = intern(record.block.name_space);
  state.group = record.block.group;
  set_content(record.place, content);
}

void SlotTable::set_uses(std::span<const CatalogRecord> records) {
  MutexLock lock(mutex_);
  for (const CatalogRecord& record : records) {
    uses_[record.place.class_index].last_s[raw(record.place.slot)] = seconds(record.last_use_s);
  }
}

CatalogRecord SlotTable::record_of(const SlotPlace& place) const {
  const SlotState& state = at(place);
  CatalogRecord record;
  record.block.key = state.key;
  record.block.group = state.group;
  if (state.has_parent) record.block.parent = state.parent;
  record.block.depth = state.depth;
  record.block.name_space = tags_[state.name_space];
  record.place = place;
  record.generation = state.generation;
  record.payload_bytes = state.payload_bytes;
  MutexLock lock(mutex_);
  record.last_use_s = last_use_s(place);
  return record;
}

std::vector<CatalogRecord> SlotTable::durable_records() const {
  std::vector<CatalogRecord> records;
  records.reserve(std::accumulate(used_.begin(), used_.end(), std::size_t{0}));
  for (std::uint32_t c = 0; c < classes_.size(); ++c) {
    for (std::uint32_t slot = 0; slot < classes_[c].size(); ++slot) {
      if (classes_[c][slot].content == SlotContent::durable) records.push_back(record_of({c, SlotId{slot}}));
    }
  }
  return records;
}

void SlotTable::note_use(const SlotPlace& place, std::int64_t now_s) {
  MutexLock lock(mutex_);
  Uses& uses = uses_[place.class_index];
  const std::uint32_t slot = raw(place.slot);
  if (slot >= uses.last_s.size()) return;
  uses.last_s[slot] = seconds(now_s);
  if (uses.noted[slot]) return;
  uses.noted[slot] = true;
  noted_.push_back(place);
}

bool SlotTable::has_uses() const {
  MutexLock lock(mutex_);
  return !noted_.empty();
}

std::vector<CatalogChange> SlotTable::take_uses() {
  MutexLock lock(mutex_);
  std::vector<CatalogChange> changes;
  changes.reserve(noted_.size());
  for (const SlotPlace& place : noted_) {
    uses_[place.class_index].noted[raw(place.slot)] = false;
    if (at(place).content != SlotContent::durable) continue;  // its own record will say it
    CatalogChange change;
    change.kind = CatalogChange::Kind::touch;
    change.record.place = place;
    change.record.last_use_s = last_use_s(place);
    changes.push_back(change);
  }
  noted_.clear();
  return changes;
}

std::int64_t SlotTable::last_use_s(const SlotPlace& place) const {
  return uses_[place.class_index].last_s[raw(place.slot)];
}

// From the newest on: a server's traffic comes in runs of one tenant.
std::uint32_t SlotTable::intern(const NamespaceTag& tag) {
  for (std::size_t i = tags_.size(); i-- > 0;) {
    if (tags_[i] == tag) return static_cast<std::uint32_t>(i);
  }
  tags_.push_back(tag);
  return static_cast<std::uint32_t>(tags_.size() - 1);
}

}  // namespace kvtier
