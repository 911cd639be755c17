// lookup() and pin(): states, the ready prefix with windows, and the books.
#include "support/engine_world.h"

namespace kvtier {
namespace {

using namespace support;

// Straight from the definition: every group has all blocks that a token at position p attends to.
std::size_t longest_prefix(const std::vector<GroupSpec>& groups, const Match& match) {
  for (std::size_t p = match.num_keys; p > 0; --p) {
    bool usable = true;
    for (std::size_t g = 0; g < groups.size(); ++g) {
      std::size_t begin = 0;
      if (groups[g].window_tokens) {
        // The next token, number p * block_tokens, attends to window - 1 tokens before it.
        const std::size_t tokens = p * groups[g].block_tokens;
        const std::size_t back = std::max<std::size_t>(*groups[g].window_tokens - 1, 1);
        begin = (tokens - std::min(tokens, back)) / groups[g].block_tokens;
      }
      for (std::size_t i = begin; i < p; ++i) usable = usable && match.states[g][i] == BlockState::ready;
    }
    if (usable) return p;
  }
  return 0;
}

TEST(Lookup, the_ready_prefix_with_windows_is_that_of_the_definition) {
  std::size_t longer_than_the_gap = 0;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    Random random(seed);
    std::vector<GroupSpec> groups;
    const std::uint32_t count = 1 + random.below(3);
    for (std::uint32_t g = 0; g < count; ++g) {
      groups.push_back(random.percent(60) ? window_group(1 + random.below(20)) : full_group());
    }
    World world({.groups = groups, .blocks = 12});
    for (std::size_t g = 0; g < groups.size(); ++g) {
      const std::uint32_t per_block = groups[g].pages_per_block();
      done(world.try_store(g, range(0, 12), range(0, 12 * per_block)).value());
    }
    // Blocks of all groups are dropped together, so holes differ by what is stored again.
    const std::uint32_t holes = random.below(5);
    for (std::uint32_t h = 0; h < holes; ++h) {
      const std::uint32_t hole = random.below(12);
      ASSERT_TRUE(world.engine->drop(keys({hole})));
      for (std::size_t g = 0; g < groups.size(); ++g) {
        if (random.percent(50)) continue;
        done(world.try_store(g, {hole}, range(0, groups[g].pages_per_block())).value());
      }
    }
    world.quiesce();
    const Match match = world.lookup(range(0, 12));
    EXPECT_EQ(match.ready_blocks, longest_prefix(groups, match)) << "seed " << seed;
    const auto first_gap = std::find(match.states[0].begin(), match.states[0].end(), BlockState::miss);
    longer_than_the_gap +=
        match.ready_blocks > static_cast<std::size_t>(first_gap - match.states[0].begin()) ? 1 : 0;

    // pin() holds exactly what that prefix needs.
    const auto lease = world.pin(range(0, 12));
    EXPECT_EQ(lease->num_blocks(), match.ready_blocks);
    std::uint64_t needed = 0;
    for (const GroupSpec& spec : groups) {
      needed += std::min<std::size_t>(match.ready_blocks, spec.window_blocks().value_or(12));
    }
    EXPECT_EQ(world.stats().pins, needed);
    EXPECT_EQ(world.engine->pin(keys(range(0, 12)), 2, std::nullopt, nullptr).value()->num_blocks(),
              longest_prefix(groups, world.lookup({0, 1})));
  }
  EXPECT_GT(longer_than_the_gap, 0U);
}

TEST(Lookup, hits_and_misses_by_cause_add_up_to_lookups) {
  World world({.groups = {full_group(), latent_group()}, .seed = 2});
  done(world.store(0, {0, 1}, {0, 1}));
  world.quiesce();
  world.machine.sim->hold();
  const auto running = world.store(0, {2}, {2}, 2, 1);
  const Match match = world.lookup({0, 1, 2, 3});
  EXPECT_EQ(match.ready_blocks, 0U);  // the other group has nothing
  EngineStats stats = world.stats();
  EXPECT_EQ(stats.lookup_blocks, 8U);
  EXPECT_EQ(stats.lookup_hits_host, 2U);
  EXPECT_EQ(stats.lookup_misses_pending, 1U);
  EXPECT_EQ(stats.lookup_misses_absent, 5U);
  EXPECT_EQ(stats.lookup_misses_failed, 0U);
  world.machine.sim->release();
  done(running);
}

TEST(Lookup, never_touches_recency) {
  World world({.blocks = 2});
  done(world.store(0, {0}, {0}));
  done(world.store(0, {10}, {1}));
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(world.ready(0));
  done(world.store(0, {20}, {2}));
  EXPECT_FALSE(world.ready(0));
  EXPECT_TRUE(world.ready(10));
}

TEST(Lookup, of_more_keys_than_one_hold_of_the_mutex_is_whole) {
  World world;
  done(world.store(0, {9000, 9001}, {0, 1}));
  Numbers numbers = range(0, 9002);
  const Match match = world.lookup(numbers);
  EXPECT_EQ(std::count(match.states[0].begin(), match.states[0].end(), BlockState::ready), 2);
  EXPECT_EQ(match.states[0][9000], BlockState::ready);
  EXPECT_EQ(world.engine->touch(keys(numbers)).value(), 2U);
  EXPECT_EQ(world.engine->drop(keys(numbers)).value(), 2U);
}

}  // namespace
}  // namespace kvtier
