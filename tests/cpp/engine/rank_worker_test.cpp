// A keeper's engine and its ranks' workers, here in one process: the arena is mapped once by each.
#include "kvtier/engine/rank_worker.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kvtier/core/ordering.h"
#include "kvtier/platform/cpu_device.h"
#include "kvtier/platform/faulty_device.h"
#include "kvtier/platform/simulated_device.h"

namespace kvtier {
namespace {

constexpr std::uint32_t kPages = 16;

GroupSpec group(std::uint32_t stripes, std::uint32_t page_tokens = 4) {
  GroupSpec spec;
  spec.name = stripes > 1 ? "full" : "latent";
  spec.num_layers = 2;
  spec.num_parts = stripes > 1 ? 2 : 1;
  spec.num_heads = stripes > 1 ? 2 : 1;
  spec.head_dim = 8;
  spec.item_bytes = 2;
  spec.page_tokens = page_tokens;
  spec.block_tokens = 4;
  spec.page_order = stripes > 1 ? "KTHD" : "TD";
  spec.num_stripes = stripes;
  return spec;
}

BlockKey key(unsigned n) {
  BlockKey key{};
  std::memcpy(key.bytes.data(), &n, sizeof n);
  return key;
}

Deadline soon() { return std::chrono::steady_clock::now() + std::chrono::seconds(30); }

// The pages of one rank: one tensor of all layers, [page, layer, part, token, head, dim], densely.
struct RankMemory {
  explicit RankMemory(const GroupSpec& s, unsigned seed) : spec(s), bytes(kPages * page_bytes()) {
    for (std::size_t i = 0; i < bytes.size(); ++i)
      bytes[i] = static_cast<std::byte>(i * 31 + i / 251 + seed * 17);
  }
  std::size_t page_bytes() const { return spec.layer_token_bytes() * spec.page_tokens * spec.num_layers; }
  std::vector<std::byte> page(std::uint32_t page) const {
    const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(page * page_bytes());
    return {begin, begin + static_cast<std::ptrdiff_t>(page_bytes())};
  }
  TensorView view() {
    TensorView tensor;
    tensor.base = bytes.data();
    std::int64_t stride = spec.item_bytes;
    const std::string letters = "PL" + spec.page_order;
    for (auto letter = letters.rbegin(); letter != letters.rend(); ++letter) {
      const std::uint64_t extent = *letter == 'P'   ? kPages
                                   : *letter == 'L' ? spec.num_layers
                                                    : spec.extent(*letter);
      tensor.axes.push_back({*letter, extent, stride});
      stride *= static_cast<std::int64_t>(extent);
    }
    return tensor;
  }

  GroupSpec spec;
  std::vector<std::byte> bytes;
};

struct Rank {
  Rank(const GroupSpec& spec, std::uint32_t rank, std::shared_ptr<Device> device)
      : memory(spec, rank + 1), worker(RankWorker::create({spec}, rank).value()) {
    pages = worker->attach(std::move(device), GroupId{0}, std::vector{memory.view()}).value();
  }
  Status join(const Engine& keeper) {
    return worker->join(keeper.arena().geometry(), keeper.config().class_of_group(), keeper.arena().fd());
  }
  Result<std::shared_ptr<Ticket>> run(Direction direction, const Grant& grant, std::vector<PageId> ids,
                                      std::uint32_t first_block = 0) {
    const BlockOutcome rest = direction == Direction::store ? BlockOutcome::declined : BlockOutcome::missed;
    std::vector<BlockOutcome> outcomes(grant.ticket->outcomes().size(), rest);
    for (const std::uint32_t block : grant.blocks) outcomes[block] = BlockOutcome::running;
    RankOrder order;
    order.id = grant.id;
    order.direction = direction;
    order.outcomes = outcomes;
    order.slots = grant.slots;
    order.pages = ids;
    order.first_block = first_block;
    return worker->run(*pages, order);
  }
  // The outcome of the one order that is under way.
  EndedOrder ended() const {
    pollfd ready{worker->ended_fd(), POLLIN, 0};
    EXPECT_EQ(::poll(&ready, 1, 30000), 1);
    std::vector<EndedOrder> all = worker->take_ended();
    EXPECT_EQ(all.size(), 1U);
    return all.empty() ? EndedOrder{0, {}} : all[0];
  }

