#include "kvtier/transfer/transfers.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <set>
#include <stdexcept>

#include "support/turns.h"
#include "transfer/transfer_world.h"

#include "kvtier/core/ordering.h"
#include "kvtier/platform/faulty_device.h"

namespace kvtier {
namespace {

// Each is another schedule of the simulated device.
constexpr unsigned kSeeds = support::turns(4000, 200);

std::unique_ptr<Transfers> make(Device& device) { return Transfers::create(device).value(); }

// Store, scribble over the pages, load elsewhere, read: with nothing but stream order between the steps.
void round_trip(World& world, Transfers& transfers, const std::function<Status()>& synchronize,
                unsigned seed) {
  Ended stored, loaded;
  world.poison();
  world.write(1, seed);
  const std::shared_ptr<Transfer> store =
      transfers.submit(world.request(Direction::store, 1), stored.callback());
  ASSERT_TRUE(ok(store->wait_stream(world.stream())));
  world.poison();  // the pages are the framework's again, once the copies have run
  const TransferOutcome outcome = stored.wait();
  ASSERT_TRUE(ok(outcome.status));
  EXPECT_TRUE(outcome.drained);
  ASSERT_TRUE(world.slot_bytes() == World::content(seed)) << "wrong bytes in the slots";

  const std::uint32_t layers_per_batch = seed % 5;  // 0: whole blocks
  std::vector<std::byte> whole, by_layer;
  world.poison();
  const std::shared_ptr<Transfer> load =
      transfers.submit(world.request(Direction::load, 2, layers_per_batch), loaded.callback());
  if (layers_per_batch > 0) {
    for (std::uint32_t layer = 0; layer < World::kLayers; ++layer) {
      ASSERT_TRUE(ok(load->wait_layer(layer, world.stream())));
      world.read(2, by_layer, layer, layer + 1);
    }
  }
  ASSERT_TRUE(ok(load->wait_stream(world.stream())));
  world.read(2, whole);
  ASSERT_TRUE(ok(synchronize()));
  EXPECT_TRUE(whole == World::content(seed)) << "wrong bytes in the pages";
  if (layers_per_batch > 0) {
    EXPECT_TRUE(by_layer == World::content(seed)) << "a layer was read too early";
  }
  ASSERT_TRUE(ok(loaded.wait().status));
  EXPECT_EQ(stored.calls(), 1);
  EXPECT_EQ(loaded.calls(), 1);
}

TEST(Transfers, stores_and_loads_are_byte_exact_on_the_simulated_device) {
  for (unsigned seed = 1; seed <= kSeeds; ++seed) {
    SCOPED_TRACE(seed);
    SimulatedWorld sim(seed);
    {
      const std::unique_ptr<Transfers> transfers = make(sim.device);
      for (unsigned round = 0; round < 3; ++round) {
        round_trip(
            sim.world, *transfers, [&] { return sim.device.host_synchronize(sim.stream); }, seed + round);
      }
    }
    EXPECT_EQ(sim.device.violations(), std::vector<std::string>{});
    if (HasFailure()) return;
  }
}

TEST(Transfers, stores_and_loads_are_byte_exact_on_the_cpu) {
  const std::unique_ptr<Device> device = make_cpu_device({.copy_threads = 2});
  std::vector<std::unique_ptr<std::byte[]>> memory;
  World world(
      *device, StreamHandle{0}, [](const std::function<void()>& kernel) { kernel(); },
      [&](std::size_t bytes) { return memory.emplace_back(std::make_unique<std::byte[]>(bytes)).get(); });
  const std::unique_ptr<Transfers> transfers = make(*device);
  for (unsigned seed = 1; seed <= kSeeds; ++seed) {
    round_trip(world, *transfers, [] { return Status::ok(); }, seed);
    if (HasFailure()) return;
  }
}

// --- the ordering points of transfers.cpp: without each, the suite is told of wrong bytes ---

// The framework still uses the pages when a load into them is submitted.
bool load_spares_what_the_framework_still_reads(std::uint64_t seed) {
  SimulatedWorld sim(seed, 0);
  World& world = sim.world;
  std::vector<std::byte> seen;
  world.write(0, 1);
  EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
  world.fill_slots(2);
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  Ended ended;
  sim.device.hold(sim.stream);
  world.read(0, seen);
  transfers->submit(world.request(Direction::load, 0), ended.callback());
  sim.device.run_until_idle();
  sim.device.release(sim.stream);
  EXPECT_TRUE(ok(ended.wait().status));
  EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
  return seen == World::content(1);
}

// The kernels that compute the pages have not run when their store is submitted.
bool store_has_what_the_framework_computes(std::uint64_t seed) {
  SimulatedWorld sim(seed, 0);
  World& world = sim.world;
  world.poison();
  EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  Ended ended;
  sim.device.hold(sim.stream);
  world.write(0, 1);
  transfers->submit(world.request(Direction::store, 0), ended.callback());
  sim.device.run_until_idle();
  sim.device.release(sim.stream);
  EXPECT_TRUE(ok(ended.wait().status));
  return world.slot_bytes() == World::content(1);
}

// The framework's kernel is submitted behind wait_stream (or wait_layer of every layer), and its stream is
// quicker than ours.
bool kernels_behind_a_wait_see_the_load(std::uint64_t seed, bool layer_by_layer) {
  SimulatedWorld sim(seed, 0);
  World& world = sim.world;
  world.poison();
  EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
  world.fill_slots(1);
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  std::vector<std::byte> seen;
  Ended ended;
  sim.device.hold();
  const std::shared_ptr<Transfer> load =
      transfers->submit(world.request(Direction::load, 0, layer_by_layer ? 1 : 0), ended.callback());
  if (layer_by_layer) {
    for (std::uint32_t layer = 0; layer < World::kLayers; ++layer) {
      EXPECT_TRUE(ok(load->wait_layer(layer, sim.stream)));
      world.read(0, seen, layer, layer + 1);
    }
  } else {
    EXPECT_TRUE(ok(load->wait_stream(sim.stream)));
    world.read(0, seen);
  }
  while (sim.device.step(sim.stream)) {
  }
  sim.device.release();
  EXPECT_TRUE(ok(ended.wait().status));
  EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
  return seen == World::content(1);
}

struct OrderingCase {
  OrderingPoint point;
  std::function<bool(std::uint64_t seed)> right;
};

TEST(TransfersOrdering, without_any_one_point_bytes_are_wrong_and_with_all_they_are_right) {
  const std::vector<OrderingCase> cases{
      {OrderingPoint::load_after_framework_stream, load_spares_what_the_framework_still_reads},
      {OrderingPoint::store_after_framework_stream, store_has_what_the_framework_computes},
      {OrderingPoint::wait_stream_event,
       [](std::uint64_t s) { return kernels_behind_a_wait_see_the_load(s, false); }},
      {OrderingPoint::wait_layer_event,
       [](std::uint64_t s) { return kernels_behind_a_wait_see_the_load(s, true); }},
  };
  for (const OrderingCase& c : cases) {
    SCOPED_TRACE(to_string(c.point));
    unsigned told = 0;
    for (std::uint64_t seed = 1; seed <= 30; ++seed) {
      EXPECT_TRUE(c.right(seed)) << "seed " << seed;
      const DisableOrdering disabled(c.point);
      told += c.right(seed) ? 0 : 1;
    }
    EXPECT_GT(told, 0U) << "the test does not notice that the point is missing";
  }
}

// --- what the interface promises ---

TEST(Transfers, wait_layer_says_what_it_cannot_do) {
  SimulatedWorld sim(1);
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  Ended a, b;
  const auto whole = transfers->submit(sim.world.request(Direction::load, 0), a.callback());
  EXPECT_EQ(whole->wait_layer(0, sim.stream).code(), StatusCode::unsupported);
  const auto layered = transfers->submit(sim.world.request(Direction::load, 0, 2), b.callback());
  EXPECT_TRUE(ok(layered->wait_layer(2, sim.stream)));
  const Status beyond = layered->wait_layer(3, sim.stream);  // within the last batch of two, but no layer
  EXPECT_EQ(beyond.code(), StatusCode::invalid_argument);
  EXPECT_EQ(beyond.message(), "layer is 3; allowed: 0 to 2");
  a.wait(), b.wait();
}

TEST(Transfers, a_batch_may_have_more_layers_than_there_are) {
  SimulatedWorld sim(1);
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  sim.world.fill_slots(3);
  Ended ended;
  const auto load = transfers->submit(sim.world.request(Direction::load, 0, 0xffffffffU), ended.callback());
  std::vector<std::byte> seen;
  EXPECT_TRUE(ok(load->wait_layer(2, sim.stream)));
  sim.world.read(0, seen);
  EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
  EXPECT_TRUE(seen == World::content(3));
  EXPECT_TRUE(ok(ended.wait().status));
}

TEST(Transfers, the_destructor_waits_for_work_in_flight) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    SimulatedWorld sim(seed);
    std::vector<Ended> ended(12);
    std::unique_ptr<Transfers> transfers = make(sim.device);
    sim.device.hold();
    std::shared_ptr<Transfer> last;
    for (std::size_t i = 0; i < ended.size(); ++i) {
      last = transfers->submit(sim.world.request(i % 2 ? Direction::load : Direction::store, 0),
                               ended[i].callback());
    }
    std::thread releaser([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      sim.device.release();
    });
    transfers.reset();
    for (Ended& each : ended) {
      EXPECT_EQ(each.calls(), 1);
      EXPECT_TRUE(ok(each.wait().status));
    }
    EXPECT_TRUE(ok(last->wait_stream(sim.stream))) << "a Transfer may outlive its Transfers";
    releaser.join();
    EXPECT_EQ(sim.device.violations(), std::vector<std::string>{});
  }
}

