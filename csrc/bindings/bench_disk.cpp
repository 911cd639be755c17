// `kvtier bench disk`: one slot store driven at full depth, without Python between two requests.
#include <sys/mman.h>
#include <sys/resource.h>

#include <array>
#include <chrono>
#include <cstring>
#include <mutex>

#include "common.h"

#include "kvtier/core/mutex.h"
#include "kvtier/storage/slot_store.h"

namespace kvtier::bindings {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;

// Memory for images, as the arena has it: anonymous, of huge pages where there are any, present.
class ImageMemory {
 public:
  explicit ImageMemory(std::uint64_t bytes)
      : bytes_((bytes + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes) {
    void* begin = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) {
      throw StatusError{Status::resource("no memory for " + std::to_string(bytes_) + " bytes of images")};
    }
    static_cast<void>(::madvise(begin, bytes_, MADV_HUGEPAGE));  // best effort
    begin_ = static_cast<std::byte*>(begin);
    // Random bytes (xorshift): drives and checksums must not profit from zeros.
    std::uint64_t x = 0x9E3779B97F4A7C15;
    for (std::uint64_t i = 0; i < bytes_; i += sizeof(x)) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
      std::memcpy(begin_ + i, &x, sizeof(x));
    }
  }
  ImageMemory(const ImageMemory&) = delete;
  ImageMemory& operator=(const ImageMemory&) = delete;
  ~ImageMemory() { ::munmap(begin_, bytes_); }

  std::byte* begin() const { return begin_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  std::byte* begin_ = nullptr;
  std::uint64_t bytes_;
};

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

BlockKey key_of_slot(std::uint32_t slot) {
  BlockKey key{};
  std::memcpy(key.bytes.data(), &slot, sizeof(slot));
  return key;
}

// What one pass over some slots took.
struct Pass {
  double seconds = 0;
  double cpu_seconds = 0;    // of the whole process
  double flush_seconds = 0;  // of `seconds`: the last sync and commit, when every block is written
  std::uint64_t blocks = 0;  // good ones
};

// Owns a store of one size class in a directory of its own. Threads: one caller.
class DiskBench {
 public:
  DiskBench(const std::string& path, std::uint64_t payload_bytes, std::uint32_t num_slots,
            std::uint32_t queue_depth, std::uint32_t window, const std::optional<py::bytes>& key)
      : payload_bytes_(payload_bytes),
        stride_bytes_((payload_bytes + kSlotHeaderBytes + kSlotAlignment - 1) / kSlotAlignment *
                      kSlotAlignment),
        num_slots_(num_slots),
        window_(window),
        images_(stride_bytes_ * window) {
    if (payload_bytes == 0 || num_slots == 0 || window == 0) {
      throw StatusError{
          Status::invalid_argument("payload_bytes, num_slots and window: allowed is 1 and more")};
    }
    SlotStoreOptions options;
    options.classes = {{stride_bytes_, num_slots}};
    options.queue_depth = queue_depth;
    options.growth = Growth::whole;
    if (key) {
      const auto view = static_cast<std::string_view>(*key);
      options.cipher = take(SlotCipher::make(std::as_bytes(std::span(view.data(), view.size())), {}));
    }
    without_gil([&] { open(path, std::move(options)); });
  }

  ~DiskBench() {
    if (store_ != nullptr) without_gil([&] { store_.reset(); });  // closes: its requests use images_
  }

  // Goes so many times through `order`, one after another, and syncs at the end.
  Pass write(const PageArray& order, std::uint32_t rounds) {
    return run(
        order, rounds, [this](std::uint32_t slot, std::byte* image, std::function<void(bool)> on_over) {
          SlotWrite write;
          write.place = {0, SlotId{slot}};
          write.block.key = key_of_slot(slot);
          write.payload_bytes = payload_bytes_;
          write.image = image;
          write.on_written = [over = std::move(on_over)](const Status& status) { over(status.is_ok()); };
          write.on_durable = [](const Status&) {};
          store_->write(std::move(write));
        });
  }

  Pass read(const PageArray& order) {
    return run(order, 1, [this](std::uint32_t slot, std::byte* image, std::function<void(bool)> on_over) {
      SlotRead read;
      read.place = {0, SlotId{slot}};
      read.key = key_of_slot(slot);
      read.image = image;
      read.on_done = [over = std::move(on_over)](const ReadOutcome& outcome) { over(outcome.good()); };
      store_->read(std::move(read));
    });
  }

  void close() {
    if (store_ != nullptr) check(without_gil([&] { return store_->close(std::nullopt); }));
  }

  py::dict about() const {
    py::dict about;
    const StoreStats stats = store_->stats();
    about["queue"] = stats.queue;
    about["queue_problem"] = report_.queue_problem;
    about["buffers_problem"] = stats.buffers_problem;
    about["direct_io"] = report_.direct_io;
    about["file"] = file_;
    about["stride_bytes"] = stride_bytes_;
    return about;
  }

 private:
  using Start = std::function<void(std::uint32_t slot, std::byte* image, std::function<void(bool)> on_over)>;