  RankMemory memory;
  std::shared_ptr<RankWorker> worker;
  std::shared_ptr<Pages> pages;
};

std::shared_ptr<Engine> open_keeper(const GroupSpec& spec, std::uint64_t blocks = 8) {
  EngineConfig config;
  config.groups = {spec};
  config.host_bytes = blocks * spec.slot_stride_bytes();
  return Engine::open(std::move(config)).value();
}

Grant grant(Engine& keeper, Direction direction, const std::vector<BlockKey>& keys, std::uint32_t parts,
            std::uint32_t first_block = 0) {
  if (direction == Direction::store) {
    StoreRequest request;
    request.keys = keys;
    request.first_block = first_block;
    return keeper.grant_store(GroupId{0}, request, parts).value();
  }
  LoadRequest request;
  request.keys = keys;
  request.first_block = first_block;
  return keeper.grant_load(GroupId{0}, request, parts).value();
}

std::size_t ready(Engine& keeper, const std::vector<BlockKey>& keys) {
  return keeper.lookup(keys)->ready_blocks;
}

std::vector<PageId> ids(std::vector<std::uint32_t> numbers) {
  std::vector<PageId> out;
  for (const std::uint32_t n : numbers) out.push_back(PageId{n});
  return out;
}

// Stores pages 0 and 1 of both ranks and loads them into pages 5 and 4.
void round_trip(const std::shared_ptr<Engine>& keeper, Rank& a, Rank& b) {
  const std::vector<BlockKey> keys{key(1), key(2)};
  const Grant store = grant(*keeper, Direction::store, keys, 2);
  ASSERT_EQ(store.slots.size(), 2U);
  for (Rank* rank : {&a, &b}) {
    ASSERT_TRUE(rank->run(Direction::store, store, ids({0, 1})).is_ok());
    const EndedOrder ended = rank->ended();
    EXPECT_EQ(ended.id, store.id);
    EXPECT_TRUE(ended.outcome.status.is_ok());
    EXPECT_EQ(ready(*keeper, keys), 0U) << "visible before every rank has stored its part";
    ASSERT_TRUE(keeper->finish_part(ended.id, ended.outcome).is_ok());
  }
  EXPECT_EQ(ready(*keeper, keys), 2U);

  const Grant load = grant(*keeper, Direction::load, keys, 2);
  for (Rank* rank : {&a, &b}) {
    const auto first = rank->memory.page(0);
    const auto second = rank->memory.page(1);
    const auto ticket = rank->run(Direction::load, load, ids({5, 4}));
    ASSERT_TRUE(ticket.is_ok());
    EXPECT_TRUE(ticket.value()->wait(Moment::ready, soon()).is_ok());
    EXPECT_EQ(ticket.value()->valid_blocks(), 2U);
    const EndedOrder ended = rank->ended();
    ASSERT_TRUE(keeper->finish_part(ended.id, ended.outcome).is_ok());
    EXPECT_EQ(rank->memory.page(5), first);
    EXPECT_EQ(rank->memory.page(4), second);
  }
  EXPECT_EQ(keeper->stats()->pins, 0U);
}

TEST(RankWorker, each_rank_gets_back_its_own_bytes) {
  const GroupSpec spec = group(2);
  const auto keeper = open_keeper(spec);
  const std::shared_ptr<Device> device = make_cpu_device();
  Rank a(spec, 0, device);
  Rank b(spec, 1, device);
  ASSERT_TRUE(a.join(*keeper).is_ok());
  ASSERT_TRUE(b.join(*keeper).is_ok());
  round_trip(keeper, a, b);
}

TEST(RankWorker, pages_stay_attached_from_one_arena_to_the_next) {
  const GroupSpec spec = group(2);
  const std::shared_ptr<Device> device = make_cpu_device();
  Rank a(spec, 0, device);
  Rank b(spec, 1, device);
  for (int life = 0; life < 3; ++life) {
    const auto keeper = open_keeper(spec);
    ASSERT_TRUE(a.join(*keeper).is_ok());
    ASSERT_TRUE(b.join(*keeper).is_ok());
    EXPECT_EQ(a.join(*keeper).code(), StatusCode::invalid_argument);
    round_trip(keeper, a, b);
    ASSERT_TRUE(a.worker->leave(soon()).is_ok());
    ASSERT_TRUE(b.worker->leave(soon()).is_ok());
  }
}

TEST(RankWorker, the_arena_outlives_its_keeper_as_long_as_a_rank_maps_it) {
  const GroupSpec spec = group(2);
  auto keeper = open_keeper(spec);
  Rank a(spec, 0, make_cpu_device());
  ASSERT_TRUE(a.join(*keeper).is_ok());
  const Grant store = grant(*keeper, Direction::store, {key(1)}, 1);
  ASSERT_TRUE(keeper->finish_part(store.id, {}).is_ok());
  ASSERT_TRUE(keeper->close(soon()).is_ok());
  keeper.reset();
  const auto ticket = a.run(Direction::store, store, ids({0}));
  ASSERT_TRUE(ticket.is_ok());
  EXPECT_TRUE(ticket.value()->wait(Moment::released, soon()).is_ok());
  EXPECT_TRUE(a.ended().outcome.status.is_ok());
}

TEST(RankWorker, replicated_group_is_stored_by_rank_0_and_loaded_by_all) {
  const GroupSpec spec = group(1);
  const auto keeper = open_keeper(spec);
  const std::shared_ptr<Device> device = make_cpu_device();
  Rank a(spec, 0, device);
  Rank b(spec, 3, device);
  ASSERT_TRUE(a.join(*keeper).is_ok());
  ASSERT_TRUE(b.join(*keeper).is_ok());
  const Grant store = grant(*keeper, Direction::store, {key(7)}, 1);
  EXPECT_EQ(b.run(Direction::store, store, ids({0})).status().code(), StatusCode::invalid_argument);
  ASSERT_TRUE(a.run(Direction::store, store, ids({3})).is_ok());
  ASSERT_TRUE(keeper->finish_part(store.id, a.ended().outcome).is_ok());
  const Grant load = grant(*keeper, Direction::load, {key(7)}, 2);
  for (Rank* rank : {&a, &b}) {
    ASSERT_TRUE(rank->run(Direction::load, load, ids({9})).is_ok());
    ASSERT_TRUE(keeper->finish_part(load.id, rank->ended().outcome).is_ok());
    EXPECT_EQ(rank->memory.page(9), a.memory.page(3));
  }
}

TEST(RankWorker, blocks_smaller_than_a_page_find_their_place_in_it) {
  const GroupSpec spec = group(2, 8);  // two blocks to a page
  const auto keeper = open_keeper(spec);
  Rank a(spec, 1, make_cpu_device());
  ASSERT_TRUE(a.join(*keeper).is_ok());
  const std::vector<BlockKey> keys{key(1), key(2), key(3)};
  const Grant store = grant(*keeper, Direction::store, keys, 1, 1);
  ASSERT_TRUE(a.run(Direction::store, store, ids({0, 1, 1}), 1).is_ok());
  ASSERT_TRUE(keeper->finish_part(store.id, a.ended().outcome).is_ok());
  const Grant load = grant(*keeper, Direction::load, {key(2), key(3)}, 1, 2);
  ASSERT_TRUE(a.run(Direction::load, load, ids({6, 6}), 2).is_ok());
  ASSERT_TRUE(keeper->finish_part(load.id, a.ended().outcome).is_ok());
  EXPECT_EQ(a.memory.page(6), a.memory.page(1));
}

TEST(RankWorker, only_granted_blocks_are_copied) {
  const GroupSpec spec = group(2);
  const auto keeper = open_keeper(spec);
  Rank a(spec, 0, make_cpu_device());
  ASSERT_TRUE(a.join(*keeper).is_ok());
  const Grant store = grant(*keeper, Direction::store, {key(2)}, 1);
  ASSERT_TRUE(a.run(Direction::store, store, ids({2})).is_ok());
  ASSERT_TRUE(keeper->finish_part(store.id, a.ended().outcome).is_ok());
  const Grant load = grant(*keeper, Direction::load, {key(1), key(2)}, 1);
  const auto untouched = a.memory.page(10);
  const auto ticket = a.run(Direction::load, load, ids({10, 11}));
  ASSERT_TRUE(ticket.is_ok());
  ASSERT_TRUE(keeper->finish_part(load.id, a.ended().outcome).is_ok());
  EXPECT_EQ(ticket.value()->outcomes(), (std::vector{BlockOutcome::missed, BlockOutcome::loaded}));
  EXPECT_EQ(a.memory.page(10), untouched);
  EXPECT_EQ(a.memory.page(11), a.memory.page(2));
}

TEST(RankWorker, bad_orders_are_refused_and_leave_nothing_behind) {
  const GroupSpec spec = group(2);
  const auto keeper = open_keeper(spec);
  Rank a(spec, 0, make_cpu_device());
  const Grant store = grant(*keeper, Direction::store, {key(1)}, 1);
  EXPECT_EQ(a.run(Direction::store, store, ids({0})).status().code(), StatusCode::closed) << "not joined yet";
  ASSERT_TRUE(a.join(*keeper).is_ok());
  EXPECT_EQ(a.run(Direction::store, store, ids({0, 1})).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(a.run(Direction::store, store, ids({kPages})).status().code(), StatusCode::invalid_argument);
  Grant foreign = store;
  foreign.slots = {SlotId{8}};
  EXPECT_EQ(a.run(Direction::store, foreign, ids({0})).status().code(), StatusCode::invalid_argument);
  EXPECT_TRUE(a.worker->take_ended().empty());
  EXPECT_TRUE(a.worker->detach(*a.pages, soon()).is_ok());
  EXPECT_EQ(a.run(Direction::store, store, ids({0})).status().code(), StatusCode::invalid_argument);
  EXPECT_TRUE(a.worker->close(soon()).is_ok());
  EXPECT_TRUE(a.worker->close(soon()).is_ok());
  EXPECT_EQ(a.join(*keeper).code(), StatusCode::closed);
  ASSERT_TRUE(keeper->finish_part(store.id, {Status::closed("refused"), true}).is_ok());
}

TEST(RankWorker, an_arena_of_another_layout_is_refused) {
  GroupSpec larger = group(2);
  larger.head_dim = 512;
  const auto keeper = open_keeper(larger);
  Rank a(group(2), 0, make_cpu_device());
  const Status status = a.join(*keeper);
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_NE(status.message().find("'full'"), std::string::npos) << status.message();
  EXPECT_EQ(RankWorker::create({group(2)}, 2).status().code(), StatusCode::invalid_argument);
}

// A rank whose one store is under way: the simulated device runs nothing before it is released.
struct HeldStore {
  HeldStore() {
    const GroupSpec spec = group(2);
    keeper = open_keeper(spec);
    const auto size = static_cast<std::size_t>(kPages) * 1024;
    memory = device->allocate(size);
    worker = RankWorker::create({spec}, 0).value();
    RankMemory shape(spec, 0);
    EXPECT_EQ(shape.bytes.size(), size / 2);
    TensorView view = shape.view();
    view.base = memory;
    pages = worker->attach(device, GroupId{0}, std::vector{view}).value();
    EXPECT_TRUE(
        worker->join(keeper->arena().geometry(), keeper->config().class_of_group(), keeper->arena().fd())
            .is_ok());
    store = grant(*keeper, Direction::store, {key(1)}, 1);
    EXPECT_TRUE(worker->wait_until_whole().is_ok());
    device->hold();
    RankOrder order;
    const std::vector<BlockOutcome> running{BlockOutcome::running};
    const std::vector<PageId> page{PageId{0}};
    order.outcomes = running;
    order.slots = store.slots;
    order.pages = page;
    EXPECT_TRUE(worker->run(*pages, order).is_ok());
  }

  std::shared_ptr<Engine> keeper;
  std::shared_ptr<SimulatedDevice> device = std::make_shared<SimulatedDevice>();
  std::byte* memory = nullptr;
  std::shared_ptr<RankWorker> worker;
  std::shared_ptr<Pages> pages;
  Grant store;
};

TEST(RankWorker, leave_and_detach_wait_for_copies) {
  HeldStore held;
  const Deadline now = std::chrono::steady_clock::now();
  EXPECT_EQ(held.worker->leave(now).code(), StatusCode::timeout);
  EXPECT_EQ(held.worker->detach(*held.pages, now).code(), StatusCode::timeout);
  held.device->release();
  EXPECT_TRUE(held.worker->leave(soon()).is_ok());
  EXPECT_TRUE(held.worker->detach(*held.pages, soon()).is_ok());
  held.device->free(held.memory);
  EXPECT_EQ(held.worker->take_ended().size(), 1U);
  EXPECT_TRUE(held.worker->close(soon()).is_ok());
  EXPECT_TRUE(held.device->violations().empty());
  ASSERT_TRUE(held.keeper->finish_part(held.store.id, {}).is_ok());
}

TEST(RankWorker, a_detach_that_does_not_wait_is_noticed) {
  HeldStore held;
  {
    const DisableOrdering disabled(OrderingPoint::detach_after_copies);
    EXPECT_TRUE(held.worker->detach(*held.pages, std::chrono::steady_clock::now()).is_ok());
  }
  held.device->free(held.memory);
  held.device->release();
  EXPECT_TRUE(held.worker->leave(soon()).is_ok());
  EXPECT_FALSE(held.device->violations().empty()) << "a copy out of memory that was freed";
  EXPECT_TRUE(held.worker->close(soon()).is_ok());
  ASSERT_TRUE(held.keeper->finish_part(held.store.id, {}).is_ok());
}

TEST(RankWorker, copies_that_nobody_can_prove_to_be_over_keep_the_arena) {
  const GroupSpec spec = group(2);
  const auto keeper = open_keeper(spec);
  struct Faulty {
    std::unique_ptr<Device> inner = make_cpu_device();
    FaultPlan plan;
    FaultyDevice device{*inner, plan};
  };
  auto faulty = std::make_shared<Faulty>();
  Rank a(spec, 0, {faulty, &faulty->device});
  ASSERT_TRUE(a.join(*keeper).is_ok());
  faulty->plan.fail(FaultCall::synchronize, 1, Status::device("lost", 700), FaultSpan::from_then_on);
  const Grant store = grant(*keeper, Direction::store, {key(1)}, 1);
  const auto ticket = a.run(Direction::store, store, ids({0}));
  ASSERT_TRUE(ticket.is_ok());
  const EndedOrder ended = a.ended();
  EXPECT_FALSE(ended.outcome.drained);
  EXPECT_EQ(ended.outcome.status.native_code(), 700);
  EXPECT_EQ(ticket.value()->wait(Moment::released, soon()).code(), StatusCode::device) << "not to be reused";
  EXPECT_EQ(a.worker->detach(*a.pages, soon()).code(), StatusCode::device);
  EXPECT_EQ(a.worker->close(soon()).code(), StatusCode::device) << "no hang, and the arena stays";
  EXPECT_EQ(a.worker->close(soon()).code(), StatusCode::device)
      << "whoever asks again may not free them either";
  ASSERT_TRUE(keeper->finish_part(ended.id, ended.outcome).is_ok());
  EXPECT_EQ(keeper->stats()->host[0].leaving, 1U) << "quarantined";
}

TEST(RankWorker, a_forked_child_is_told_and_ends) {
  const GroupSpec spec = group(2);
  const auto keeper = open_keeper(spec);
  auto a = std::make_unique<Rank>(spec, 0, make_cpu_device());
  ASSERT_TRUE(a->join(*keeper).is_ok());
  const Grant store = grant(*keeper, Direction::store, {key(1)}, 1);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(30);
    if (a->run(Direction::store, store, ids({0})).status().code() != StatusCode::closed) ::_exit(1);
    if (a->worker->leave(std::nullopt).code() != StatusCode::closed) ::_exit(2);
    if (!a->worker->take_ended().empty()) ::_exit(3);
    a.reset();
    ::_exit(0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  ASSERT_TRUE(keeper->finish_part(store.id, {Status::closed("never run"), true}).is_ok());
}

}  // namespace
}  // namespace kvtier
