// An engine with a device, pages and a framework, for the engine's tests.
//
// The bytes of a block follow from its key number and the logical place of each row (layer, part, token,
// head), and rows are found by strides alone: nothing here shares arithmetic with PageMap or plan().
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvtier/core/clock.h"
#include "kvtier/engine/engine.h"
#include "kvtier/platform/cpu_device.h"
#include "kvtier/platform/simulated_device.h"

namespace kvtier::support {

class Random {  // SplitMix64
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15U + 1) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  std::uint32_t below(std::uint64_t bound) { return static_cast<std::uint32_t>(next() % bound); }
  bool percent(unsigned chance) { return below(100) < chance; }

 private:
  std::uint64_t state_;
};

using Numbers = std::vector<std::uint32_t>;  // key numbers or page numbers

inline Numbers range(std::uint32_t begin, std::uint32_t end) {
  Numbers out(end - begin);
  std::iota(out.begin(), out.end(), begin);
  return out;
}

inline BlockKey key(std::uint32_t number) {
  BlockKey out{};
  std::memcpy(out.bytes.data(), &number, sizeof number);
  return out;
}

inline std::vector<BlockKey> keys(const Numbers& numbers) {
  std::vector<BlockKey> out;
  for (const std::uint32_t n : numbers) out.push_back(key(n));
  return out;
}

inline std::vector<PageId> page_ids(const Numbers& numbers) {
  std::vector<PageId> out;
  for (const std::uint32_t n : numbers) out.push_back(PageId{n});
  return out;
}

inline Deadline in_seconds(int seconds) {
  return std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
}

// --- groups: different strides (two size classes), page sizes and orders ---

inline GroupSpec full_group() {
  GroupSpec spec;
  spec.name = "full";
  spec.num_layers = 2;
  spec.num_heads = 2;
  spec.head_dim = 80;
  spec.item_bytes = 2;
  spec.page_tokens = spec.block_tokens = 4;
  return spec;
}

inline GroupSpec window_group(std::uint32_t window_tokens = 9) {  // pages smaller than blocks
  GroupSpec spec;
  spec.name = "window";
  spec.num_layers = 1;
  spec.num_heads = 2;
  spec.head_dim = 16;
  spec.item_bytes = 2;
  spec.page_tokens = 2;
  spec.block_tokens = 4;
  spec.page_order = "KHTD";
  spec.window_tokens = window_tokens;
  return spec;
}

inline GroupSpec latent_group() {  // MLA; pages larger than blocks
  GroupSpec spec;
  spec.name = "latent";
  spec.num_layers = 3;
  spec.num_parts = 1;
  spec.num_heads = 1;
  spec.head_dim = 24;
  spec.item_bytes = 1;
  spec.page_tokens = 8;
  spec.block_tokens = 4;
  spec.page_order = "TD";
  return spec;
}

// --- the framework's memory ---

enum class Layout { one_tensor, tensor_per_layer, parts_apart };

class Memory {
 public:
  using Allocate = std::function<std::byte*(std::size_t)>;

  Memory(GroupSpec group, std::uint32_t num_pages, Layout layout, const Allocate& allocate)
      : spec_(std::move(group)), num_pages_(num_pages) {
    if (layout == Layout::parts_apart && (spec_.num_parts == 1 || spec_.page_order[0] != 'K')) {
      layout = Layout::tensor_per_layer;
    }
    const bool apart = layout == Layout::parts_apart;
    std::string letters = (layout == Layout::one_tensor ? "PL" : "P") + spec_.page_order;
    if (apart) std::erase(letters, 'K');
    const std::size_t tensors =
        layout == Layout::one_tensor ? 1 : spec_.num_layers * (apart ? std::size_t{2} : std::size_t{1});
    std::uint64_t stride = spec_.item_bytes;
    for (auto letter = letters.rbegin(); letter != letters.rend(); ++letter) {
      const std::uint64_t extent = *letter == 'P'   ? num_pages
                                   : *letter == 'L' ? spec_.num_layers
                                                    : spec_.extent(*letter);
      if (*letter == 'P') stride += 64;  // pages may be padded
      axes_.insert(axes_.begin(), {*letter, extent, static_cast<std::int64_t>(stride)});
      stride *= extent;
    }
    for (std::size_t t = 0; t < tensors; ++t) bases_.push_back(allocate(stride));
    bytes_ = stride;
    one_tensor_ = layout == Layout::one_tensor;
    apart_ = apart;
  }

