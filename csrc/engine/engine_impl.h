// The engine's inside: one mutex, the state it guards, and the operations that run without it.
//
// Lock order: EngineHandle's epoch_mutex_ or attach_mutex_, then mutex_. Devices, arena and tickets are
// called with mutex_ free. A waiter's thread may call finish_operation() until its Transfers is destroyed, so
// whatever that touches outlives all Transfers; close() sees to it.
#pragma once

#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "disk_tier.h"
#include "ghosts.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"
#include "kvtier/engine/engine.h"
#include "kvtier/engine/hop_meter.h"
#include "kvtier/index/tier_index.h"
#include "kvtier/transfer/transfers.h"

namespace kvtier {

// Keys that lookup() and its like handle per hold of the mutex: about 100 us, so that a completion never
// waits long for them.
inline constexpr std::size_t kKeysPerHold = 4096;

inline constexpr std::int64_t kLongestTtlUs = std::int64_t{1}
                                              << 60;  // any clock's now and this do not overflow

class EngineImpl;

class PagesImpl final : public Pages {
 public:
  PagesImpl(EngineImpl& engine, GroupId group, std::shared_ptr<Device> device, Transfers& transfers,
            PageMap map)
      : engine_(&engine),
        group_(group),
        device_(std::move(device)),
        transfers_(&transfers),
        map_(std::make_shared<const PageMap>(std::move(map))) {}

  const PageMap& map() const override { return *map_; }
  GroupId group() const override { return group_; }
  Device& device() const override { return *device_; }
  bool attached() const override { return attached_.load(); }

 private:
  friend class EngineImpl;
  EngineImpl* engine_;  // compared, never followed
  GroupId group_;
  std::shared_ptr<Device> device_;
  Transfers* transfers_;
  std::shared_ptr<const PageMap> map_;
  std::atomic<bool> attached_{true};
  // Guarded by EngineImpl::mutex_:
  std::uint32_t running_ = 0;
  bool undrained_ = false;  // a copy may touch these pages for ever
};

// What a lease holds; shared by the Lease and the engine's list. Guarded by EngineImpl::mutex_.
struct LeaseState {
  std::vector<EntryId> pinned;          // in prompt order, group by group
  std::vector<EntryId> pinned_on_disk;  // those that were on disk alone
  std::size_t num_blocks = 0;
  std::optional<std::int64_t> expires_us;
  bool active = true;
};

// A load some of whose blocks come from disk: they go on to the pages in parts, as they arrive.
struct Pipeline {
  struct Part {
    std::vector<EntryId> entries;  // pinned
    std::vector<std::uint32_t> blocks;
    std::vector<SlotId> slots;
    bool unpinned = false;  // by an ordering point that a test disabled
  };
  std::vector<PageId> pages;
  std::uint32_t first_block = 0;
  std::shared_ptr<Event> after;  // the point of the framework's stream at load(); null for a prefetch
  Deadline read_deadline;        // of a prefetch
  // Guarded by EngineImpl::mutex_:
  std::uint32_t reads_left = 0;
  std::uint32_t holds = 1;  // parts that run, and calls that are about to submit one; 0 ends the operation
  Part arrived;
  std::uint64_t next_part_bytes = 1;  // what makes a part of what has arrived
};

// A running store, load or prefetch: the owner of its reservations or pins (I5).
struct Operation {
  std::uint64_t grant_id = 0;      // 0: not a grant
  std::uint64_t store_number = 0;  // stores are numbered, for flush()
  Direction direction = Direction::store;
  GroupId group{0};
  std::shared_ptr<Ticket> ticket;
  PagesImpl* pages = nullptr;  // null for a grant; outlives the operation: detach() and close() wait for it
  std::vector<BlockOutcome> outcomes;
  std::vector<EntryId> entries;            // reserved or pinned, in prompt order
  std::vector<std::uint32_t> blocks;       // the key that each entry stands for
  std::vector<SlotId> slots;               // and the slot it has
  std::optional<HopMeter::Flight> flight;  // of a load that goes to its pages in one
  std::vector<EntryId> present;            // pinned by a store only while it reserves
  // A store's blocks that were there already, with the generation of their records: are they on disk?
  std::vector<std::pair<EntryId, std::uint32_t>> seen;
  std::unique_ptr<Pipeline> pipeline;  // null unless blocks come from disk
  std::uint32_t parts_left = 1;
  bool is_prefetch = false;
  bool admitted = false;  // close(), detach() and flush() wait for it
  bool finished = false;
  TransferOutcome outcome;
  bool entries_settled = false;  // by an ordering point that a test disabled
};

class EngineImpl : public std::enable_shared_from_this<EngineImpl> {
 public:
  EngineImpl(EngineConfig config, const TierIndex::Options& options);
  ~EngineImpl();
  Status start();

