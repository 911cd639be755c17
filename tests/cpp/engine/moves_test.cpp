// Bytes on the move, against every layout and under a seeded adversary.
#include "support/engine_world.h"

namespace kvtier {
namespace {

using namespace support;

// A random walk of one caller. Pages in use by a transfer are not touched until its ticket says so; what a
// load calls loaded must be right, and the books must balance after every step.
class Walk {
 public:
  Walk(std::uint64_t seed, bool simulated)
      : random_(seed),
        world_({.groups = {full_group(), window_group(), latent_group()},
                .blocks = 5,
                .seed = simulated ? std::optional(seed) : std::nullopt,
                .pages = 48,
                .layout = static_cast<Layout>(seed % 3)}) {}

  void run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFailure(); ++i) {
      step();
      check();
    }
    for (std::size_t g = 0; g < 3; ++g) settle(g);
    leases_.clear();
    world_.quiesce();
    expect_at_rest(world_.stats());
    const EngineStats stats = world_.stats();
    EXPECT_EQ(stats.store_stored + stats.store_present + stats.store_pending + stats.store_declined +
                  stats.store_failed + stats.store_dropped,
              stored_);
    EXPECT_EQ(stats.load_loaded + stats.load_missed + stats.load_pending + stats.load_failed, loaded_);
    EXPECT_EQ(stats.store_failed + stats.load_failed, 0U);
    if (world_.machine.sim) {
      EXPECT_TRUE(world_.machine.sim->violations().empty());
    }
    EXPECT_TRUE(world_.engine->close(in_seconds(30)));
    expect_at_rest(world_.stats());
    hits_ = stats.load_loaded;
  }
  std::uint64_t hits() const { return hits_; }

 private:
  struct Running {
    std::shared_ptr<Ticket> ticket;
    Numbers numbers;
    Numbers at;
    std::uint32_t depth;
  };

  // A prompt: key n of tree t at depth d. Two prompts of a tree share a prefix.
  Numbers prompt() {
    const std::uint32_t tree = random_.below(3);
    const std::uint32_t length = 1 + random_.below(5);
    const std::uint32_t fork = random_.below(5);
    Numbers out;
    for (std::uint32_t d = 0; d < length; ++d) out.push_back(1000 * tree + 10 * d + (d > fork ? 1 : 0));
    return out;
  }
  Numbers places(std::size_t g, std::size_t blocks, std::uint32_t depth) {
    const GroupSpec& spec = world_.memory[g].spec();
    Numbers out;
    if (spec.page_tokens > spec.block_tokens) {
      for (std::size_t i = 0; i < blocks; ++i) {
        out.push_back(first_page_ + static_cast<std::uint32_t>((depth + i) / 2 - depth / 2));
      }
    } else {
      for (std::uint32_t i = 0; i < blocks * spec.pages_per_block(); ++i) out.push_back(first_page_ + i);
    }
    return out;
  }

  // All pages of a group are the caller's again.
  void settle(std::size_t g) {
    for (const Running& r : running_[g]) {
      if (r.ticket->direction() == Direction::load) {
        EXPECT_TRUE(world_.right(g, *r.ticket, r.numbers, r.at, r.depth));
      } else {
        EXPECT_TRUE(r.ticket->wait(Moment::released, in_seconds(30)));
      }
    }
    running_[g].clear();
    used_[g] = 0;
  }
  void reserve_pages(std::size_t g) {
    if (used_[g] + 12 > 48) settle(g);
    first_page_ = used_[g];
    used_[g] += 12;
  }

