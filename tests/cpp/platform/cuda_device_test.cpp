#include "kvtier/platform/cuda_device.h"

#include <gtest/gtest.h>

#include "support/gpu.h"

#ifdef KVTIER_HAVE_CUDA
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <random>
#include <set>
#include <vector>
#endif

namespace kvtier {
namespace {

TEST(CudaDevice, where_there_is_no_gpu_every_entry_says_why) {
  const Result<CudaFacts> facts = cuda_facts();
  if (facts) GTEST_SKIP() << "there is a GPU";
  for (const Status& status :
       {facts.status(), make_cuda_device({}).status(), CudaBench::create({}).status()}) {
    EXPECT_EQ(status.code(), StatusCode::unsupported);
    EXPECT_NE(status.message().find("CUDA"), std::string::npos) << status.message();
  }
}

#ifdef KVTIER_HAVE_CUDA

constexpr CopyPath kPaths[] = {CopyPath::plain,  CopyPath::merged, CopyPath::batched,
                               CopyPath::kernel, CopyPath::staged, CopyPath::bulk};

// A device with options of its own, memory on both sides and a stream. Poisoned before each use.
class CudaDeviceOnGpu : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = std::size_t{24} << 20;

  void SetUp() override {
    if (const std::optional<std::string> why = gpu_missing()) GTEST_SKIP() << *why;
    ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
    void* memory = nullptr;
    ASSERT_EQ(cudaMalloc(&memory, kBytes), cudaSuccess);
    pages_ = static_cast<std::byte*>(memory);
    host_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, 2 * kBytes)));
  }
  void TearDown() override {
    if (!host_) return;
    stream_.reset();
    if (device_) {
      EXPECT_TRUE(device_->unregister_host(host_.get()));
    }
    device_.reset();
    EXPECT_EQ(cudaFree(pages_), cudaSuccess);
  }

  void open(CudaOptions options) {
    Result<std::unique_ptr<Device>> device = make_cuda_device(options);
    ASSERT_TRUE(device) << device.status().message();
    device_ = std::move(device).value();
    ASSERT_TRUE(device_->register_host(host_.get(), 2 * kBytes));
    stream_.emplace(OwnedStream::create(*device_).value());
  }
  static CudaOptions by(CopyPath path) {
    CudaOptions options;
    options.path = path;
    options.calibration = CalibrationUse::none;
    return options;
  }
  void copy(const std::vector<CopyRun>& runs, Direction direction) {
    const Status status = device_->copy(stream_->handle(), runs, direction);
    ASSERT_TRUE(status) << status.message();
  }
  void finish() {
    std::unique_ptr<Event> done = device_->create_event().value();
    ASSERT_TRUE(device_->record(*done, stream_->handle()));
    const Status status = device_->synchronize(*done);
    ASSERT_TRUE(status) << status.message();
  }
  std::vector<std::byte> pages() const {
    std::vector<std::byte> bytes(kBytes);
    EXPECT_EQ(cudaMemcpy(bytes.data(), pages_, kBytes, cudaMemcpyDeviceToHost), cudaSuccess);
    return bytes;
  }

  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::byte* pages_ = nullptr;
  std::unique_ptr<std::byte, Free> host_;
  std::unique_ptr<Device> device_;
  std::optional<OwnedStream> stream_;
};

struct Shape {
  const char* name;
  std::size_t run_bytes;     // 0: of many lengths
  std::size_t misalignment;  // of the pages' side against the slots'
};

