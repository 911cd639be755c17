// What every Device must do (kvtier/platform/device.h), written once.
//
// An implementation derives a default-constructible harness from DeviceHarness, and its test file says
//
//   INSTANTIATE_TYPED_TEST_SUITE_P(Cpu, DeviceConformance, ::testing::Types<CpuHarness>);
//
// The framework's memory is touched only through fill() and snapshot(), at their place in the framework's
// stream: the host need not be able to address it.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvtier/platform/device.h"

namespace kvtier::conformance {

// The device under test and the framework's side of it.
class DeviceHarness {
 public:
  virtual ~DeviceHarness() = default;
  // Why this implementation cannot be tested on this machine; nothing else is called then.
  virtual std::optional<std::string> missing() { return std::nullopt; }
  virtual Device& device() = 0;

  virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void free(std::byte* begin) = 0;

  // Where the caller itself is the framework's stream (cpu), launch() just runs the kernel, and
  // Device::wait() on that stream has to block the caller: nothing else could order its later work.
  virtual StreamHandle framework_stream() = 0;
  // Runs `kernel` at its place in the framework's stream. It must not touch device memory nor call the
  // device.
  virtual void launch(std::function<void()> kernel) = 0;
  virtual void framework_synchronize() = 0;

  // Kernels on device memory. The defaults suit memory that the host can address.
  virtual void fill(std::byte* begin, std::byte value, std::size_t bytes) {
    launch([=] { std::memset(begin, static_cast<int>(value), bytes); });
  }
  // Borrows `host` until framework_synchronize().
  virtual void snapshot(std::byte* host, const std::byte* begin, std::size_t bytes) {
    launch([=] { std::memcpy(host, begin, bytes); });
  }

  // Stops the framework's stream behind what it has been given, until release. False: cannot.
  virtual bool hold_framework() { return false; }
  virtual void release_framework() {}  // a no-op when nothing is held

  // The framework begins to capture a graph (global mode). False: there is no such thing.
  virtual bool begin_capture() { return false; }
  virtual void end_capture() {}
};

inline ::testing::AssertionResult ok(const Status& status) {
  if (status.is_ok()) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << to_string(status.code()) << " (" << status.native_code() << "): " << status.message();
}

template <typename T>
::testing::AssertionResult ok(const Result<T>& result) {
  return ok(result.status());
}

// Bytes that differ from place to place and from seed to seed.
inline std::vector<std::byte> pattern(std::size_t bytes, unsigned seed) {
  std::vector<std::byte> result(bytes);
  for (std::size_t i = 0; i < bytes; ++i)
    result[i] = static_cast<std::byte>((i * 131 + i / 256 + seed * 29 + 7) & 0xff);
  return result;
}

// Page-aligned host memory, since that is what registration is about.
class HostBuffer {
 public:
  static constexpr std::size_t kPage = 4096;

  explicit HostBuffer(std::size_t bytes)
      : bytes_((bytes + kPage - 1) / kPage * kPage),
        begin_(static_cast<std::byte*>(std::aligned_alloc(kPage, bytes_))) {
    std::memset(begin_.get(), 0, bytes_);
  }
  std::byte* data() const { return begin_.get(); }
  std::size_t size() const { return bytes_; }
  void assign(std::span<const std::byte> bytes) { std::memcpy(data(), bytes.data(), bytes.size()); }
  std::vector<std::byte> first(std::size_t bytes) const { return {data(), data() + bytes}; }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> begin_;
};

template <typename Harness>
class DeviceConformance : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = 96 * 1024;

  Device& device() { return harness_.device(); }
  StreamHandle framework() { return harness_.framework_stream(); }

