// A framework with paged memory, host slots beside it, and moves between them: what the tests of Transfers
// share. Pages are rows (a row is the heads of one token) with padding, so that a block is many runs.
#pragma once

#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "conformance/device_harness.h"

#include "kvtier/platform/cpu_device.h"
#include "kvtier/platform/simulated_device.h"
#include "kvtier/transfer/transfers.h"

namespace kvtier {

using conformance::ok;

// Waits for on_end, and knows how often it was called.
class Ended {
 public:
  Transfers::OnEnd callback() {
    return [state = state_](const TransferOutcome& outcome) {
      std::lock_guard<std::mutex> lock(state->mutex);
      ++state->calls;
      state->outcome = outcome;
      state->changed.notify_all();
    };
  }
  TransferOutcome wait() {
    std::unique_lock<std::mutex> lock(state_->mutex);
    const bool ended =
        state_->changed.wait_for(lock, std::chrono::seconds(60), [this] { return state_->calls > 0; });
    EXPECT_TRUE(ended) << "on_end was not called";
    return state_->outcome;
  }
  int calls() {
    std::lock_guard<std::mutex> lock(state_->mutex);
    return state_->calls;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    int calls = 0;
    TransferOutcome outcome{Status::internal("never ended"), false};
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

class World {
 public:
  static constexpr std::uint32_t kLayers = 3;
  static constexpr std::uint32_t kPages = 10;
  static constexpr std::uint32_t kBlocks = 4;
  static constexpr std::uint64_t kRowBytes = 12;
  static constexpr std::uint64_t kRowStride = 16;
  static constexpr std::uint64_t kRows = 2 * 4;  // parts x tokens
  static constexpr std::uint64_t kPageStride = kRows * kRowStride;
  static constexpr std::uint64_t kTensorBytes = kPages * kPageStride;
  static constexpr std::uint64_t kStripeBytes = kLayers * kRows * kRowBytes;

  // `launch` runs a kernel at its place in the framework's stream; `allocate` gives device memory.
  World(Device& device, StreamHandle stream, std::function<void(std::function<void()>)> launch,
        const std::function<std::byte*(std::size_t)>& allocate)
      : device_(device), stream_(stream), launch_(std::move(launch)), slots_(kBlocks * kStripeBytes) {
    GroupSpec spec;
    spec.name = "g";
    spec.num_layers = kLayers;
    spec.num_heads = 3;
    spec.head_dim = 2;
    spec.item_bytes = 2;
    spec.page_tokens = spec.block_tokens = 4;
    std::vector<TensorView> views;
    for (std::uint32_t layer = 0; layer < kLayers; ++layer) {
      tensors_.push_back(allocate(kTensorBytes));
      views.push_back({tensors_.back(),
                       {{'P', kPages, kPageStride},
                        {'K', 2, 4 * kRowStride},
                        {'T', 4, kRowStride},
                        {'H', 3, 4},
                        {'D', 2, 2}}});
    }
    map_ = std::make_shared<const PageMap>(PageMap::make(spec, views).value());
    EXPECT_TRUE(ok(device_.register_host(slots_.data(), slots_.size())));
    poison_slots();
  }

  StreamHandle stream() const { return stream_; }
  const std::vector<std::byte*>& tensors() const { return tensors_; }
  std::byte* slots() { return slots_.data(); }

  TransferRequest request(Direction direction, std::uint32_t first_page, std::uint32_t layers_per_batch = 0) {
    TransferRequest request;
    request.map = map_;
    request.direction = direction;
    request.framework_stream = stream_;
    request.layers_per_batch = layers_per_batch;
    for (std::uint32_t block = 0; block < kBlocks; ++block) {
      request.moves.push_back({slots_.data() + block * kStripeBytes, block, 0});
      request.pages.push_back(PageId{(first_page + 3 * block) % kPages});
    }
    return request;
  }

  // What a page holds after write(seed), as a slot has it.
  static std::vector<std::byte> content(unsigned seed) {
    return conformance::pattern(kBlocks * kStripeBytes, seed);
  }
  void poison_slots() { std::memset(slots_.data(), 0xdd, slots_.size()); }
  void fill_slots(unsigned seed) { std::memcpy(slots_.data(), content(seed).data(), kBlocks * kStripeBytes); }
  std::vector<std::byte> slot_bytes() const { return slots_.first(kBlocks * kStripeBytes); }

  // Kernels, at their place in the framework's stream.
  void write(std::uint32_t first_page, unsigned seed) {
    launch_([this, first_page, bytes = content(seed)]() mutable {
      each_row(first_page, 0, kLayers,
               [&](std::byte* row, std::size_t at) { std::memcpy(row, bytes.data() + at, kRowBytes); });
    });
  }
  void poison() {
    launch_([this] {
      for (std::byte* tensor : tensors_) std::memset(tensor, 0xee, kTensorBytes);
    });
  }
  // Into `out`, where it must live until the kernel has run.
  void read(std::uint32_t first_page, std::vector<std::byte>& out, std::uint32_t layer_begin = 0,
            std::uint32_t layer_end = kLayers) {
    out.resize(kBlocks * kStripeBytes);
    launch_([this, first_page, &out, layer_begin, layer_end] {
      each_row(first_page, layer_begin, layer_end,
               [&](std::byte* row, std::size_t at) { std::memcpy(out.data() + at, row, kRowBytes); });
    });
  }

 private:
  void each_row(std::uint32_t first_page, std::uint32_t layer_begin, std::uint32_t layer_end,
                const std::function<void(std::byte*, std::size_t)>& visit) {
    for (std::uint32_t block = 0; block < kBlocks; ++block) {
      for (std::uint32_t layer = layer_begin; layer < layer_end; ++layer) {
        for (std::uint32_t row = 0; row < kRows; ++row) {
          visit(tensors_[layer] + ((first_page + 3 * block) % kPages) * kPageStride + row * kRowStride,
                block * kStripeBytes + (layer * kRows + row) * kRowBytes);
        }
      }
    }
  }

  Device& device_;
  StreamHandle stream_;
  std::function<void(std::function<void()>)> launch_;
  conformance::HostBuffer slots_;
  std::vector<std::byte*> tensors_;
  std::shared_ptr<const PageMap> map_;
};

// A World on a simulated device. `through` may decorate it for Transfers.
struct SimulatedWorld {
  explicit SimulatedWorld(std::uint64_t seed, std::uint32_t max_delay_us = 300)
      : device({.seed = seed, .max_delay_us = max_delay_us, .patience_us = 20}),
        stream(device.create_framework_stream()),
        world(
            device, stream,
            [this](std::function<void()> kernel) { device.launch(stream, std::move(kernel)); },
            [this](std::size_t bytes) { return device.allocate(bytes); }) {}

  // Kernels that nobody waited for use the world.
  ~SimulatedWorld() { device.run_until_idle(); }
  SimulatedWorld(const SimulatedWorld&) = delete;
  SimulatedWorld& operator=(const SimulatedWorld&) = delete;

  SimulatedDevice device;
  StreamHandle stream;
  World world;
};

}  // namespace kvtier
