#include "kvtier/index/event_feed.h"

#include <algorithm>

#include "kvtier/core/status.h"

namespace kvtier {

static_assert(sizeof(BlockEvent) == 36);

EventFeed::EventFeed(std::size_t capacity) : ring_(capacity) { KVTIER_CHECK(capacity > 0); }

void EventFeed::push(const BlockEvent& event) {
  announced_ = true;
  if (size_ == ring_.size()) {
    pop();
    ++lost_;
  }
  ring_[(first_ + size_) % ring_.size()] = event;
  ++size_;
}

void EventFeed::reset(const BlockKey& epoch) {
  if (announced_) {
    push({.key = epoch, .kind = EventKind::reset});
  } else {
    epoch_ = epoch;
  }
}

BlockEvent EventFeed::pop() {
  BlockEvent event = ring_[first_];
  first_ = (first_ + 1) % ring_.size();
  --size_;
  if (event.kind == EventKind::reset) {
    epoch_ = event.key;
    event.key = {};
  } else {
    for (std::size_t i = 0; i < kKeyBytes; ++i) event.key.bytes[i] ^= epoch_.bytes[i];
  }
  return event;
}

BlockEvents EventFeed::take(std::size_t most) {
  BlockEvents out;
  out.events.reserve(std::min(most, size_));
  out.lost = lost_;
  lost_ = 0;
  while (size_ > 0 && out.events.size() < most) out.events.push_back(pop());
  return out;
}

}  // namespace kvtier
