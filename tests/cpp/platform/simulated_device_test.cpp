// What SimulatedDevice adds to the conformance suite: that its adversary is one, and each CUDA behaviour
// that a caller could get wrong.
#include "kvtier/platform/simulated_device.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <set>
#include <thread>

#include "conformance/device_harness.h"

namespace kvtier {
namespace {

using conformance::HostBuffer;
using conformance::ok;

constexpr std::uint64_t kSeeds = 200;
// How often a mistake shows depends on how soon the device's own thread steps in, so on the machine's load
// (seen: 139 to 195 of 200). A third is far from chance and far from that.
constexpr std::size_t kBytes = 8192;
constexpr std::byte kOld{1};
constexpr std::byte kNew{2};

// A device with one page of each side's memory. Nothing runs in the background: a seed is a schedule.
struct Rig {
  explicit Rig(std::uint64_t seed, CaptureMode capture_mode = CaptureMode::global)
      : device({.seed = seed, .max_delay_us = 0, .patience_us = 0, .capture_mode = capture_mode}) {
    EXPECT_TRUE(ok(device.register_host(slot.data(), kBytes)));
    fill(kOld);
    EXPECT_TRUE(ok(device.host_synchronize(framework)));
    std::memset(slot.data(), static_cast<int>(kOld), kBytes);
  }

  Status copy(StreamHandle stream, void* destination, const void* source, Direction direction,
              std::size_t bytes = kBytes) {
    const CopyRun run{destination, source, bytes};
    return device.copy(stream, {&run, 1}, direction);
  }
  Status store() { return copy(ours, slot.data(), page, Direction::store); }
  Status load() { return copy(ours, page, slot.data(), Direction::load); }
  void fill(std::byte value) {
    device.launch(framework, [this, value] { std::memset(page, static_cast<int>(value), kBytes); });
  }
  std::unique_ptr<Event> event() { return device.create_event().value(); }
  std::unique_ptr<Event> recorded(StreamHandle stream) {
    std::unique_ptr<Event> result = event();
    EXPECT_TRUE(ok(device.record(*result, stream)));
    return result;
  }
  void finish(StreamHandle stream) { EXPECT_TRUE(ok(device.synchronize(*recorded(stream)))); }
  static bool whole(const std::byte* begin, std::byte value) {
    return std::all_of(begin, begin + kBytes, [value](std::byte b) { return b == value; });
  }

