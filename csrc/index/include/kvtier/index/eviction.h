// EvictionPolicy: decides which block goes when a slot is needed. It decides and never acts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "kvtier/core/huge_vector.h"

namespace kvtier {

// A record of the Index. Reused after erase(); see Entry::generation.
enum class EntryId : std::uint32_t {};
constexpr std::uint32_t raw(EntryId id) { return static_cast<std::uint32_t>(id); }

// Every tracked entry is *evictable* or *held* (pinned, or a younger block hangs on it). Holding and letting
// go is no use of the entry: its age stays.
//
// Threads: none of its own; guarded by its owner. Memory: bounded by the highest EntryId seen.
class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // A block became ready, just now; evictable.
  virtual void insert(EntryId id) = 0;
  // It was used.
  virtual void touch(EntryId id) = 0;
  // Requires an entry that is evictable, or held, respectively.
  virtual void hold(EntryId id) = 0;
  virtual void let_go(EntryId id) = 0;
  // It left, for whatever reason.
  virtual void erase(EntryId id) = 0;
  // The block to evict next; it stays until erase(). nullopt when every entry is held.
  virtual std::optional<EntryId> victim() = 0;
};

// Least recently used, exactly: the victim is the evictable entry whose last use is longest ago.
//
// Evictable entries stand in a list ordered by last use. An entry that is let go may belong anywhere in
// it: mostly at an end (a parent whose last child went is next in line; a pin was just used), else it waits
// in a heap beside the list, and the victim is the older of the list's oldest and the heap's. So every
// operation is O(1) but for entries that were let go out of order, O(log of how many there are).
class LruPolicy final : public EvictionPolicy {
 public:
  // Links for `capacity` records are reserved now, so that only let_go() may allocate (the heap).
  explicit LruPolicy(std::size_t capacity);
  void insert(EntryId id) override;
  void touch(EntryId id) override;
  void hold(EntryId id) override;
  void let_go(EntryId id) override;
  void erase(EntryId id) override;
  std::optional<EntryId> victim() override;

 private:
  enum class Where : std::uint8_t { nowhere, list, heap, held };
  struct Node {
    std::uint32_t older = 0;
    std::uint32_t younger = 0;
    std::uint64_t last_use : 62 = 0;  // a count of uses, not a time
    std::uint64_t where : 2 = 0;
  };
  struct Waiting {
    std::uint64_t last_use;
    EntryId id;
  };

  Node& node(EntryId id);  // node 0 is the sentinel
  static Where where(const Node& n) { return static_cast<Where>(n.where); }
  static void place(Node& n, Where where) { n.where = static_cast<std::uint64_t>(where) & 3U; }
  void link_behind(std::uint32_t at, std::uint32_t older);
  void unlink(std::uint32_t at);
  void leave(EntryId id);
  bool is_stale(const Waiting& waiting);
  void compact_waiting();
  void drop_stale_waiting();

  HugeVector<Node> nodes_;        // sentinel.younger is the oldest, sentinel.older the youngest
  std::vector<Waiting> waiting_;  // a heap, oldest first; entries that left it meanwhile are skipped
  std::size_t in_heap_ = 0;       // entries in the heap, without the stale
  std::uint64_t uses_ = 0;

  friend struct LruPolicyPeer;  // tests: how much memory the heap takes

 public:
  static constexpr std::size_t kBytesPerEntry = sizeof(Node);  // what index_bytes_per_block counts
};

}  // namespace kvtier