  void step() {
    const std::size_t g = random_.below(3);
    Numbers numbers = prompt();
    switch (random_.below(12)) {
      case 0:
      case 1:
      case 2:
      case 3: {
        reserve_pages(g);
        std::uint32_t depth = 0;
        std::optional<std::uint32_t> parent;
        if (numbers.size() > 1 && random_.percent(30)) {
          parent = numbers[0];
          numbers.erase(numbers.begin());
          depth = 1;
        }
        const Numbers at = places(g, numbers.size(), depth);
        const auto ticket = world_.store(g, numbers, at, depth, parent, depth == 0 ? "a" : "b");
        stored_ += numbers.size();
        running_[g].push_back({ticket, numbers, at, depth});
        break;
      }
      case 4:
      case 5:
      case 6:
      case 7: {
        reserve_pages(g);
        const Numbers at = places(g, numbers.size(), 0);
        const auto ticket = world_.load(g, numbers, at);
        loaded_ += numbers.size();
        if (random_.percent(80)) {
          running_[g].push_back({ticket, numbers, at, 0});
        } else if (world_.machine.sim) {
          // The framework's stream waits instead of the host.
          EXPECT_TRUE(ticket->wait_stream(world_.machine.stream));
          auto seen = std::make_shared<std::vector<bool>>();
          world_.machine.run([=, this] {
            for (std::size_t i = 0; i < numbers.size(); ++i) {
              seen->push_back(world_.memory[g].holds(numbers[i], at, i, 0));
            }
          });
          EXPECT_TRUE(ticket->wait(Moment::ready, in_seconds(30)));
          for (std::size_t i = 0; i < numbers.size(); ++i) {
            EXPECT_TRUE(ticket->outcomes()[i] != BlockOutcome::loaded || (*seen)[i]);
          }
        } else {
          running_[g].push_back({ticket, numbers, at, 0});
        }
        break;
      }
      case 8: {
        const std::uint32_t dropped = numbers[random_.below(numbers.size())];
        EXPECT_TRUE(random_.percent(90) ? world_.engine->drop(keys({dropped}))
                                        : world_.engine->drop_namespace("b"));
        leases_.clear();
        break;
      }
      case 9:
        EXPECT_TRUE(world_.engine->touch(keys(numbers)));
        looked_up_ = {numbers, world_.lookup(numbers)};
        break;
      case 10: {
        const auto ttl_us = random_.percent(50) ? std::optional<std::int64_t>(50) : std::nullopt;
        std::optional<Match> match;  // of now, or of long ago, when these blocks stood elsewhere
        if (random_.percent(30)) match = world_.lookup(numbers);
        if (!match && looked_up_ && random_.percent(50)) std::tie(numbers, match) = *looked_up_;
        auto lease =
            world_.engine->pin(keys(numbers), numbers.size(), ttl_us, match ? &*match : nullptr).value();
        numbers.resize(lease->num_blocks());
        leases_.push_back({std::move(lease), numbers});
        if (leases_.size() > 1) leases_.erase(leases_.begin());
        break;
      }
      default: world_.clock->advance_us(random_.below(40)); EXPECT_TRUE(world_.engine->poll());
    }
  }

  void check() {
    expect_consistent(world_.stats());
    for (const auto& [lease, numbers] : leases_) {
      if (!lease->active() || numbers.empty()) continue;
      EXPECT_EQ(world_.lookup(numbers).ready_blocks, numbers.size());  // I4
    }
  }

  Random random_;
  World world_;
  std::vector<Running> running_[3];
  std::optional<std::pair<Numbers, Match>> looked_up_;
  std::uint32_t used_[3] = {};
  std::uint32_t first_page_ = 0;
  std::vector<std::pair<std::shared_ptr<Lease>, Numbers>> leases_;
  std::uint64_t stored_ = 0;
  std::uint64_t loaded_ = 0;
  std::uint64_t hits_ = 0;
};

TEST(Moves, what_a_random_walk_on_the_simulated_device_loads_is_right_and_its_books_balance_I1_to_I5) {
  std::uint64_t hits = 0;
  for (std::uint64_t seed = 1; seed <= 140 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Walk walk(seed, true);
    walk.run(60);
    hits += walk.hits();
  }
  EXPECT_GT(hits, 1000U);
}

TEST(Moves, what_a_random_walk_on_the_cpu_device_loads_is_right_and_its_books_balance_I1_to_I5) {
  std::uint64_t hits = 0;
  for (std::uint64_t seed = 1; seed <= 140 && !HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Walk walk(seed, false);
    walk.run(60);
    hits += walk.hits();
  }
  EXPECT_GT(hits, 1000U);
}

TEST(Moves, a_layerwise_load_orders_each_layer) {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    World world({.groups = {latent_group()}, .seed = seed});
    done(world.store(0, {0, 1, 2}, {0, 0, 1}));
    world.scribble(0);
    const auto ticket = world.try_load(0, {0, 1, 2}, {4, 4, 5}, 0, 2).value();
    for (std::uint32_t layer = 0; layer < 3; ++layer) {
      ASSERT_TRUE(ticket->wait_layer(layer, world.machine.stream));
      bool right = false;
      world.machine.run([&] { right = world.memory[0].layer_holds(layer, 2, {4, 4, 5}, 2, 0); });
      EXPECT_TRUE(right) << "seed " << seed << ", layer " << layer;
    }
    EXPECT_EQ(ticket->wait_layer(3, world.machine.stream).code(), StatusCode::invalid_argument);
    EXPECT_TRUE(world.right(0, *ticket, {0, 1, 2}, {4, 4, 5}));
  }
}

TEST(Moves, a_layerwise_load_of_a_block_that_is_not_there_is_refused_and_leaves_no_pin) {
  World world({.groups = {latent_group()}});
  done(world.store(0, {0, 1}, {0, 0}));
  EXPECT_EQ(world.try_load(0, {0, 1, 2}, {4, 4, 5}, 0, 1).status().code(), StatusCode::unsupported);
  const auto whole = world.load(0, {0, 1}, {4, 4});
  EXPECT_EQ(whole->wait_layer(0, world.machine.stream).code(), StatusCode::unsupported);
  done(whole);
  world.quiesce();
  expect_at_rest(world.stats());
}