  HostBuffer slot{kBytes};
  SimulatedDevice device;
  std::byte* page = device.allocate(kBytes);
  StreamHandle framework = device.create_framework_stream();
  StreamHandle ours = device.create_stream().value();
};

// How many seeds of kSeeds make `scenario` true.
template <typename Scenario>
std::uint64_t seeds_where(Scenario scenario) {
  std::uint64_t count = 0;
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    Rig rig(seed);
    if (scenario(rig)) ++count;
    EXPECT_TRUE(rig.device.violations().empty());
  }
  return count;
}

// --- the adversary ---

bool store_is_stale(Rig& rig, bool ordered) {
  rig.fill(kNew);
  if (ordered) {
    EXPECT_TRUE(ok(rig.device.wait(rig.ours, *rig.recorded(rig.framework))));
  }
  EXPECT_TRUE(ok(rig.store()));
  rig.finish(rig.ours);
  return !Rig::whole(rig.slot.data(), kNew);
}

TEST(SimulatedAdversary, notices_a_store_that_does_not_wait_for_the_framework) {
  EXPECT_EQ(seeds_where([](Rig& rig) { return store_is_stale(rig, true); }), 0U);
  EXPECT_GE(seeds_where([](Rig& rig) { return store_is_stale(rig, false); }), kSeeds / 3);
}

bool attention_is_stale(Rig& rig, bool ordered) {
  std::memset(rig.slot.data(), static_cast<int>(kNew), kBytes);
  bool stale = false;
  EXPECT_TRUE(ok(rig.load()));
  if (ordered) {
    EXPECT_TRUE(ok(rig.device.wait(rig.framework, *rig.recorded(rig.ours))));
  }
  rig.device.launch(rig.framework, [&] { stale = !Rig::whole(rig.page, kNew); });
  EXPECT_TRUE(ok(rig.device.host_synchronize(rig.framework)));
  return stale;
}

TEST(SimulatedAdversary, notices_a_kernel_that_does_not_wait_for_a_load) {
  EXPECT_EQ(seeds_where([](Rig& rig) { return attention_is_stale(rig, true); }), 0U);
  EXPECT_GE(seeds_where([](Rig& rig) { return attention_is_stale(rig, false); }), kSeeds / 3);
}

// The layer-wise load that waits before it records: silent wrong KV on CUDA.
TEST(SimulatedAdversary, notices_a_wait_on_an_event_that_is_recorded_too_late) {
  EXPECT_GE(seeds_where([](Rig& rig) {
              std::unique_ptr<Event> event = rig.event();
              rig.fill(kNew);
              EXPECT_TRUE(ok(rig.device.wait(rig.ours, *event)));
              EXPECT_TRUE(ok(rig.device.record(*event, rig.framework)));
              EXPECT_TRUE(ok(rig.store()));
              rig.finish(rig.ours);
              return !Rig::whole(rig.slot.data(), kNew);
            }),
            kSeeds / 3);
}

TEST(SimulatedAdversary, notices_a_host_that_does_not_wait_at_all) {
  EXPECT_GE(seeds_where([](Rig& rig) {
              rig.fill(kNew);
              EXPECT_TRUE(ok(rig.device.wait(rig.ours, *rig.recorded(rig.framework))));
              EXPECT_TRUE(ok(rig.store()));
              const bool stale = !Rig::whole(rig.slot.data(), kNew);
              rig.finish(rig.ours);
              return stale;
            }),
            kSeeds / 3);
}

// Pages given back when the store was submitted and not when it had run.
TEST(SimulatedAdversary, notices_pages_that_are_released_before_the_store_has_run) {
  EXPECT_GE(seeds_where([](Rig& rig) {
              EXPECT_TRUE(ok(rig.store()));
              rig.fill(kNew);  // the next request writes into the pages
              EXPECT_TRUE(ok(rig.device.host_synchronize(rig.framework)));
              rig.finish(rig.ours);
              return !Rig::whole(rig.slot.data(), kOld);
            }),
            kSeeds / 3);
}

// Some seeds must be eager too: bytes that are written after the submission and before the wait.
TEST(SimulatedAdversary, notices_a_source_that_is_filled_after_submission) {
  EXPECT_GE(seeds_where([](Rig& rig) {
              EXPECT_TRUE(ok(rig.load()));
              std::memset(rig.slot.data(), static_cast<int>(kNew), kBytes);
              rig.finish(rig.ours);
              return !Rig::whole(rig.page, kNew);
            }),
            kSeeds / 20);
}

TEST(SimulatedAdversary, runs_of_a_batch_have_no_order) {
  const std::uint64_t second_is_last = seeds_where([](Rig& rig) {
    HostBuffer both(2 * kBytes);
    std::memset(both.data() + kBytes, 7, kBytes);
    EXPECT_TRUE(ok(rig.device.register_host(both.data(), both.size())));
    const CopyRun runs[] = {{rig.page, both.data(), kBytes}, {rig.page, both.data() + kBytes, kBytes}};
    EXPECT_TRUE(ok(rig.device.copy(rig.ours, runs, Direction::load)));
    rig.finish(rig.ours);
    EXPECT_TRUE(ok(rig.device.unregister_host(both.data())));
    return rig.page[kBytes / 2] == std::byte{7};
  });
  EXPECT_GE(second_is_last, kSeeds / 3);
  EXPECT_LE(second_is_last, kSeeds * 2 / 3);
}

TEST(SimulatedAdversary, copies_of_one_direction_have_no_order_without_an_event_between) {
  const auto seeds_with_the_first_last = [](bool event_between) {
    return seeds_where([event_between](Rig& rig) {
      HostBuffer later{kBytes};
      std::memset(later.data(), static_cast<int>(kNew), kBytes);
      EXPECT_TRUE(ok(rig.device.register_host(later.data(), kBytes)));
      EXPECT_TRUE(ok(rig.load()));
      const std::unique_ptr<Event> between = event_between ? rig.recorded(rig.ours) : nullptr;
      EXPECT_TRUE(ok(rig.copy(rig.ours, rig.page, later.data(), Direction::load)));
      rig.finish(rig.ours);
      const bool first_last = !Rig::whole(rig.page, kNew);
      EXPECT_TRUE(ok(rig.device.unregister_host(later.data())));
      return first_last;
    });
  };
  EXPECT_GT(seeds_with_the_first_last(false), kSeeds / 10);
  EXPECT_EQ(seeds_with_the_first_last(true), 0U);
}

TEST(SimulatedAdversary, other_streams_see_half_done_copies) {
  EXPECT_GE(seeds_where([](Rig& rig) {
              bool torn = false;
              rig.device.hold();
              std::memset(rig.slot.data(), static_cast<int>(kNew), kBytes);
              EXPECT_TRUE(ok(rig.load()));
              for (int i = 0; i < 3; ++i) {
                rig.device.launch(rig.framework, [&] {
                  torn = torn || (!Rig::whole(rig.page, kOld) && !Rig::whole(rig.page, kNew));
                });
              }
              rig.device.run_until_idle();
              return torn;
            }),
            kSeeds / 10);
}

// --- one behaviour each ---

TEST(SimulatedDevice, source_bytes_are_read_when_the_copy_runs) {
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    Rig rig(seed);
    rig.device.hold();
    ASSERT_TRUE(ok(rig.load()));
    std::memset(rig.slot.data(), static_cast<int>(kNew), kBytes);
    EXPECT_TRUE(Rig::whole(rig.page, kOld));
    EXPECT_GT(rig.device.run_until_idle(), 0U);
    EXPECT_TRUE(Rig::whole(rig.page, kNew));
  }
}

