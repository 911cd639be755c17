// "Fail the n-th call, for every n": each run ends in a miss or a typed failure, and leaves nothing behind.
#include <dirent.h>

#include <atomic>
#include <future>
#include <list>

#include "support/engine_world.h"

#include "kvtier/core/mutex.h"
#include "kvtier/platform/faulty_device.h"

namespace kvtier {
namespace {

using namespace support;

std::size_t entries_of(const char* directory) {
  DIR* dir = ::opendir(directory);
  std::size_t n = 0;
  while (::readdir(dir) != nullptr) ++n;
  ::closedir(dir);
  return n;
}
std::size_t threads() { return entries_of("/proc/self/task"); }
std::size_t descriptors() { return entries_of("/proc/self/fd"); }

// A joined thread stays listed for a moment until the kernel has let go of it.
bool back_to(std::size_t (*count)(), std::size_t wanted) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (count() > wanted && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
  return count() <= wanted;
}

// What a run needs for as long as the process lives if its device could not prove that copies ended.
struct Scene {
  explicit Scene(std::uint64_t seed)
      : machine(options(seed)), device(std::make_shared<FaultyDevice>(*machine.sim, plan)) {}
  static SimulatedOptions options(std::uint64_t seed) {
    SimulatedOptions o = Machine::seeded(seed);
    o.max_delay_us = 0;  // no thread of its own
    return o;
  }
  Machine machine;
  FaultPlan plan;
  FaultyHostMemory memory{linux_host_memory(), plan};
  std::shared_ptr<FaultyDevice> device;
  Mutex mutex;
  std::weak_ptr<Engine> engine KVTIER_GUARDED_BY(mutex);  // once it is open
};

struct Ending {
  bool quarantined = false;
  bool failed_somewhere = false;
  std::size_t loaded = 0;
};

// open, attach, store, load, evict, detach, close; with checks after each.
Ending scenario(Scene& scene) {
  Ending result;
  const auto typed = [&result](const Status& status) {
    result.failed_somewhere |= !status;
    EXPECT_NE(status.code(), StatusCode::internal) << status.message();
    EXPECT_NE(status.code(), StatusCode::timeout) << status.message();
    return status.is_ok();
  };
  EngineConfig config;
  config.groups = {full_group(), latent_group()};
  config.host_bytes = 3 * (full_group().slot_stride_bytes() + latent_group().slot_stride_bytes());
  config.chunk_bytes = 2 * full_group().slot_stride_bytes();
  config.memory = &scene.memory;
  config.hash_seed = 1;
  Result<std::shared_ptr<Engine>> opened = Engine::open(config);
  if (!typed(opened.status())) return result;
  const std::shared_ptr<Engine> engine = *opened;
  {
    MutexLock lock(scene.mutex);
    scene.engine = engine;
  }

  std::list<Memory> memories;
  std::vector<std::shared_ptr<Pages>> attached(2);
  for (std::uint16_t g = 0; g < 2; ++g) {
    memories.emplace_back(config.groups[g], 16, Layout::one_tensor,
                          [&](std::size_t bytes) { return scene.machine.allocate(bytes); });
    auto pages = engine->attach(scene.device, GroupId{g}, memories.back().tensors());
    if (typed(pages.status())) attached[g] = *pages;
  }
  result.failed_somewhere |= !engine->wait_until_whole().is_ok();
  std::size_t g = 0;
  for (const Memory& memory : memories) {
    const std::shared_ptr<Pages> pages = attached[g];
    const std::uint32_t layerwise = g++ == 1 ? 1 : 0;
    if (!pages) continue;
    const auto store = [&](const Numbers& numbers, const Numbers& at) {
      scene.machine.kernel([&memory, numbers, at] {
        for (std::size_t i = 0; i < numbers.size(); ++i) memory.write(numbers[i], at, i, 0);
      });
      const auto k = keys(numbers);
      const auto p = page_ids(at);
      const auto ticket =
          engine->store(*pages, StoreRequest{k, p, scene.machine.stream, 0, std::nullopt, {}}).value();
      typed(done(ticket)->failure());
      static_cast<void>(ticket->wait(Moment::released, in_seconds(30)));
      for (const BlockOutcome outcome : ticket->outcomes()) EXPECT_NE(outcome, BlockOutcome::running);
    };
    const auto load = [&](const Numbers& numbers, const Numbers& at, std::uint32_t layers) {
      scene.machine.run([&memory] { memory.scribble(); });
      const auto k = keys(numbers);
      const auto p = page_ids(at);
      const auto submitted = engine->load(*pages, LoadRequest{k, p, scene.machine.stream, 0, layers});
      if (!typed(submitted.status())) return;
      const auto ticket = done(submitted.value());
      typed(ticket->failure());
      const auto outcomes = ticket->outcomes();
      scene.machine.run([&] {
        for (std::size_t i = 0; i < numbers.size(); ++i) {
          if (outcomes[i] != BlockOutcome::loaded) continue;
          ++result.loaded;
          EXPECT_TRUE(memory.holds(numbers[i], at, i, 0)) << "wrong bytes";
        }
      });
    };
    store({0, 1}, {0, 1});
    store({0, 1, 2, 3}, {0, 1, 2, 3});
    load({0, 1, 2}, {4, 5, 6}, 0);
    load({0, 1}, {4, 5}, layerwise);
    {
      const auto lease = engine->pin(keys({0, 1}), 2, std::nullopt, nullptr).value();
    }
    store({10, 11}, {7, 8});  // evicts
    load({10, 11, 0}, {9, 10, 11}, 0);
    expect_consistent(engine->stats().value());
  }
  for (const auto& pages : attached) {
    if (!pages) continue;
    const Status status = engine->detach(*pages, in_seconds(30));
    typed(status);
    if (!status) result.quarantined = true;
  }
  const Status closed = engine->close(in_seconds(30));
  EXPECT_EQ(closed.code(), result.quarantined ? StatusCode::device : StatusCode::ok);
  const EngineStats stats = engine->stats().value();
  expect_consistent(stats);
  if (result.quarantined) {
    EXPECT_EQ(stats.transfers_running, 0U);
  } else {
    expect_at_rest(stats);
    EXPECT_EQ(stats.quarantined_blocks, 0U);
  }
  return result;
}

Status injected() { return Status::device("injected", 77); }

// Runs it for every n until n is past the last call.
void for_every_call(std::optional<FaultCall> call, FaultSpan span, std::uint64_t step) {
  static auto& kept = *new std::list<std::unique_ptr<Scene>>;
  std::thread([] {}).join();  // ThreadSanitizer starts a thread of its own beside the first one
  std::size_t runs = 0;
  for (std::uint64_t n = 1;; n += step) {
    SCOPED_TRACE((call ? std::string(to_string(*call)) : "any call") + ", n = " + std::to_string(n));
    const std::size_t threads_before = threads();
    const std::size_t descriptors_before = descriptors();
    auto scene = std::make_unique<Scene>(n);
    if (call) {
      scene->plan.fail(*call, n, injected(), span);
    } else {
      scene->plan.fail(n, injected(), span);
    }
    const Ending result = scenario(*scene);
    const bool over = scene->plan.injected() == 0;
    EXPECT_TRUE(scene->machine.sim->violations().empty());
    if (result.quarantined) {
      kept.push_back(std::move(scene));  // its copies may run for ever, so its engine stays
    } else {
      EXPECT_TRUE(back_to(threads, threads_before));
      EXPECT_TRUE(back_to(descriptors, descriptors_before));
    }
    ++runs;
    if (over) {
      EXPECT_FALSE(result.failed_somewhere);
      EXPECT_GT(result.loaded, 8U);
      break;
    }
    if (testing::Test::HasFailure()) break;
  }
  EXPECT_GT(runs, 1U);
}

TEST(Faults, the_nth_call_of_all_may_fail) { for_every_call(std::nullopt, FaultSpan::once, 1); }

TEST(Faults, the_nth_call_of_each_kind_may_fail) {
  for (const FaultCall call :
       {FaultCall::create_stream, FaultCall::create_event, FaultCall::record, FaultCall::wait,
        FaultCall::synchronize, FaultCall::copy, FaultCall::register_host, FaultCall::available_bytes,
        FaultCall::create_shared, FaultCall::map_shared, FaultCall::populate}) {
    for_every_call(call, FaultSpan::once, 1);
    if (HasFailure()) return;
  }
}

TEST(Faults, memory_calls_and_submissions_may_fail_for_good) {
  for (const FaultCall call : {FaultCall::create_event, FaultCall::copy, FaultCall::register_host,
                               FaultCall::populate, FaultCall::available_bytes}) {
    for_every_call(call, FaultSpan::from_then_on, call == FaultCall::create_event ? 5 : 1);
    if (HasFailure()) return;
  }
}

TEST(Faults, devices_and_memory_are_not_called_under_the_engines_mutex_I6) {
  Scene scene(3);
  std::atomic<std::size_t> asked = 0;
  std::atomic<std::size_t> locked_out = 0;
  const auto looked_for = keys({0});
  scene.plan.watch([&](FaultCall) {
    std::shared_ptr<Engine> engine;
    {
      MutexLock lock(scene.mutex);
      engine = scene.engine.lock();
    }
    if (!engine) return;
    ++asked;
    auto looked_up = std::async(std::launch::async, [&] { static_cast<void>(engine->lookup(looked_for)); });
    if (looked_up.wait_for(std::chrono::seconds(10)) != std::future_status::ready) ++locked_out;
  });
  EXPECT_FALSE(scenario(scene).failed_somewhere);
  EXPECT_GT(asked, 50U);
  EXPECT_EQ(locked_out, 0U);
}

// The device refuses to say that copies ended: slots are quarantined, and nothing hangs.
TEST(Faults, copies_that_cannot_be_proved_over_quarantine_their_slots_I5) {
  static auto& kept = *new std::list<std::unique_ptr<Scene>>;
  kept.push_back(std::make_unique<Scene>(5));
  Scene& scene = *kept.back();
  EngineConfig config;
  config.groups = {full_group()};
  config.host_bytes = 4 * full_group().slot_stride_bytes();
  auto engine = Engine::open(config).value();
  Memory memory(full_group(), 8, Layout::one_tensor,
                [&](std::size_t bytes) { return scene.machine.allocate(bytes); });
  const auto pages = engine->attach(scene.device, GroupId{0}, memory.tensors()).value();
  ASSERT_TRUE(engine->wait_until_whole());
  const auto k = keys({0, 1});
  const auto p = page_ids({0, 1});
  scene.plan.fail(FaultCall::synchronize, 1, injected(), FaultSpan::from_then_on);
  const auto stored =
      done(engine->store(*pages, StoreRequest{k, p, scene.machine.stream, 0, std::nullopt, {}}).value());
  EXPECT_EQ(stored->outcomes(), all(2, BlockOutcome::failed));
  EXPECT_EQ(stored->wait(Moment::released, std::nullopt).code(), StatusCode::device);
  EXPECT_EQ(stored->failure().code(), StatusCode::device);
  EXPECT_EQ(engine->lookup(k)->ready_blocks, 0U);
  EXPECT_EQ(engine->detach(*pages, in_seconds(30)).code(), StatusCode::device);
  EXPECT_EQ(engine->detach(*pages, std::nullopt).code(), StatusCode::device);
  EXPECT_EQ(engine->close(in_seconds(30)).code(), StatusCode::device);
  EXPECT_EQ(engine->close(std::nullopt).code(), StatusCode::device);
  const EngineStats stats = engine->stats().value();
  EXPECT_EQ(stats.quarantined_blocks, 2U);
  EXPECT_EQ(stats.host[0].leaving, 2U);
  expect_consistent(stats);
  engine.reset();
  // The copies run after all: into memory that is still there.
  scene.machine.sim->run_until_idle();
  EXPECT_TRUE(scene.machine.sim->violations().empty());
}

TEST(Faults, a_sticky_error_fails_the_engine_and_every_lookup_misses) {
  std::size_t in_loads = 0;
  for (std::uint64_t n = 1; n <= 6; ++n) {
    for (std::uint64_t seed = 1; seed <= 10; ++seed) {
      SCOPED_TRACE("copy " + std::to_string(n) + ", seed " + std::to_string(seed));
      World world({.seed = seed});
      world.machine.sim->fail_sticky_at_copy(n, 700);
      std::vector<std::shared_ptr<Ticket>> tickets;
      for (std::uint32_t i = 0; i < 4; ++i) {
        tickets.push_back(world.store(0, {2 * i, 2 * i + 1}, {2 * i, 2 * i + 1}));
        if (i % 2 == 1) done(tickets.back());
      }
      for (std::uint32_t i = 0; i < 4; ++i) tickets.push_back(world.load(0, {i}, {10 + i}));
      std::size_t failed = 0;
      for (const auto& ticket : tickets) {
        failed += done(ticket)->failure() ? 0 : 1;
        EXPECT_TRUE(ticket->wait(Moment::released, in_seconds(30)));  // the context is gone, and its DMA
      }
      ASSERT_GT(failed, 0U);
      in_loads += tickets[3]->failure() ? 1 : 0;
      world.quiesce();
      const EngineStats before = world.stats();
      EXPECT_NE(before.health, "ok");
      EXPECT_EQ(world.lookup(range(0, 8)).ready_blocks, 0U);
      EXPECT_EQ(world.stats().lookup_misses_failed, before.lookup_misses_failed + 8);
      EXPECT_EQ(world.pin({0, 1})->num_blocks(), 0U);
      EXPECT_EQ(world.load(0, {0}, {20})->outcomes(), all(1, BlockOutcome::missed));
      const auto refused = world.try_store(0, {100}, {0}).value();
      EXPECT_EQ(refused->outcomes(), all(1, BlockOutcome::declined));
      EXPECT_EQ(refused->failure().code(), StatusCode::device);
      EXPECT_TRUE(world.engine->flush(in_seconds(30)));
      EXPECT_TRUE(world.engine->detach(*world.pages[0], in_seconds(30)));
      EXPECT_TRUE(world.engine->close(in_seconds(30)));
      expect_at_rest(world.stats());
    }
  }
  EXPECT_GT(in_loads, 0U);
}

}  // namespace
}  // namespace kvtier