  Result<std::shared_ptr<Pages>> attach(std::shared_ptr<Device> device, GroupId group,
                                        std::span<const TensorView> tensors);
  Status detach(Pages& pages, Deadline deadline);
  Result<Match> lookup(std::span<const BlockKey> keys);
  Result<std::shared_ptr<LeaseState>> pin(std::span<const BlockKey> keys, std::size_t max_blocks,
                                          std::optional<std::int64_t> ttl_us, const Match* match);
  void release(LeaseState& lease);
  bool lease_active(const LeaseState& lease);
  Result<std::shared_ptr<Ticket>> store(Pages& pages, const StoreRequest& request);
  Result<std::shared_ptr<Ticket>> load(Pages& pages, const LoadRequest& request);
  Result<Grant> grant_store(GroupId group, const StoreRequest& request, std::uint32_t num_parts);
  Result<Grant> grant_load(GroupId group, const LoadRequest& request, std::uint32_t num_parts);
  Status finish_part(std::uint64_t grant_id, const TransferOutcome& outcome);
  // `what` is TierIndex::expect or expect_no_more: for each key, group and tier, in that order, at most
  // `most` times. Counts them in `told`, which begins at 0 and is right after an exception too.
  Status tell_expected(std::span<const BlockKey> keys,
                       void (TierIndex::*what)(const BlockKey& key, GroupId group), std::size_t most,
                       std::size_t& told);
  Result<std::uint64_t> touch(std::span<const BlockKey> keys);
  Result<std::uint64_t> drop(std::span<const BlockKey> keys);
  Result<std::uint64_t> drop_namespace(std::string_view name_space);
  Result<std::shared_ptr<Ticket>> prefetch(std::span<const BlockKey> keys, Deadline deadline);
  Result<std::uint64_t> cancel_prefetch(const std::shared_ptr<Ticket>& ticket);
  Result<std::uint32_t> poll();
  Result<FlushPoint> flush_point();
  Result<FlushResult> flush(const FlushPoint& point, Deadline deadline);
  Status wait_until_whole();
  Result<BlockEvents> take_events(std::size_t most);
  // What is announced from now on has keys of this epoch.
  void announce_epoch(const Epoch& epoch);
  Result<EngineStats> stats();
  Result<Hops> hops();
  Status pause_ghosts(bool paused);
  Status close(Deadline deadline);
  bool closed();

  const EngineConfig& config() const { return config_; }
  const Arena& arena() const { return *arena_; }
  bool in_forked_child() const { return process_generation() != born_in_; }

  // Runs f; a broken invariant inside marks the engine failed instead of leaving it (release builds).
  template <typename F>
  auto guarded(F&& f) -> decltype(f()) {
    if (in_forked_child()) return forked();
    try {
      return f();
    } catch (const std::bad_alloc&) {
      return Status::resource("out of memory");
    } catch (const std::exception& bug) {
      mark_failed(bug.what());
      return Status::internal(bug.what());
    }
  }
  // The engine, or its arena: for threads, copies, drives or children of fork() that may use it for ever.
  static void keep_for_ever(std::shared_ptr<void> what);

