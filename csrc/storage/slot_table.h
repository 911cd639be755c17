// SlotTable: what the store knows of each slot, so that it can verify reads, make the catalog anew, and tell
// whether it may call itself clean.
//
// 96 bytes a slot, plus 5 for the time of last use: 50 MiB for a terabyte of 2 MiB slots, 400 MiB for one of
// 256 KiB. Memory is taken as the files grow.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/prefetch.h"
#include "kvtier/storage/catalog.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier {

// What stands in a slot, as far as is known.
enum class SlotContent : std::uint8_t {
  unknown,      // nothing that would be served: blank, or not looked at
  writing,      // a write is on its way
  written,      // an image whose write has completed
  durable,      // ... and was synced, and is in the catalog if there is one
  doubtful,     // anything: a write or wipe failed, or a sync that should have covered it
  untouchable,  // an image of a newer version; never read, written or wiped
};

struct SlotState {
  BlockKey key{};
  BlockKey parent{};
  Generation generation{0};
  std::uint64_t payload_bytes = 0;
  std::uint32_t depth = 0;
  std::uint32_t name_space = 0;  // index into the table's tags
  GroupId group{0};
  bool has_parent = false;
  SlotContent content = SlotContent::unknown;
  bool busy = false;  // the store itself is writing to it; a write of the owner waits
  bool held = false;  // busy with a request that was given up: nobody waits for that
};
static_assert(sizeof(SlotState) == 96);

// Threads: one, the I/O thread (before it starts, the opener), but for note_use() and friends, which are
// guarded.
class SlotTable {
 public:
  explicit SlotTable(std::size_t num_classes)
      : classes_(num_classes), used_(num_classes), uses_(num_classes) {}

  void grow(std::uint32_t class_index, std::uint32_t num_slots);
  void clear();  // every slot holds nothing
  std::uint32_t num_slots(std::uint32_t class_index) const {
    return static_cast<std::uint32_t>(classes_[class_index].size());
  }
  // Of them, those that hold nothing, as far as is known.
  std::uint32_t num_free(std::uint32_t class_index) const {
    return num_slots(class_index) - used_[class_index];
  }
  SlotState& at(const SlotPlace& place) { return classes_[place.class_index][raw(place.slot)]; }
  const SlotState& at(const SlotPlace& place) const { return classes_[place.class_index][raw(place.slot)]; }

  // It will be changed soon.
  void fetch(const SlotPlace& place) const { prefetch(&at(place), sizeof(SlotState)); }

  void set_content(const SlotPlace& place, SlotContent content);
  // Fills in what `record` says; set_block() leaves the time of last use to set_uses().
  void set_record(const CatalogRecord& record, SlotContent content);
  void set_block(const CatalogRecord& record, SlotContent content);
  void set_uses(std::span<const CatalogRecord> records) KVTIER_EXCLUDES(mutex_);
  CatalogRecord record_of(const SlotPlace& place) const;
  // Records of all slots whose content is `durable`.
  std::vector<CatalogRecord> durable_records() const;
  // Whether some slot holds, or may hold, what the catalog does not know.
  bool has_uncatalogued() const { return uncatalogued_ > 0; }
  // How often a slot has become doubtful.
  std::uint64_t num_doubts() const { return doubts_; }

  // Time of last use, Unix seconds. Any thread.
  void note_use(const SlotPlace& place, std::int64_t now_s) KVTIER_EXCLUDES(mutex_);
  bool has_uses() const KVTIER_EXCLUDES(mutex_);
  // `touch` changes of what was noted since the last call, for slots that are durable.
  std::vector<CatalogChange> take_uses() KVTIER_EXCLUDES(mutex_);

 private:
  struct Uses {
    std::vector<std::uint32_t> last_s;
    std::vector<bool> noted;
  };
  std::uint32_t intern(const NamespaceTag& tag);
  std::int64_t last_use_s(const SlotPlace& place) const KVTIER_REQUIRES(mutex_);

  std::vector<std::vector<SlotState>> classes_;
  std::vector<std::uint32_t> used_;  // by class: slots whose content is not `unknown`
  std::vector<NamespaceTag> tags_;   // few: one a tenant
  std::uint64_t uncatalogued_ = 0;   // slots that are writing, written or doubtful
  std::uint64_t doubts_ = 0;

  mutable Mutex mutex_;
  std::vector<Uses> uses_ KVTIER_GUARDED_BY(mutex_);
  std::vector<SlotPlace> noted_ KVTIER_GUARDED_BY(mutex_);
};

}  // namespace kvtier
