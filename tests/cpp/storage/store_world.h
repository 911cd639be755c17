// What the tests of SlotStore share: a home that outlives openings, blocks whose bytes follow from their
// number, and waiting for callbacks.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "support/temp_directory.h"

#include "kvtier/core/mutex.h"
#include "kvtier/platform/simulated_drive.h"
#include "kvtier/storage/slot_store.h"

namespace kvtier::store_world {

inline constexpr std::uint64_t kStride = 16384;
inline constexpr std::uint64_t kPayload = 12000;  // leaves padding behind it

inline std::chrono::steady_clock::time_point soon() {
  return std::chrono::steady_clock::now() + std::chrono::seconds(60);
}

// --- blocks ---

struct Block {
  std::uint32_t number = 0;
  std::uint32_t version = 0;  // of the bytes; the key does not tell it
  friend auto operator<=>(const Block&, const Block&) = default;
};

inline std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30U)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27U)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31U);
}

inline BlockKey key_of(std::uint32_t number) {
  BlockKey key{};
  for (std::size_t i = 0; i < 4; ++i) {
    const std::uint64_t word = mixed(number * 4ULL + i + 77);
    std::memcpy(key.bytes.data() + 8 * i, &word, 8);
  }
  return key;
}

inline BlockIdentity identity_of(std::uint32_t number) {
  BlockIdentity identity;
  identity.key = key_of(number);
  identity.group = GroupId{static_cast<std::uint16_t>(number % 2)};
  identity.depth = number;
  identity.name_space = namespace_tag("tenant " + std::to_string(number % 3));
  return identity;
}

// Image memory of one slot.
class Image {
 public:
  explicit Image(std::uint64_t bytes = kStride)
      : bytes_(bytes), memory_(static_cast<std::byte*>(std::aligned_alloc(4096, bytes)), &std::free) {
    std::memset(memory_.get(), 0x5a, bytes);
  }
  std::byte* data() const { return memory_.get(); }
  void fill(const Block& block, std::uint64_t payload = kPayload) const {
    for (std::uint64_t i = 0; i + 8 <= payload; i += 8) {
      const std::uint64_t word =
          mixed((std::uint64_t{block.number} << 40U) ^ (std::uint64_t{block.version} << 20U) ^ i);
      std::memcpy(data() + kSlotHeaderBytes + i, &word, 8);
    }
  }
  bool holds(const Block& block, std::uint64_t payload = kPayload) const {
    const Image expected(bytes_);
    expected.fill(block, payload);
    return std::memcmp(data() + kSlotHeaderBytes, expected.data() + kSlotHeaderBytes, payload / 8 * 8) == 0;
  }

 private:
  std::uint64_t bytes_;
  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
};

// --- waiting ---

// What callbacks leave behind. Each must come exactly once: `told` counts.
template <typename T>
class Told {
 public:
  void tell(const T& value) {
    MutexLock lock(mutex_);
    ++count_;
    value_ = value;
    changed_.notify_all();
  }
  bool is_told() const { return count() > 0; }
  int count() const {
    MutexLock lock(mutex_);
    return count_;
  }
  T wait() {
    MutexLock lock(mutex_);
    while (!value_) {
      if (!changed_.wait_until(lock, soon())) {
        ADD_FAILURE() << "a callback did not come";
        std::abort();  // what it borrows must not go
      }
    }
    return *value_;
  }

 private:
  mutable Mutex mutex_;
  CondVar changed_;
  int count_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::optional<T> value_ KVTIER_GUARDED_BY(mutex_);
};

struct PendingWrite {
  Block block;
  SlotPlace place;
  Image image;
  StoreJob job{0};
  Told<Status> written, durable;
  Told<bool> let_go;
};
struct PendingRead {
  Block block;
  Image image;
  StoreJob job{0};
  Told<ReadOutcome> done;
  Told<bool> let_go;
};

inline std::shared_ptr<PendingWrite> start_write(SlotStore& store, std::uint32_t slot, const Block& block,
                                                 std::uint32_t class_index = 0) {
  auto pending = std::make_shared<PendingWrite>();
  pending->block = block;
  pending->place = {class_index, SlotId{slot}};
  pending->image.fill(block);
  SlotWrite write;
  write.place = pending->place;
  write.block = identity_of(block.number);
  write.payload_bytes = kPayload;
  write.image = pending->image.data();
  write.on_written = [pending](const Status& status) { pending->written.tell(status); };
  write.on_durable = [pending](const Status& status) {
    EXPECT_TRUE(pending->written.is_told());
    pending->durable.tell(status);
  };
  write.on_let_go = [pending] { pending->let_go.tell(true); };
  pending->job = store.write(std::move(write));
  return pending;
}

inline std::shared_ptr<PendingRead> start_read(SlotStore& store, std::uint32_t slot, const Block& block,
                                               ReadPriority priority = ReadPriority::demand,
                                               std::uint32_t class_index = 0) {
  auto pending = std::make_shared<PendingRead>();
  pending->block = block;
  SlotRead read;
  read.place = {class_index, SlotId{slot}};
  read.key = key_of(block.number);
  read.group = identity_of(block.number).group;
  read.image = pending->image.data();
  read.priority = priority;
  read.on_done = [pending](const ReadOutcome& outcome) { pending->done.tell(outcome); };
  read.on_let_go = [pending] { pending->let_go.tell(true); };
  pending->job = store.read(std::move(read));
  return pending;
}

inline std::shared_ptr<Told<Status>> start_wipe(SlotStore& store, const std::vector<std::uint32_t>& slots) {
  auto done = std::make_shared<Told<Status>>();
  std::vector<SlotPlace> places;
  for (const std::uint32_t slot : slots) places.push_back({0, SlotId{slot}});
  store.wipe(places, [done](const Status& status) { done->tell(status); });
  return done;
}

