#include "conformance/device_conformance.h"

#include <array>
#include <chrono>
#include <cstring>
#include <set>
#include <thread>

namespace kvtier::conformance {
namespace {

TEST_P(DeviceConformance, says_what_it_is) {
  EXPECT_FALSE(device().name().empty());
  EXPECT_GE(device().ordinal(), 0);
  EXPECT_TRUE(ok(device().health()));
}

TEST_P(DeviceConformance, streams_are_distinct_and_not_the_frameworks) {
  std::set<StreamHandle> handles{framework()};
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(handles.insert(new_stream()).second);
}

TEST_P(DeviceConformance, streams_can_be_created_and_destroyed_many_times) {
  for (int i = 0; i < 200; ++i) {
    Result<OwnedStream> stream = OwnedStream::create(device());
    ASSERT_TRUE(ok(stream));
    if (i % 10 == 0) finish(stream->handle());
  }
}

TEST_P(DeviceConformance, copies_both_ways) {
  const StreamHandle stream = new_stream();
  std::byte* source = new_host();
  std::byte* back = new_host();
  std::byte* pages = allocate();
  const std::vector<std::byte> expected = pattern(kBytes, 1);
  std::memcpy(source, expected.data(), expected.size());

  ASSERT_TRUE(ok(copy(stream, pages, source, Direction::load)));
  finish(stream);
  EXPECT_EQ(read(pages), expected);

  ASSERT_TRUE(ok(copy(stream, back, pages, Direction::store)));
  finish(stream);
  EXPECT_EQ(bytes_at(back), expected);
}

TEST_P(DeviceConformance, copies_every_run_of_a_batch_and_nothing_beside) {
  // Odd sizes at odd places, in an order that differs between both sides, with gaps that must stay as they
  // were.
  constexpr std::size_t kRuns = 3000;
  constexpr std::size_t kPitch = 128;
  const StreamHandle stream = new_stream();
  std::byte* slot = new_host(kRuns * kPitch);
  std::byte* pages = allocate(kRuns * kPitch);
  const std::vector<std::byte> content = pattern(kRuns * kPitch, 2);
  std::memcpy(slot, content.data(), content.size());
  write(pages, std::byte{0xee}, kRuns * kPitch);

  std::vector<CopyRun> runs;
  std::vector<std::byte> expected(kRuns * kPitch, std::byte{0xee});
  for (std::size_t i = 0; i < kRuns; ++i) {
    const std::size_t to = (i * 1237 % kRuns) * kPitch + i % 5;
    const std::size_t from = i * kPitch + i % 3;
    const std::size_t bytes = 1 + i * 7 % 120;
    runs.push_back({pages + to, slot + from, bytes});
    std::memcpy(expected.data() + to, content.data() + from, bytes);
  }
  ASSERT_TRUE(ok(device().copy(stream, runs, Direction::load)));
  runs.assign(runs.size(), CopyRun{nullptr, nullptr, ~std::size_t{0}});  // ours again once copy() returned
  finish(stream);
  EXPECT_EQ(read(pages, kRuns * kPitch), expected);
}

TEST_P(DeviceConformance, an_empty_batch_is_nothing) {
  const StreamHandle stream = new_stream();
  ASSERT_TRUE(ok(device().copy(stream, {}, Direction::load)));
  finish(stream);
}

TEST_P(DeviceConformance, pageable_host_memory_is_legal) {
  const StreamHandle stream = new_stream();
  const std::vector<std::byte> source = pattern(kBytes, 3);
  std::vector<std::byte> back(kBytes);
  std::byte* pages = allocate();
  ASSERT_TRUE(ok(copy(stream, pages, source.data(), Direction::load)));
  ASSERT_TRUE(ok(copy(stream, back.data(), pages, Direction::store)));
  finish(stream);
  EXPECT_EQ(back, source);
}

TEST_P(DeviceConformance, one_stream_runs_in_order) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::byte* first = new_host();
  std::byte* second = new_host();
  std::byte* saw_first = new_host();
  std::byte* saw_second = new_host();
  std::memset(first, 1, kBytes);
  std::memset(second, 2, kBytes);
  ASSERT_TRUE(ok(copy(stream, pages, first, Direction::load)));
  ASSERT_TRUE(ok(copy(stream, saw_first, pages, Direction::store)));
  ASSERT_TRUE(ok(copy(stream, pages, second, Direction::load)));
  ASSERT_TRUE(ok(copy(stream, saw_second, pages, Direction::store)));
  finish(stream);
  EXPECT_EQ(bytes_at(saw_first), filled(std::byte{1}));
  EXPECT_EQ(bytes_at(saw_second), filled(std::byte{2}));
}

TEST_P(DeviceConformance, an_event_orders_two_streams) {
  const StreamHandle producer = new_stream();
  const StreamHandle consumer = new_stream();
  std::byte* pages = allocate();
  std::byte* source = new_host();
  std::byte* back = new_host();
  const std::vector<std::byte> expected = pattern(kBytes, 4);
  std::memcpy(source, expected.data(), expected.size());
  std::unique_ptr<Event> loaded = new_event();
  ASSERT_TRUE(ok(copy(producer, pages, source, Direction::load)));
  ASSERT_TRUE(ok(device().record(*loaded, producer)));
  ASSERT_TRUE(ok(device().wait(consumer, *loaded)));
  ASSERT_TRUE(ok(copy(consumer, back, pages, Direction::store)));
  finish(consumer);
  EXPECT_EQ(bytes_at(back), expected);
}

TEST_P(DeviceConformance, an_event_orders_a_load_behind_another_streams_store) {
  const StreamHandle producer = new_stream();
  const StreamHandle consumer = new_stream();
  std::byte* pages = allocate();
  std::byte* others = allocate();
  std::byte* slot = new_host();
  write(pages, std::byte{8});
  ASSERT_TRUE(ok(copy(consumer, others, slot, Direction::load)));  // the stream has loaded before
  finish(consumer);
  std::unique_ptr<Event> computed = new_event();
  std::unique_ptr<Event> stored = new_event();
  harness_->launch([] { std::this_thread::sleep_for(std::chrono::milliseconds(2)); });
  ASSERT_TRUE(ok(device().record(*computed, framework())));
  ASSERT_TRUE(ok(device().wait(producer, *computed)));
  ASSERT_TRUE(ok(copy(producer, slot, pages, Direction::store)));
  ASSERT_TRUE(ok(device().record(*stored, producer)));
  ASSERT_TRUE(ok(device().wait(consumer, *stored)));
  ASSERT_TRUE(ok(copy(consumer, others, slot, Direction::load)));
  finish(consumer);
  EXPECT_EQ(read(others), filled(std::byte{8}));
}

TEST_P(DeviceConformance, a_store_behind_the_frameworks_event_sees_its_kernels) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::byte* slot = new_host();
  write(pages, std::byte{1});
  std::unique_ptr<Event> computed = new_event();
  harness_->launch([] { std::this_thread::sleep_for(std::chrono::milliseconds(2)); });
  harness_->fill(pages, std::byte{2}, kBytes);
  ASSERT_TRUE(ok(device().record(*computed, framework())));
  ASSERT_TRUE(ok(device().wait(stream, *computed)));
  ASSERT_TRUE(ok(copy(stream, slot, pages, Direction::store)));
  finish(stream);
  EXPECT_EQ(bytes_at(slot), filled(std::byte{2}));
}

