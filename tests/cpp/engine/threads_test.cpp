// Many callers at once. Run under TSan, these say that nothing is unguarded; anywhere, that bytes are right.
#include <atomic>

#include "support/engine_world.h"
#include "support/turns.h"

namespace kvtier {
namespace {

using namespace support;

constexpr int kSteps = turns(400, 200);
constexpr std::uint32_t kThreads = 8;
constexpr std::uint32_t kPagesEach = 16;

// One caller with pages of its own: stores, loads, checks, drops, pins, until it is told `closed`.
void call(World& world, std::uint32_t self, std::uint64_t seed, std::atomic<int>& wrong,
          std::atomic<std::uint64_t>& hits) {
  Random random(seed * 100 + self);
  const std::uint32_t first = self * kPagesEach;
  std::uint32_t pages_left = 4;
  for (int step = 0; step < kSteps; ++step) {
    Numbers numbers;
    const std::uint32_t tree = random.below(4);
    for (std::uint32_t d = 0; d <= random.below(4); ++d) numbers.push_back(100 * tree + d);
    const auto n = static_cast<std::uint32_t>(numbers.size());
    switch (random.below(8)) {
      case 0:
      case 1: {
        const Numbers at = range(first, first + n);
        world.write(0, numbers, at);
        const auto ticket = world.try_store(0, numbers, at, 0, {}, tree == 0 ? "a" : "b");
        if (!ticket) return;
        if (!ticket.value()->wait(Moment::released, in_seconds(60))) ++wrong;
        break;
      }
      case 2: {  // dropped at once; its page is used no more
        if (pages_left == 0) break;
        const Numbers at{first + kPagesEach - pages_left--};
        world.write(0, {7000 + self}, at);
        if (!world.try_store(0, {7000 + self}, at)) return;
        break;
      }
      case 3:
      case 4:
      case 5: {
        const Numbers at = range(first + 8, first + 8 + n);
        const auto ticket = world.try_load(0, numbers, at);
        if (!ticket) return;
        if (!world.right(0, *ticket.value(), numbers, at)) ++wrong;
        hits += ticket.value()->valid_blocks();
        break;
      }
      case 6: {
        const auto match = world.engine->lookup(keys(numbers));
        if (!match) return;
        const auto lease = world.engine->pin(keys(numbers), n, std::nullopt, &match.value());
        if (!lease || !world.engine->touch(keys(numbers))) return;
        break;
      }
      default:
        if (!world.engine->drop(keys({numbers.back()}))) return;
        if (step % 16 == 0 && !world.engine->drop_namespace("a")) return;
        if (!world.engine->poll() || !world.engine->stats()) return;
    }
  }
}

void storm(std::optional<std::uint64_t> seed, bool close_early) {
  World world({.blocks = 12, .seed = seed, .pages = kThreads * kPagesEach});
  std::atomic<int> wrong = 0;
  std::atomic<std::uint64_t> hits = 0;
  std::vector<std::thread> callers;
  for (std::uint32_t t = 0; t < kThreads; ++t) {
    callers.emplace_back([&, t] { call(world, t, seed.value_or(1), wrong, hits); });
  }
  if (close_early) {
    while (hits < 20) std::this_thread::yield();
    EXPECT_TRUE(world.engine->close(in_seconds(60)));
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(hits, 0U);
  if (!close_early) {
    world.quiesce();
    EXPECT_TRUE(world.engine->flush(in_seconds(60)));
  }
  expect_at_rest(world.stats());
  EXPECT_TRUE(world.engine->close(in_seconds(60)));
  if (world.machine.sim) {
    EXPECT_TRUE(world.machine.sim->violations().empty());
  }
}

TEST(Threads, eight_callers_on_the_simulated_device_see_right_bytes) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) storm(seed, false);
}
TEST(Threads, eight_callers_on_the_cpu_device_see_right_bytes) { storm(std::nullopt, false); }
TEST(Threads, close_under_eight_callers_ends_them_all) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) storm(seed, true);
  storm(std::nullopt, true);
}

TEST(Threads, detach_and_attach_while_others_transfer) {
  World world({.blocks = 12, .seed = 11});
  done(world.store(0, range(0, 4), range(0, 4)));
  std::atomic<bool> stop = false;
  std::atomic<int> wrong = 0;
  std::thread loading([&] {
    while (!stop) {
      const auto ticket = world.load(0, range(0, 4), range(8, 12));
      if (!world.right(0, *ticket, range(0, 4), range(8, 12))) ++wrong;
    }
  });
  for (int i = 0; i < 30; ++i) {
    Memory memory(full_group(), 8, Layout::parts_apart,
                  [&](std::size_t n) { return world.machine.allocate(n); });
    const auto pages = world.engine->attach(world.machine.device, GroupId{0}, memory.tensors()).value();
    const auto k = keys(range(0, 4));
    const auto p = page_ids(range(0, 4));
    for (int j = 0; j < 3; ++j) {
      static_cast<void>(world.engine->load(*pages, LoadRequest{k, p, world.machine.stream, 0, 0}).value());
    }
    EXPECT_TRUE(world.engine->detach(*pages, in_seconds(60)));
    for (std::byte* base : memory.bases()) world.machine.sim->free(base);
  }
  stop = true;
  loading.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(world.engine->close(in_seconds(60)));
  EXPECT_TRUE(world.machine.sim->violations().empty());
}

}  // namespace
}  // namespace kvtier
