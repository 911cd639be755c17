// Every state in which a power loss can leave a slot, beside every state of the catalog: what is served has
// the right bytes, and what was committed and is not damaged is served (docs/durability.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <map>
#include <numeric>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "storage/real_store.h"

namespace kvtier::store_world {
#ifdef KVTIER_TEST_CATALOG_HELPER
namespace {

namespace fs = std::filesystem;

enum class CatalogState { older, newer, torn, absent };

std::ostream& operator<<(std::ostream& out, CatalogState state) {
  constexpr const char* kNames[] = {"older", "newer", "torn", "absent"};
  return out << kNames[static_cast<std::size_t>(state)];
}

// What the last opening wrote, block n in slot n, and the block that stood there before.
enum Slot : std::uint32_t { blank, old_block, old_version, torn_header, torn_payload, good, wiped, kStates };
constexpr std::uint32_t kOld = 50;       // the number of the block that slot n held before: kOld + n
constexpr std::uint32_t kKept = 20;      // slots that were written by the first opening alone ...
constexpr std::uint32_t kKeptEnd = 24;   // ... and not damaged
constexpr std::uint32_t kAdded = 30;     // slots that were written by the last opening for the first time ...
constexpr std::uint32_t kAddedEnd = 34;  // ... and not damaged

Block before(std::uint32_t slot) { return {slot == old_version ? slot : kOld + slot, 1}; }
Block after(std::uint32_t slot) { return {slot, 2}; }

class PowerLossTable : public RealStore, public testing::WithParamInterface<CatalogState> {
 protected:
  void SetUp() override {
    {
      SlotStore::Opened opened = open_real();
      wait_for_slots(*opened.store, kSlots);
      for (std::uint32_t slot = 0; slot < kStates; ++slot) write_durably(*opened.store, slot, before(slot));
      for (std::uint32_t slot = kKept; slot < kKeptEnd; ++slot) {
        write_durably(*opened.store, slot, {slot, 1});
      }
      ASSERT_TRUE(opened.store->close(soon()));
    }
    old_slots_ = file("slots.0");
    old_catalog_ = file("catalog.mdb");
    SlotStore::Opened opened = open_real();
    wait_for_slots(*opened.store, kSlots);
    for (std::uint32_t slot = 0; slot < kStates; ++slot) write_durably(*opened.store, slot, after(slot));
    for (std::uint32_t slot = kAdded; slot < kAddedEnd; ++slot) {
      write_durably(*opened.store, slot, {slot, 1});
    }
    // As they are on the drive at this moment: the store is open, its superblock not clean.
    slots_ = file("slots.0");
    catalog_ = file("catalog.mdb");
    const std::string superblock = file("superblock");
    ASSERT_TRUE(opened.store->close(soon()));
    opened.store.reset();
    directory.reset();
    put("superblock", superblock);
    put("slots.0", damaged_slots());
    put_catalog();
  }

  std::string damaged_slots() const {
    std::string slots = slots_;
    const auto take_old = [&](std::uint32_t slot, std::uint64_t begin, std::uint64_t end) {
      const std::uint64_t at = slot * kStride;
      std::copy_n(old_slots_.begin() + static_cast<std::ptrdiff_t>(at + begin), end - begin,
                  slots.begin() + static_cast<std::ptrdiff_t>(at + begin));
    };
    const auto zero = [&](std::uint32_t slot, std::uint64_t bytes) {
      std::fill_n(slots.begin() + static_cast<std::ptrdiff_t>(slot * kStride), bytes, '\0');
    };
    zero(blank, kStride);
    take_old(old_block, 0, kStride);
    take_old(old_version, 0, kStride);
    take_old(torn_header, 512, kStride);
    take_old(torn_payload, kSlotHeaderBytes + 4096, kStride);
    zero(wiped, kSlotHeaderBytes);
    return slots;
  }