TEST(Transfers, submit_from_any_thread) {
  constexpr unsigned kThreads = 8;
  SimulatedDevice device({.seed = 7, .max_delay_us = 200});
  {
    const std::unique_ptr<Transfers> transfers = make(device);
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        const StreamHandle stream = device.create_framework_stream();
        World world(
            device, stream, [&](std::function<void()> kernel) { device.launch(stream, std::move(kernel)); },
            [&](std::size_t bytes) { return device.allocate(bytes); });
        for (unsigned round = 0; round < 6; ++round) {
          round_trip(world, *transfers, [&] { return device.host_synchronize(stream); }, t * 100 + round);
        }
        EXPECT_TRUE(ok(device.host_synchronize(stream)));
        EXPECT_TRUE(ok(device.unregister_host(world.slots())));
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(device.violations(), std::vector<std::string>{});
}

TEST(Transfers, a_callback_that_throws_ends_neither_the_process_nor_later_transfers) {
  SimulatedWorld sim(1);
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  transfers->submit(sim.world.request(Direction::store, 0),
                    [](const TransferOutcome&) { throw std::logic_error("on purpose"); });
  transfers->submit(sim.world.request(Direction::store, 0), [](const TransferOutcome&) { throw 5; });
  Ended ended;
  transfers->submit(sim.world.request(Direction::store, 0), ended.callback());
  EXPECT_TRUE(ok(ended.wait().status));
}

// --- failures ---

struct Tally {
  int failed = 0;
  int undrained = 0;
};

// A store and a load on a device whose calls fail by plan. Whatever fails: each ends exactly once, an ok
// outcome means right bytes, and `drained` that the memory may go.
Tally run_faulty(std::uint64_t seed, FaultPlan& plan) {
  Tally tally;
  SimulatedWorld sim(seed);
  FaultyDevice faulty(sim.device, plan);
  World& world = sim.world;
  world.write(0, 1);
  Ended ended[2];
  bool drained = true;
  {
    Result<std::unique_ptr<Transfers>> made = Transfers::create(faulty);
    if (!made) {
      EXPECT_EQ(made.status().native_code(), 77);
      return {1, 0};
    }
    const auto check = [&](const TransferOutcome& outcome) {
      tally.failed += outcome.status ? 0 : 1;
      tally.undrained += outcome.drained ? 0 : 1;
      if (!outcome.status) {
        EXPECT_EQ(outcome.status.native_code(), 77);
      }
      EXPECT_TRUE(!outcome.status || outcome.drained);
      drained = drained && outcome.drained;
      return outcome.status.is_ok();
    };
    const auto store = (*made)->submit(world.request(Direction::store, 0), ended[0].callback());
    if (check(ended[0].wait())) {
      EXPECT_TRUE(world.slot_bytes() == World::content(1));
    } else if (!store->wait_stream(sim.stream)) {
      // The failure of the submission; nothing was ordered.
    }
    if (drained) {
      world.fill_slots(2);
      const auto load = (*made)->submit(world.request(Direction::load, 1, 1), ended[1].callback());
      std::vector<std::byte> seen;
      const bool ordered = load->wait_layer(0, sim.stream).is_ok() && load->wait_stream(sim.stream).is_ok();
      if (ordered) world.read(1, seen);
      if (check(ended[1].wait()) && ordered) {
        EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
        EXPECT_TRUE(seen == World::content(2));
      }
      EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
    }
  }
  EXPECT_EQ(ended[0].calls(), 1);
  if (drained) {
    EXPECT_EQ(ended[1].calls(), 1);
    EXPECT_TRUE(ok(sim.device.host_synchronize(sim.stream)));
    for (std::byte* tensor : world.tensors()) sim.device.free(tensor);
    EXPECT_TRUE(ok(sim.device.unregister_host(world.slots())));
  }
  EXPECT_EQ(sim.device.violations(), std::vector<std::string>{});
  return tally;
}

TEST(TransfersFaults, the_nth_call_fails_for_every_n) {
  FaultPlan plan;
  int failed = 0;
  std::uint64_t n = 1;
  for (;; ++n) {
    SCOPED_TRACE(n);
    plan.reset();
    plan.fail(n, Status::device("planned", 77));
    const Tally tally = run_faulty(n, plan);
    if (plan.injected() == 0) break;
    failed += tally.failed;
    EXPECT_EQ(tally.undrained, 0) << "one failure is not enough to lose the proof";
    ASSERT_FALSE(HasFailure());
  }
  EXPECT_GT(n, 20U);
  EXPECT_GT(failed, 10);
}

TEST(TransfersFaults, from_the_nth_call_on_all_fail) {
  FaultPlan plan;
  int undrained = 0;
  for (std::uint64_t n = 1;; n += 2) {
    SCOPED_TRACE(n);
    plan.reset();
    plan.fail(n, Status::device("planned", 77), FaultSpan::from_then_on);
    undrained += run_faulty(n, plan).undrained;
    if (plan.injected() == 0) break;
    ASSERT_FALSE(HasFailure());
  }
  EXPECT_GT(undrained, 0);
}

TEST(TransfersFaults, a_failed_wait_is_repeated_and_then_proves_the_end) {
  FaultPlan plan;
  for (const FaultCall call : {FaultCall::synchronize, FaultCall::record}) {
    SimulatedWorld sim(1);
    FaultyDevice faulty(sim.device, plan);
    plan.reset();
    const std::unique_ptr<Transfers> transfers = make(faulty);
    // The record of the framework's event comes first, then that of the end.
    for (std::uint64_t n = 2; n < 5; ++n)
      plan.fail(call, n - (call == FaultCall::synchronize), Status::device("now", 77));
    sim.world.write(0, 4);
    Ended ended;
    const auto store = transfers->submit(sim.world.request(Direction::store, 0), ended.callback());
    const TransferOutcome outcome = ended.wait();
    EXPECT_TRUE(outcome.drained);
    EXPECT_TRUE(sim.world.slot_bytes() == World::content(4)) << "drained, so all that was submitted has run";
    EXPECT_EQ(outcome.status.is_ok(), call == FaultCall::synchronize);
    EXPECT_EQ(store->wait_stream(sim.stream).is_ok(), call == FaultCall::synchronize);
    EXPECT_EQ(plan.injected(), 3U);
  }
}

TEST(TransfersFaults, a_wait_that_never_succeeds_proves_nothing) {
  FaultPlan plan;
  SimulatedWorld sim(1, 0);
  FaultyDevice faulty(sim.device, plan);
  Ended ended;
  {
    const std::unique_ptr<Transfers> transfers = make(faulty);
    plan.fail(FaultCall::synchronize, 1, Status::device("for good", 77), FaultSpan::from_then_on);
    sim.device.hold();
    transfers->submit(sim.world.request(Direction::store, 0), ended.callback());
    const TransferOutcome outcome = ended.wait();
    EXPECT_EQ(outcome.status.native_code(), 77);
    EXPECT_FALSE(outcome.drained);
  }
  EXPECT_GT(sim.device.pending(), 0U);
  EXPECT_EQ(sim.device.violations(), std::vector<std::string>{})
      << "the stream is left alone: its work is pending";
  sim.device.release();
  sim.device.run_until_idle();
}

TEST(TransfersFaults, a_capture_in_the_way_is_waited_out) {
  FaultPlan plan;
  SimulatedWorld sim(1);
  FaultyDevice faulty(sim.device, plan);
  const std::unique_ptr<Transfers> transfers = make(faulty);
  for (std::uint64_t n = 1; n <= 12; ++n) {  // more often than another failure is forgiven
    plan.fail(FaultCall::synchronize, n, Status::device("capturing", kCaptureConflict));
  }
  Ended ended;
  transfers->submit(sim.world.request(Direction::store, 0), ended.callback());
  const TransferOutcome outcome = ended.wait();
  EXPECT_TRUE(ok(outcome.status));
  EXPECT_TRUE(outcome.drained);
}

TEST(TransfersFaults, a_sticky_error_in_the_middle_of_a_copy_ends_all_transfers_drained) {
  for (std::uint64_t copy = 1; copy <= 4; ++copy) {
    for (std::uint64_t seed = 1; seed <= 20; ++seed) {
      SimulatedWorld sim(seed);
      std::vector<Ended> ended(4);
      {
        const std::unique_ptr<Transfers> transfers = make(sim.device);
        sim.device.fail_sticky_at_copy(copy, 700);
        for (std::size_t i = 0; i < ended.size(); ++i) {
          transfers->submit(sim.world.request(i % 2 ? Direction::load : Direction::store, 0),
                            ended[i].callback());
        }
      }
      int failed = 0;
      for (Ended& each : ended) {
        EXPECT_EQ(each.calls(), 1);
        const TransferOutcome outcome = each.wait();
        EXPECT_TRUE(outcome.drained);
        failed += outcome.status ? 0 : 1;
        if (!outcome.status) {
          EXPECT_EQ(outcome.status.native_code(), 700);
        }
      }
      EXPECT_GE(failed, 1);
    }
  }
}

// The device is lost, and its context is not torn down: what was submitted may still be at work.
TEST(TransfersFaults, copies_that_nobody_can_prove_to_be_over_are_not_taken_for_drained) {
  for (const int code : {700, kCopiesUnproved}) {
    SimulatedWorld sim(1);
    Ended ended;
    {
      const std::unique_ptr<Transfers> transfers = make(sim.device);
      sim.device.hold();
      transfers->submit(sim.world.request(Direction::store, 0), ended.callback());
      sim.device.fail_sticky(code);
      EXPECT_EQ(ended.wait().drained, code == 700);
      EXPECT_EQ(ended.wait().status.code(), StatusCode::device);
      sim.device.release();
    }
    EXPECT_EQ(ended.calls(), 1);
  }
}

TEST(TransfersFaults, on_a_dead_device_a_submission_fails_at_once) {
  SimulatedWorld sim(1);
  const std::unique_ptr<Transfers> transfers = make(sim.device);
  sim.device.fail_sticky(700);
  Ended ended;
  const auto store = transfers->submit(sim.world.request(Direction::store, 0), ended.callback());
  EXPECT_EQ(ended.calls(), 1) << "inside submit()";
  EXPECT_EQ(ended.wait().status.native_code(), 700);
  EXPECT_TRUE(ended.wait().drained);
  EXPECT_EQ(store->wait_stream(sim.stream).native_code(), 700);
  EXPECT_EQ(store->wait_layer(0, sim.stream).native_code(), 700);
}

#if !defined(__SANITIZE_THREAD__)
TEST(TransfersFork, a_child_is_told_and_never_waits) {
  SimulatedWorld sim(1, 0);
  std::unique_ptr<Transfers> transfers = make(sim.device);
  Ended running;
  sim.device.hold();  // one waiter sleeps in the device, the other on its condition variable
  transfers->submit(sim.world.request(Direction::store, 0), running.callback());
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang becomes a failure
    int calls = 0;
    bool closed = false;
    transfers->submit(sim.world.request(Direction::load, 0), [&](const TransferOutcome& outcome) {
      ++calls;
      closed = outcome.status.code() == StatusCode::closed && outcome.drained;
    });
    transfers.reset();
    _exit(calls == 1 && closed ? 0 : 1);
  }
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(running.calls(), 0);
  sim.device.release();
  EXPECT_TRUE(ok(running.wait().status));
}
#endif

}  // namespace
}  // namespace kvtier