  std::byte* allocate(std::size_t bytes = kBytes) {
    std::byte* begin = harness_.allocate(bytes);
    allocations_.push_back(begin);
    return begin;
  }
  std::byte* host(std::size_t bytes = kBytes) {
    HostBuffer& buffer = host_.emplace_back(bytes);
    EXPECT_TRUE(ok(device().register_host(buffer.data(), buffer.size())));
    registered_.push_back(buffer.data());
    return buffer.data();
  }
  StreamHandle stream() { return streams_.emplace_back(OwnedStream::create(device()).value()).handle(); }
  std::unique_ptr<Event> event() { return device().create_event().value(); }

  Status copy(StreamHandle stream, void* destination, const void* source, Direction direction,
              std::size_t bytes = kBytes) {
    const CopyRun run{destination, source, bytes};
    return device().copy(stream, {&run, 1}, direction);
  }
  // Waits for everything submitted to `stream` so far.
  void finish(StreamHandle stream) {
    std::unique_ptr<Event> done = event();
    ASSERT_TRUE(ok(device().record(*done, stream)));
    ASSERT_TRUE(ok(device().synchronize(*done)));
  }
  void write(std::byte* begin, std::byte value, std::size_t bytes = kBytes) {
    harness_.fill(begin, value, bytes);
    harness_.framework_synchronize();
  }
  std::vector<std::byte> read(const std::byte* begin, std::size_t bytes = kBytes) {
    std::vector<std::byte> result(bytes);
    harness_.snapshot(result.data(), begin, bytes);
    harness_.framework_synchronize();
    return result;
  }
  static std::vector<std::byte> filled(std::byte value, std::size_t bytes = kBytes) { return {bytes, value}; }
  static std::vector<std::byte> bytes_at(const std::byte* begin, std::size_t bytes = kBytes) {
    return {begin, begin + bytes};
  }

  void SetUp() override {
    if (const std::optional<std::string> why = harness_.missing()) GTEST_SKIP() << *why;
  }

  // Every test ends with all work completed, as the contract asks of its callers.
  void TearDown() override {
    if (harness_.missing()) return;
    harness_.release_framework();  // a failed test may have left it held
    harness_.framework_synchronize();
    for (const OwnedStream& each : streams_) finish(each.handle());
    for (void* begin : registered_) EXPECT_TRUE(ok(device().unregister_host(begin)));
    for (std::byte* begin : allocations_) harness_.free(begin);
    EXPECT_TRUE(ok(device().health()));
  }

  Harness harness_;
  std::vector<std::byte*> allocations_;
  std::vector<HostBuffer> host_;
  std::vector<void*> registered_;
  std::vector<OwnedStream> streams_;  // destroyed before the device
};

TYPED_TEST_SUITE_P(DeviceConformance);

TYPED_TEST_P(DeviceConformance, says_what_it_is) {
  EXPECT_FALSE(this->device().name().empty());
  EXPECT_GE(this->device().ordinal(), 0);
  EXPECT_TRUE(ok(this->device().health()));
}

TYPED_TEST_P(DeviceConformance, streams_are_distinct_and_not_the_frameworks) {
  std::set<StreamHandle> handles{this->framework()};
  for (int i = 0; i < 8; ++i) EXPECT_TRUE(handles.insert(this->stream()).second);
}

TYPED_TEST_P(DeviceConformance, streams_can_be_created_and_destroyed_many_times) {
  for (int i = 0; i < 200; ++i) {
    Result<OwnedStream> stream = OwnedStream::create(this->device());
    ASSERT_TRUE(ok(stream));
    if (i % 10 == 0) this->finish(stream->handle());
  }
}

TYPED_TEST_P(DeviceConformance, copies_both_ways) {
  const StreamHandle stream = this->stream();
  std::byte* source = this->host();
  std::byte* back = this->host();
  std::byte* pages = this->allocate();
  const std::vector<std::byte> expected = pattern(this->kBytes, 1);
  std::memcpy(source, expected.data(), expected.size());

  ASSERT_TRUE(ok(this->copy(stream, pages, source, Direction::load)));
  this->finish(stream);
  EXPECT_EQ(this->read(pages), expected);

  ASSERT_TRUE(ok(this->copy(stream, back, pages, Direction::store)));
  this->finish(stream);
  EXPECT_EQ(this->bytes_at(back), expected);
}