TEST_F(CudaDeviceOnGpu, every_path_copies_every_shape_both_ways_and_nothing_beside) {
  constexpr Shape kShapes[] = {{"70B rank", 4096, 0},      {"8B", 32768, 0}, {"MLA", 18432, 0},
                               {"contiguous", 2097152, 0}, {"mixed", 0, 0},  {"odd", 0, 3},
                               {"narrow", 200, 4},         {"tiny", 16, 0}};
  for (const CopyPath path : kPaths) {
    open(by(path));
    for (const Shape& shape : kShapes) {
      std::mt19937 random(static_cast<unsigned>(shape.run_bytes + shape.misalignment));
      // Runs with gaps on both sides, in an order of their own.
      std::vector<std::pair<std::size_t, std::size_t>> places;  // offset, bytes; the same on both sides
      for (std::size_t at = 16 + shape.misalignment;
           at + (std::size_t{3} << 20) < kBytes && places.size() < 6000;) {
        const std::size_t bytes = shape.run_bytes > 0 ? shape.run_bytes : 1 + random() % 70000;
        places.emplace_back(at, bytes);
        at += bytes + 16 * (random() % 4);
        if (shape.run_bytes == 0) at += random() % 8;
      }
      std::shuffle(places.begin(), places.end(), random);

      std::vector<std::byte> source(kBytes);
      for (std::byte& b : source) b = static_cast<std::byte>(random());
      std::memcpy(host_.get(), source.data(), kBytes);
      ASSERT_EQ(cudaMemset(pages_, 0xee, kBytes), cudaSuccess);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      std::vector<CopyRun> loads;
      std::vector<CopyRun> stores;
      std::vector<std::byte> expected(kBytes, std::byte{0xee});
      std::vector<std::byte> expected_back(kBytes, std::byte{0xdd});
      std::byte* back = host_.get() + kBytes;
      for (const auto& [at, bytes] : places) {
        const std::size_t slot = at - shape.misalignment;
        loads.push_back({pages_ + at, host_.get() + slot, bytes});
        stores.push_back({back + slot, pages_ + at, bytes});
        std::memcpy(expected.data() + at, source.data() + slot, bytes);
        std::memcpy(expected_back.data() + slot, source.data() + slot, bytes);
      }
      copy(loads, Direction::load);
      finish();
      EXPECT_TRUE(pages() == expected) << to_string(path) << " loads " << shape.name;
      std::memset(back, 0xdd, kBytes);
      copy(stores, Direction::store);
      finish();
      EXPECT_TRUE(std::memcmp(back, expected_back.data(), kBytes) == 0)
          << to_string(path) << " stores " << shape.name;
    }
    stream_.reset();
    ASSERT_TRUE(device_->unregister_host(host_.get()));
    device_.reset();
  }
  open(by(CopyPath::plain));
}

TEST_F(CudaDeviceOnGpu, stages_are_reused_only_behind_the_copies_that_use_them) {
  open(by(CopyPath::staged));
  // Many times the ring, in many calls and both ways, without a wait between.
  std::vector<CopyRun> loads;
  std::vector<CopyRun> stores;
  for (std::size_t i = 0; i < kBytes / 4096; ++i) {
    const std::size_t page = i * 1237 % (kBytes / 4096) * 4096;
    loads.push_back({pages_ + page, host_.get() + i * 4096, 4096});
    stores.push_back({host_.get() + kBytes + i * 4096, pages_ + page, 4096});
  }
  for (unsigned round = 0; round < 8; ++round) {
    finish();
    std::mt19937_64 random(round);
    for (std::size_t i = 0; i < kBytes; i += 8) {
      const std::uint64_t word = random();
      std::memcpy(host_.get() + i, &word, 8);
    }
    std::memset(host_.get() + kBytes, 0xdd, kBytes);
    // One stage at a time, the directions in turn; or each direction's whole, more stages than there are.
    const std::size_t step = round % 2 == 0 ? 1000 : loads.size();
    for (std::size_t at = 0; at < loads.size(); at += step) {
      const std::size_t end = std::min(at + step, loads.size());
      copy(
          {loads.begin() + static_cast<std::ptrdiff_t>(at), loads.begin() + static_cast<std::ptrdiff_t>(end)},
          Direction::load);
      copy({stores.begin() + static_cast<std::ptrdiff_t>(at),
            stores.begin() + static_cast<std::ptrdiff_t>(end)},
           Direction::store);
    }
    finish();
    ASSERT_EQ(std::memcmp(host_.get(), host_.get() + kBytes, kBytes), 0) << round;
  }
}