TEST_P(DeviceConformance, the_frameworks_kernels_behind_a_load_see_its_bytes) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::byte* slot = new_host();
  std::memset(slot, 3, kBytes);
  write(pages, std::byte{1});
  std::unique_ptr<Event> loaded = new_event();
  ASSERT_TRUE(ok(copy(stream, pages, slot, Direction::load)));
  ASSERT_TRUE(ok(device().record(*loaded, stream)));
  ASSERT_TRUE(ok(device().wait(framework(), *loaded)));
  EXPECT_EQ(read(pages), filled(std::byte{3}));
}

TEST_P(DeviceConformance, an_unrecorded_event_counts_as_complete_and_orders_nothing) {
  const StreamHandle stream = new_stream();
  std::unique_ptr<Event> never = new_event();
  Result<bool> complete = device().query(*never);
  ASSERT_TRUE(ok(complete));
  EXPECT_TRUE(*complete);
  EXPECT_TRUE(ok(device().synchronize(*never)));
  EXPECT_TRUE(ok(device().wait(stream, *never)));
  finish(stream);
}

TEST_P(DeviceConformance, an_event_is_incomplete_while_work_before_it_is) {
  std::unique_ptr<Event> event = new_event();
  bool ran = false;
  if (!harness_->hold_framework()) GTEST_SKIP() << "the framework's stream cannot be held";
  harness_->launch([&ran] { ran = true; });
  ASSERT_TRUE(ok(device().record(*event, framework())));
  EXPECT_FALSE(device().query(*event).value());

  std::thread releaser([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    harness_->release_framework();
  });
  EXPECT_TRUE(ok(device().synchronize(*event)));
  EXPECT_TRUE(ran);
  EXPECT_TRUE(device().query(*event).value());
  releaser.join();
}

