// A store with all that it has in production: directory, lease, ledger, catalog helper, files on a real
// drive.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "storage/store_world.h"

#include "kvtier/storage/store_directory.h"

namespace kvtier::store_world {

#ifdef KVTIER_TEST_CATALOG_HELPER

class RealStore : public testing::Test {
 protected:
  static constexpr std::uint32_t kSlots = 64;
  using OnFound = std::function<void(const CatalogRecord&)>;

  SlotStore::Opened open_real(OnFound on_found = nullptr,
                              const std::function<void(SlotStoreOptions&)>& adjust = nullptr) {
    directory = StoreDirectory::open(files.path() + "/disk", std::uint64_t{64} << 20U).value();
    Fingerprint fingerprint{};
    fingerprint.fill(std::byte{7});
    const std::uint64_t strides[] = {kStride};
    Result<std::unique_ptr<StoreLease>> lease =
        directory->acquire(fingerprint, strides, SecondProcess::refuse);
    if (!lease) {
      ADD_FAILURE() << lease.status().message();
      std::abort();
    }
    SlotStoreOptions options;
    options.classes = {{kStride, kSlots}};
    options.commit_interval = std::chrono::milliseconds(2);
    options.catalog.helper_path = KVTIER_TEST_CATALOG_HELPER;
    options.catalog.max_bytes = std::uint64_t{4} << 20U;
    if (adjust) adjust(options);
    Result<SlotStore::Opened> opened =
        SlotStore::open(std::move(lease.value()), std::move(options), tell(std::move(on_found)));
    if (!opened) {
      ADD_FAILURE() << opened.status().message();
      std::abort();
    }
    return std::move(opened.value());
  }

  // Opens, and waits until it is known what stands in every slot.
  SlotStore::Opened open_and_scan(std::map<std::uint32_t, CatalogRecord>& by_slot) {
    auto found = std::make_shared<std::pair<Mutex, std::map<std::uint32_t, CatalogRecord>>>();
    SlotStore::Opened opened = open_real([found](const CatalogRecord& record) {
      const MutexLock lock(found->first);
      found->second.emplace(raw(record.place.slot), record);
    });
    wait_until([&] { return opened.store->scan_done(); });
    const MutexLock lock(found->first);
    for (const CatalogRecord& record : opened.blocks) found->second.emplace(raw(record.place.slot), record);
    by_slot = found->second;
    return opened;
  }

  TempDirectory files;
  std::unique_ptr<StoreDirectory> directory;
};

#endif

}  // namespace kvtier::store_world
