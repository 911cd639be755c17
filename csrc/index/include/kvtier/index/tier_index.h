// TierIndex: the life of blocks in the slots of one tier, host or disk, as pure bookkeeping: no memory, no
// device, no drive, no thread.
//
//   reserve --> filling --commit--> ready --evict / drop--> (gone)
//                |   |                |
//                | abort           drop while pinned --> leaving --last unpin--> (gone)
//                |   '--> (gone)
//                '-- quarantine --> leaving --release_quarantined--> (gone)
//
// It joins the Index (which block), a SlotPool per size class (which slot) and an EvictionPolicy per size
// class (who goes). The disk tier has these for each of its volumes: one volume is one drive.
// Only `ready` entries may be read (I3), pinned ones are not evicted and their slots not
// reused (I4), and free + filling + ready + leaving = capacity after every call (I1).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "kvtier/core/huge_vector.h"
#include "kvtier/index/age_queues.h"
#include "kvtier/index/event_feed.h"
#include "kvtier/index/expiries.h"
#include "kvtier/index/index.h"
#include "kvtier/index/use_observer.h"

namespace kvtier {

// What reserve() found. Outcomes, not failures.
enum class ReserveOutcome : std::uint8_t {
  reserved,  // a slot is held; commit() or abort() must follow
  present,   // ready already
  pending,   // somebody is filling it
  declined,  // no slot is free and none may be evicted
};

inline constexpr std::uint32_t kMaxVolumes = 64;

// Threads: none of its own; guarded by the engine mutex. Errors: a misuse is a bug (KVTIER_CHECK).
class TierIndex {
 public:
  struct Options {
    std::vector<std::uint32_t> slots_per_class;  // of volume 0, then of volume 1 ...: as many for each
    std::vector<std::size_t> class_of_group;     // within a volume
    std::uint32_t num_volumes = 1;               // at most kMaxVolumes
    std::uint64_t hash_seed = 0;
    std::string_view eviction = kDefaultEviction;  // one of eviction_choices()
    // Makes the policies instead, if there is one. `leaf_first` must say what they want.
    std::function<std::unique_ptr<EvictionPolicy>(const EvictionOptions&)> make_eviction = {};
    // Whether no block is evicted while a block that hangs on it is resident; nullopt: as the policy wants
    // it.
    std::optional<bool> leaf_first = std::nullopt;
    // Bytes of a slot of each class of a volume, for policies that weigh them; empty: not known.
    std::vector<std::uint64_t> block_bytes = {};
  };
  explicit TierIndex(const Options& options);

  struct Reservation {
    ReserveOutcome outcome;
    Entry* entry;  // null when declined
  };
  // `parent`: the entry that this one hangs on, not erased (dropped is allowed), or null. It takes the place
  // of no block of a higher priority.
  Reservation reserve(const BlockKey& key, GroupId group, NamespaceId name_space, std::uint32_t depth,
                      Entry* parent, std::uint32_t volume = 0, Priority priority = Priority::normal,
                      Arrival arrival = Arrival::used);
  // A block that is being filled ahead of a request is used by another one, which runs, as it becomes ready.
  void arrive(Entry& filling);
  // A block that stood in its slot before this process: ready at once, the most recently used. Null when the
  // slot is not free or not usable, or the key is there already. link_parent() may follow, once.
  Entry* restore(const BlockKey& key, GroupId group, NamespaceId name_space, std::uint32_t depth,
                 std::uint32_t volume, SlotId slot);
  // Requires a child that has no parent yet.
  void link_parent(Entry& child, Entry& parent);
  // As link_parent(), unless the child has a parent; one that was evicted is none any more. `parent` came
  // back, and the blocks that hung on it are orphans no longer.
  void adopt(Entry& child, Entry& parent);
  // The copy has run. Returns false when the block was dropped meanwhile: its slot is free again.
  bool commit(Entry& entry);
  // The copy failed and can touch the slot no more.
  void abort(Entry& entry);
  // The copy failed but may still run: unfindable at once, its slot held until release_quarantined().
  void quarantine(Entry& entry);
  void release_quarantined(Entry& entry);

  // Requires a ready entry.
  void pin(Entry& entry);
  // Never touches: recency is the caller's statement, made by touch().
  void unpin(Entry& entry);
  // Requires a linked, ready entry.
  void touch(Entry& entry);
  // Blocks of a lower priority go first, whatever the policy says; among those of `low`, and of `high`, the
  // least recently used. Leaf first, if the policy wants it, stands above it: a prefix goes behind what hangs
  // on it. Requires a linked entry.
  void set_priority(Entry& entry, Priority priority);
  // Whether any block ever had a priority.
  bool has_priorities() const { return has_priorities_; }

  // Times to live, as Clock's times. Requires a linked entry. From a new one on, it only grows: nullopt is
  // for ever, and stays so.
  void let_expire(Entry& entry, std::int64_t at_us);
  void lengthen(Entry& entry, std::optional<std::int64_t> at_us);
  // When the first is over; nullopt if none has one.
  std::optional<std::int64_t> next_expiry_us() const { return expiries_.next_us(); }
  // A block whose time is over, or null. It can be found until expire(), which is as drop().
  Entry* due(std::int64_t now_us);
  void expire(Entry& entry) { remove(entry, Departure::expired); }

