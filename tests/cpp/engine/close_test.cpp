// The end of an engine: close, detach, tickets and pages that outlive it, forked children.
#include <sys/wait.h>
#include <unistd.h>

#include "support/engine_world.h"

namespace kvtier {
namespace {

using namespace support;

TEST(Close, refuses_new_work_and_answers_stats_for_ever) {
  World world;
  done(world.store(0, {0}, {0}));
  EXPECT_FALSE(world.engine->closed());
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
  EXPECT_TRUE(world.engine->close(std::nullopt));
  EXPECT_TRUE(world.engine->closed());
  EXPECT_FALSE(world.pages[0]->attached());
  const auto k = keys({0});
  const auto code = [](const auto& result) { return result.status().code(); };
  EXPECT_EQ(code(world.engine->lookup(k)), StatusCode::closed);
  EXPECT_EQ(code(world.engine->lookup({})), StatusCode::closed);
  EXPECT_EQ(code(world.engine->pin(k, 1, std::nullopt, nullptr)), StatusCode::closed);
  EXPECT_EQ(code(world.try_store(0, {0}, {0})), StatusCode::closed);
  EXPECT_EQ(code(world.try_load(0, {0}, {0})), StatusCode::closed);
  EXPECT_EQ(code(world.engine->grant_store(GroupId{0}, {}, 1)), StatusCode::closed);
  EXPECT_EQ(code(world.engine->grant_load(GroupId{0}, {}, 1)), StatusCode::closed);
  EXPECT_EQ(code(world.engine->touch(k)), StatusCode::closed);
  EXPECT_EQ(code(world.engine->drop(k)), StatusCode::closed);
  EXPECT_EQ(code(world.engine->drop_namespace("")), StatusCode::closed);
  EXPECT_EQ(code(world.engine->poll()), StatusCode::closed);
  EXPECT_EQ(code(world.engine->flush(std::nullopt)), StatusCode::closed);
  EXPECT_EQ(code(world.engine->attach(world.machine.device, GroupId{0}, world.memory[0].tensors())),
            StatusCode::closed);
  EXPECT_EQ(world.engine->wait_until_whole().code(), StatusCode::closed);
  EXPECT_TRUE(world.engine->detach(*world.pages[0], std::nullopt));
  const EngineStats stats = world.stats();
  EXPECT_EQ(stats.store_stored, 1U);
  EXPECT_EQ(stats.host_bytes, 0U);
  expect_at_rest(stats);
}

TEST(Close, waits_for_running_transfers_and_may_be_called_again_after_a_timeout) {
  World world({.seed = 1});
  done(world.store(0, {0}, {0}));
  world.quiesce();
  world.machine.sim->hold();
  const auto store = world.store(0, {1}, {1});
  const auto load = world.load(0, {0}, {2});
  EXPECT_EQ(world.engine->close(std::chrono::steady_clock::now()).code(), StatusCode::timeout);
  EXPECT_TRUE(world.engine->closed());
  EXPECT_EQ(world.engine->lookup(keys({0})).status().code(), StatusCode::closed);
  EXPECT_EQ(world.stats().transfers_running, 2U);
  EXPECT_EQ(world.stats().pins, 1U);
  Status first;
  Status second;
  std::thread closing([&] { first = world.engine->close(in_seconds(30)); });
  std::thread closing_too([&] { second = world.engine->close(std::nullopt); });
  world.machine.sim->release();
  closing.join();
  closing_too.join();
  EXPECT_TRUE(first);
  EXPECT_TRUE(second);
  EXPECT_EQ(store->outcomes(), all(1, BlockOutcome::stored));
  EXPECT_TRUE(world.right(0, *load, {0}, {2}));
  EXPECT_EQ(load->outcomes(), all(1, BlockOutcome::loaded));
  expect_at_rest(world.stats());
  EXPECT_TRUE(world.machine.sim->violations().empty());
}

TEST(Close, an_engine_may_be_destroyed_with_tickets_leases_and_pages_alive) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    std::shared_ptr<Ticket> load;
    std::shared_ptr<Ticket> store;
    std::shared_ptr<Lease> lease;
    std::shared_ptr<Pages> pages;
    {
      World world({.seed = seed});
      done(world.store(0, {0}, {0}));
      lease = world.pin({0});
      load = world.load(0, {0}, {1});
      store = world.store(0, {1}, {2});
      pages = world.pages[0];
      world.engine.reset();
      EXPECT_TRUE(load->done() && store->done());
      EXPECT_TRUE(world.right(0, *load, {0}, {1}));
      EXPECT_TRUE(world.machine.sim->violations().empty());
    }
    // The device is alive as long as somebody may order a stream behind its events.
    EXPECT_EQ(load->outcomes(), all(1, BlockOutcome::loaded));
    EXPECT_TRUE(load->wait_stream(StreamHandle{0}));
    EXPECT_FALSE(pages->attached());
    lease.reset();
  }
}

TEST(Close, tickets_that_are_dropped_at_once_cancel_nothing_I5) {
  World world({.seed = 7});
  for (std::uint32_t i = 0; i < 8; ++i) static_cast<void>(world.store(0, {i}, {i}));
  EXPECT_TRUE(world.engine->flush(in_seconds(30)));
  for (std::uint32_t i = 0; i < 8; ++i) static_cast<void>(world.load(0, {i}, {8 + i}));
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
  bool right = true;
  world.machine.run([&] {
    for (std::uint32_t i = 0; i < 8; ++i) right = right && world.memory[0].holds(i, {8 + i}, 0, 0);
  });
  EXPECT_TRUE(right);
  expect_at_rest(world.stats());
}