// Short runs go through the ring, and its second stream; long ones do not. Each copy reads what the one
// before has written, to either side.
TEST_F(CudaDeviceOnGpu, copies_by_different_paths_keep_the_order_of_their_stream) {
  CudaOptions options;
  options.calibration = CalibrationUse::none;
  open(options);
  constexpr std::size_t kPart = std::size_t{2} << 20;
  constexpr std::size_t kParts = 8;
  const auto copy_part = [&](void* to, const void* from, Direction direction, bool in_short_runs) {
    std::vector<CopyRun> runs;
    const std::size_t each = in_short_runs ? 4096 : kPart;
    for (std::size_t at = 0; at < kPart; at += each) {
      runs.push_back({static_cast<std::byte*>(to) + at, static_cast<const std::byte*>(from) + at, each});
    }
    copy(runs, direction);
  };
  for (unsigned round = 0; round < 12; ++round) {
    std::memset(host_.get(), 0xdd, kBytes);
    ASSERT_EQ(cudaMemset(pages_, 0xee, kBytes), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    for (std::size_t i = 0; i < kPart; ++i)
      host_.get()[i] = static_cast<std::byte>(i * 131 + i / 4096 + round);
    const std::vector<std::byte> sent(host_.get(), host_.get() + kPart);
    for (std::size_t i = 0; i < kParts; ++i) {
      const bool short_loads = (round >> i % 2 & 1) != 0;
      const bool short_stores = (round >> (1 + i % 2) & 1) != 0;
      copy_part(pages_ + i * kPart, host_.get() + i * kPart, Direction::load, short_loads);
      copy_part(host_.get() + (i + 1) * kPart, pages_ + i * kPart, Direction::store, short_stores);
    }
    finish();
    EXPECT_EQ(std::memcmp(host_.get() + kParts * kPart, sent.data(), kPart), 0) << round;
  }
}

// What copies need is made with their stream: an allocation would wait for the GPU.
TEST_F(CudaDeviceOnGpu, no_copy_allocates_device_memory) {
  for (const CopyPath path : kPaths) {
    CudaOptions options = by(path);
    options.load_limit = options.store_limit = std::uint64_t{1} << 40;
    open(options);
    const auto free_bytes = [] {
      std::size_t free = 0;
      std::size_t total = 0;
      EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
      return free;
    };
    const std::size_t before = free_bytes();
    std::vector<CopyRun> loads;
    std::vector<CopyRun> stores;
    for (std::size_t at = 0; at + 8192 <= kBytes; at += 8192) {
      loads.push_back({pages_ + at, host_.get() + at, 4096});
      stores.push_back({host_.get() + kBytes + at, pages_ + at, 4096});
    }
    copy(loads, Direction::load);
    copy(stores, Direction::store);
    finish();
    EXPECT_EQ(free_bytes(), before) << to_string(path);
    stream_.reset();
    ASSERT_TRUE(device_->unregister_host(host_.get()));
    device_.reset();
  }
  open(by(CopyPath::plain));
}

// Of what was never offered for pinning the driver itself takes care; a refusal makes our ring.
class UnpinnedOnGpu : public CudaDeviceOnGpu, public ::testing::WithParamInterface<bool> {
 protected:
  void refuse_to_pin() {
    if (!GetParam()) return;
    constexpr std::size_t kNowhere = std::size_t{1} << 20;
    void* nowhere = ::mmap(nullptr, kNowhere, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(nowhere, MAP_FAILED);
    EXPECT_FALSE(device_->register_host(nowhere, kNowhere));
    ASSERT_EQ(::munmap(nowhere, kNowhere), 0);
    ASSERT_TRUE(device_->health());
  }
};

TEST_P(UnpinnedOnGpu, memory_is_copied_by_every_path) {
  for (const CopyPath path : {CopyPath::plain, CopyPath::staged, CopyPath::kernel}) {
    open(by(path));
    refuse_to_pin();
    std::vector<std::byte> source(std::size_t{10} << 20);
    for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 131 + i / 4096);
    std::vector<std::byte> back(source.size());
    std::vector<CopyRun> loads;
    std::vector<CopyRun> stores;
    for (std::size_t at = 0; at < source.size(); at += 5000) {
      const std::size_t bytes = std::min<std::size_t>(5000, source.size() - at);
      loads.push_back({pages_ + at, source.data() + at, bytes});
      stores.push_back({back.data() + at, pages_ + at, bytes});
    }
    copy(loads, Direction::load);
    copy(stores, Direction::store);
    finish();
    EXPECT_TRUE(back == source) << to_string(path);
    stream_.reset();
    ASSERT_TRUE(device_->unregister_host(host_.get()));
    device_.reset();
  }
  open(by(CopyPath::plain));
}

TEST_P(UnpinnedOnGpu, copies_keep_to_the_rate_of_their_direction) {
  CudaOptions options = by(CopyPath::merged);
  options.load_limit = options.store_limit = std::uint64_t{500'000'000};
  open(options);
  refuse_to_pin();
  std::vector<std::byte> memory(kBytes, std::byte{7});
  constexpr double kShortest = 0.9 * static_cast<double>(kBytes - (6 << 20)) / 5e8;
  for (const Direction direction : {Direction::load, Direction::store}) {
    const auto begin = std::chrono::steady_clock::now();
    copy({direction == Direction::load ? CopyRun{pages_, memory.data(), kBytes}
                                       : CopyRun{memory.data(), pages_, kBytes}},
         direction);
    finish();
    EXPECT_GE(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(), kShortest);
  }
  EXPECT_EQ(std::count(memory.begin(), memory.end(), std::byte{7}), static_cast<std::ptrdiff_t>(kBytes));
}

INSTANTIATE_TEST_SUITE_P(CudaDevice, UnpinnedOnGpu, ::testing::Bool(), [](const auto& suite) {
  return suite.param ? std::string("refused") : std::string("never_offered");
});

TEST_F(CudaDeviceOnGpu, a_stream_that_captures_is_refused_and_its_capture_stays_whole) {
  open(by(CopyPath::kernel));
  cudaStream_t framework = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&framework, cudaStreamNonBlocking), cudaSuccess);
  const StreamHandle handle{reinterpret_cast<std::uintptr_t>(framework)};
  std::unique_ptr<Event> event = device_->create_event().value();
  ASSERT_EQ(cudaStreamBeginCapture(framework, cudaStreamCaptureModeGlobal), cudaSuccess);
  EXPECT_TRUE(is_capture_conflict(device_->record(*event, handle)));
  EXPECT_TRUE(is_capture_conflict(device_->wait(handle, *event)));
  // Our own streams go on beside it.
  copy({{pages_, host_.get(), 4096}}, Direction::load);
  finish();
  cudaGraph_t graph = nullptr;
  EXPECT_EQ(cudaStreamEndCapture(framework, &graph), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_TRUE(device_->record(*event, handle));
  EXPECT_EQ(cudaStreamDestroy(framework), cudaSuccess);
}

