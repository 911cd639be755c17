#include "kvtier/index/index.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {

namespace {

// The finaliser of splitmix64.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

Index::Index(std::size_t capacity, std::uint64_t seed)
    : entries_(capacity),
      parent_generations_(capacity, 0),
      table_(std::max<std::size_t>(capacity, 8) * 2, Bucket{0, kEmpty}),
      num_buckets_(table_.size()),
      seed_(seed),
      second_seed_(mix(seed)) {
  KVTIER_CHECK(capacity < kEmpty);
  free_records_.reserve(capacity);
}

Entry* Index::find(const BlockKey& key, GroupId group) {
  const std::uint32_t wanted = tag(hash(key, group));
  for (std::size_t at = home(wanted); table_[at].id != kEmpty; at = behind(at)) {
    if (table_[at].tag != wanted) continue;
    Entry& entry = entries_[table_[at].id];
    if (entry.key == key && entry.group == group) return &entry;
  }
  return nullptr;
}

Entry& Index::insert(const BlockKey& key, GroupId group) {
  KVTIER_CHECK(size_ < capacity());
  std::uint32_t id;
  if (!free_records_.empty()) {
    id = free_records_.back();
    free_records_.pop_back();
  } else {
    id = static_cast<std::uint32_t>(used_++);
  }
  ++size_;
  Entry& entry = entries_[id];
  entry = Entry{.key = key,
                .group = group,
                .state = SlotState::filling,
                .linked = true,
                .volume = 0,
                .name_space = NamespaceId{0},
                .depth = 0,
                .children = 0,
                .slot = SlotId{0},
                .pins = 0,
                .priority = Priority::normal,
                .expires = false,
                .ahead = false,
                .generation = entry.generation + 1,
                .parent = kEmpty};

  const std::uint32_t own = tag(hash(entry.key, group));  // the caller's may be another one by now
  std::size_t at = home(own);
  while (table_[at].id != kEmpty) at = behind(at);
  table_[at] = {own, id};
  return entry;
}

void Index::unlink(Entry& entry) {
  KVTIER_CHECK(entry.linked);
  entry.linked = false;
  const std::uint32_t wanted = raw(id(entry));
  std::size_t hole = home(tag(hash(entry.key, entry.group)));
  while (table_[hole].id != wanted) {
    KVTIER_CHECK(table_[hole].id != kEmpty);
    hole = behind(hole);
  }
  // Backward shift (Knuth 6.4, algorithm R): no tombstones, so lookups never slow down with age.
  for (std::size_t at = behind(hole); table_[at].id != kEmpty; at = behind(at)) {
    if (distance(home(table_[at].tag), at) >= distance(hole, at)) {
      table_[hole] = table_[at];
      hole = at;
    }
  }
  table_[hole].id = kEmpty;
}

void Index::set_parent(Entry& child, Entry& parent) {
  KVTIER_CHECK(child.parent == kEmpty);
  child.parent = raw(id(parent));
  parent_generations_[raw(id(child))] = parent.generation;
  ++parent.children;
}

bool Index::forget_erased_parent(Entry& child) {
  if (child.parent != kEmpty && parent(child) == nullptr) child.parent = kEmpty;
  return child.parent == kEmpty;
}

Entry* Index::parent(const Entry& child) {
  if (child.parent == kEmpty) return nullptr;
  Entry& parent = entries_[child.parent];
  return parent.generation == parent_generations_[raw(id(child))] ? &parent : nullptr;
}

Entry* Index::release_parent(Entry& child) {
  if (child.parent == kEmpty) return nullptr;
  Entry& parent = entries_[child.parent];
  child.parent = kEmpty;
  if (parent.generation != parent_generations_[raw(id(child))]) return nullptr;
  KVTIER_CHECK(parent.children > 0);
  return --parent.children == 0 ? &parent : nullptr;
}

Entry* Index::erase(Entry& entry) {
  KVTIER_CHECK(!entry.linked && entry.generation % 2 == 1);  // not twice
  Entry* parent = release_parent(entry);
  ++entry.generation;  // children that still name this record no longer count on it
  free_records_.push_back(raw(id(entry)));
  --size_;
  return parent;
}

double Index::bytes_per_entry() const {
  const std::size_t bytes =
      entries_.size() * (sizeof(Entry) + sizeof(std::uint32_t) * 2) + table_.size() * sizeof(Bucket);
  return static_cast<double>(bytes) / static_cast<double>(std::max<std::size_t>(1, entries_.size()));
}

}  // namespace kvtier
