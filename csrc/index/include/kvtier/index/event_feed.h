// EventFeed: which blocks came into and left the tiers, for whoever keeps a copy of that elsewhere (a router,
// vLLM's KV events). A ring of the last `capacity` events.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kvtier/core/types.h"

namespace kvtier {

// The numbers are part of the Python API.
enum class EventKind : std::uint8_t {
  stored = 0,   // it can be hit in this tier from now on
  evicted = 1,  // it made room
  dropped = 2,  // by the caller
  failed = 3,   // what was read of it did not prove to be it
  expired = 4,  // its time to live was over
  reset = 5,    // no call finds what was announced before; names no block
};

struct BlockEvent {
  BlockKey key{};
  GroupId group{0};
  Tier tier = Tier::host;
  EventKind kind = EventKind::stored;
};

struct BlockEvents {
  std::vector<BlockEvent> events;  // oldest first
  std::uint64_t lost = 0;          // older ones that were pushed out unread since the last take()
};

// Keys stand in it as the tiers have them, mixed with an epoch (XOR); take() gives them back as the caller
// has them. A block of an earlier epoch that leaves later comes out under a key that nobody knows.
//
// Threads: none of its own; guarded by its owner. Memory: 36 bytes an event, allocated at the start.
class EventFeed {
 public:
  explicit EventFeed(std::size_t capacity);

  // O(1), never allocates. When it is full the oldest goes, and counts as lost.
  void push(const BlockKey& key, GroupId group, Tier tier, EventKind kind) { push({key, group, tier, kind}); }
  // A `reset` event, unless nothing was ever announced. Keys that are pushed from now on are of this epoch.
  void reset(const BlockKey& epoch);
  // Takes out at most `most` of the oldest.
  BlockEvents take(std::size_t most);
  std::size_t waiting() const { return size_; }

 private:
  void push(const BlockEvent& event);
  BlockEvent pop();

  std::vector<BlockEvent> ring_;
  std::size_t first_ = 0;  // the oldest
  std::size_t size_ = 0;
  std::uint64_t lost_ = 0;
  bool announced_ = false;  // anything, ever
  BlockKey epoch_{};        // of the oldest
};

}  // namespace kvtier