  // Runs f on a store's thread, where nothing may be thrown: a bug, or no memory for the bookkeeping, marks
  // the engine failed.
  template <typename F>
  void contained(F&& f) noexcept {
    try {
      f();
    } catch (const std::exception& bug) {
      try {
        mark_failed(bug.what());
      } catch (...) {  // NOLINT: no memory for the reason
      }
    }
  }

 private:
  struct AttachedDevice {
    std::shared_ptr<Device> device;
    std::unique_ptr<Transfers> transfers;
  };
  // An API call that submits: close() waits until it has returned.
  class Call {
   public:
    explicit Call(EngineImpl& engine);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    EngineImpl& engine_;
  };

  // Reads of blocks that are on disk alone, to be started once the mutex is free.
  struct DiskRead {
    std::uint32_t volume = 0;
    SlotRead read;
    std::shared_ptr<Promotion> promotion;
  };
  struct Reads {
    std::vector<DiskRead> begin;
    std::vector<std::pair<std::uint32_t, StoreJob>> hurry;
  };

  static Status forked() {
    return Status::closed("this engine belongs to the parent process; open one of your own after fork()");
  }
  Status check_open() KVTIER_REQUIRES(mutex_);
  // Tells the eviction policies what time it is.
  void tick() KVTIER_REQUIRES(mutex_);
  void mark_failed(const std::string& why) KVTIER_EXCLUDES(mutex_);

  // Steps 1 and 3 of every operation; see engine.h.
  Status admit(Operation& operation) KVTIER_REQUIRES(mutex_);
  Status begin_store(Operation& operation, const StoreRequest& request);
  // Loads of whole blocks also bring what is on disk alone: `reads` are then to be started.
  Status begin_load(const std::shared_ptr<Operation>& shared, const LoadRequest& request, Reads* reads);
  // Exactly once for every admitted operation, whatever happened: else close() would wait for ever.
  void finish_operation(const std::shared_ptr<Operation>& operation) noexcept;
  void fail_operation(const std::shared_ptr<Operation>& operation, const Status& why) noexcept;
  // f() begins and submits. An exception in it ends the operation, if it was admitted, before it goes on.
  template <typename F>
  auto finished_if_thrown(const std::shared_ptr<Operation>& operation, F&& f) -> decltype(f());
  void settle_entries(Operation& operation);
  void release_present(Operation& operation);
  // A load is about to go to its pages; finish_operation() ends it.
  void take_off(Operation& operation) KVTIER_EXCLUDES(mutex_);
  void count(const Operation& operation) KVTIER_REQUIRES(mutex_);
  void submit(const std::shared_ptr<Operation>& operation, std::vector<PageId> pages, StreamHandle stream,
              std::uint32_t first_block, std::uint32_t layers_per_batch);
  void break_order_for_tests(const std::shared_ptr<Operation>& operation);
  Result<PagesImpl*> checked(Pages& pages);
  static Status check_request(const GroupSpec& spec, std::size_t num_keys, std::size_t num_pages,
                              std::uint32_t first_block);
  std::shared_ptr<Operation> make_operation(Direction direction, GroupId group, std::size_t num_blocks);
  Status check_grant(GroupId group, std::uint32_t num_parts, std::size_t num_keys,
                     std::uint32_t first_block) const;
  static Status check_depth(std::size_t num_keys, std::uint32_t first_block);
  Result<Grant> make_grant(const std::shared_ptr<Operation>& operation, std::uint32_t num_parts);