TEST(SimulatedDevice, a_pageable_load_reads_its_source_during_the_call) {
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    Rig rig(seed);
    {
      const std::vector<std::byte> source(kBytes, kNew);
      ASSERT_TRUE(ok(rig.copy(rig.ours, rig.page, source.data(), Direction::load)));
    }
    rig.finish(rig.ours);
    EXPECT_TRUE(Rig::whole(rig.page, kNew));
  }
}

TEST(SimulatedDevice, a_pageable_store_returns_when_it_and_all_before_it_has_run) {
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    Rig rig(seed);
    rig.fill(kNew);
    ASSERT_TRUE(ok(rig.device.wait(rig.ours, *rig.recorded(rig.framework))));
    std::vector<std::byte> target(kBytes);
    ASSERT_TRUE(ok(rig.copy(rig.ours, target.data(), rig.page, Direction::store)));
    EXPECT_TRUE(Rig::whole(target.data(), kNew));
  }
}

TEST(SimulatedDevice, same_seed_and_calls_give_the_same_schedule) {
  const auto order = [](std::uint64_t seed) {
    std::vector<int> ran;
    Rig rig(seed);
    const StreamHandle other = rig.device.create_framework_stream();
    for (int i = 0; i < 12; ++i)
      rig.device.launch(i % 2 == 0 ? other : rig.framework, [&ran, i] { ran.push_back(i); });
    EXPECT_TRUE(ok(rig.load()));
    rig.finish(rig.ours);
    EXPECT_TRUE(ok(rig.device.host_synchronize(other)));
    EXPECT_TRUE(ok(rig.device.host_synchronize(rig.framework)));
    return ran;
  };
  std::set<std::vector<int>> different;
  for (std::uint64_t seed = 1; seed <= 50; ++seed) {
    const std::vector<int> first = order(seed);
    EXPECT_EQ(first, order(seed));
    different.insert(first);
  }
  EXPECT_GT(different.size(), 10U);
}