  const GroupSpec& spec() const { return spec_; }
  std::uint32_t num_pages() const { return num_pages_; }
  const std::vector<std::byte*>& bases() const { return bases_; }
  std::vector<TensorView> tensors() const {
    std::vector<TensorView> out;
    for (std::byte* base : bases_) out.push_back({base, axes_});
    return out;
  }

  // The pages of the i-th block of a request.
  void write(std::uint32_t number, const Numbers& pages, std::size_t i, std::uint32_t depth) const {
    each_row(pages, i, depth, [&](std::byte* row, std::uint64_t place) { fill(row, number, place); });
  }
  bool holds(std::uint32_t number, const Numbers& pages, std::size_t i, std::uint32_t depth) const {
    bool right = true;
    std::vector<std::byte> wanted(row_bytes());
    each_row(pages, i, depth, [&](std::byte* row, std::uint64_t place) {
      fill(wanted.data(), number, place);
      right = right && std::memcmp(row, wanted.data(), wanted.size()) == 0;
    });
    return right;
  }
  // Restricted to one layer.
  bool layer_holds(std::uint32_t layer, std::uint32_t number, const Numbers& pages, std::size_t i,
                   std::uint32_t depth) const {
    bool right = true;
    std::vector<std::byte> wanted(row_bytes());
    each_row(pages, i, depth, [&](std::byte* row, std::uint64_t place) {
      if (place >> 32 != layer) return;
      fill(wanted.data(), number, place);
      right = right && std::memcmp(row, wanted.data(), wanted.size()) == 0;
    });
    return right;
  }
  void scribble() const {
    for (std::byte* base : bases_) std::memset(base, 0x5a, bytes_);
  }

 private:
  std::size_t row_bytes() const { return std::size_t{spec_.head_dim} * spec_.item_bytes; }
  std::uint64_t stride(char letter) const {
    for (const TensorAxis& axis : axes_) {
      if (axis.letter == letter) return static_cast<std::uint64_t>(axis.stride_bytes);
    }
    return 0;
  }
  void fill(std::byte* row, std::uint32_t number, std::uint64_t place) const {
    Random random((std::uint64_t{number} << 40) ^ place ^ (static_cast<std::uint64_t>(spec_.name[0]) << 32));
    for (std::size_t at = 0; at < row_bytes(); at += 8) {
      const std::uint64_t word = random.next();
      std::memcpy(row + at, &word, std::min<std::size_t>(8, row_bytes() - at));
    }
  }
  template <typename F>
  void each_row(const Numbers& pages, std::size_t i, std::uint32_t depth, F&& f) const {
    const std::uint32_t per_block =
        spec_.block_tokens > spec_.page_tokens ? spec_.block_tokens / spec_.page_tokens : 1;
    const std::uint32_t per_page =
        spec_.page_tokens > spec_.block_tokens ? spec_.page_tokens / spec_.block_tokens : 1;
    for (std::uint32_t layer = 0; layer < spec_.num_layers; ++layer) {
      for (std::uint32_t part = 0; part < spec_.num_parts; ++part) {
        const std::size_t tensor = one_tensor_ ? 0 : apart_ ? layer * 2 + part : layer;
        for (std::uint32_t token = 0; token < spec_.block_tokens; ++token) {
          const std::uint32_t page = pages[i * per_block + token / spec_.page_tokens];
          const std::uint32_t token_in_page =
              token % spec_.page_tokens +
              static_cast<std::uint32_t>((depth + i) % per_page) * spec_.block_tokens;
          for (std::uint32_t head = 0; head < spec_.num_heads; ++head) {
            f(bases_[tensor] + page * stride('P') + (one_tensor_ ? layer * stride('L') : 0) +
                  part * stride('K') + token_in_page * stride('T') + head * stride('H'),
              std::uint64_t{layer} << 32 | part << 24 | token << 12 | head);
          }
        }
      }
    }
  }

  GroupSpec spec_;
  std::uint32_t num_pages_;
  std::vector<TensorAxis> axes_;
  std::vector<std::byte*> bases_;
  std::uint64_t bytes_ = 0;
  bool one_tensor_ = true;
  bool apart_ = false;
};

// --- a device as a framework uses it ---