TYPED_TEST_P(DeviceConformance, copies_every_run_of_a_batch_and_nothing_beside) {
  // Odd sizes at odd places, in an order that differs between both sides, with gaps that must stay as they
  // were.
  constexpr std::size_t kRuns = 3000;
  constexpr std::size_t kPitch = 128;
  const StreamHandle stream = this->stream();
  std::byte* slot = this->host(kRuns * kPitch);
  std::byte* pages = this->allocate(kRuns * kPitch);
  const std::vector<std::byte> content = pattern(kRuns * kPitch, 2);
  std::memcpy(slot, content.data(), content.size());
  this->write(pages, std::byte{0xee}, kRuns * kPitch);

  std::vector<CopyRun> runs;
  std::vector<std::byte> expected(kRuns * kPitch, std::byte{0xee});
  for (std::size_t i = 0; i < kRuns; ++i) {
    const std::size_t to = (i * 1237 % kRuns) * kPitch + i % 5;
    const std::size_t from = i * kPitch + i % 3;
    const std::size_t bytes = 1 + i * 7 % 120;
    runs.push_back({pages + to, slot + from, bytes});
    std::memcpy(expected.data() + to, content.data() + from, bytes);
  }
  ASSERT_TRUE(ok(this->device().copy(stream, runs, Direction::load)));
  runs.assign(runs.size(), CopyRun{nullptr, nullptr, ~std::size_t{0}});  // ours again once copy() returned
  this->finish(stream);
  EXPECT_EQ(this->read(pages, kRuns * kPitch), expected);
}

TYPED_TEST_P(DeviceConformance, an_empty_batch_is_nothing) {
  const StreamHandle stream = this->stream();
  ASSERT_TRUE(ok(this->device().copy(stream, {}, Direction::load)));
  this->finish(stream);
}

TYPED_TEST_P(DeviceConformance, pageable_host_memory_is_legal) {
  const StreamHandle stream = this->stream();
  const std::vector<std::byte> source = pattern(this->kBytes, 3);
  std::vector<std::byte> back(this->kBytes);
  std::byte* pages = this->allocate();
  ASSERT_TRUE(ok(this->copy(stream, pages, source.data(), Direction::load)));
  ASSERT_TRUE(ok(this->copy(stream, back.data(), pages, Direction::store)));
  this->finish(stream);
  EXPECT_EQ(back, source);
}

TYPED_TEST_P(DeviceConformance, one_stream_runs_in_order) {
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  std::byte* first = this->host();
  std::byte* second = this->host();
  std::byte* saw_first = this->host();
  std::byte* saw_second = this->host();
  std::memset(first, 1, this->kBytes);
  std::memset(second, 2, this->kBytes);
  ASSERT_TRUE(ok(this->copy(stream, pages, first, Direction::load)));
  ASSERT_TRUE(ok(this->copy(stream, saw_first, pages, Direction::store)));
  ASSERT_TRUE(ok(this->copy(stream, pages, second, Direction::load)));
  ASSERT_TRUE(ok(this->copy(stream, saw_second, pages, Direction::store)));
  this->finish(stream);
  EXPECT_EQ(this->bytes_at(saw_first), this->filled(std::byte{1}));
  EXPECT_EQ(this->bytes_at(saw_second), this->filled(std::byte{2}));
}

TYPED_TEST_P(DeviceConformance, an_event_orders_two_streams) {
  const StreamHandle producer = this->stream();
  const StreamHandle consumer = this->stream();
  std::byte* pages = this->allocate();
  std::byte* source = this->host();
  std::byte* back = this->host();
  const std::vector<std::byte> expected = pattern(this->kBytes, 4);
  std::memcpy(source, expected.data(), expected.size());
  std::unique_ptr<Event> loaded = this->event();
  ASSERT_TRUE(ok(this->copy(producer, pages, source, Direction::load)));
  ASSERT_TRUE(ok(this->device().record(*loaded, producer)));
  ASSERT_TRUE(ok(this->device().wait(consumer, *loaded)));
  ASSERT_TRUE(ok(this->copy(consumer, back, pages, Direction::store)));
  this->finish(consumer);
  EXPECT_EQ(this->bytes_at(back), expected);
}