TEST(SimulatedDevice, work_runs_though_nobody_waits_or_asks) {
  SimulatedDevice device({.max_delay_us = 1000});
  std::atomic<bool> ran = false;
  device.launch(StreamHandle{0}, [&ran] { ran = true; });
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!ran && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
  EXPECT_TRUE(ran);
}

TEST(SimulatedDevice, what_is_held_runs_by_steps_only) {
  Rig rig(1);
  rig.device.hold();
  rig.fill(kNew);
  std::unique_ptr<Event> filled = rig.recorded(rig.framework);
  EXPECT_FALSE(rig.device.query(*filled).value());
  EXPECT_EQ(rig.device.pending(), 2U);
  EXPECT_TRUE(rig.device.step());
  EXPECT_TRUE(Rig::whole(rig.page, kNew));
  EXPECT_FALSE(rig.device.query(*filled).value());
  EXPECT_TRUE(rig.device.step());
  EXPECT_TRUE(rig.device.query(*filled).value());
  EXPECT_FALSE(rig.device.step());
}

TEST(SimulatedDevice, a_held_stream_holds_nobody_else) {
  Rig rig(2);
  rig.device.hold(rig.framework);
  rig.fill(kNew);
  std::unique_ptr<Event> filled = rig.recorded(rig.framework);
  ASSERT_TRUE(ok(rig.store()));
  rig.finish(rig.ours);
  EXPECT_TRUE(Rig::whole(rig.slot.data(), kOld));
  EXPECT_FALSE(rig.device.query(*filled).value());
  EXPECT_TRUE(rig.device.step(rig.framework));  // by hand it goes on
  EXPECT_TRUE(Rig::whole(rig.page, kNew));
  rig.device.release(rig.framework);
  EXPECT_TRUE(ok(rig.device.synchronize(*filled)));
}

TEST(SimulatedDevice, a_waiter_of_held_work_sleeps_until_release) {
  Rig rig(3);
  rig.device.hold();
  rig.fill(kNew);
  std::unique_ptr<Event> filled = rig.recorded(rig.framework);
  std::thread waiter([&] {
    EXPECT_TRUE(ok(rig.device.synchronize(*filled)));
    EXPECT_TRUE(Rig::whole(rig.page, kNew));
  });
  rig.device.release();
  waiter.join();
}

TEST(SimulatedDevice, a_run_stays_within_its_registration_and_its_allocation) {
  Rig rig(1);
  HostBuffer memory(4 * kBytes);  // [pageable][registered][registered][pageable]
  std::byte* first = memory.data() + kBytes;
  std::byte* second = memory.data() + 2 * kBytes;
  ASSERT_TRUE(ok(rig.device.register_host(first, kBytes)));
  ASSERT_TRUE(ok(rig.device.register_host(second, kBytes)));
  std::byte* wide = rig.device.allocate(4 * kBytes);
  constexpr std::size_t kHuge = std::numeric_limits<std::size_t>::max();
  struct Case {
    const char* what;
    std::byte* on_device;
    std::byte* on_host;
    std::size_t bytes;
    bool legal;
  };
  const Case cases[] = {
      {"whole", wide, first, kBytes, true},
      {"end of both", wide + 4 * kBytes - 8, first + kBytes - 8, 8, true},
      {"pageable", wide, memory.data(), kBytes, true},
      {"runs out of its registration", wide, second + 8, kBytes, false},
      {"straddles two registrations", wide, first + 8, kBytes, false},
      {"runs into a registration", wide, memory.data() + 8, kBytes, false},
      {"runs over a registration", wide, memory.data(), 4 * kBytes, false},
      {"runs out of its allocation", rig.page + 8, first, kBytes, false},
      {"before its allocation", rig.page - 8, first, 16, false},
      {"beyond every address", wide + 8, first, kHuge, false},
      {"host memory as device memory", first, second, kBytes, false},
      {"device memory as host memory", wide, rig.page, kBytes, false},
      {"no host memory", wide, nullptr, kBytes, false},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.what);
    for (const Direction direction : {Direction::load, Direction::store}) {
      const bool load = direction == Direction::load;
      const CopyRun good{load ? rig.page : rig.slot.data(), load ? rig.slot.data() : rig.page, kBytes};
      const CopyRun tried{load ? each.on_device : each.on_host, load ? each.on_host : each.on_device,
                          each.bytes};
      const CopyRun batch[] = {good, tried};
      const std::size_t before = rig.device.pending();
      const Status status = rig.device.copy(rig.ours, batch, direction);
      EXPECT_EQ(status.is_ok(), each.legal) << status.message();
      if (each.legal) continue;
      EXPECT_EQ(status.native_code(), cuda_error::kInvalidValue);
      EXPECT_EQ(rig.device.pending(), before);  // nothing of the batch
    }
  }
  rig.finish(rig.ours);
  EXPECT_TRUE(rig.device.violations().empty());
}

