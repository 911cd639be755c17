#include "kvtier/core/ordering.h"

#include <array>

namespace kvtier {
namespace internal {
std::atomic<std::uint32_t> disabled_ordering_points{0};
}

namespace {
constexpr std::size_t kCount = static_cast<std::size_t>(OrderingPoint::count_);

constexpr std::array<OrderingPoint, kCount> make_all() {
  std::array<OrderingPoint, kCount> all{};
  for (std::size_t i = 0; i < kCount; ++i) all[i] = static_cast<OrderingPoint>(i);
  return all;
}
constexpr std::array<OrderingPoint, kCount> kAll = make_all();
constexpr std::size_t kFirstOfDisk = static_cast<std::size_t>(OrderingPoint::disk_verify_checksum);
}  // namespace

std::span<const OrderingPoint> all_ordering_points() { return std::span(kAll).first(kFirstOfDisk); }
std::span<const OrderingPoint> disk_ordering_points() { return std::span(kAll).subspan(kFirstOfDisk); }

std::string_view to_string(OrderingPoint point) {
  switch (point) {
    case OrderingPoint::load_after_framework_stream: return "load_after_framework_stream";
    case OrderingPoint::store_after_framework_stream: return "store_after_framework_stream";
    case OrderingPoint::released_after_store_copy: return "released_after_store_copy";
    case OrderingPoint::ready_after_store_copy: return "ready_after_store_copy";
    case OrderingPoint::done_after_load_copy: return "done_after_load_copy";
    case OrderingPoint::wait_stream_event: return "wait_stream_event";
    case OrderingPoint::wait_layer_event: return "wait_layer_event";
    case OrderingPoint::pins_until_load_copy: return "pins_until_load_copy";
    case OrderingPoint::reservation_until_store_copy: return "reservation_until_store_copy";
    case OrderingPoint::detach_after_copies: return "detach_after_copies";
    case OrderingPoint::disk_verify_checksum: return "disk_verify_checksum";
    case OrderingPoint::disk_verify_generation: return "disk_verify_generation";
    case OrderingPoint::disk_sync_before_commit: return "disk_sync_before_commit";
    case OrderingPoint::count_: break;
  }
  return "unknown";
}

DisableOrdering::DisableOrdering(OrderingPoint point) : bit_(1U << static_cast<unsigned>(point)) {
  // What an outer scope has disabled stays disabled behind this one.
  bit_ &= ~internal::disabled_ordering_points.fetch_or(bit_);
}
DisableOrdering::~DisableOrdering() { internal::disabled_ordering_points.fetch_and(~bit_); }

}  // namespace kvtier