TYPED_TEST_P(DeviceConformance, a_store_behind_the_frameworks_event_sees_its_kernels) {
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  std::byte* slot = this->host();
  this->write(pages, std::byte{1});
  std::unique_ptr<Event> computed = this->event();
  this->harness_.launch([] { std::this_thread::sleep_for(std::chrono::milliseconds(2)); });
  this->harness_.fill(pages, std::byte{2}, this->kBytes);
  ASSERT_TRUE(ok(this->device().record(*computed, this->framework())));
  ASSERT_TRUE(ok(this->device().wait(stream, *computed)));
  ASSERT_TRUE(ok(this->copy(stream, slot, pages, Direction::store)));
  this->finish(stream);
  EXPECT_EQ(this->bytes_at(slot), this->filled(std::byte{2}));
}

TYPED_TEST_P(DeviceConformance, the_frameworks_kernels_behind_a_load_see_its_bytes) {
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  std::byte* slot = this->host();
  std::memset(slot, 3, this->kBytes);
  this->write(pages, std::byte{1});
  std::unique_ptr<Event> loaded = this->event();
  ASSERT_TRUE(ok(this->copy(stream, pages, slot, Direction::load)));
  ASSERT_TRUE(ok(this->device().record(*loaded, stream)));
  ASSERT_TRUE(ok(this->device().wait(this->framework(), *loaded)));
  EXPECT_EQ(this->read(pages), this->filled(std::byte{3}));
}

TYPED_TEST_P(DeviceConformance, an_unrecorded_event_counts_as_complete_and_orders_nothing) {
  const StreamHandle stream = this->stream();
  std::unique_ptr<Event> never = this->event();
  Result<bool> complete = this->device().query(*never);
  ASSERT_TRUE(ok(complete));
  EXPECT_TRUE(*complete);
  EXPECT_TRUE(ok(this->device().synchronize(*never)));
  EXPECT_TRUE(ok(this->device().wait(stream, *never)));
  this->finish(stream);
}

TYPED_TEST_P(DeviceConformance, an_event_is_incomplete_while_work_before_it_is) {
  if (!this->harness_.hold_framework()) GTEST_SKIP() << "the framework's stream cannot be held";
  std::unique_ptr<Event> event = this->event();
  bool ran = false;
  this->harness_.launch([&ran] { ran = true; });
  ASSERT_TRUE(ok(this->device().record(*event, this->framework())));
  EXPECT_FALSE(this->device().query(*event).value());

  std::thread releaser([this] {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    this->harness_.release_framework();
  });
  EXPECT_TRUE(ok(this->device().synchronize(*event)));
  EXPECT_TRUE(ran);
  EXPECT_TRUE(this->device().query(*event).value());
  releaser.join();
}

TYPED_TEST_P(DeviceConformance, a_wait_holds_work_back_until_its_event) {
  if (!this->harness_.hold_framework()) GTEST_SKIP() << "the framework's stream cannot be held";
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  std::byte* slot = this->host();
  std::unique_ptr<Event> computed = this->event();
  std::unique_ptr<Event> stored = this->event();
  this->harness_.fill(pages, std::byte{4}, this->kBytes);
  ASSERT_TRUE(ok(this->device().record(*computed, this->framework())));
  ASSERT_TRUE(ok(this->device().wait(stream, *computed)));
  ASSERT_TRUE(ok(this->copy(stream, slot, pages, Direction::store)));
  ASSERT_TRUE(ok(this->device().record(*stored, stream)));
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_FALSE(this->device().query(*stored).value());
  this->harness_.release_framework();
  EXPECT_TRUE(ok(this->device().synchronize(*stored)));
  EXPECT_EQ(this->bytes_at(slot), this->filled(std::byte{4}));
}