TEST(Detach, waits_for_running_copies_and_refuses_further_ones) {
  World world({.seed = 2});
  done(world.store(0, {0}, {0}));
  world.machine.sim->hold();
  const auto load = world.load(0, {0}, {1});
  EXPECT_EQ(world.engine->detach(*world.pages[0], std::chrono::steady_clock::now()).code(),
            StatusCode::timeout);
  EXPECT_FALSE(world.pages[0]->attached());
  EXPECT_EQ(world.try_store(0, {1}, {1}).status().code(), StatusCode::closed);
  EXPECT_EQ(world.try_load(0, {0}, {1}).status().code(), StatusCode::closed);
  Status detached;
  std::thread detaching([&] { detached = world.engine->detach(*world.pages[0], in_seconds(30)); });
  world.machine.sim->release();
  detaching.join();
  EXPECT_TRUE(detached);
  EXPECT_TRUE(load->done());
  EXPECT_TRUE(world.engine->detach(*world.pages[0], std::nullopt));
  world.machine.sim->free(world.memory[0].bases()[0]);
  EXPECT_TRUE(world.machine.sim->violations().empty());
  // What was stored through them is still there, for other pages.
  EXPECT_TRUE(world.ready(0));
  Memory memory(full_group(), 4, Layout::tensor_per_layer,
                [&](std::size_t n) { return world.machine.allocate(n); });
  world.pages[0] = world.engine->attach(world.machine.device, GroupId{0}, memory.tensors()).value();
  const auto again = done(world.load(0, {0}, {3}));
  bool right = false;
  world.machine.run([&] { right = memory.holds(0, {3}, 0, 0); });
  EXPECT_TRUE(right);
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
}

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// 0 if every method of an inherited engine answers `closed`, else the number of the first that does not.
int closed_everywhere(World& world, const std::shared_ptr<Ticket>& ticket, Lease& lease) {
  int at = 0;
  const auto k = keys({0});
  const auto is_closed = [&](const auto& result) {
    ++at;
    if constexpr (requires { result.code(); }) {
      return result.code() == StatusCode::closed;
    } else {
      return result.status().code() == StatusCode::closed;
    }
  };
  Engine& engine = *world.engine;
  const bool good = is_closed(engine.lookup(k)) && is_closed(engine.pin(k, 1, std::nullopt, nullptr)) &&
                    is_closed(world.try_store(0, {0}, {0})) && is_closed(world.try_load(0, {0}, {0})) &&
                    is_closed(engine.grant_store(GroupId{0}, {}, 1)) &&
                    is_closed(engine.grant_load(GroupId{0}, {}, 1)) && is_closed(engine.finish_part(1, {})) &&
                    is_closed(engine.touch(k)) && is_closed(engine.drop(k)) &&
                    is_closed(engine.drop_namespace("")) && is_closed(engine.poll()) &&
                    is_closed(engine.flush(std::nullopt)) && is_closed(engine.wait_until_whole()) &&
                    is_closed(engine.stats()) && is_closed(engine.close(std::nullopt)) &&
                    is_closed(engine.attach(world.machine.device, GroupId{0}, {})) &&
                    is_closed(engine.detach(*world.pages[0], std::nullopt)) &&
                    is_closed(ticket->wait(Moment::ready, std::nullopt)) && is_closed(ticket->failure()) &&
                    is_closed(ticket->wait_stream(StreamHandle{0})) && is_closed(ticket->done_fd());
  if (!good) return at;
  if (!engine.closed() || lease.active() || !ticket->done() || ticket->valid_blocks() != 0) return at + 1;
  return 0;
}

TEST(Fork, a_child_is_told_closed_by_every_method_and_ends_without_hanging) {
  if (kThreadSanitizer) GTEST_SKIP() << "TSan does not follow fork() in a process with threads";
  for (const bool simulated : {true, false}) {
    auto world = std::make_unique<World>(
        WorldOptions{.seed = simulated ? std::optional<std::uint64_t>(3) : std::nullopt});
    done(world->store(0, {0}, {0}));
    std::shared_ptr<Lease> lease = world->pin({0});
    if (simulated) world->machine.sim->hold();
    std::shared_ptr<Ticket> ticket = world->load(0, {0}, {1});  // runs while we fork
    // Somebody waits for it: destroying the ticket in the child must not wait for him.
    std::thread waiting([ticket] { static_cast<void>(ticket->wait(Moment::ready, in_seconds(30))); });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // only makes the hazard likely
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(20);
      const int wrong = closed_everywhere(*world, ticket, *lease);
      lease.reset();
      ticket.reset();
      world->pages.clear();
      world->engine.reset();
      ::_exit(wrong);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
    EXPECT_EQ(WEXITSTATUS(status), 0);
    if (simulated) world->machine.sim->release();
    waiting.join();
    EXPECT_TRUE(world->right(0, *ticket, {0}, {1}));
    EXPECT_EQ(ticket->outcomes(), all(1, BlockOutcome::loaded));
    EXPECT_TRUE(world->engine->close(in_seconds(30)));
  }
}

}  // namespace
}  // namespace kvtier