TEST_F(CudaDeviceOnGpu, the_default_streams_can_be_recorded_and_waited_for) {
  open(by(CopyPath::merged));
  std::unique_ptr<Event> event = device_->create_event().value();
  for (const std::uintptr_t handle : {0, 1, 2}) {
    EXPECT_TRUE(device_->record(*event, StreamHandle{handle})) << handle;
    EXPECT_TRUE(device_->synchronize(*event)) << handle;
    EXPECT_TRUE(device_->wait(StreamHandle{handle}, *event)) << handle;
  }
}

TEST_F(CudaDeviceOnGpu, a_limited_direction_keeps_to_its_rate_and_the_other_does_not_wait) {
  CudaOptions options = by(CopyPath::merged);
  options.load_limit = std::uint64_t{500'000'000};
  open(options);
  const auto seconds = [&](const CopyRun& run, Direction direction) {
    const auto begin = std::chrono::steady_clock::now();
    copy({run}, direction);
    finish();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  };
  static_cast<void>(seconds({host_.get(), pages_, kBytes}, Direction::store));  // warms up
  EXPECT_LT(seconds({host_.get(), pages_, kBytes}, Direction::store), 0.02);
  const double limited = seconds({pages_, host_.get(), kBytes}, Direction::load);
  EXPECT_GE(limited, 0.9 * static_cast<double>(kBytes - (4 << 20)) / 5e8);
  EXPECT_LT(limited, 2.0 * static_cast<double>(kBytes) / 5e8);
}