  void open(const std::string& path, SlotStoreOptions options) {
    // Room for the slots, the catalog and the directories.
    options.catalog.max_bytes = (std::uint64_t{8} << 20) + std::uint64_t{num_slots_} * 1024;
    const std::uint64_t capacity =
        stride_bytes_ * num_slots_ + options.catalog.max_bytes + (std::uint64_t{8} << 20);
    const auto directory = take(StoreDirectory::open(path, capacity));
    const std::array<std::uint64_t, 1> strides{stride_bytes_};
    auto lease = take(directory->acquire(Fingerprint{}, strides, SecondProcess::refuse));
    file_ = lease->directory().path() + "/slots.0";
    SlotStore::Opened opened = take(SlotStore::open(std::move(lease), std::move(options), nullptr));
    store_ = std::move(opened.store);
    report_ = std::move(opened.report);
    store_->add_buffers({{images_.begin(), images_.bytes()}});
    store_->on_grown([this](std::uint32_t, std::uint32_t) {
      const MutexLock lock(mutex_);
      changed_.notify_all();
    });
    MutexLock lock(mutex_);
    while (store_->usable_slots(0) < num_slots_) {
      const StoreStats stats = store_->stats();
      if (stats.growth != "ok") throw StatusError{Status::resource(stats.growth)};
      changed_.wait_until(lock, Clock::now() + std::chrono::milliseconds(100));
    }
  }

  // Keeps `window_` blocks under way; each that is over begins the next, on the store's thread.
  Pass run(const PageArray& order, std::uint32_t rounds, Start start) {
    const std::span<const PageId> slots = pages_of(order);
    for (const PageId slot : slots) {
      if (raw(slot) >= num_slots_) {
        throw StatusError{Status::invalid_argument(
            "slot " + std::to_string(raw(slot)) + ": allowed are those below " + std::to_string(num_slots_))};
      }
    }
    return without_gil([&] {
      const double cpu = cpu_seconds();
      const auto begun = Clock::now();
      Pass pass;
      for (std::uint32_t i = 0; i < rounds; ++i) pass.blocks += run_all(slots, start);
      const auto written = Clock::now();
      check(store_->flush(std::nullopt));
      const auto ended = Clock::now();
      pass.seconds = std::chrono::duration<double>(ended - begun).count();
      pass.flush_seconds = std::chrono::duration<double>(ended - written).count();
      pass.cpu_seconds = cpu_seconds() - cpu;
      return pass;
    });
  }

  // Returns the number of good blocks.
  std::uint64_t run_all(std::span<const PageId> slots, const Start& start) {
    struct Run {
      Mutex mutex;
      CondVar over;
      std::size_t next KVTIER_GUARDED_BY(mutex) = 0;
      std::size_t ended KVTIER_GUARDED_BY(mutex) = 0;
      std::uint64_t good KVTIER_GUARDED_BY(mutex) = 0;
    } run;
    // Begins the next block in the image of one that is over, if there is a next one.
    std::function<void(std::byte*)> begin = [&](std::byte* image) {
      std::uint32_t slot = 0;
      {
        const MutexLock lock(run.mutex);
        if (run.next == slots.size()) return;
        slot = raw(slots[run.next++]);
      }
      start(slot, image, [&, image](bool good) {
        begin(image);
        const MutexLock lock(run.mutex);
        run.good += good ? 1 : 0;
        if (++run.ended == slots.size()) run.over.notify_all();
      });
    };
    for (std::uint32_t i = 0; i < window_; ++i) begin(images_.begin() + i * stride_bytes_);
    MutexLock lock(run.mutex);
    while (run.ended < slots.size()) run.over.wait(lock);
    return run.good;
  }

  std::uint64_t payload_bytes_;
  std::uint64_t stride_bytes_;
  std::uint32_t num_slots_;
  std::uint32_t window_;
  ImageMemory images_;
  std::string file_;
  OpenReport report_;
  Mutex mutex_;
  CondVar changed_;
  std::unique_ptr<SlotStore> store_;
};

}  // namespace

void bind_bench_disk(py::module_& m) {
  const auto as_tuple = [](const Pass& pass) {
    return py::make_tuple(pass.seconds, pass.cpu_seconds, pass.blocks, pass.flush_seconds);
  };
  py::class_<DiskBench, std::shared_ptr<DiskBench>>(m, "DiskBench")
      .def(py::init<const std::string&, std::uint64_t, std::uint32_t, std::uint32_t, std::uint32_t,
                    const std::optional<py::bytes>&>(),
           py::kw_only(), py::arg("path"), py::arg("payload_bytes"), py::arg("num_slots"),
           py::arg("queue_depth"), py::arg("window"), py::arg("key"),
           "A slot store of its own in a directory, to be measured. Every slot may be used.")
      .def(
          "write",
          [as_tuple](DiskBench& bench, const PageArray& order, std::uint32_t rounds) {
            return as_tuple(bench.write(order, rounds));
          },
          py::arg("order").noconvert(), py::arg("rounds"),
          "Writes slots and waits until they are durable: (seconds, CPU seconds, blocks written, seconds of "
          "the "
          "flush).")
      .def(
          "read",
          [as_tuple](DiskBench& bench, const PageArray& order) { return as_tuple(bench.read(order)); },
          py::arg("order").noconvert(),
          "Reads slots and proves them: (seconds, CPU seconds, good blocks, seconds of the flush).")
      .def("about", &DiskBench::about)
      .def("close", &DiskBench::close);
}

}  // namespace kvtier::bindings
