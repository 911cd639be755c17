// What an engine does with blocks, one promise a test.
#include "kvtier/engine/engine.h"

#include <unistd.h>

#include "support/engine_world.h"

namespace kvtier {
namespace {

using namespace support;
using enum BlockOutcome;

TEST(Engine, a_stored_block_comes_back_byte_for_byte) {
  World world;
  const auto stored = done(world.store(0, range(0, 4), range(0, 4)));
  EXPECT_EQ(stored->outcomes(), all(4, BlockOutcome::stored));
  EXPECT_EQ(stored->valid_blocks(), 4U);
  world.scribble(0);
  const auto loaded = world.load(0, range(0, 4), range(8, 12));
  EXPECT_TRUE(world.right(0, *loaded, range(0, 4), range(8, 12)));
  EXPECT_EQ(loaded->outcomes(), all(4, BlockOutcome::loaded));
  world.quiesce();
  const EngineStats stats = world.stats();
  EXPECT_EQ(stats.store_stored, 4U);
  EXPECT_EQ(stats.load_loaded, 4U);
  EXPECT_EQ(stats.bytes_stored, 4 * full_group().payload_bytes());
  EXPECT_EQ(stats.bytes_loaded, stats.bytes_stored);
  expect_at_rest(stats);
}

TEST(Engine, groups_of_equal_stride_share_a_size_class_and_keep_their_blocks_apart) {
  World world({.groups = {full_group(), window_group(), latent_group()}, .blocks = 4});
  EXPECT_EQ(world.stats().host.size(), 2U);
  for (std::size_t g = 0; g < 3; ++g) {
    const std::uint32_t per_block = world.memory[g].spec().pages_per_block();
    done(world.store(g, range(0, 4), g == 2 ? Numbers{0, 0, 1, 1} : range(0, 4 * per_block)));
  }
  for (std::size_t g = 0; g < 3; ++g) {
    world.scribble(g);
    const std::uint32_t per_block = world.memory[g].spec().pages_per_block();
    const Numbers at = g == 2 ? Numbers{5, 5, 3, 3} : range(8, 8 + 4 * per_block);
    const auto ticket = world.load(g, range(0, 4), at);
    EXPECT_TRUE(world.right(g, *ticket, range(0, 4), at));
    EXPECT_EQ(ticket->valid_blocks(), 4U);
  }
}

TEST(Engine, a_block_that_begins_inside_a_page_is_found_by_its_depth) {
  World world({.groups = {latent_group()}});
  done(world.store(0, {1, 2, 3}, {4, 5, 5}, 1));
  world.scribble(0);
  const auto ticket = world.load(0, {1, 2, 3}, {7, 9, 9}, 1);
  EXPECT_TRUE(world.right(0, *ticket, {1, 2, 3}, {7, 9, 9}, 1));
  EXPECT_EQ(ticket->outcomes(), all(3, loaded));
}

TEST(Engine, a_present_block_is_not_copied_again) {
  World world;
  done(world.store(0, range(0, 3), range(0, 3)));
  world.scribble(0);
  const auto again = done(world.try_store(0, range(0, 4), range(0, 4)).value());
  EXPECT_EQ(again->outcomes(), (std::vector{present, present, present, stored}));
  const auto ticket = world.load(0, range(0, 3), range(4, 7));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 3), range(4, 7)));
}

TEST(Engine, a_block_that_another_store_fills_is_pending_to_stores_loads_and_lookups) {
  World world({.seed = 1});
  world.machine.sim->hold();
  const auto first = world.store(0, range(0, 2), range(0, 2));
  EXPECT_EQ(world.states(range(0, 3)),
            (std::vector{BlockState::pending, BlockState::pending, BlockState::miss}));
  const auto second = world.try_store(0, range(0, 2), range(4, 6)).value();
  EXPECT_TRUE(second->done());
  EXPECT_EQ(second->outcomes(), all(2, pending));
  EXPECT_EQ(second->valid_blocks(), 2U);
  const auto load = world.load(0, range(0, 3), range(8, 11));
  EXPECT_TRUE(load->done());
  EXPECT_EQ(load->outcomes(), (std::vector{pending, pending, missed}));
  EXPECT_EQ(load->valid_blocks(), 0U);
  EXPECT_FALSE(first->done());
  EXPECT_EQ(first->outcomes(), all(2, running));
  world.machine.sim->release();
  EXPECT_EQ(done(first)->outcomes(), all(2, stored));
  EXPECT_EQ(world.stats().lookup_misses_pending, 2U);
}