TYPED_TEST_P(DeviceConformance, streams_without_an_event_between_them_do_not_wait_for_each_other) {
  if (!this->harness_.hold_framework()) GTEST_SKIP() << "the framework's stream cannot be held";
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  ASSERT_TRUE(ok(this->copy(stream, pages, this->host(), Direction::load)));
  this->finish(stream);  // must not hang
  this->harness_.release_framework();
}

TYPED_TEST_P(DeviceConformance, recording_again_moves_the_event_but_not_earlier_waits) {
  const StreamHandle early = this->stream();
  const StreamHandle idle = this->stream();
  const StreamHandle late = this->stream();
  std::unique_ptr<Event> event = this->event();
  std::unique_ptr<Event> late_done = this->event();
  const bool held = this->harness_.hold_framework();

  ASSERT_TRUE(ok(this->device().record(*event, early)));              // completes by itself
  ASSERT_TRUE(ok(this->device().wait(idle, *event)));                 // so this wait does
  ASSERT_TRUE(ok(this->device().record(*event, this->framework())));  // moved behind the hold
  ASSERT_TRUE(ok(this->device().wait(late, *event)));
  this->finish(idle);  // hangs if the wait moved too
  ASSERT_TRUE(ok(this->device().record(*late_done, late)));
  if (held) {
    EXPECT_FALSE(this->device().query(*event).value());
  }
  ASSERT_TRUE(ok(this->device().record(*event, early)));  // moved off it again; `late` still waits
  EXPECT_TRUE(ok(this->device().synchronize(*event)));
  if (held) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    EXPECT_FALSE(this->device().query(*late_done).value());
    this->harness_.release_framework();
  }
  EXPECT_TRUE(ok(this->device().synchronize(*late_done)));
}

TYPED_TEST_P(DeviceConformance, destroying_a_pending_event_waits_for_nothing_and_undoes_nothing) {
  const StreamHandle producer = this->stream();
  const StreamHandle consumer = this->stream();
  std::byte* pages = this->allocate();
  std::byte* source = this->host();
  std::byte* back = this->host();
  std::memset(source, 5, this->kBytes);
  ASSERT_TRUE(ok(this->copy(producer, pages, source, Direction::load)));
  {
    std::unique_ptr<Event> loaded = this->event();
    ASSERT_TRUE(ok(this->device().record(*loaded, producer)));
    ASSERT_TRUE(ok(this->device().wait(consumer, *loaded)));
  }
  ASSERT_TRUE(ok(this->copy(consumer, back, pages, Direction::store)));
  this->finish(consumer);
  EXPECT_EQ(this->bytes_at(back), this->filled(std::byte{5}));
}

TYPED_TEST_P(DeviceConformance, work_completes_though_nobody_waits) {
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  std::unique_ptr<Event> done = this->event();
  ASSERT_TRUE(ok(this->copy(stream, pages, this->host(), Direction::load)));
  ASSERT_TRUE(ok(this->device().record(*done, stream)));
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  bool complete = false;
  while (!complete && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    complete = this->device().query(*done).value();
  }
  EXPECT_TRUE(complete);
}

TYPED_TEST_P(DeviceConformance, many_threads_may_wait_for_one_event) {
  const StreamHandle stream = this->stream();
  std::byte* pages = this->allocate();
  std::byte* source = this->host();
  std::byte* back = this->host();
  std::memset(source, 6, this->kBytes);
  std::unique_ptr<Event> done = this->event();
  ASSERT_TRUE(ok(this->copy(stream, pages, source, Direction::load)));
  ASSERT_TRUE(ok(this->copy(stream, back, pages, Direction::store)));
  ASSERT_TRUE(ok(this->device().record(*done, stream)));
  std::vector<std::thread> waiters;
  for (int i = 0; i < 4; ++i) {
    waiters.emplace_back([&] {
      EXPECT_TRUE(ok(this->device().synchronize(*done)));
      EXPECT_EQ(this->bytes_at(back), this->filled(std::byte{6}));
    });
  }
  for (std::thread& waiter : waiters) waiter.join();
}

