#include "kvtier/index/ghost_lists.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <random>

namespace kvtier {
namespace {

TEST(GhostLists, a_digest_is_in_one_list_and_is_taken_once) {
  GhostLists ghosts(4, 2);
  ghosts.add(7, 0);
  ghosts.add(7, 1);
  EXPECT_EQ(ghosts.size(0), 0U);
  EXPECT_EQ(ghosts.size(1), 1U);
  EXPECT_EQ(ghosts.take(7), 1U);
  EXPECT_EQ(ghosts.take(7), std::nullopt);
}

TEST(GhostLists, without_capacity_nothing_is_remembered) {
  GhostLists ghosts(0, 1);
  ghosts.add(7, 0);
  EXPECT_EQ(ghosts.take(7), std::nullopt);
}

TEST(GhostLists, agree_with_a_naive_model) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    std::mt19937 random(seed);
    GhostLists ghosts(10, 2);
    std::list<std::uint64_t> model[2];
    for (int step = 0; step < 3000; ++step) {
      // Digests that share a bucket, so that chains of them form and break.
      const std::uint64_t digest = (random() % 30) * (seed % 2 == 0 ? 1 : 128);
      const auto list = static_cast<std::uint32_t>(random() % 2);
      if (random() % 3 != 0) {
        for (auto& each : model) each.remove(digest);
        if (model[0].size() + model[1].size() == 10)
          model[model[1].size() > model[0].size() ? 1 : 0].pop_front();
        model[list].push_back(digest);
        ghosts.add(digest, list);
      } else if (random() % 4 != 0) {
        std::optional<std::uint32_t> expected;
        for (std::uint32_t l = 0; l < 2; ++l) {
          if (model[l].remove(digest) > 0) expected = l;
        }
        ASSERT_EQ(ghosts.take(digest), expected);
      } else if (!model[list].empty()) {
        model[list].pop_front();
        ghosts.drop_oldest(list);
      }
      for (std::uint32_t l = 0; l < 2; ++l) ASSERT_EQ(ghosts.size(l), model[l].size());
    }
  }
}

}  // namespace
}  // namespace kvtier