TEST(SimulatedDevice, registration_errors_have_cudas_numbers) {
  Rig rig(1);
  EXPECT_EQ(rig.device.register_host(rig.slot.data() + 8, 8).native_code(),
            cuda_error::kHostMemoryAlreadyRegistered);
  EXPECT_EQ(rig.device.unregister_host(rig.slot.data() + 8).native_code(),
            cuda_error::kHostMemoryNotRegistered);
  EXPECT_EQ(rig.device.register_host(nullptr, 8).native_code(), cuda_error::kInvalidValue);
  EXPECT_EQ(rig.device.register_host(rig.page, 8).native_code(), cuda_error::kInvalidValue);
}

TEST(SimulatedDevice, handles_of_others_are_refused) {
  Rig rig(1);
  Rig other(1);
  std::unique_ptr<Event> foreign = other.event();
  const StreamHandle unknown{999};
  const int refused = cuda_error::kInvalidResourceHandle;
  EXPECT_EQ(rig.device.record(*foreign, rig.ours).native_code(), refused);
  EXPECT_EQ(rig.device.wait(rig.ours, *foreign).native_code(), refused);
  EXPECT_EQ(rig.device.query(*foreign).status().native_code(), refused);
  EXPECT_EQ(rig.device.synchronize(*foreign).native_code(), refused);
  EXPECT_EQ(rig.device.record(*rig.event(), unknown).native_code(), refused);
  EXPECT_EQ(rig.copy(unknown, rig.page, rig.slot.data(), Direction::load).native_code(), refused);
}

// --- violations ---

TEST(SimulatedViolations, memory_taken_away_under_a_copy_is_noticed_and_never_touched) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Rig rig(seed);
    rig.device.hold();
    auto gone = std::make_unique<HostBuffer>(kBytes);
    ASSERT_TRUE(ok(rig.device.register_host(gone->data(), kBytes)));
    ASSERT_TRUE(ok(rig.copy(rig.ours, rig.page, gone->data(), Direction::load)));
    ASSERT_TRUE(ok(rig.device.unregister_host(gone->data())));
    EXPECT_EQ(rig.device.violations().size(), 1U);
    gone.reset();
    rig.device.run_until_idle();
    EXPECT_GT(rig.device.violations().size(), 1U);  // seen again when the copy ran
    EXPECT_TRUE(Rig::whole(rig.page, kOld));

    const std::size_t before = rig.device.violations().size();
    ASSERT_TRUE(ok(rig.store()));
    rig.device.free(rig.page);
    EXPECT_EQ(rig.device.violations().size(), before + 1);
    rig.device.run_until_idle();
    EXPECT_GT(rig.device.violations().size(), before + 1);
  }
}

TEST(SimulatedViolations, memory_taken_away_after_its_copy_is_fine) {
  Rig rig(1);
  ASSERT_TRUE(ok(rig.store()));
  rig.finish(rig.ours);
  ASSERT_TRUE(ok(rig.device.unregister_host(rig.slot.data())));
  rig.device.free(rig.page);
  EXPECT_TRUE(rig.device.violations().empty());
}