TEST(Engine, a_key_named_twice_in_a_store_is_stored_once) {
  World world;
  EXPECT_EQ(done(world.store(0, {5, 5}, {0, 1}))->outcomes(), (std::vector{stored, pending}));
  EXPECT_EQ(done(world.store(0, {5, 5}, {0, 1}))->outcomes(), all(2, present));
  world.quiesce();
  EXPECT_EQ(world.stats().host[0].ready, 1U);
}

TEST(Engine, a_key_named_twice_in_a_load_lands_in_both_places) {
  World world;
  done(world.store(0, {5}, {0}));
  world.scribble(0);
  const auto ticket = world.load(0, {5, 5}, {3, 4});
  EXPECT_TRUE(world.right(0, *ticket, {5, 5}, {3, 4}));
  EXPECT_EQ(ticket->outcomes(), all(2, loaded));
}

TEST(Engine, an_empty_request_succeeds_at_once) {
  World world;
  const auto stored_none = world.store(0, {}, {});
  EXPECT_TRUE(stored_none->done());
  EXPECT_TRUE(stored_none->settled(Moment::released));
  EXPECT_TRUE(world.load(0, {}, {})->done());
  EXPECT_TRUE(world.load(0, {}, {})->wait_stream(world.machine.stream));
  EXPECT_EQ(world.lookup({}).ready_blocks, 0U);
  EXPECT_EQ(world.pin({})->num_blocks(), 0U);
  EXPECT_EQ(world.engine->touch({}).value(), 0U);
  EXPECT_EQ(world.engine->drop({}).value(), 0U);
  world.quiesce();
  expect_at_rest(world.stats());
}

TEST(Engine, a_bad_request_names_the_problem_and_does_nothing) {
  World world;
  World other;
  const auto code = [](const auto& result) { return result.status().code(); };
  EXPECT_EQ(code(world.try_store(0, {1, 2}, {0})), StatusCode::invalid_argument);
  EXPECT_EQ(code(world.try_store(0, {1}, {32})), StatusCode::invalid_argument);
  EXPECT_EQ(code(world.try_load(0, {1}, {32})), StatusCode::invalid_argument);
  EXPECT_EQ(code(world.try_load(0, {1, 2}, {3, 3})), StatusCode::invalid_argument);
  EXPECT_EQ(code(world.try_store(0, {1, 2}, {0, 1}, 0xffffffffU)), StatusCode::invalid_argument);
  EXPECT_EQ(code(other.engine->store(*world.pages[0], {})), StatusCode::invalid_argument);
  EXPECT_EQ(other.engine->detach(*world.pages[0], std::nullopt).code(), StatusCode::invalid_argument);
  EXPECT_EQ(code(world.engine->attach(nullptr, GroupId{0}, {})), StatusCode::invalid_argument);
  EXPECT_EQ(code(world.engine->attach(world.machine.device, GroupId{1}, {})), StatusCode::invalid_argument);
  expect_at_rest(world.stats());
  EXPECT_EQ(world.stats().host[0].free, 8U);
}

TEST(Engine, when_slots_run_out_the_prefix_is_kept_and_the_rest_declined) {
  World world({.blocks = 4});
  const auto ticket = done(world.store(0, range(0, 6), range(0, 6)));
  EXPECT_EQ(ticket->outcomes(), (std::vector{stored, stored, stored, stored, declined, declined}));
  EXPECT_EQ(ticket->valid_blocks(), 4U);
  EXPECT_EQ(world.lookup(range(0, 6)).ready_blocks, 4U);
}

TEST(Engine, eviction_takes_the_oldest_prompt_from_its_tail) {
  World world({.blocks = 6});
  done(world.store(0, range(0, 3), range(0, 3)));
  done(world.store(0, range(10, 13), range(3, 6)));
  done(world.store(0, {20}, {6}));
  EXPECT_EQ(world.lookup(range(0, 3)).ready_blocks, 2U);
  done(world.store(0, {21}, {7}, 1, 20));
  EXPECT_EQ(world.lookup(range(0, 3)).ready_blocks, 1U);
  EXPECT_EQ(world.lookup(range(10, 13)).ready_blocks, 3U);
  EXPECT_EQ(world.stats().evictions, 2U);
}

