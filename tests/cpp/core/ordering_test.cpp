#include "kvtier/core/ordering.h"

#include <gtest/gtest.h>

#include <optional>
#include <set>
#include <vector>

namespace kvtier {
namespace {

std::vector<OrderingPoint> every_point() {
  std::vector<OrderingPoint> points(all_ordering_points().begin(), all_ordering_points().end());
  points.insert(points.end(), disk_ordering_points().begin(), disk_ordering_points().end());
  return points;
}

TEST(Ordering, every_point_is_enumerated_and_has_a_name) {
  EXPECT_EQ(every_point().size(), static_cast<std::size_t>(OrderingPoint::count_));
  std::set<std::string_view> names;
  for (const OrderingPoint point : every_point()) EXPECT_TRUE(names.insert(to_string(point)).second);
  EXPECT_FALSE(names.contains("unknown"));
  EXPECT_EQ(to_string(OrderingPoint::count_), "unknown");
}

TEST(Ordering, disabling_a_point_disables_it_alone_and_for_a_scope) {
  for (const OrderingPoint disabled : every_point()) {
    {
      const DisableOrdering scope(disabled);
      for (const OrderingPoint point : every_point()) EXPECT_EQ(ordering_enabled(point), point != disabled);
    }
    for (const OrderingPoint point : every_point()) EXPECT_TRUE(ordering_enabled(point));
  }
}

TEST(Ordering, an_inner_scope_does_not_enable_what_an_outer_one_disabled) {
  const OrderingPoint point = OrderingPoint::wait_stream_event;
  {
    const DisableOrdering outer(point);
    {
      const DisableOrdering inner(point);
    }
    EXPECT_FALSE(ordering_enabled(point));
  }
  EXPECT_TRUE(ordering_enabled(point));
}

}  // namespace
}  // namespace kvtier