TEST(SimulatedViolations, a_stream_destroyed_with_work_pending_is_noticed_and_its_work_runs) {
  Rig rig(1);
  rig.device.hold();
  const StreamHandle stream = rig.device.create_stream().value();
  std::memset(rig.slot.data(), static_cast<int>(kNew), kBytes);
  ASSERT_TRUE(ok(rig.copy(stream, rig.page, rig.slot.data(), Direction::load)));
  rig.device.destroy_stream(stream);
  EXPECT_EQ(rig.device.violations().size(), 1U);
  EXPECT_FALSE(rig.device.record(*rig.event(), stream));
  rig.device.run_until_idle();
  EXPECT_TRUE(Rig::whole(rig.page, kNew));
}

// --- capture ---

TEST(SimulatedCapture, refuses_unsafe_calls_without_effect_and_is_spoiled_by_them) {
  Rig rig(1);
  HostBuffer memory(kBytes);
  std::vector<std::byte> pageable(kBytes);
  std::unique_ptr<Event> event = rig.recorded(rig.ours);
  const std::function<Status()> unsafe[] = {
      [&] { return rig.device.create_stream().status(); },
      [&] { return rig.device.register_host(memory.data(), kBytes); },
      [&] { return rig.device.unregister_host(rig.slot.data()); },
      [&] { return rig.device.query(*event).status(); },
      [&] { return rig.device.synchronize(*event); },
      [&] { return rig.copy(rig.ours, rig.page, pageable.data(), Direction::load); },
  };
  for (const std::function<Status()>& call : unsafe) {
    ASSERT_TRUE(ok(rig.device.begin_capture(rig.framework)));
    EXPECT_TRUE(is_capture_conflict(call()));
    EXPECT_EQ(rig.device.end_capture().native_code(), cuda_error::kStreamCaptureInvalidated);
  }
  // None of them had an effect: now each works.
  for (const std::function<Status()>& call : unsafe) EXPECT_TRUE(ok(call()));
}

TEST(SimulatedCapture, leaves_submissions_on_other_streams_alone) {
  Rig rig(1);
  ASSERT_TRUE(ok(rig.device.begin_capture(rig.framework)));
  std::unique_ptr<Event> event = rig.event();
  EXPECT_TRUE(ok(rig.store()));
  EXPECT_TRUE(ok(rig.device.record(*event, rig.ours)));
  EXPECT_TRUE(ok(rig.device.wait(rig.ours, *event)));
  EXPECT_TRUE(ok(rig.device.end_capture()));
}

TEST(SimulatedCapture, relaxed_calls_spoil_nothing_but_keep_off_the_capturing_stream) {
  Rig rig(1, CaptureMode::relaxed);
  HostBuffer memory(kBytes);
  ASSERT_TRUE(ok(rig.device.begin_capture(rig.framework)));
  std::unique_ptr<Event> event = rig.event();
  EXPECT_TRUE(ok(rig.device.create_stream()));
  EXPECT_TRUE(ok(rig.device.register_host(memory.data(), kBytes)));
  EXPECT_TRUE(ok(rig.device.record(*event, rig.ours)));
  EXPECT_TRUE(ok(rig.device.synchronize(*event)));
  EXPECT_TRUE(is_capture_conflict(rig.device.record(*event, rig.framework)));
  EXPECT_TRUE(is_capture_conflict(rig.device.wait(rig.framework, *event)));
  EXPECT_TRUE(is_capture_conflict(rig.copy(rig.framework, rig.page, rig.slot.data(), Direction::load)));
  rig.fill(kNew);  // captured, not run
  EXPECT_TRUE(ok(rig.device.end_capture()));
  EXPECT_TRUE(ok(rig.device.host_synchronize(rig.framework)));
  EXPECT_TRUE(Rig::whole(rig.page, kOld));
}

// --- sticky errors ---

