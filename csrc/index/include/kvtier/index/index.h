// Index: (key, group) -> Entry, for a million blocks and tens of thousands of keys a lookup.
//
// One record is one cache line: key, state and slot are read with a single miss. The table beside it is
// open-addressed, {tag, id} pairs at a load of at most one half, probed linearly from the place that the tag
// gives: whoever moves pairs needs no record. A batch of lookups is
// software-pipelined: while the records of one batch are compared, those of the next and the buckets of the
// one behind it are on their way (the technique: group prefetching, Chen et al., ICDE 2004). Everything is
// allocated for `capacity` at the start, in huge pages; nothing is ever rehashed under the engine mutex.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "kvtier/core/huge_vector.h"
#include "kvtier/core/mutex.h"
#include "kvtier/core/types.h"
#include "kvtier/index/eviction.h"
#include "kvtier/index/slot_pool.h"

namespace kvtier {

struct alignas(64) Entry {
  BlockKey key;
  GroupId group;
  SlotState state;          // of its slot
  bool linked : 1;          // findable; false once dropped while its slot is still held
  std::uint8_t volume : 7;  // which drive, in the disk tier; 0 in the host tier
  NamespaceId name_space;
  std::uint32_t depth;     // blocks before it in its sequence
  std::uint32_t children;  // resident entries whose parent this is
  SlotId slot;
  std::uint32_t pins : 28;
  Priority priority : 2;
  bool expires : 1;          // it has a time to live
  bool ahead : 1;            // fetched for a request that waits, and not used since
  std::uint32_t generation;  // of this record: odd while in use, then one more
  std::uint32_t parent;      // raw EntryId, valid while its generation is parent_generation(); see Index
};
static_assert(sizeof(Entry) == 64);

// Threads: none of its own; guarded by its owner. Never allocates after construction.
class Index {
  struct NoNote {
    void operator()(std::uint64_t /*hash*/) const {}
  };

 public:
  // At most `capacity` entries. `seed` decides where keys land in the table.
  Index(std::size_t capacity, std::uint64_t seed);

  // The linked entry of (key, group), or null.
  Entry* find(const BlockKey& key, GroupId group);
  // As find(), and quicker where `hint` is still the entry's id. Any hint is allowed.
  Entry* find(const BlockKey& key, GroupId group, EntryId hint);
  // Calls sink(i, Entry* or null) for every key, in order. It looks ahead, so the sink may change entries,
  // but must not insert, unlink or erase any. The sink may need the owner's mutex, which the analysis cannot
  // see here.
  // It calls note(hash) for every key too, in order, some keys ahead of the sink.
  template <typename Sink, typename Note = NoNote>
  void find_each(std::span<const BlockKey> keys, GroupId group, Sink&& sink,
                 Note&& note = {}) KVTIER_NO_THREAD_SAFETY_ANALYSIS;
  // The same with a hint for every key, as of find().
  template <typename Sink>
  void find_each(std::span<const BlockKey> keys, GroupId group, std::span<const EntryId> hints,
                 Sink&& sink) KVTIER_NO_THREAD_SAFETY_ANALYSIS;
  // Asks for what find() or insert() will read soon.
  void fetch(const BlockKey& key, GroupId group) const {
    __builtin_prefetch(&table_[home(tag(hash(key, group)))], 1);
  }
  // Asks for what unlink() and erase() of this entry will read soon.
  void fetch_for_removal(const Entry& entry) const {
    fetch(entry.key, entry.group);
    if (entry.parent != kEmpty) __builtin_prefetch(&entries_[entry.parent], 1);
  }
  // Uniform whatever the keys are; another one in every process.
  std::uint64_t hash(const BlockKey& key, GroupId group) const;

  // A new linked entry, state `filling`. Requires that none is linked under (key, group) and size() <
  // capacity.
  Entry& insert(const BlockKey& key, GroupId group);
  // Makes it unfindable, so that its key may be inserted anew.
  void unlink(Entry& entry);
  // Ends an unlinked entry; its record may be reused. Returns its parent if that has no child any more.
  Entry* erase(Entry& entry);

  // The parent counts this child until the child is erased. Requires a child that has none yet. Entries hold
  // the child -> parent link by id and generation, so that a parent that went first is never mistaken for its
  // record's next user.
  void set_parent(Entry& child, Entry& parent);
  // Forgets a parent that is erased. Returns whether the child has none now.
  bool forget_erased_parent(Entry& child);
  // The parent, if it has one that is not erased.
  Entry* parent(const Entry& child);

  EntryId id(const Entry& entry) const {
    return EntryId{static_cast<std::uint32_t>(&entry - entries_.data())};
  }
  Entry& at(EntryId id) { return entries_[raw(id)]; }
  std::size_t size() const { return size_; }
  std::size_t capacity() const { return entries_.size(); }
  // All records ever used, for sweeps: those with `linked` set are findable.
  std::span<Entry> records() { return {entries_.data(), used_}; }
  // Bytes allocated per entry of capacity, without the policy.
  double bytes_per_entry() const;

 private:
  friend struct IndexPeer;  // tests: makes keys that collide
  struct Bucket {
    std::uint32_t tag;  // upper half of the hash; its own upper bits choose the bucket
    std::uint32_t id;   // raw EntryId, or kEmpty
  };
  static constexpr std::uint32_t kEmpty = 0xffffffffU;
  static constexpr std::size_t kBatch = 16;  // as many misses of each kind are kept in flight