TEST_P(DeviceConformance, a_wait_holds_work_back_until_its_event) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::byte* slot = new_host();
  std::unique_ptr<Event> computed = new_event();
  std::unique_ptr<Event> stored = new_event();
  // Only now, here and below: while a stream is held, what allocates may wait for it.
  if (!harness_->hold_framework()) GTEST_SKIP() << "the framework's stream cannot be held";
  harness_->fill(pages, std::byte{4}, kBytes);
  ASSERT_TRUE(ok(device().record(*computed, framework())));
  ASSERT_TRUE(ok(device().wait(stream, *computed)));
  ASSERT_TRUE(ok(copy(stream, slot, pages, Direction::store)));
  ASSERT_TRUE(ok(device().record(*stored, stream)));
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_FALSE(device().query(*stored).value());
  harness_->release_framework();
  EXPECT_TRUE(ok(device().synchronize(*stored)));
  EXPECT_EQ(bytes_at(slot), filled(std::byte{4}));
}

TEST_P(DeviceConformance, streams_without_an_event_between_them_do_not_wait_for_each_other) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::byte* slot = new_host();
  if (!harness_->hold_framework()) GTEST_SKIP() << "the framework's stream cannot be held";
  ASSERT_TRUE(ok(copy(stream, pages, slot, Direction::load)));
  finish(stream);  // must not hang
  harness_->release_framework();
}

TEST_P(DeviceConformance, recording_again_moves_the_event_but_not_earlier_waits) {
  const StreamHandle early = new_stream();
  const StreamHandle idle = new_stream();
  const StreamHandle late = new_stream();
  std::unique_ptr<Event> event = new_event();
  std::unique_ptr<Event> late_done = new_event();
  const bool held = harness_->hold_framework();

  ASSERT_TRUE(ok(device().record(*event, early)));        // completes by itself
  ASSERT_TRUE(ok(device().wait(idle, *event)));           // so this wait does
  ASSERT_TRUE(ok(device().record(*event, framework())));  // moved behind the hold
  ASSERT_TRUE(ok(device().wait(late, *event)));
  finish(idle);  // hangs if the wait moved too
  ASSERT_TRUE(ok(device().record(*late_done, late)));
  if (held) {
    EXPECT_FALSE(device().query(*event).value());
  }
  ASSERT_TRUE(ok(device().record(*event, early)));  // moved off it again; `late` still waits
  EXPECT_TRUE(ok(device().synchronize(*event)));
  if (held) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_FALSE(device().query(*late_done).value());
    harness_->release_framework();
  }
  EXPECT_TRUE(ok(device().synchronize(*late_done)));
}

TEST_P(DeviceConformance, destroying_a_pending_event_waits_for_nothing_and_undoes_nothing) {
  const StreamHandle producer = new_stream();
  const StreamHandle consumer = new_stream();
  std::byte* pages = allocate();
  std::byte* source = new_host();
  std::byte* back = new_host();
  std::memset(source, 5, kBytes);
  ASSERT_TRUE(ok(copy(producer, pages, source, Direction::load)));
  {
    std::unique_ptr<Event> loaded = new_event();
    ASSERT_TRUE(ok(device().record(*loaded, producer)));
    ASSERT_TRUE(ok(device().wait(consumer, *loaded)));
  }
  ASSERT_TRUE(ok(copy(consumer, back, pages, Direction::store)));
  finish(consumer);
  EXPECT_EQ(bytes_at(back), filled(std::byte{5}));
}

TEST_P(DeviceConformance, work_completes_though_nobody_waits) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::unique_ptr<Event> done = new_event();
  ASSERT_TRUE(ok(copy(stream, pages, new_host(), Direction::load)));
  ASSERT_TRUE(ok(device().record(*done, stream)));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  bool complete = false;
  while (!complete && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    complete = device().query(*done).value();
  }
  EXPECT_TRUE(complete);
}

