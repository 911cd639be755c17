// Lease: pins from lookup to load.
#include "support/engine_world.h"

namespace kvtier {
namespace {

using namespace support;

TEST(Lease, a_leased_block_is_never_evicted_I4) {
  World world({.blocks = 4});
  done(world.store(0, {0, 1}, {0, 1}));
  const auto lease = world.pin({0, 1, 2});
  EXPECT_EQ(lease->num_blocks(), 2U);
  EXPECT_TRUE(lease->active());
  EXPECT_EQ(world.stats().pins, 2U);
  EXPECT_EQ(world.stats().leases, 1U);
  for (std::uint32_t n = 10; n < 40; ++n) {
    done(world.store(0, {n, n + 100}, {2, 3}));
    EXPECT_EQ(world.lookup({0, 1}).ready_blocks, 2U);
  }
  const auto too_many = done(world.store(0, {200, 201, 202}, {2, 3, 4}));
  EXPECT_EQ(too_many->outcomes()[2], BlockOutcome::declined);
  const auto ticket = world.load(0, {0, 1}, {8, 9});
  EXPECT_TRUE(world.right(0, *ticket, {0, 1}, {8, 9}));
  EXPECT_EQ(ticket->valid_blocks(), 2U);
}

TEST(Lease, of_a_match_holds_what_is_there_now) {
  World world({.blocks = 2});
  done(world.store(0, {0, 1}, {0, 1}));
  const Match match = world.lookup({0, 1});
  const auto pin = [&] { return world.engine->pin(keys({0, 1}), 2, std::nullopt, &match).value(); };
  EXPECT_EQ(pin()->num_blocks(), 2U);
  ASSERT_TRUE(world.engine->drop(keys({0, 1})));
  EXPECT_EQ(pin()->num_blocks(), 0U);
  done(world.store(0, {10, 11}, {2, 3}));  // they stand where the others stood
  EXPECT_EQ(pin()->num_blocks(), 0U);
  EXPECT_EQ(world.stats().pins, 0U);
  ASSERT_TRUE(world.engine->drop(keys({10, 11})));
  done(world.store(0, {1}, {4}));
  done(world.store(0, {0}, {5}));  // and these where they never stood
  const auto lease = pin();
  EXPECT_EQ(lease->num_blocks(), 2U);
  EXPECT_EQ(world.stats().pinned_blocks, 2U);
  const Match other = world.lookup({0});  // of fewer keys: it says nothing of these
  EXPECT_EQ(world.engine->pin(keys({0, 1}), 2, std::nullopt, &other).value()->num_blocks(), 2U);
}

TEST(Lease, is_released_by_release_and_by_the_destructor_once) {
  World world;
  done(world.store(0, {0, 1}, {0, 1}));
  auto first = world.pin({0, 1});
  auto second = world.pin({0, 1});
  EXPECT_EQ(world.stats().pins, 4U);
  EXPECT_EQ(world.stats().pinned_blocks, 2U);
  first->release();
  first->release();
  EXPECT_FALSE(first->active());
  EXPECT_EQ(first->num_blocks(), 2U);
  EXPECT_EQ(world.stats().pins, 2U);
  first.reset();
  second.reset();
  world.quiesce();
  expect_at_rest(world.stats());
}

TEST(Lease, ends_when_its_time_to_live_is_over_and_not_before) {
  World world;
  done(world.store(0, {0}, {0}));
  const auto lease = world.pin({0}, 1000);
  const auto for_ever = world.pin({0});
  const auto longest = world.pin({0}, std::numeric_limits<std::int64_t>::max());
  world.clock->advance_us(999);
  EXPECT_TRUE(world.engine->poll());
  EXPECT_EQ(world.stats().pins, 3U);
  EXPECT_TRUE(lease->active());
  world.clock->advance_us(1);
  EXPECT_TRUE(world.engine->poll());
  EXPECT_EQ(world.stats().pins, 2U);
  EXPECT_FALSE(lease->active());
  EXPECT_TRUE(for_ever->active());
  EXPECT_TRUE(longest->active());
}

TEST(Lease, an_expired_lease_gives_way_to_the_next_store) {
  World world({.blocks = 1});
  done(world.store(0, {0}, {0}));
  const auto lease = world.pin({0}, 10);
  EXPECT_EQ(done(world.store(0, {1}, {1}))->outcomes()[0], BlockOutcome::declined);
  world.clock->advance_us(10);
  EXPECT_EQ(done(world.store(0, {1}, {1}))->outcomes()[0], BlockOutcome::stored);
}

TEST(Lease, a_dropped_block_keeps_its_slot_until_the_lease_ends) {
  World world;
  done(world.store(0, {0, 1}, {0, 1}));
  const auto lease = world.pin({0, 1});
  EXPECT_EQ(world.engine->drop(keys({0, 1})).value(), 2U);
  EXPECT_EQ(world.lookup({0, 1}).ready_blocks, 0U);
  EXPECT_EQ(world.pin({0, 1})->num_blocks(), 0U);
  EXPECT_EQ(world.stats().host[0].leaving, 2U);
  // The same key anew, beside the old one.
  EXPECT_EQ(done(world.store(0, {0}, {2}))->outcomes()[0], BlockOutcome::stored);
  EXPECT_EQ(world.stats().host[0].leaving, 2U);
  lease->release();
  world.quiesce();
  expect_at_rest(world.stats());
  EXPECT_EQ(world.stats().host[0].free, 7U);
  EXPECT_TRUE(world.ready(0));
}

TEST(Lease, ends_with_close_and_outlives_the_engine) {
  World world;
  done(world.store(0, {0}, {0}));
  const auto lease = world.pin({0});
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
  EXPECT_FALSE(lease->active());
  expect_at_rest(world.stats());
  lease->release();
  world.engine.reset();
  lease->release();
  EXPECT_FALSE(lease->active());
}

TEST(Lease, of_nothing_ready_holds_nothing) {
  World world({.seed = 9});
  world.machine.sim->hold();
  const auto running = world.store(0, {0}, {0});
  const auto lease = world.pin({0});
  EXPECT_EQ(lease->num_blocks(), 0U);
  EXPECT_EQ(world.stats().pins, 0U);
  world.machine.sim->release();
  done(running);
}

}  // namespace
}  // namespace kvtier
