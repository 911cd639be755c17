#include "kvtier/index/eviction.h"

#include <string>

#include "conformance/eviction_conformance.h"

namespace kvtier {
namespace conformance {
namespace {

std::vector<std::string_view> all_names() {
  std::vector<std::string_view> names;
  for (const EvictionChoice& choice : eviction_choices()) names.push_back(choice.name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Native, EvictionConformance, ::testing::ValuesIn(all_names()), [](const auto& name) {
  std::string said(name.param);
  for (char& each : said) each = each == '-' ? '_' : each;
  return said;
});

}  // namespace
}  // namespace conformance

namespace {

TEST(EvictionChoices, the_default_is_first_and_runs_leaf_first) {
  EXPECT_EQ(eviction_choices().front().name, kDefaultEviction);
  EXPECT_TRUE(eviction_choices().front().leaf_first);
  EXPECT_EQ(find_eviction("mru"), nullptr);
}

}  // namespace
}  // namespace kvtier