TEST(Engine, a_touched_prompt_outlives_an_untouched_one) {
  World world({.blocks = 4});
  done(world.store(0, {0, 1}, {0, 1}));
  done(world.store(0, {10, 11}, {2, 3}));
  EXPECT_EQ(world.engine->touch(keys({0, 1, 99})).value(), 2U);
  done(world.store(0, {20, 21}, {4, 5}));
  EXPECT_EQ(world.lookup({0, 1}).ready_blocks, 2U);
  EXPECT_EQ(world.lookup({10, 11}).ready_blocks, 0U);
}

TEST(Engine, a_parent_is_not_evicted_before_its_child_even_when_it_is_older) {
  World world({.blocks = 3});
  done(world.store(0, {0}, {0}));
  done(world.store(0, {1}, {1}, 1, 0));  // hangs on block 0
  done(world.store(0, {10}, {2}));
  EXPECT_EQ(world.engine->touch(keys({1})).value(), 1U);
  EXPECT_EQ(world.engine->touch(keys({10})).value(), 1U);
  done(world.store(0, {20}, {3}));  // 0 is the oldest, but 1 hangs on it
  EXPECT_TRUE(world.ready(0));
}

TEST(Engine, storing_a_child_never_evicts_its_parent) {
  World world({.blocks = 1});
  done(world.store(0, {0}, {0}));
  EXPECT_EQ(done(world.store(0, {1}, {1}, 1, 0))->outcomes(), all(1, declined));
  EXPECT_TRUE(world.ready(0));
}

TEST(Engine, a_dropped_block_is_not_found_and_its_slot_is_free) {
  World world;
  done(world.store(0, range(0, 3), range(0, 3)));
  EXPECT_EQ(world.engine->drop(keys({1, 7})).value(), 1U);
  EXPECT_EQ(world.states(range(0, 3)), (std::vector{BlockState::ready, BlockState::miss, BlockState::ready}));
  world.quiesce();
  EXPECT_EQ(world.stats().drops, 1U);
  EXPECT_EQ(world.stats().host[0].free, 6U);
}

TEST(Engine, a_block_dropped_while_it_is_stored_never_becomes_visible) {
  World world({.seed = 3});
  world.machine.sim->hold();
  const auto ticket = world.store(0, {0, 1}, {0, 1});
  EXPECT_EQ(world.engine->drop(keys({1})).value(), 1U);
  EXPECT_EQ(world.stats().host[0].filling, 2U);  // the copy still writes the slot (I5)
  // The key may be stored anew at once, into another slot.
  const auto anew = world.store(0, {1}, {5}, 1, 0);
  EXPECT_EQ(world.stats().host[0].filling, 3U);
  world.machine.sim->release();
  EXPECT_EQ(done(ticket)->outcomes(), (std::vector{stored, dropped}));
  EXPECT_EQ(done(anew)->outcomes(), all(1, stored));
  world.scribble(0);
  const auto load = world.load(0, {0, 1}, {8, 9});
  EXPECT_TRUE(world.right(0, *load, {0, 1}, {8, 9}));
  EXPECT_EQ(load->outcomes(), all(2, loaded));
  world.quiesce();
  expect_at_rest(world.stats());
  EXPECT_EQ(world.stats().store_dropped, 1U);
}

TEST(Engine, a_block_dropped_while_it_is_loaded_still_arrives_and_frees_its_slot_then) {
  World world({.seed = 4});
  done(world.store(0, {0}, {0}));
  world.quiesce();
  world.scribble(0);
  world.machine.sim->hold();
  const auto ticket = world.load(0, {0}, {1});
  EXPECT_EQ(world.engine->drop(keys({0})).value(), 1U);
  EXPECT_FALSE(world.ready(0));
  EXPECT_EQ(world.stats().host[0].leaving, 1U);
  world.machine.sim->release();
  EXPECT_TRUE(world.right(0, *ticket, {0}, {1}));
  EXPECT_EQ(ticket->outcomes(), all(1, loaded));
  world.quiesce();
  EXPECT_EQ(world.stats().host[0].free, 8U);
}