TEST(Moves, blocks_go_from_one_device_to_another) {
  World world({.seed = 1});
  Machine other(Machine::seeded(99));
  Memory memory(full_group(), 8, Layout::parts_apart,
                [&](std::size_t bytes) { return other.allocate(bytes); });
  const auto pages = world.engine->attach(other.device, GroupId{0}, memory.tensors()).value();
  ASSERT_TRUE(world.engine->wait_until_whole());
  done(world.store(0, {0, 1}, {0, 1}));
  const auto k = keys({0, 1});
  const auto p = page_ids({5, 6});
  const auto ticket = world.engine->load(*pages, LoadRequest{k, p, other.stream, 0, 0}).value();
  EXPECT_EQ(done(ticket)->outcomes(), all(2, BlockOutcome::loaded));
  bool right = false;
  other.run([&] { right = memory.holds(0, {5, 6}, 0, 0) && memory.holds(1, {5, 6}, 1, 0); });
  EXPECT_TRUE(right);
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
}

TEST(Moves, a_grant_is_over_when_every_part_has_finished) {
  World world;
  const auto k = keys({0, 1});
  StoreRequest request;
  request.keys = k;
  Grant grant = world.engine->grant_store(GroupId{0}, request, 2).value();
  EXPECT_EQ(grant.blocks, (std::vector<std::uint32_t>{0, 1}));
  // Its copies run in other processes: to say that a stream waits for them would be a lie.
  EXPECT_EQ(grant.ticket->wait_stream(StreamHandle{0}).code(), StatusCode::unsupported);
  EXPECT_TRUE(world.engine->finish_part(grant.id, {}));
  EXPECT_FALSE(grant.ticket->done());
  EXPECT_TRUE(world.engine->finish_part(grant.id, {}));
  EXPECT_EQ(grant.ticket->outcomes(), all(2, BlockOutcome::stored));
  EXPECT_EQ(world.engine->finish_part(grant.id, {}).code(), StatusCode::invalid_argument);
  EXPECT_EQ(world.engine->grant_store(GroupId{9}, request, 1).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(world.engine->grant_store(GroupId{0}, request, 0).status().code(), StatusCode::invalid_argument);

  LoadRequest load;
  load.keys = k;
  grant = world.engine->grant_load(GroupId{0}, load, 1).value();
  EXPECT_EQ(world.stats().pins, 2U);
  EXPECT_TRUE(world.engine->finish_part(grant.id, {Status::device("a rank failed"), true}));
  EXPECT_EQ(grant.ticket->outcomes(), all(2, BlockOutcome::failed));
  expect_at_rest(world.stats());
}

TEST(Moves, a_block_whose_time_ends_between_its_lease_and_its_grant_is_granted) {
  World world;
  const auto k = keys({0});
  const auto p = page_ids({0});
  StoreRequest store;
  store.keys = k;
  store.pages = p;
  store.ttl_us = 1000;
  done(world.engine->store(*world.pages[0], store).value());
  const auto lease = world.pin({0});
  world.clock->advance_us(1000);
  LoadRequest load;
  load.keys = k;
  const Grant grant = world.engine->grant_load(GroupId{0}, load, 1).value();
  ASSERT_EQ(grant.blocks.size(), 1U);
  EXPECT_TRUE(world.engine->finish_part(grant.id, {Status::ok(), true}));
  EXPECT_EQ(grant.ticket->outcomes(), all(1, BlockOutcome::loaded));
  EXPECT_EQ(done(world.load(0, {0}, {1}))->outcomes(), all(1, BlockOutcome::missed));
  lease->release();
  expect_at_rest(world.stats());
}

TEST(Moves, a_rank_that_cannot_prove_its_copies_over_never_makes_a_block_visible) {
  World world;
  const auto k = keys({0});
  StoreRequest request;
  request.keys = k;
  const Grant grant = world.engine->grant_store(GroupId{0}, request, 2).value();
  EXPECT_TRUE(world.engine->finish_part(grant.id, {Status::ok(), false}));
  EXPECT_TRUE(world.engine->finish_part(grant.id, {Status::ok(), true}));
  EXPECT_EQ(grant.ticket->outcomes(), all(1, BlockOutcome::failed));
  EXPECT_FALSE(grant.ticket->wait(Moment::released, std::nullopt));
  EXPECT_FALSE(world.ready(0));
  const EngineStats stats = world.stats();
  EXPECT_EQ(stats.quarantined_blocks, 1U);
  EXPECT_EQ(stats.host[0].leaving, 1U);
  EXPECT_EQ(world.engine->close(in_seconds(30)).code(), StatusCode::device);
}

}  // namespace
}  // namespace kvtier