TYPED_TEST_P(DeviceConformance, threads_may_use_the_device_at_once) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 20;
  constexpr std::size_t kPart = 8192;
  const StreamHandle shared = this->stream();
  std::byte* pages = this->allocate(kThreads * kPart);
  std::byte* host = this->host(2 * kThreads * kPart);
  std::array<StreamHandle, kThreads> own{};
  for (StreamHandle& each : own) each = this->stream();
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::byte* source = host + 2 * t * kPart;
      std::byte* back = source + kPart;
      std::byte* page = pages + t * kPart;
      std::unique_ptr<Event> loaded = this->event();
      std::unique_ptr<Event> stored = this->event();
      for (unsigned round = 0; round < kRounds; ++round) {
        const std::vector<std::byte> expected = pattern(kPart, round * kThreads + static_cast<unsigned>(t));
        std::memcpy(source, expected.data(), kPart);
        ASSERT_TRUE(ok(this->copy(own[t], page, source, Direction::load, kPart)));
        ASSERT_TRUE(ok(this->device().record(*loaded, own[t])));
        ASSERT_TRUE(ok(this->device().wait(shared, *loaded)));
        ASSERT_TRUE(ok(this->copy(shared, back, page, Direction::store, kPart)));
        ASSERT_TRUE(ok(this->device().record(*stored, shared)));
        ASSERT_TRUE(ok(this->device().synchronize(*stored)));
        ASSERT_EQ(this->bytes_at(back, kPart), expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TYPED_TEST_P(DeviceConformance, registrations_neither_overlap_nor_vanish_twice) {
  constexpr std::size_t kPage = HostBuffer::kPage;
  HostBuffer memory(8 * kPage);
  Device& device = this->device();
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

TYPED_TEST_P(DeviceConformance, what_a_capture_refuses_has_no_effect_and_works_afterwards) {
  if (!this->harness_.begin_capture()) GTEST_SKIP() << "nothing to capture";
  HostBuffer memory(4 * HostBuffer::kPage);
  const Status during = this->device().register_host(memory.data(), memory.size());
  this->harness_.end_capture();
  if (!during) {
    EXPECT_TRUE(is_capture_conflict(during)) << during.message();
    EXPECT_TRUE(ok(this->device().register_host(memory.data(), memory.size())));
  }
  EXPECT_TRUE(ok(this->device().unregister_host(memory.data())));
}

REGISTER_TYPED_TEST_SUITE_P(
    DeviceConformance, says_what_it_is, streams_are_distinct_and_not_the_frameworks,
    streams_can_be_created_and_destroyed_many_times, copies_both_ways,
    copies_every_run_of_a_batch_and_nothing_beside, an_empty_batch_is_nothing, pageable_host_memory_is_legal,
    one_stream_runs_in_order, an_event_orders_two_streams,
    a_store_behind_the_frameworks_event_sees_its_kernels, the_frameworks_kernels_behind_a_load_see_its_bytes,
    an_unrecorded_event_counts_as_complete_and_orders_nothing, an_event_is_incomplete_while_work_before_it_is,
    a_wait_holds_work_back_until_its_event, streams_without_an_event_between_them_do_not_wait_for_each_other,
    recording_again_moves_the_event_but_not_earlier_waits,
    destroying_a_pending_event_waits_for_nothing_and_undoes_nothing, work_completes_though_nobody_waits,
    many_threads_may_wait_for_one_event, threads_may_use_the_device_at_once,
    registrations_neither_overlap_nor_vanish_twice,
    what_a_capture_refuses_has_no_effect_and_works_afterwards);

}  // namespace kvtier::conformance