// Simulated, or `cpu` when there is no seed.
struct Machine {
  explicit Machine(std::optional<SimulatedOptions> options) {
    if (options) {
      sim = std::make_shared<SimulatedDevice>(*options);
      device = sim;
      stream = sim->create_framework_stream();
    } else {
      device = make_cpu_device();
    }
  }
  static SimulatedOptions seeded(std::uint64_t seed) {
    SimulatedOptions options;
    options.seed = seed;
    options.max_delay_us = 300;
    options.patience_us = 20;
    return options;
  }

  std::byte* allocate(std::size_t bytes) {
    if (sim) return sim->allocate(bytes);
    heap.push_back(std::make_unique<std::byte[]>(bytes));
    return heap.back().get();
  }
  // The framework's kernels: in its stream, or at once.
  void kernel(std::function<void()> f) {
    if (sim) {
      sim->launch(stream, std::move(f));
    } else {
      f();
    }
  }
  void run(std::function<void()> f) {
    kernel(std::move(f));
    if (sim) static_cast<void>(sim->host_synchronize(stream));
  }

  std::shared_ptr<SimulatedDevice> sim;
  std::shared_ptr<Device> device;
  StreamHandle stream{0};
  std::vector<std::unique_ptr<std::byte[]>> heap;
};

struct WorldOptions {
  std::vector<GroupSpec> groups{full_group()};
  std::uint32_t blocks = 8;  // of each group
  std::optional<std::uint64_t> seed = std::nullopt;
  std::uint32_t pages = 32;
  Layout layout = Layout::one_tensor;
  std::uint32_t chunk_slots = 0;  // 0: the default chunk
  DiskOptions disk = {};
};