  static std::uint32_t tag(std::uint64_t h) { return static_cast<std::uint32_t>(h >> 32); }
  std::size_t home(std::uint32_t tag) const {
    return static_cast<std::size_t>((std::uint64_t{tag} * num_buckets_) >> 32);
  }
  std::size_t behind(std::size_t bucket) const { return bucket + 1 == num_buckets_ ? 0 : bucket + 1; }
  std::size_t distance(std::size_t from, std::size_t to) const {
    return to >= from ? to - from : to + num_buckets_ - from;
  }
  Entry* release_parent(Entry& child);

  HugeVector<Entry> entries_;
  HugeVector<std::uint32_t> parent_generations_;
  HugeVector<std::uint32_t> free_records_;
  HugeVector<Bucket> table_;
  std::size_t num_buckets_;
  std::size_t used_ = 0;  // records [0, used_) were used at least once
  std::size_t size_ = 0;
  std::uint64_t seed_;
  std::uint64_t second_seed_;  // of seed_
};

inline std::uint64_t Index::hash(const BlockKey& key, GroupId group) const {
  // Keys are digests already, but a caller may hand in anything, so all 32 bytes are folded in with a
  // secret seed: two 64 x 64 -> 128 bit products, as in wyhash. Both factors of a product are seeded: a
  // factor that a caller can make 0 would swallow the other one.
  std::uint64_t words[4];
  std::memcpy(words, key.bytes.data(), sizeof words);
  __extension__ using Wide = unsigned __int128;
  const Wide a = static_cast<Wide>(words[0] ^ seed_) * (words[1] ^ second_seed_);
  const Wide b = static_cast<Wide>(words[2] ^ seed_ ^ raw(group)) * (words[3] ^ ~second_seed_);
  const std::uint64_t x = static_cast<std::uint64_t>(a) ^ static_cast<std::uint64_t>(a >> 64);
  const std::uint64_t y = static_cast<std::uint64_t>(b) ^ static_cast<std::uint64_t>(b >> 64);
  const Wide c = static_cast<Wide>(x ^ 0xa0761d6478bd642fULL) * (y ^ seed_ ^ 0xe7037ed1a0b428dbULL);
  return static_cast<std::uint64_t>(c) ^ static_cast<std::uint64_t>(c >> 64);
}

inline Entry* Index::find(const BlockKey& key, GroupId group, EntryId hint) {
  if (raw(hint) < used_) {
    Entry& entry = entries_[raw(hint)];
    if (entry.linked && entry.key == key && entry.group == group) return &entry;
  }
  return find(key, group);
}

template <typename Sink, typename Note>
void Index::find_each(std::span<const BlockKey> keys, GroupId group, Sink&& sink, Note&& note) {
  // Three steps a batch, and in each turn one step of three batches: what a step asks for has the time of two
  // other batches' steps to arrive.
  std::uint64_t hashes[2][kBatch];
  std::uint32_t ids[2][kBatch];
  const auto keys_of = [keys](std::size_t begin) {
    return keys.subspan(begin, std::min(kBatch, keys.size() - begin));
  };
  const auto ask_for_buckets = [&](std::span<const BlockKey> batch, std::uint64_t* hash_of) {
    for (std::size_t i = 0; i < batch.size(); ++i) {
      hash_of[i] = hash(batch[i], group);
      __builtin_prefetch(&table_[home(tag(hash_of[i]))]);
      note(hash_of[i]);
    }
  };
  const auto ask_for_records = [&](std::size_t n, const std::uint64_t* hash_of, std::uint32_t* id_of) {
    for (std::size_t i = 0; i < n; ++i) {
      // The first bucket with the right tag is nearly always the one; the compare below decides.
      const std::uint32_t wanted = tag(hash_of[i]);
      std::size_t at = home(wanted);
      while (table_[at].id != kEmpty && table_[at].tag != wanted) at = behind(at);
      id_of[i] = table_[at].id;
      if (id_of[i] != kEmpty) __builtin_prefetch(&entries_[id_of[i]]);
    }
  };
  const auto answer = [&](std::size_t begin, const std::uint32_t* id_of) KVTIER_NO_THREAD_SAFETY_ANALYSIS {
    const std::span<const BlockKey> batch = keys_of(begin);
    for (std::size_t i = 0; i < batch.size(); ++i) {
      Entry* entry = nullptr;
      if (id_of[i] != kEmpty) {
        entry = &entries_[id_of[i]];
        if (!(entry->key == batch[i] && entry->group == group)) entry = find(batch[i], group);
      }
      sink(begin + i, entry);
    }
  };

  const std::size_t num_batches = (keys.size() + kBatch - 1) / kBatch;
  for (std::size_t turn = 0; turn < num_batches + 2; ++turn) {
    if (turn < num_batches) ask_for_buckets(keys_of(turn * kBatch), hashes[turn % 2]);
    if (turn >= 2) answer((turn - 2) * kBatch, ids[turn % 2]);
    if (turn >= 1 && turn <= num_batches) {
      ask_for_records(keys_of((turn - 1) * kBatch).size(), hashes[(turn - 1) % 2], ids[(turn - 1) % 2]);
    }
  }
}

template <typename Sink>
void Index::find_each(std::span<const BlockKey> keys, GroupId group, std::span<const EntryId> hints,
                      Sink&& sink) {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    if (i + kBatch < keys.size() && raw(hints[i + kBatch]) < used_) {
      __builtin_prefetch(&entries_[raw(hints[i + kBatch])]);
    }
    sink(i, find(keys[i], group, hints[i]));
  }
}

}  // namespace kvtier