TEST_P(DeviceConformance, many_threads_may_wait_for_one_event) {
  const StreamHandle stream = new_stream();
  std::byte* pages = allocate();
  std::byte* source = new_host();
  std::byte* back = new_host();
  std::memset(source, 6, kBytes);
  std::unique_ptr<Event> done = new_event();
  ASSERT_TRUE(ok(copy(stream, pages, source, Direction::load)));
  ASSERT_TRUE(ok(copy(stream, back, pages, Direction::store)));
  ASSERT_TRUE(ok(device().record(*done, stream)));
  std::vector<std::thread> waiters;
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] {
      EXPECT_TRUE(ok(device().synchronize(*done)));
      EXPECT_EQ(bytes_at(back), filled(std::byte{6}));
    });
  }
  for (std::thread& waiter : waiters) waiter.join();
}

TEST_P(DeviceConformance, threads_may_use_the_device_at_once) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 20;
  constexpr std::size_t kPart = 8192;
  const StreamHandle shared = new_stream();
  std::byte* pages = allocate(kThreads * kPart);
  std::byte* host = new_host(2 * kThreads * kPart);
  std::array<StreamHandle, kThreads> own{};
  for (StreamHandle& each : own) each = new_stream();
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::byte* source = host + 2 * t * kPart;
      std::byte* back = source + kPart;
      std::byte* page = pages + t * kPart;
      std::unique_ptr<Event> loaded = new_event();
      std::unique_ptr<Event> stored = new_event();
      for (unsigned round = 0; round < kRounds; ++round) {
        const std::vector<std::byte> expected = pattern(kPart, round * kThreads + static_cast<unsigned>(t));
        std::memcpy(source, expected.data(), kPart);
        ASSERT_TRUE(ok(copy(own[t], page, source, Direction::load, kPart)));
        ASSERT_TRUE(ok(device().record(*loaded, own[t])));
        ASSERT_TRUE(ok(device().wait(shared, *loaded)));
        ASSERT_TRUE(ok(copy(shared, back, page, Direction::store, kPart)));
        ASSERT_TRUE(ok(device().record(*stored, shared)));
        ASSERT_TRUE(ok(device().synchronize(*stored)));
        ASSERT_EQ(bytes_at(back, kPart), expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(DeviceConformance, registrations_neither_overlap_nor_vanish_twice) {
  constexpr std::size_t kPage = HostBuffer::kPage;
  HostBuffer memory(8 * kPage);
  Device& device = harness_->device();
  ASSERT_TRUE(ok(device.register_host(memory.data() + 2 * kPage, 4 * kPage)));
  EXPECT_FALSE(device.register_host(memory.data() + 2 * kPage, 4 * kPage));
  EXPECT_FALSE(device.register_host(memory.data() + 5 * kPage, 2 * kPage));
  EXPECT_FALSE(device.register_host(memory.data(), 8 * kPage));
  EXPECT_FALSE(device.unregister_host(memory.data()));
  ASSERT_TRUE(ok(device.register_host(memory.data() + 6 * kPage, 2 * kPage)));  // adjacent is fine
  EXPECT_TRUE(ok(device.unregister_host(memory.data() + 6 * kPage)));
  EXPECT_TRUE(ok(device.unregister_host(memory.data() + 2 * kPage)));
  EXPECT_FALSE(device.unregister_host(memory.data() + 2 * kPage));
  EXPECT_TRUE(ok(device.register_host(memory.data(), 8 * kPage)));
  EXPECT_TRUE(ok(device.unregister_host(memory.data())));
}

TEST_P(DeviceConformance, what_a_capture_refuses_has_no_effect_and_works_afterwards) {
  if (!harness_->begin_capture()) GTEST_SKIP() << "nothing to capture";
  HostBuffer memory(4 * HostBuffer::kPage);
  const Status during = device().register_host(memory.data(), memory.size());
  harness_->end_capture();
  if (!during) {
    EXPECT_TRUE(is_capture_conflict(during)) << during.message();
    EXPECT_TRUE(ok(device().register_host(memory.data(), memory.size())));
  }
  EXPECT_TRUE(ok(device().unregister_host(memory.data())));
}

}  // namespace
}  // namespace kvtier::conformance