inline void write_durably(SlotStore& store, std::uint32_t slot, const Block& block) {
  const auto pending = start_write(store, slot, block);
  ASSERT_TRUE(pending->written.wait()) << pending->written.wait().message();
  ASSERT_TRUE(store.flush(soon()));
  ASSERT_TRUE(pending->durable.wait()) << pending->durable.wait().message();
}

// Whether the slot serves these very bytes. Wrong bytes fail the test.
inline bool serves(SlotStore& store, std::uint32_t slot, const Block& block) {
  const auto pending = start_read(store, slot, block);
  const ReadOutcome outcome = pending->done.wait();
  if (!outcome.good()) return false;
  const bool right = pending->image.holds(block);
  EXPECT_TRUE(right) << "wrong bytes in slot " << slot;
  return right;
}

inline Verdict verdict_of(SlotStore& store, std::uint32_t slot, const Block& block) {
  const ReadOutcome outcome = start_read(store, slot, block)->done.wait();
  EXPECT_TRUE(outcome.status) << outcome.status.message();
  return outcome.verdict;
}

inline void wait_until(const std::function<bool()>& condition) {
  const auto give_up = soon();
  while (!condition()) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up);
    ::usleep(200);
  }
}

inline void wait_for_slots(SlotStore& store, std::uint32_t slots, std::uint32_t class_index = 0) {
  wait_until([&] { return store.usable_slots(class_index) >= slots; });
}

// --- a home ---

// What is left of a store when a process ends: its directory, its superblock, the versions of its catalog.
struct Home {
  explicit Home(std::uint32_t num_slots = 64) {
    superblock.store.fill(std::byte{0x51});
    superblock.fingerprint.fill(std::byte{0xf0});
    superblock.class_strides = {kStride};
    classes = {{kStride, num_slots}};
    directory = std::make_unique<Directory>(std::move(Directory::open_or_create(files.path()).value()));
  }

  TempDirectory files;
  std::unique_ptr<Directory> directory;
  std::vector<StoreClass> classes;
  CatalogHistory catalogs;
  std::optional<std::size_t> catalog_version;  // what an opening finds; the newest

  Mutex mutex;
  Superblock superblock;  // as on the drive
  std::uint64_t capacity_bytes = std::uint64_t{1} << 40;
  std::uint64_t reserved_bytes = 0;
  int leases = 0;
  int superblock_writes = 0;
  bool superblock_fails = false;
  bool was_opened = false;
};

class HomeLease final : public StoreLease {
 public:
  explicit HomeLease(Home& home) : home_(home), is_new_(!home.was_opened) {
    MutexLock lock(home_.mutex);
    EXPECT_EQ(home_.leases++, 0) << "two at home at once";
    home_.was_opened = true;
    superblock_ = home_.superblock;
  }
  ~HomeLease() override {
    MutexLock lock(home_.mutex);
    --home_.leases;
  }
  const Directory& directory() const override { return *home_.directory; }
  const std::string& name() const override { return name_; }
  const Superblock& superblock() const override { return superblock_; }
  bool is_new() const override { return is_new_; }
  Status write_superblock(const Superblock& superblock) override {
    MutexLock lock(home_.mutex);
    if (home_.superblock_fails) return Status::io("the superblock cannot be written");
    home_.superblock = superblock;
    ++home_.superblock_writes;
    return Status::ok();
  }
  Result<std::uint64_t> reserve(std::uint64_t bytes) override {
    MutexLock lock(home_.mutex);
    home_.reserved_bytes = std::min(bytes, home_.capacity_bytes);
    return home_.reserved_bytes;
  }
  std::uint64_t reserved_bytes() const override {
    MutexLock lock(home_.mutex);
    return home_.reserved_bytes;
  }

 private:
  Home& home_;
  const std::string name_ = "f0f0-0";
  Superblock superblock_;
  const bool is_new_;
};

inline SlotStoreOptions options_of(Home& home) {
  SlotStoreOptions options;
  options.classes = home.classes;
  options.queue_depth = 8;
  options.commit_interval = std::chrono::milliseconds(20);
  options.first_probe = std::chrono::milliseconds(5);
  options.make_catalog = [&home](const Directory&) -> Result<std::unique_ptr<Catalog>> {
    return home.catalogs.open(home.catalog_version.value_or(home.catalogs.num_versions() - 1));
  };
  return options;
}

inline SlotStoreOptions options_of(Home& home, SimulatedDrive& drive) {
  SlotStoreOptions options = options_of(home);
  options.make_queue = [&drive](std::uint32_t depth) -> Result<std::unique_ptr<IoQueue>> {
    return drive.make_queue(depth);
  };
  return options;
}

// For tests that do not ask when what was found is durable.
inline SlotStore::OnFound tell(std::function<void(const CatalogRecord&)> on_found) {
  if (!on_found) return nullptr;
  return [on_found = std::move(on_found)](const CatalogRecord& found) {
    on_found(found);
    return nullptr;
  };
}

inline Result<SlotStore::Opened> try_open(Home& home, SlotStoreOptions options,
                                          std::function<void(const CatalogRecord&)> on_found = nullptr) {
  return SlotStore::open(std::make_unique<HomeLease>(home), std::move(options), tell(std::move(on_found)));
}

inline SlotStore::Opened open(Home& home, SlotStoreOptions options,
                              std::function<void(const CatalogRecord&)> on_found = nullptr) {
  Result<SlotStore::Opened> opened = try_open(home, std::move(options), std::move(on_found));
  if (!opened) {
    ADD_FAILURE() << opened.status().message();
    std::abort();
  }
  return std::move(opened.value());
}

}  // namespace kvtier::store_world