  // Unfindable at once. The slot is freed now, or with the last pin, or when its filling ends.
  void drop(Entry& entry) { remove(entry, Departure::dropped); }
  // As drop(): what was read of it did not prove to be it.
  void lose(Entry& entry) { remove(entry, Departure::failed); }

  // From now on says what becomes ready and what leaves, as of `tier`. restore() is not told.
  void announce_to(EventFeed& feed, Tier tier) {
    feed_ = &feed;
    tier_ = tier;
  }

  // From now on tells it of the time, of what reserve() reserves and of what is touched. Null: nobody.
  void tell_uses_to(UseObserver* observer) { observer_ = observer; }

  // These blocks are about to be looked up, used or reserved. A hint: their misses of the caches overlap.
  void fetch(std::span<const BlockKey> keys, GroupId group) const;

  // The time of what follows: see EvictionPolicy.
  void advance(std::int64_t now_us);
  // A request that waits will want this block, resident or not; once per request. 48 bytes for each such
  // block.
  void expect(const BlockKey& key, GroupId group);
  // That request waits no more: it runs, or was given up.
  void expect_no_more(const BlockKey& key, GroupId group);

  // Who would be evicted next to make room in a class for a block of this priority; null if nobody may be.
  const Entry* next_victim(std::size_t class_index, Priority priority = Priority::normal);

  Index& index() { return index_; }
  std::size_t class_of(GroupId group, std::uint32_t volume = 0) const {
    return volume * classes_per_volume_ + class_of_group_[raw(group)];
  }
  std::size_t classes_per_volume() const { return classes_per_volume_; }
  SlotPool& slots(std::size_t class_index) { return classes_[class_index].slots; }
  const SlotPool& slots(std::size_t class_index) const { return classes_[class_index].slots; }
  std::size_t num_classes() const { return classes_.size(); }

  bool leaf_first() const { return leaf_first_; }
  std::uint64_t evictions() const { return evictions_; }
  // Blocks that lost their parent to an eviction while they were resident: no prefix reaches them until it is
  // back. Never with leaf-first.
  std::uint64_t orphans() const { return orphans_; }
  std::uint32_t pinned_blocks() const { return pinned_blocks_; }
  std::uint64_t pins() const { return pins_; }
  // Bytes of bookkeeping per slot of capacity: index, slot states, the policy's links, and what priorities
  // and times to live take.
  double bytes_per_block() const;

 private:
  struct Class {
    SlotPool slots;
    std::unique_ptr<EvictionPolicy> policy;  // of the blocks of normal priority
    std::unique_ptr<AgeQueues> others;       // of those of low and of high; null before the first
    HugeVector<EntryId> in_slot;             // of several classes: see known_id()
  };
  static std::optional<EntryId> victim(Class& tier_class, Priority newcomer);
  bool evict_one(Class& tier_class, Priority newcomer);
  void make_queues(Class& tier_class, Priority priority);
  void put_into(Class& tier_class, Entry& entry, SlotId slot);
  // As what its class's policy knows the block: the number of its slot, so that policies take memory for
  // their own blocks only. Of one class alone the entry's own id is as good.
  EntryId known_id(const Entry& entry) const;
  Entry& known_as(const Class& tier_class, EntryId id);
  // What the policy, or what stands in its place for other priorities, is told.
  void track(Entry& entry);
  void untrack(Entry& entry, Departure why);
  void hold(Entry& entry);
  void let_go(Entry& entry);
  void unlink(Entry& entry);
  void make_ready(Entry& entry);
  void remove(Entry& entry, Departure why);
  void free_slot(Entry& entry);
  bool is_expected(const Entry& entry) const;
  // The block, if the policy of its class tracks it; or null.
  Entry* in_policy(const BlockKey& key, GroupId group);
  // Whether the policy knows it, and whether it may name it as a victim (else it is held).
  bool tracked(const Entry& entry) const { return entry.linked && entry.state == SlotState::ready; }
  bool evictable(const Entry& entry) const {
    return entry.pins == 0 && (!leaf_first_ || entry.children == 0);
  }
  Class& class_for(const Entry& entry) { return classes_[class_of(entry.group, entry.volume)]; }

  std::vector<std::size_t> class_of_group_;
  std::size_t classes_per_volume_;
  bool leaf_first_;
  Index index_;
  std::vector<Class> classes_;
  std::uint64_t evictions_ = 0;
  std::uint64_t orphans_ = 0;
  std::uint64_t pins_ = 0;
  std::uint32_t pinned_blocks_ = 0;
  bool has_priorities_ = false;
  Expiries expiries_;
  std::unordered_map<std::uint64_t, std::uint32_t> expected_;  // requests that wait for it, by Index::hash()
  EventFeed* feed_ = nullptr;                                  // null: nobody wants to know
  UseObserver* observer_ = nullptr;                            // as feed_
  Tier tier_ = Tier::host;
};

}  // namespace kvtier