  // Disk tier: opening and closing (disk_open.cpp).
  Status open_disks();
  SlotStoreOptions store_options(std::size_t disk);
  void adopt_blocks(std::uint32_t volume, std::span<const CatalogRecord> blocks,
                    const std::shared_ptr<WriteBack>& found = nullptr) KVTIER_EXCLUDES(mutex_);
  std::function<void(const Status&)> on_found(std::uint32_t volume, const CatalogRecord& block)
      KVTIER_EXCLUDES(mutex_);
  void note_found(const std::shared_ptr<WriteBack>& found, Entry& entry) KVTIER_REQUIRES(mutex_);
  void on_found_durable(const std::shared_ptr<WriteBack>& found, const Status& status)
      KVTIER_EXCLUDES(mutex_);
  Entry* restore_block(std::uint32_t volume, const CatalogRecord& block) KVTIER_REQUIRES(mutex_);
  // entries[i] is of blocks[i], or null.
  void link_restored(std::span<const CatalogRecord> blocks, std::span<Entry* const> entries)
      KVTIER_REQUIRES(mutex_);
  void offer_buffers() KVTIER_EXCLUDES(mutex_);
  // Frees it, unless a drive may write into it for ever.
  void end_arena();
  Status close_disks(Deadline deadline);
  void add_disk_stats(EngineStats& stats) KVTIER_REQUIRES(mutex_);

  // host -> disk (disk_write.cpp). What is settled outside the mutex is collected in `settled`.
  using Settled = std::vector<std::pair<std::shared_ptr<Ticket>, std::uint64_t>>;  // and the store's number
  struct DiskWrite {
    std::uint32_t volume = 0;
    SlotWrite write;
  };
  void track_store(const Operation& operation);
  void add_candidate(Entry& entry, const std::shared_ptr<DurableTracker>& tracker) KVTIER_REQUIRES(mutex_);
  void end_write_back(WriteBack& write_back, bool durable, std::uint64_t EngineStats::* counter,
                      const Status& status, Settled& settled) KVTIER_REQUIRES(mutex_);
  void end_tracked(DurableTracker& tracker, Settled& settled) KVTIER_REQUIRES(mutex_);
  void pump_write_backs();
  void save_budget(const SavedBudget& budget);
  bool next_write(std::vector<DiskWrite>& writes, Settled& settled) KVTIER_REQUIRES(mutex_);
  std::optional<std::uint32_t> choose_volume(std::size_t class_index) KVTIER_REQUIRES(mutex_);
  void on_written(const std::shared_ptr<WriteBack>& write_back, const Status& status);
  void on_write_let_go(const std::shared_ptr<WriteBack>& write_back);
  void wipe_what_is_owed();
  void drop_gone_candidates(Settled& settled) KVTIER_REQUIRES(mutex_);
  void on_durable(const std::shared_ptr<WriteBack>& write_back, const Status& status);
  void lose_undurable(const WriteBack& write_back) KVTIER_REQUIRES(mutex_);
  OwedWipe owed_of(EntryId disk, bool pinned) KVTIER_REQUIRES(mutex_);
  void wipe_doomed(std::uint32_t volume, const OwedWipe& wipe);
  void end_wipe(std::uint32_t volume, const OwedWipe& wipe, const Status& status) KVTIER_REQUIRES(mutex_);
  void settle_durable(const Settled& settled) KVTIER_EXCLUDES(mutex_);
  Status wait_durable(std::uint64_t up_to, Deadline deadline);
  static bool can_be_hurried(const DiskTier::Volume& volume);
  void hurry_drives();
  std::uint64_t disk_dropped() const KVTIER_REQUIRES(mutex_);
  // Stores that run and have a lower number.
  std::uint64_t running_before(std::uint64_t store_number) const KVTIER_REQUIRES(mutex_);