// The rate itself is `kvtier bench device`'s to measure.
TEST_F(CudaDeviceOnGpu, a_direction_limited_in_percent_of_decoding_copies_the_right_bytes) {
  CudaOptions options;
  options.calibration = CalibrationUse::fresh;
  options.load_limit = DecodeShare{0.05};
  options.store_limit = DecodeShare{1.0};
  open(options);
  std::vector<std::byte> sent(kBytes);
  std::mt19937 random(5);
  std::ranges::generate(sent, [&] { return static_cast<std::byte>(random()); });
  std::memcpy(host_.get(), sent.data(), kBytes);
  copy({{pages_, host_.get(), kBytes}}, Direction::load);
  finish();
  std::memset(host_.get(), 0xdd, kBytes);
  copy({{host_.get(), pages_, kBytes}}, Direction::store);
  finish();
  EXPECT_EQ(std::memcmp(host_.get(), sent.data(), kBytes), 0);
}

TEST_F(CudaDeviceOnGpu, a_limit_in_percent_needs_a_calibration) {
  CudaOptions options;
  options.calibration = CalibrationUse::none;
  options.load_limit = DecodeShare{0.05};
  EXPECT_EQ(make_cuda_device(options).status().code(), StatusCode::unsupported);
  options.load_limit = DecodeShare{1.5};
  EXPECT_EQ(make_cuda_device(options).status().code(), StatusCode::invalid_argument);
}

TEST_F(CudaDeviceOnGpu, a_calibration_is_measured_once_and_found_again) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("kvtier-test-" + std::to_string(std::random_device{}()));
  CudaOptions options;
  options.cache_folder = folder.string();
  options.calibration = CalibrationUse::fresh;
  open(options);
  ASSERT_TRUE(std::filesystem::exists(folder));
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry.path());
  ASSERT_EQ(files.size(), 1U);
  const auto written = std::filesystem::last_write_time(files[0]);
  options.calibration = CalibrationUse::cached;
  ASSERT_TRUE(make_cuda_device(options));
  EXPECT_EQ(std::filesystem::last_write_time(files[0]), written);
  std::filesystem::remove_all(folder);
}

TEST_F(CudaDeviceOnGpu, the_current_device_stays_and_other_gpus_get_no_context) {
  const int gpus = static_cast<int>(cuda_facts().value().gpus.size());
  if (gpus < 2) {
    open(by(CopyPath::plain));
    GTEST_SKIP() << "one GPU";
  }
  CudaOptions options = by(CopyPath::plain);
  options.ordinal = gpus - 1;
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  Result<std::unique_ptr<Device>> other = make_cuda_device(options);
  ASSERT_TRUE(other) << other.status().message();
  int current = -1;
  ASSERT_EQ(cudaGetDevice(&current), cudaSuccess);
  EXPECT_EQ(current, 0);
  open(by(CopyPath::plain));
  // The same host memory on two GPUs.
  EXPECT_TRUE((*other)->register_host(host_.get(), 2 * kBytes));
  EXPECT_TRUE((*other)->unregister_host(host_.get()));
  copy({{pages_, host_.get(), 4096}}, Direction::load);
  finish();
}

#endif

}  // namespace
}  // namespace kvtier