constexpr int kIllegalAddress = 700;

TEST(SimulatedSticky, ends_every_call_and_all_pending_work) {
  Rig rig(1);
  rig.device.hold();
  rig.fill(kNew);
  std::unique_ptr<Event> filled = rig.recorded(rig.framework);
  rig.device.fail_sticky(kIllegalAddress);
  rig.device.fail_sticky(1);  // the first one stays
  rig.device.release();
  HostBuffer memory(kBytes);
  const Status statuses[] = {
      rig.device.health(),
      rig.device.create_stream().status(),
      rig.device.create_event().status(),
      rig.device.record(*filled, rig.ours),
      rig.device.wait(rig.ours, *filled),
      rig.device.query(*filled).status(),
      rig.device.synchronize(*filled),
      rig.store(),
      rig.device.register_host(memory.data(), kBytes),
      rig.device.unregister_host(rig.slot.data()),
      rig.device.host_synchronize(rig.framework),
  };
  for (const Status& status : statuses) {
    EXPECT_EQ(status.code(), StatusCode::device);
    EXPECT_EQ(status.native_code(), kIllegalAddress);
  }
  EXPECT_EQ(rig.device.run_until_idle(), 0U);
  EXPECT_TRUE(Rig::whole(rig.page, kOld));
  EXPECT_TRUE(rig.device.violations().empty());
}

TEST(SimulatedSticky, wakes_those_who_wait) {
  Rig rig(1);
  rig.device.hold();
  rig.fill(kNew);
  std::unique_ptr<Event> filled = rig.recorded(rig.framework);
  std::thread waiter([&] { EXPECT_EQ(rig.device.synchronize(*filled).native_code(), kIllegalAddress); });
  rig.device.fail_sticky(kIllegalAddress);
  waiter.join();
}

TEST(SimulatedSticky, can_strike_in_the_middle_of_an_accepted_copy) {
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    Rig rig(seed);
    std::byte* other = rig.device.allocate(kBytes);
    std::memset(rig.slot.data(), static_cast<int>(kNew), kBytes);
    rig.device.fail_sticky_at_copy(2, kIllegalAddress);
    rig.device.hold();
    ASSERT_TRUE(ok(rig.load()));
    std::unique_ptr<Event> first = rig.recorded(rig.ours);
    ASSERT_TRUE(ok(rig.copy(rig.ours, other, rig.slot.data(), Direction::load)));
    std::unique_ptr<Event> second = rig.recorded(rig.ours);
    rig.device.release();
    EXPECT_EQ(rig.device.synchronize(*second).native_code(), kIllegalAddress);
    EXPECT_TRUE(Rig::whole(rig.page, kNew));
    EXPECT_FALSE(rig.device.health());
    // As in CUDA, one cannot even learn any more that the first has completed.
    EXPECT_FALSE(rig.device.query(*first));
    // No copy will run any more: the memory is the caller's again.
    rig.device.free(other);
    EXPECT_TRUE(rig.device.violations().empty());
  }
}

// --- the end ---

TEST(SimulatedDevice, dies_with_work_pending) {
  SimulatedDevice device({.max_delay_us = 1000});
  const auto token = std::make_shared<int>(0);
  device.hold();
  device.launch(StreamHandle{0}, [token] {});
  std::unique_ptr<Event> event = device.create_event().value();
  EXPECT_TRUE(ok(device.record(*event, StreamHandle{0})));
  device.allocate(64);  // never freed
}

TEST(SimulatedDevice, a_forked_child_is_told_and_does_not_wait_for_the_parents_thread) {
  auto device = std::make_unique<SimulatedDevice>();
  device->hold();
  device->launch(StreamHandle{0}, [] {});
  // By now the background thread sleeps on its condition variable, whose destruction would wait for it.
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ::alarm(20);  // a hang is a failure
    const bool told = device->health().code() == StatusCode::closed &&
                      device->create_stream().status().code() == StatusCode::closed;
    device.reset();
    ::_exit(told ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace kvtier
