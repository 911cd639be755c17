// AgeQueues: what eviction policies are made of. Several queues of entries, each ordered by when they were
// moved to its end, from which entries can be held and let go without losing their place.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvtier/core/huge_vector.h"
#include "kvtier/core/status.h"
#include "kvtier/index/eviction.h"

namespace kvtier {

// Evictable entries stand in a list ordered by age. An entry that is let go may belong anywhere in it: mostly
// at an end (a parent whose last child went is next in line; a pin was just used), else it waits in a heap
// beside the list, and the oldest is the older of the list's and the heap's. So every operation is O(1) but
// for entries that were let go out of order, O(log of how many there are).
//
// Memory: 16 bytes per record, allocated at the start; only let_go() may allocate (the heaps: 32 bytes for
// each entry that stands in one). Threads: none of its own. Errors: a misuse is a bug (KVTIER_CHECK).
class AgeQueues {
 public:
  static constexpr std::uint32_t kMostQueues = 256;
  static constexpr std::uint32_t kMostMark = 15;

  AgeQueues(std::size_t records, std::uint32_t num_queues);

  // A new entry, evictable, the youngest of the queue; its mark is 0.
  void push(EntryId id, std::uint32_t queue);
  // The entry becomes the youngest of the queue, whichever it was in. One that is held stays held.
  void move(EntryId id, std::uint32_t queue);
  void hold(EntryId id);
  void let_go(EntryId id);
  void erase(EntryId id);

  // The oldest evictable entry.
  std::optional<EntryId> oldest(std::uint32_t queue);
  // Held ones included.
  std::size_t size(std::uint32_t queue) const { return sizes_[queue]; }
  std::uint32_t queue(EntryId id) { return static_cast<std::uint32_t>(node(id).queue); }
  // A small number of the policy's own, up to kMostMark.
  std::uint32_t mark(EntryId id) { return static_cast<std::uint32_t>(node(id).mark); }
  void set_mark(EntryId id, std::uint32_t mark) { node(id).mark = mark & kMostMark; }

  static constexpr double kBytesPerRecord = 16;

 private:
  enum class Where : std::uint8_t { nowhere, list, heap, held };
  struct Node {
    std::uint32_t older = 0;
    std::uint32_t younger = 0;
    std::uint64_t age : 50 = 0;  // a count of moves, not a time
    std::uint64_t queue : 8 = 0;
    std::uint64_t mark : 4 = 0;
    std::uint64_t where : 2 = 0;
  };
  static_assert(sizeof(Node) == static_cast<std::size_t>(kBytesPerRecord));
  static constexpr std::uint64_t kAgeMask = (std::uint64_t{1} << 50) - 1;  // outlasts any machine
  struct Waiting {
    std::uint64_t age;
    EntryId id;
  };
  struct Heap {
    std::vector<Waiting> waiting;  // oldest first; entries that left it meanwhile are skipped
    std::size_t inside = 0;        // without those
  };

  // Nodes [0, num_queues) are the sentinels: .younger is the queue's oldest, .older its youngest.
  std::uint32_t at(EntryId id) const { return raw(id) + num_queues_; }
  Node& node(EntryId id) {
    KVTIER_CHECK(std::size_t{raw(id)} + num_queues_ < nodes_.size());
    return nodes_[std::size_t{raw(id)} + num_queues_];
  }
  static Where where(const Node& n) { return static_cast<Where>(n.where); }
  static void place(Node& n, Where where) { n.where = static_cast<std::uint64_t>(where) & 3U; }
  void link_behind(std::uint32_t index, std::uint32_t older);
  void unlink(std::uint32_t index);
  void leave_list_or_heap(EntryId id, Node& n);
  void let_go_out_of_order(EntryId id, Node& n);
  bool is_stale(const Waiting& waiting);
  void compact(Heap& heap);
  void drop_stale(Heap& heap);

  std::uint32_t num_queues_;
  HugeVector<Node> nodes_;
  std::vector<Heap> heaps_;         // of each queue
  std::vector<std::size_t> sizes_;  // of each queue
  std::uint64_t moves_ = 0;

  friend struct AgeQueuesPeer;  // tests: how much memory the heaps take
};

inline void AgeQueues::link_behind(std::uint32_t index, std::uint32_t older) {
  const std::uint32_t younger = nodes_[older].younger;
  nodes_[index].older = older;
  nodes_[index].younger = younger;
  nodes_[older].younger = index;
  nodes_[younger].older = index;
}

inline void AgeQueues::unlink(std::uint32_t index) {
  nodes_[nodes_[index].older].younger = nodes_[index].younger;
  nodes_[nodes_[index].younger].older = nodes_[index].older;
}

// A waiting entry stays in the heap's array; drop_stale() skips it when it comes up.
inline void AgeQueues::leave_list_or_heap(EntryId id, Node& n) {
  if (where(n) == Where::list) unlink(at(id));
  if (where(n) == Where::heap) --heaps_[n.queue].inside;
}

inline void AgeQueues::push(EntryId id, std::uint32_t queue) {
  const std::size_t needed = std::size_t{at(id)} + 1;
  if (needed > nodes_.size()) nodes_.resize(needed);
  Node& n = nodes_[at(id)];
  KVTIER_CHECK(where(n) == Where::nowhere);
  n.age = ++moves_ & kAgeMask;
  n.queue = queue & 0xffU;
  n.mark = 0;
  place(n, Where::list);
  link_behind(at(id), nodes_[queue].older);
  ++sizes_[queue];
}

inline void AgeQueues::move(EntryId id, std::uint32_t queue) {
  Node& n = node(id);
  KVTIER_CHECK(where(n) != Where::nowhere);
  leave_list_or_heap(id, n);
  --sizes_[n.queue];
  ++sizes_[queue];
  n.age = ++moves_ & kAgeMask;
  n.queue = queue & 0xffU;
  if (where(n) == Where::held) return;
  place(n, Where::list);
  link_behind(at(id), nodes_[queue].older);
}

inline void AgeQueues::hold(EntryId id) {
  Node& n = node(id);
  KVTIER_CHECK(where(n) == Where::list || where(n) == Where::heap);
  leave_list_or_heap(id, n);
  place(n, Where::held);
}

inline void AgeQueues::let_go(EntryId id) {
  Node& n = node(id);
  KVTIER_CHECK(where(n) == Where::held);
  const auto sentinel = static_cast<std::uint32_t>(n.queue);
  const std::uint32_t oldest = nodes_[sentinel].younger;
  const std::uint32_t youngest = nodes_[sentinel].older;
  if (oldest == sentinel || n.age < nodes_[oldest].age) {
    place(n, Where::list);
    link_behind(at(id), sentinel);
  } else if (n.age > nodes_[youngest].age) {
    place(n, Where::list);
    link_behind(at(id), youngest);
  } else {
    let_go_out_of_order(id, n);
  }
}

inline void AgeQueues::erase(EntryId id) {
  Node& n = node(id);
  KVTIER_CHECK(where(n) != Where::nowhere);
  leave_list_or_heap(id, n);
  --sizes_[n.queue];
  place(n, Where::nowhere);
}

inline std::optional<EntryId> AgeQueues::oldest(std::uint32_t queue) {
  Heap& heap = heaps_[queue];
  if (!heap.waiting.empty()) drop_stale(heap);
  const std::uint32_t first = nodes_[queue].younger;
  const bool listed = first != queue;
  if (!heap.waiting.empty() && (!listed || heap.waiting.front().age < nodes_[first].age)) {
    return heap.waiting.front().id;
  }
  if (!listed) return std::nullopt;
  return EntryId{first - num_queues_};
}

}  // namespace kvtier