  // disk -> host (disk_read.cpp).
  std::uint64_t readable_volumes() const;  // one bit each
  Entry* find_on_disk(const BlockKey& key, GroupId group, std::uint64_t readable) KVTIER_REQUIRES(mutex_);
  // Whether the block will come: then the operation waits for it as its block `i`.
  bool promote(const std::shared_ptr<Operation>& operation, std::uint32_t i, const BlockKey& key,
               GroupId group, ReadPriority priority, std::uint64_t readable, Reads& reads)
      KVTIER_REQUIRES(mutex_);
  bool begin_read(const std::shared_ptr<Operation>& operation, std::uint32_t i, Entry& on_disk,
                  ReadPriority priority, Reads& reads) KVTIER_REQUIRES(mutex_);
  void start_reads(Reads& reads);
  void load_from_disk(const std::shared_ptr<Operation>& operation, Reads& reads);
  void on_read(const std::shared_ptr<Promotion>& promotion, const ReadOutcome& outcome);
  void on_read_let_go(const Promotion& promotion);
  void advance(const std::shared_ptr<Operation>& operation);
  void submit_part(const std::shared_ptr<Operation>& operation, Pipeline::Part part);
  void break_part_order_for_tests(const Operation& operation, Pipeline::Part& part);
  void end_part(const std::shared_ptr<Operation>& operation, const Pipeline::Part& part,
                const HopMeter::Flight& flight, const TransferOutcome& outcome) noexcept;
  void release_hold(const std::shared_ptr<Operation>& operation);
  std::uint64_t cancel_reads(const std::vector<std::shared_ptr<Operation>>& prefetches);
  void expire_prefetches();

  bool touch_on_disk(const BlockKey& key, GroupId group) KVTIER_REQUIRES(mutex_);

  void open_events() KVTIER_EXCLUDES(mutex_);

  // Ghost caches (ghosts.cpp).
  void open_ghosts() KVTIER_EXCLUDES(mutex_);
  void note_ghosts(const BlockKey& key, GroupId group, void (Ghosts::*what)(std::uint64_t))
      KVTIER_REQUIRES(mutex_);
  // The blocks are stored or loaded.
  void note_use(std::span<const BlockKey> keys, GroupId group) KVTIER_EXCLUDES(mutex_);

  // Takes blocks off the disk for good, and waits until the drives confirm it (disk_drop.cpp).
  using DiskVictims = std::vector<std::vector<EntryId>>;  // of each volume; pinned
  void doom(Entry& entry, DiskVictims& victims) KVTIER_REQUIRES(mutex_);
  Status wipe_and_wait(DiskVictims victims);
  // Until what stood on the drives uncatalogued after an unclean end is in the index too.
  Status wait_for_scans();

  NamespaceId intern(std::string_view name_space) KVTIER_REQUIRES(mutex_);
  NamespaceId intern_tag(const NamespaceTag& tag) KVTIER_REQUIRES(mutex_);
  void expire_leases() KVTIER_REQUIRES(mutex_);
  // Drops the blocks whose time to live is over. One load of an atomic where none has one.
  void expire_blocks() KVTIER_EXCLUDES(mutex_);
  void note_next_expiry() KVTIER_REQUIRES(mutex_);
  // A store names the block, which it reserved or found.
  struct Wish {
    std::optional<Priority> priority;
    std::optional<std::int64_t> expires_us;
  };
  const Entry* below(const BlockKey& key, GroupId group, const Wish& wish) KVTIER_REQUIRES(mutex_);
  void grant_wish(Entry& entry, const Wish& wish) KVTIER_REQUIRES(mutex_);
  void end_lease(LeaseState& lease) KVTIER_REQUIRES(mutex_);
  std::size_t ready_prefix(const std::vector<std::vector<BlockState>>& states, std::size_t num_keys) const;
  // What pin() has found and pinned: [group][key]; `entries` where the state is ready.
  struct Pinned {
    std::vector<std::vector<BlockState>> states;
    std::vector<std::vector<EntryId>> entries;
    bool touched = false;  // already: a window keeps few of what is pinned, so there it is done at the end
  };
  void pin_part(std::span<const BlockKey> keys, std::size_t begin, std::size_t end, std::size_t g,
                const Match* match, Pinned& pinned) KVTIER_REQUIRES(mutex_);
  void keep_needed(const Pinned& pinned, LeaseState& lease) KVTIER_REQUIRES(mutex_);
  bool wait_idle(Deadline deadline) KVTIER_EXCLUDES(mutex_);

  const EngineConfig config_;
  const std::vector<std::size_t> class_of_group_ = config_.class_of_group();
  const std::shared_ptr<const Clock> clock_;
  const std::uint64_t born_in_ = process_generation();
  const std::uint64_t hash_seed_;

