// The names of every place that waits or orders one thing after another on the data path.
//
// Wrong bytes come from an order that was forgotten, and a test that never breaks the order proves
// nothing. So each such place asks ordering_enabled(point) before it waits, and the suite disables the
// points one after another on the simulated device and expects to be told of wrong bytes (or, for the
// last three of the device's, of a broken invariant). The disk tier's points are proofs that must not be
// skipped: the campaigns over a simulated drive disable them
// (tests/cpp/storage/slot_store_campaign_test.cpp). In production every point is enabled; asking is one
// relaxed load.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvtier {

enum class OrderingPoint : std::uint8_t {
  load_after_framework_stream,   // a load's copies wait for what the framework's stream did to the pages
  store_after_framework_stream,  // a store's copies wait for the kernels that write the pages
  released_after_store_copy,     // Ticket.released only once the copies out of the pages have run
  ready_after_store_copy,        // a block is committed only once its copy has run
  done_after_load_copy,          // a load ticket is done only once its copies have run
  wait_stream_event,             // Ticket.wait_stream makes the stream wait for the copies
  wait_layer_event,              // Ticket.wait_layer makes the stream wait for that layer's copies
  pins_until_load_copy,          // a load's pins are held until its copies have run (I4, I5)
  reservation_until_store_copy,  // a failed or dropped store keeps its slots until its copies have run (I5)
  detach_after_copies,           // detach returns only when no copy touches the pages any more
  disk_verify_checksum,          // an image that was read is served only when its checksums hold (I3)
  disk_verify_generation,        // ... and only when it is of the generation last written to its slot
  disk_sync_before_commit,       // the slot file is synced before the catalog names the block
  count_,
};

std::string_view to_string(OrderingPoint point);
// Of the device's data path, and of the disk tier. Together, in this order, they are all there are.
std::span<const OrderingPoint> all_ordering_points();
std::span<const OrderingPoint> disk_ordering_points();

namespace internal {
extern std::atomic<std::uint32_t> disabled_ordering_points;  // one bit per point
}

inline bool ordering_enabled(OrderingPoint point) {
  return (internal::disabled_ordering_points.load(std::memory_order_relaxed) &
          (1U << static_cast<unsigned>(point))) == 0;
}

// Whether a test has disabled anything at all.
inline bool any_ordering_disabled() {
  return internal::disabled_ordering_points.load(std::memory_order_relaxed) != 0;
}

// Tests only: disables one point, process-wide, while it lives.
class DisableOrdering {
 public:
  explicit DisableOrdering(OrderingPoint point);
  ~DisableOrdering();
  DisableOrdering(const DisableOrdering&) = delete;
  DisableOrdering& operator=(const DisableOrdering&) = delete;

 private:
  std::uint32_t bit_;
};

}  // namespace kvtier