class World {
 public:
  explicit World(WorldOptions options = {})
      : machine(options.seed ? std::optional(Machine::seeded(*options.seed)) : std::nullopt) {
    EngineConfig config;
    config.groups = options.groups;
    for (const GroupSpec& spec : options.groups)
      config.host_bytes += options.blocks * spec.slot_stride_bytes();
    config.eviction = "lru";  // which tests predict
    config.clock = clock;
    config.hash_seed = options.seed.value_or(7);
    config.disk = options.disk;
    if (options.chunk_slots > 0)
      config.chunk_bytes = options.chunk_slots * options.groups[0].slot_stride_bytes();
    engine = Engine::open(std::move(config)).value();
    for (std::size_t g = 0; g < options.groups.size(); ++g) {
      memory.emplace_back(options.groups[g], options.pages, options.layout,
                          [this](std::size_t bytes) { return machine.allocate(bytes); });
      pages.push_back(engine->attach(machine.device, group(g), memory[g].tensors()).value());
    }
    EXPECT_TRUE(engine->wait_until_whole());
  }
  // Kernels that no store or load waited for write into `memory`.
  ~World() {
    if (machine.sim) machine.sim->run_until_idle();
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  static GroupId group(std::size_t g) { return GroupId{static_cast<std::uint16_t>(g)}; }

  void write(std::size_t g, const Numbers& numbers, const Numbers& at, std::uint32_t first_block = 0) {
    machine.kernel([=, this] {
      for (std::size_t i = 0; i < numbers.size(); ++i) memory[g].write(numbers[i], at, i, first_block);
    });
  }
  void scribble(std::size_t g) {
    machine.run([this, g] { memory[g].scribble(); });
  }
  Result<std::shared_ptr<Ticket>> try_store(std::size_t g, const Numbers& numbers, const Numbers& at,
                                            std::uint32_t first_block = 0,
                                            std::optional<std::uint32_t> parent = {},
                                            std::string_view name_space = {}) {
    const std::vector<BlockKey> k = keys(numbers);
    const std::vector<PageId> p = page_ids(at);
    StoreRequest request{k, p, machine.stream, first_block, std::nullopt, name_space};
    if (parent) request.parent = key(*parent);
    return engine->store(*pages[g], request);
  }
  // Writes the blocks with a kernel and stores them.
  std::shared_ptr<Ticket> store(std::size_t g, const Numbers& numbers, const Numbers& at,
                                std::uint32_t first_block = 0, std::optional<std::uint32_t> parent = {},
                                std::string_view name_space = {}) {
    write(g, numbers, at, first_block);
    return try_store(g, numbers, at, first_block, parent, name_space).value();
  }
  Result<std::shared_ptr<Ticket>> try_load(std::size_t g, const Numbers& numbers, const Numbers& at,
                                           std::uint32_t first_block = 0,
                                           std::uint32_t layers_per_batch = 0) {
    const std::vector<BlockKey> k = keys(numbers);
    const std::vector<PageId> p = page_ids(at);
    return engine->load(*pages[g], LoadRequest{k, p, machine.stream, first_block, layers_per_batch});
  }
  std::shared_ptr<Ticket> load(std::size_t g, const Numbers& numbers, const Numbers& at,
                               std::uint32_t first_block = 0) {
    return try_load(g, numbers, at, first_block).value();
  }
  // Whether every block that the load calls loaded has its bytes in the pages. Waits for it.
  bool right(std::size_t g, const Ticket& ticket, const Numbers& numbers, const Numbers& at,
             std::uint32_t first_block = 0) {
    EXPECT_TRUE(ticket.wait(Moment::ready, in_seconds(30)));
    const std::vector<BlockOutcome> outcomes = ticket.outcomes();
    bool right = true;
    machine.run([&] {
      for (std::size_t i = 0; i < numbers.size(); ++i) {
        if (outcomes[i] == BlockOutcome::loaded)
          right = right && memory[g].holds(numbers[i], at, i, first_block);
      }
    });
    return right;
  }
  Match lookup(const Numbers& numbers) { return engine->lookup(keys(numbers)).value(); }
  std::vector<BlockState> states(const Numbers& numbers, std::size_t g = 0) {
    return lookup(numbers).states[g];
  }
  bool ready(std::uint32_t number, std::size_t g = 0) { return states({number}, g)[0] == BlockState::ready; }
  std::shared_ptr<Lease> pin(const Numbers& numbers, std::optional<std::int64_t> ttl_us = std::nullopt) {
    return engine->pin(keys(numbers), numbers.size(), ttl_us, nullptr).value();
  }
  void quiesce() {
    while (engine->poll().value() > 0) std::this_thread::yield();
  }
  EngineStats stats() { return engine->stats().value(); }

  Machine machine;
  std::shared_ptr<ManualClock> clock = std::make_shared<ManualClock>();
  std::vector<Memory> memory;
  std::shared_ptr<Engine> engine;
  std::vector<std::shared_ptr<Pages>> pages;
};

inline std::shared_ptr<Ticket> done(const std::shared_ptr<Ticket>& ticket) {
  EXPECT_TRUE(ticket->wait(Moment::ready, in_seconds(30)));
  return ticket;
}

inline std::vector<BlockOutcome> all(std::size_t n, BlockOutcome outcome) {
  return std::vector<BlockOutcome>(n, outcome);
}

// Slots conserved in each class (I1), and lookups explained.
inline void expect_consistent(const EngineStats& stats) {
  for (const SlotClassStats& c : stats.host) {
    EXPECT_EQ(c.free + c.filling + c.ready + c.leaving, c.capacity);
    EXPECT_LE(c.usable, c.capacity);
  }
  for (const DiskStats& disk : stats.disks) {
    for (const SlotClassStats& c : disk.classes) {
      EXPECT_EQ(c.free + c.filling + c.ready + c.leaving, c.capacity);
      EXPECT_LE(c.usable, c.capacity);
    }
  }
  EXPECT_EQ(stats.lookup_blocks, stats.lookup_hits_host + stats.lookup_hits_disk +
                                     stats.lookup_misses_absent + stats.lookup_misses_pending +
                                     stats.lookup_misses_failed);
  EXPECT_LE(stats.pinned_blocks, stats.pins);
}

// Nothing runs and nobody holds anything: no pin, no slot in between.
inline void expect_at_rest(const EngineStats& stats) {
  expect_consistent(stats);
  EXPECT_EQ(stats.pins, 0U);
  EXPECT_EQ(stats.pinned_blocks, 0U);
  EXPECT_EQ(stats.leases, 0U);
  EXPECT_EQ(stats.transfers_running, 0U);
  std::uint64_t leaving = 0;
  for (const SlotClassStats& c : stats.host) {
    EXPECT_EQ(c.filling, 0U);
    leaving += c.leaving;
  }
  EXPECT_EQ(leaving, stats.quarantined_blocks);
}

}  // namespace kvtier::support