TEST(Engine, dropping_a_namespace_takes_its_blocks_and_no_others) {
  World world({.groups = {full_group(), latent_group()}});
  done(world.store(0, {0, 1}, {0, 1}, 0, {}, "a"));
  done(world.store(1, {0, 1}, {0, 0}, 0, {}, "a"));
  done(world.store(0, {10, 11}, {2, 3}, 0, {}, "b"));
  EXPECT_EQ(world.engine->drop_namespace("a").value(), 4U);
  EXPECT_EQ(world.engine->drop_namespace("a").value(), 0U);
  EXPECT_EQ(world.engine->drop_namespace("never seen").value(), 0U);
  EXPECT_FALSE(world.ready(0));
  EXPECT_TRUE(world.ready(10) && world.ready(11));
  world.quiesce();
  EXPECT_EQ(world.stats().drops, 4U);
  expect_at_rest(world.stats());
}

TEST(Engine, flush_waits_for_the_stores_before_it_and_for_no_later_one) {
  World world({.seed = 5});
  SimulatedDevice& sim = *world.machine.sim;
  EXPECT_EQ(world.engine->flush(in_seconds(5))->settled, 0U);
  sim.hold();
  const auto first = world.store(0, {0}, {0});
  EXPECT_EQ(world.engine->flush(std::chrono::steady_clock::now()).status().code(), StatusCode::timeout);
  Result<FlushResult> flushed = Status::internal("not yet");
  std::thread flushing([&] { flushed = world.engine->flush(in_seconds(30)); });
  sim.release();
  flushing.join();
  EXPECT_TRUE(flushed);
  EXPECT_TRUE(first->done());
  // A load is not waited for.
  sim.hold();
  const auto load = world.load(0, {0}, {1});
  EXPECT_TRUE(world.engine->flush(in_seconds(30)));
  EXPECT_FALSE(load->done());
  EXPECT_EQ(world.engine->poll().value(), 1U);
  sim.release();
  done(load);
}

TEST(Engine, a_full_tier_of_present_blocks_is_not_evicted_by_the_tail_of_their_own_prompt) {
  World world({.blocks = 4});
  done(world.store(0, range(0, 4), range(0, 4)));
  const auto ticket = done(world.store(0, range(0, 5), range(0, 5)));
  EXPECT_EQ(ticket->outcomes(), (std::vector{present, present, present, present, declined}));
  EXPECT_EQ(world.lookup(range(0, 4)).ready_blocks, 4U);
  world.quiesce();
  expect_at_rest(world.stats());
}

TEST(Engine, a_done_descriptor_becomes_readable_once_the_ticket_is_done) {
  World world({.seed = 6});
  world.machine.sim->hold();
  const auto ticket = world.store(0, {0}, {0});
  const int fd = ticket->done_fd().value();
  EXPECT_EQ(ticket->done_fd().value(), fd);
  EXPECT_EQ(ticket->wait(Moment::ready, std::chrono::steady_clock::now()).code(), StatusCode::timeout);
  EXPECT_EQ(ticket->wait(Moment::durable, std::nullopt).code(), StatusCode::unsupported);
  world.machine.sim->release();
  done(ticket);
  std::uint64_t count = 0;
  EXPECT_EQ(::read(fd, &count, sizeof count), static_cast<ssize_t>(sizeof count));
  EXPECT_EQ(count, 1U);
}

TEST(Engine, a_configuration_that_is_not_allowed_is_refused) {
  const auto open = [](auto&& change) {
    EngineConfig config;
    config.groups = {full_group()};
    config.host_bytes = 1 << 20;
    change(config);
    return Engine::open(std::move(config)).status().code();
  };
  EXPECT_EQ(open([](EngineConfig& c) { c.groups.clear(); }), StatusCode::invalid_argument);
  EXPECT_EQ(open([](EngineConfig& c) { c.groups.assign(65, full_group()); }), StatusCode::invalid_argument);
  EXPECT_EQ(open([](EngineConfig& c) { c.host_bytes = 4096; }), StatusCode::invalid_argument);
  EXPECT_EQ(open([](EngineConfig& c) { c.host_bytes = ~std::uint64_t{0}; }), StatusCode::invalid_argument);
  EXPECT_EQ(open([](EngineConfig& c) { c.groups[0].num_layers = 0; }), StatusCode::invalid_argument);
  EXPECT_EQ(open([](EngineConfig& c) {
              c.groups.push_back(latent_group());
              c.groups[1].block_tokens = 8;
            }),
            StatusCode::invalid_argument);
  EXPECT_EQ(open([](EngineConfig& c) { c.chunk_bytes = 0; }), StatusCode::invalid_argument);
}

}  // namespace
}  // namespace kvtier
