#include "kvtier/platform/faulty_device.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <thread>

#include "conformance/device_harness.h"

#include "kvtier/platform/simulated_device.h"

namespace kvtier {
namespace {

using conformance::HostBuffer;
using conformance::ok;

Status fault() { return Status::device("injected", 2); }

// Counts what gets through.
class CountingMemory final : public HostMemory {
 public:
  Result<std::uint64_t> available_bytes() override { return std::uint64_t(++calls); }
  Result<int> create_shared(std::uint64_t) override { return ++calls; }
  Result<std::byte*> map_shared(int, std::uint64_t) override {
    return ++calls, static_cast<std::byte*>(nullptr);
  }
  Status prefer_node(std::byte*, std::uint64_t, int) override { return ++calls, Status::ok(); }
  void unmap(std::byte*, std::uint64_t) override {}
  Status populate(std::byte*, std::uint64_t) override { return ++calls, Status::ok(); }
  int calls = 0;
};

TEST(FaultPlan, fails_the_nth_call_of_a_kind_once) {
  FaultPlan plan;
  plan.fail(FaultCall::copy, 2, fault());
  EXPECT_TRUE(ok(plan.next(FaultCall::copy)));
  EXPECT_TRUE(ok(plan.next(FaultCall::record)));
  EXPECT_EQ(plan.next(FaultCall::copy).native_code(), 2);
  EXPECT_TRUE(ok(plan.next(FaultCall::copy)));
  EXPECT_EQ(plan.seen(), 4U);
  EXPECT_EQ(plan.seen(FaultCall::copy), 3U);
  EXPECT_EQ(plan.injected(), 1U);
}

TEST(FaultPlan, fails_the_nth_call_of_all_and_from_then_on) {
  FaultPlan plan;
  plan.fail(2, fault(), FaultSpan::from_then_on);
  EXPECT_TRUE(ok(plan.next(FaultCall::copy)));
  EXPECT_FALSE(plan.next(FaultCall::record));
  EXPECT_FALSE(plan.next(FaultCall::populate));
  EXPECT_EQ(plan.injected(), 2U);
  plan.reset();
  EXPECT_TRUE(ok(plan.next(FaultCall::copy)));
  EXPECT_TRUE(ok(plan.next(FaultCall::copy)));
  EXPECT_EQ(plan.seen(), 2U);
}

TEST(FaultPlan, counts_calls_of_many_threads) {
  FaultPlan plan;
  plan.fail(FaultCall::query, 100, fault());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&plan] {
      for (int i = 0; i < 50; ++i) static_cast<void>(plan.next(FaultCall::query));
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(plan.seen(FaultCall::query), 200U);
  EXPECT_EQ(plan.injected(), 1U);
}

TEST(FaultPlan, every_kind_has_a_name) {
  std::set<std::string_view> names;
  for (unsigned i = 0; i < static_cast<unsigned>(FaultCall::count_); ++i)
    names.insert(to_string(FaultCall(i)));
  EXPECT_EQ(names.size(), static_cast<std::size_t>(FaultCall::count_));
  EXPECT_EQ(names.count("?"), 0U);
}

TEST(FaultyDevice, each_call_is_counted_as_its_kind_and_a_fault_has_no_effect) {
  SimulatedDevice inner({.max_delay_us = 0});
  FaultPlan plan;
  FaultyDevice device(inner, plan);
  HostBuffer slot(4096);
  HostBuffer more(4096);
  std::byte* page = inner.allocate(4096);
  const StreamHandle stream = device.create_stream().value();
  std::unique_ptr<Event> event = device.create_event().value();
  ASSERT_TRUE(ok(device.register_host(slot.data(), slot.size())));
  const CopyRun run{page, slot.data(), 4096};
  const std::pair<FaultCall, std::function<Status()>> calls[] = {
      {FaultCall::create_stream, [&] { return OwnedStream::create(device).status(); }},
      {FaultCall::create_event, [&] { return device.create_event().status(); }},
      {FaultCall::copy, [&] { return device.copy(stream, {&run, 1}, Direction::load); }},
      {FaultCall::record, [&] { return device.record(*event, stream); }},
      {FaultCall::wait, [&] { return device.wait(stream, *event); }},
      {FaultCall::query, [&] { return device.query(*event).status(); }},
      {FaultCall::synchronize, [&] { return device.synchronize(*event); }},
      {FaultCall::register_host, [&] { return device.register_host(more.data(), more.size()); }},
      {FaultCall::unregister_host, [&] { return device.unregister_host(more.data()); }},
  };
  for (const auto& [kind, call] : calls) {
    SCOPED_TRACE(to_string(kind));
    plan.reset();
    plan.fail(kind, 1, fault());
    const std::size_t before = inner.pending();
    EXPECT_EQ(call().native_code(), 2);
    EXPECT_EQ(inner.pending(), before);
    EXPECT_TRUE(ok(call()));  // repeating works, so the first attempt left nothing behind
    EXPECT_EQ(plan.seen(kind), 2U);
    EXPECT_EQ(plan.seen(), 2U);
  }
  EXPECT_TRUE(inner.violations().empty());
  EXPECT_EQ(device.kind(), DeviceKind::simulated);
  EXPECT_TRUE(ok(device.health()));
}

TEST(FaultyHostMemory, each_call_is_counted_as_its_kind_and_a_fault_has_no_effect) {
  CountingMemory inner;
  FaultPlan plan;
  FaultyHostMemory memory(inner, plan);
  const std::pair<FaultCall, std::function<Status()>> calls[] = {
      {FaultCall::available_bytes, [&] { return memory.available_bytes().status(); }},
      {FaultCall::create_shared, [&] { return memory.create_shared(1).status(); }},
      {FaultCall::map_shared, [&] { return memory.map_shared(0, 1).status(); }},
      {FaultCall::prefer_node, [&] { return memory.prefer_node(nullptr, 0, 0); }},
      {FaultCall::populate, [&] { return memory.populate(nullptr, 0); }},
  };
  for (const auto& [kind, call] : calls) {
    SCOPED_TRACE(to_string(kind));
    plan.reset();
    plan.fail(kind, 1, fault());
    inner.calls = 0;
    EXPECT_FALSE(call());
    EXPECT_EQ(inner.calls, 0);
    EXPECT_TRUE(ok(call()));
    EXPECT_EQ(inner.calls, 1);
    EXPECT_EQ(plan.seen(kind), 2U);
  }
}

// The loop that every test of a scenario uses.
TEST(FaultyDevice, failing_every_call_in_turn_ends_after_the_last) {
  std::uint64_t n = 0;
  for (bool injected = true; injected;) {
    SimulatedDevice inner({.max_delay_us = 0});
    FaultPlan plan;
    FaultyDevice device(inner, plan);
    plan.fail(++n, fault());
    const Status status = [&device]() -> Status {
      Result<OwnedStream> stream = OwnedStream::create(device);
      KVTIER_RETURN_IF_ERROR(stream.status());
      Result<std::unique_ptr<Event>> event = device.create_event();
      KVTIER_RETURN_IF_ERROR(event.status());
      KVTIER_RETURN_IF_ERROR(device.record(**event, stream->handle()));
      return device.synchronize(**event);
    }();
    injected = plan.injected() > 0;
    EXPECT_EQ(status.is_ok(), !injected);
  }
  EXPECT_EQ(n, 5U);
}

}  // namespace
}  // namespace kvtier
