// The engine's disk tier: which block is in which slot of which drive, and what moves between host and
// drives.
//
//   store ready --candidates--> admission, budget --reserve--> SlotStore::write --> on_written: hit by others
//                                                                              '--> on_durable: tickets
//   load, prefetch --host reserve, pin on disk--> SlotStore::read --> verified: host commit, loads go on
//                                                              '--> not good: a miss; the slot is wiped
//
// One volume is one SlotStore. The TierIndex here is of disk slots; the engine's other one is of host slots.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/engine/engine.h"
#include "kvtier/engine/hop_meter.h"
#include "kvtier/engine/ticket.h"
#include "kvtier/index/admission.h"
#include "kvtier/index/tier_index.h"
#include "kvtier/index/write_budget.h"
#include "kvtier/storage/slot_store.h"

namespace kvtier {

struct Operation;

// The `durable` moment of one store: over when the fate of each of its blocks on disk is known. Guarded by
// the engine's mutex.
struct DurableTracker {
  std::shared_ptr<Ticket> ticket;
  std::uint64_t store_number = 0;
  std::size_t waiting = 0;
  Status failure;
  bool complete = false;  // every block has been counted in
};

// A block on its way from host to disk. While it is written, the host slot is pinned. What the scan after an
// unclean end has found is `written` from the start, and has no host slot.
struct WriteBack {
  enum class Step : std::uint8_t { queued, writing, written, over };
  BlockKey key{};
  EntryId host{0};
  std::uint32_t host_generation = 0;  // of the entry's record: it may be another block's by the time
  EntryId disk{0};                    // from `writing` on
  std::uint32_t disk_generation = 0;  // of that entry's record, from `written` on
  std::uint32_t volume = 0;           // from `writing` on
  Step step = Step::queued;
  bool failed = false;  // found by a scan, and could not be made durable
  std::vector<std::shared_ptr<DurableTracker>> trackers;
};

// What the scan after an unclean end has found on a drive.
struct Found {
  std::uint32_t volume = 0;
  CatalogRecord block;
  std::shared_ptr<WriteBack> write_back;
};

// A slot on a drive whose header is to be wiped before it is free.
struct OwedWipe {
  SlotPlace place;
  std::optional<EntryId> entry;  // of the slot, `leaving`; none: the slot alone is
  bool pinned = false;           // the entry, by us; else it is quarantined
};

// A block on its way from disk to host: the host slot is filling, the disk slot pinned. Once it is given up,
// since the drive does not answer, nobody waits for it, and the slots are held until the drive lets go.
struct Promotion {
  EntryId host{0};
  EntryId disk{0};
  std::uint32_t volume = 0;
  std::optional<StoreJob> job;  // once submitted
  ReadPriority priority = ReadPriority::prefetch;
  bool cancelled = false;
  HopMeter::Flight flight;
  // Who waits for it, and as which of its blocks.
  std::vector<std::pair<std::shared_ptr<Operation>, std::uint32_t>> waiting;
};

// The write budget, kept across restarts. What is saved says less than there is, by up to a 64th: a process
// that is killed loses at most that, and does not find a fuller bucket than it left. Pure: time is handed in.
class KeptBudget {
 public:
  // Without a limit nothing is counted. `saved`: of the last opening; nullopt is a full bucket.
  KeptBudget(std::optional<std::uint64_t> bytes_per_day, const std::optional<SavedBudget>& saved,
             std::int64_t unix_s, std::int64_t now_us);
  bool take(std::uint64_t bytes, std::int64_t now_us) { return budget_.take(bytes, now_us); }
  double fullness(std::int64_t now_us) { return budget_.fullness(now_us); }
  std::uint64_t left_bytes() const { return budget_.left_bytes(); }

  // What is to be saved now, if less is left than was saved; and what is exactly so, at the end.
  std::optional<SavedBudget> to_save(std::int64_t unix_s);
  std::optional<SavedBudget> at_close(std::int64_t unix_s) const;

 private:
  std::optional<std::uint64_t> bytes_per_day_;
  WriteBudget budget_;
  std::uint64_t saved_bytes_ = 0;  // what the next opening would find
};

// Guarded by the engine's mutex, but `volumes` and `classes`, which do not change between start() and
// close().
struct DiskTier {
  struct Volume {
    std::string path;
    std::string store_name;
    std::unique_ptr<SlotStore> store;
    OpenReport report;
    std::uint32_t writing = 0;    // write-backs under way
    std::uint32_t undurable = 0;  // written, and not known to be durable
    bool flushing = false;
    bool flush_failed = false;         // the last one, and nothing has been written since
    std::vector<OwedWipe> owed_wipes;  // that have failed, or wait until the drive is in service
  };

  DiskTier(const TierIndex::Options& options, Admission admission, const KeptBudget& write_budget,
           std::uint32_t host_slots)
      : index(options),
        admission_policy(admission, {.host_blocks = host_slots, .disk_blocks = index.index().capacity()},
                         options.hash_seed),
        budget(write_budget),
        most_writing(std::max(1U, host_slots / kWriteBackShare)),
        most_candidates(2 * std::size_t{host_slots}) {}

  TierIndex index;
  std::vector<Volume> volumes;
  AdmissionPolicy admission_policy;
  KeptBudget budget;
  static constexpr std::uint32_t kWriteBackShare = 8;  // of the host slots may be pinned by write-backs
  std::uint32_t most_writing;
  std::size_t most_candidates;  // that wait for a file to grow; evicted ones stay among them until their turn

  std::deque<std::shared_ptr<WriteBack>> candidates;
  std::unordered_map<std::uint32_t, std::shared_ptr<WriteBack>>
      by_host;  // queued or writing, by raw host EntryId
  std::unordered_map<std::uint32_t, std::shared_ptr<WriteBack>> undurable;   // written, by raw disk EntryId
  std::unordered_map<std::uint32_t, std::shared_ptr<WriteBack>> found;       // likewise, by a scan
  std::unordered_map<std::uint32_t, std::shared_ptr<Promotion>> promotions;  // by raw host EntryId
  std::unordered_set<std::uint32_t> held;  // raw host EntryIds, pinned: of writes that were given up
  std::uint32_t writing = 0;
  // Writes whose slots are reserved and that the stores have not been given yet, by the number of the round.
  std::set<std::uint64_t> submitting;
  std::uint64_t submissions = 0;
  std::uint32_t doomed = 0;                // slots whose wipe is under way, or comes with a write's end
  std::set<std::uint64_t> tracked_stores;  // numbers of those whose durable moment is not settled
  std::uint32_t next_volume = 0;
  std::vector<std::uint32_t> buffered_slots;  // by host class: those whose memory the drives were told of

  // What is to make this block durable; null when it is durable.
  std::shared_ptr<WriteBack> undurable_at(EntryId id) {
    for (const auto* map : {&undurable, &found}) {
      const auto at = map->find(raw(id));
      if (at != map->end() && at->second->disk_generation == index.index().at(id).generation) {
        return at->second;
      }
    }
    return nullptr;
  }
};

}  // namespace kvtier