  Mutex attach_mutex_;
  std::unique_ptr<Arena> arena_;  // written by start() and close() only
  std::vector<AttachedDevice> devices_ KVTIER_GUARDED_BY(attach_mutex_);

  Mutex mutex_;
  CondVar idle_;                              // running_, calls_ or a PagesImpl::running_ went down
  TierIndex tier_ KVTIER_GUARDED_BY(mutex_);  // of the host tier
  std::vector<std::pair<std::string, std::string>> left_out_disks_;  // path, reason; set by start()
  std::atomic<bool> drives_hold_memory_{false};  // closed, and a drive has not answered to all requests
  std::unique_ptr<DiskTier> disk_;  // null without one; set by start(), its inside guarded by mutex_
  // What scans found before open_disks() was through with what the catalogs say.
  bool takes_found_ KVTIER_GUARDED_BY(mutex_) = false;
  std::vector<Found> found_early_ KVTIER_GUARDED_BY(mutex_);
  GroupId ghost_group_{0};  // whose blocks the ghosts are of; set by start()
  std::unique_ptr<Ghosts> ghosts_ KVTIER_GUARDED_BY(mutex_);  // null if they are not wanted
  bool ghosts_paused_ KVTIER_GUARDED_BY(mutex_) = false;
  std::unique_ptr<EventFeed> events_ KVTIER_GUARDED_BY(mutex_);                   // null if nobody wants them
  std::vector<std::shared_ptr<Operation>> prefetches_ KVTIER_GUARDED_BY(mutex_);  // running
  EngineStats counters_ KVTIER_GUARDED_BY(mutex_);
  HopMeter to_device_ KVTIER_GUARDED_BY(mutex_);
  HopMeter from_disk_ KVTIER_GUARDED_BY(mutex_);
  std::unordered_map<std::uint64_t, std::shared_ptr<Operation>> grants_ KVTIER_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<Pages>> all_pages_ KVTIER_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<LeaseState>> leases_ KVTIER_GUARDED_BY(mutex_);
  static constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();
  std::atomic<std::int64_t> next_expiry_us_{kNever};  // written with mutex_
  std::map<std::string, NamespaceId, std::less<>> namespaces_ KVTIER_GUARDED_BY(mutex_);
  std::map<NamespaceTag, NamespaceId> namespace_of_tag_ KVTIER_GUARDED_BY(mutex_);
  std::vector<NamespaceTag> namespace_tags_ KVTIER_GUARDED_BY(mutex_);  // by NamespaceId
  std::uint64_t next_grant_ KVTIER_GUARDED_BY(mutex_) = 1;
  std::uint64_t stores_begun_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint64_t reported_durable_ KVTIER_GUARDED_BY(mutex_) = 0;  // by flush()
  std::uint64_t reported_dropped_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::set<std::uint64_t> running_stores_ KVTIER_GUARDED_BY(mutex_);  // their numbers, for flush()
  std::uint32_t running_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint32_t calls_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint32_t undrained_ KVTIER_GUARDED_BY(mutex_) = 0;  // transfers that may run for ever
  bool closing_ KVTIER_GUARDED_BY(mutex_) = false;
  bool closed_ KVTIER_GUARDED_BY(mutex_) = false;
};

template <typename F>
auto EngineImpl::finished_if_thrown(const std::shared_ptr<Operation>& operation, F&& f) -> decltype(f()) {
  static const Status kNoMemory = Status::resource("out of memory before anything was submitted");
  try {
    return f();
  } catch (...) {
    // Nothing was submitted: Transfers::submit() throws only before that.
    if (operation->admitted) {
      release_present(*operation);
      operation->outcome.status = kNoMemory;
      for (BlockOutcome& outcome : operation->outcomes) {
        if (outcome == BlockOutcome::running) outcome = BlockOutcome::failed;
      }
      finish_operation(operation);
    }
    throw;
  }
}

}  // namespace kvtier