  void put_catalog() const {
    switch (GetParam()) {
      case CatalogState::older: put("catalog.mdb", old_catalog_); break;
      case CatalogState::newer: put("catalog.mdb", catalog_); break;
      case CatalogState::torn: put("catalog.mdb", catalog_.substr(0, 12288)); break;
      case CatalogState::absent: fs::remove(store_path() / "catalog.mdb"); break;
    }
  }

  // The block that this slot must serve, if any.
  std::optional<Block> owed(std::uint32_t slot) const {
    const bool by_headers = GetParam() == CatalogState::torn || GetParam() == CatalogState::absent;
    if (slot >= kKept) return Block{slot, 1};
    switch (slot) {
      // Bytes of before, of a block that this catalog knows nothing newer of.
      case old_block:
      case old_version: return GetParam() == CatalogState::newer ? std::nullopt : std::optional(before(slot));
      // An older catalog says that another block stands here.
      case good:
        return by_headers || GetParam() == CatalogState::newer ? std::optional(after(slot)) : std::nullopt;
      default: return std::nullopt;
    }
  }

  // What the named slot serves. Wrong bytes fail the test.
  static std::optional<Block> served_at(SlotStore& store, const CatalogRecord& record) {
    const std::uint32_t slot = raw(record.place.slot);
    const std::array blocks = {before(slot), after(slot), Block{slot, 1}};
    const auto named =
        std::ranges::find(blocks, record.block.key, [](const Block& block) { return key_of(block.number); });
    if (named == blocks.end()) return std::nullopt;
    const auto pending = start_read(store, slot, *named);
    if (!pending->done.wait().good()) return std::nullopt;
    for (const Block& block : blocks) {
      if (block.number == named->number && pending->image.holds(block)) return block;
    }
    ADD_FAILURE() << "wrong bytes in slot " << slot;
    return std::nullopt;
  }

  fs::path store_path() const {
    for (const auto& entry : fs::directory_iterator(files.path() + "/disk/stores")) return entry.path();
    return {};
  }
  std::string file(const std::string& name) const {
    std::ifstream in(store_path() / name, std::ios::binary);
    EXPECT_TRUE(in) << name;
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  void put(const std::string& name, const std::string& content) const {
    std::ofstream out(store_path() / name, std::ios::binary | std::ios::trunc);
    out.write(content.data(), static_cast<std::streamsize>(content.size()));
  }

 private:
  std::string old_slots_, slots_, old_catalog_, catalog_;
};

TEST_P(PowerLossTable, what_is_committed_and_sound_is_served_and_nothing_else) {
  std::map<std::uint32_t, CatalogRecord> named;
  SlotStore::Opened opened = open_and_scan(named);
  const bool believed = GetParam() == CatalogState::older || GetParam() == CatalogState::newer;
  EXPECT_EQ(opened.report.source, believed ? OpenReport::Source::catalog : OpenReport::Source::headers);

  std::vector<std::uint32_t> slots(kStates);
  std::iota(slots.begin(), slots.end(), 0U);
  for (std::uint32_t n = 0; n < kKeptEnd - kKept; ++n) slots.insert(slots.end(), {kKept + n, kAdded + n});
  for (const std::uint32_t slot : slots) {
    const auto record = named.find(slot);
    const auto served = record == named.end() ? std::nullopt : served_at(*opened.store, record->second);
    EXPECT_EQ(served, owed(slot)) << "slot " << slot;
  }
  for (const auto& [slot, record] : named) {
    EXPECT_TRUE(std::ranges::find(slots, slot) != slots.end()) << slot;
  }
  EXPECT_TRUE(opened.store->close(soon()));
}

INSTANTIATE_TEST_SUITE_P(EveryCatalog, PowerLossTable,
                         testing::Values(CatalogState::older, CatalogState::newer, CatalogState::torn,
                                         CatalogState::absent),
                         testing::PrintToStringParamName());

}  // namespace
#endif
}  // namespace kvtier::store_world
