// Engine: the whole; what users open and close.
//
// It joins a pure TierIndex (which block is in which slot, guarded by the one mutex) with an Arena (the
// slots' memory) and, per attached device, Transfers (the copies). Every operation has the same shape:
//
//   1. under the mutex: decide - reserve slots or pin blocks, and note an Operation that owns them;
//   2. without it: submit the copies;
//   3. on the waiter's thread, under the mutex again: commit or abort, unpin, count; then settle the Ticket.
//
// The mutex is never held across a copy, a device call, a callback or Python (I6), and long loops let go
// of it every thousand blocks. Outcomes are values; a failure below makes a miss (I7); a bug marks the
// engine failed: every lookup then misses and stats().health says why.
//
// Several ranks: with GroupSpec::num_stripes > 1 a slot holds one stripe per rank, and only grants (below)
// move blocks: this engine is then the keeper, and the workers of RankWorker copy.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvtier/core/clock.h"
#include "kvtier/core/layout.h"
#include "kvtier/core/status.h"
#include "kvtier/core/types.h"
#include "kvtier/engine/stats.h"
#include "kvtier/engine/ticket.h"
#include "kvtier/index/admission.h"
#include "kvtier/index/event_feed.h"
#include "kvtier/index/eviction.h"
#include "kvtier/memory/arena.h"
#include "kvtier/platform/device.h"
#include "kvtier/storage/slot_store.h"
#include "kvtier/transfer/page_map.h"

namespace kvtier {

// One drive of the disk tier.
struct DiskConfig {
  std::string path;                  // absolute; made if it is not there
  std::uint64_t capacity_bytes = 0;  // hard bound of everything under it, whoever put it there
};

// All drives together: whole blocks are placed on one of them.
struct DiskOptions {
  std::vector<DiskConfig> disks;  // empty: no disk tier
  Fingerprint fingerprint{};      // of all that makes two engines' blocks incompatible
  SecondProcess second_process = SecondProcess::next_store;
  std::string eviction{kDefaultDiskEviction};  // one of eviction_choices()
  Admission admission = kDefaultAdmission;     // once the tier was full; before that, all
  // Bytes written a day over all drives; nullopt: one capacity. 0: no limit.
  std::optional<std::uint64_t> write_bytes_per_day;
  std::shared_ptr<SlotCipher> cipher;  // null: images stand in clear
  std::uint32_t queue_depth = 32;      // of each drive
  std::chrono::milliseconds commit_interval{500};
  // Who waits for a drive that has not answered for so long waits no more: a load misses, a store is not
  // durable; the drive is out of service until it answers (SlotStoreOptions::answer_within).
  std::chrono::milliseconds answer_within{30'000};
  std::string catalog_helper;  // path of the program; empty: beside the library
  // For tests: the last word on what each SlotStore is opened with.
  std::function<void(SlotStoreOptions& options, std::size_t disk)> adjust;
};

struct EngineConfig {
  std::vector<GroupSpec> groups;
  std::uint64_t host_bytes = 0;
  std::uint64_t chunk_bytes = std::uint64_t{128} << 20;
  std::optional<NumaPlacement> placement;  // of the arena; nullopt: the kernel's choice
  std::shared_ptr<const Clock> clock;      // null: the steady clock
  HostMemory* memory = nullptr;            // null: the real one; must outlive the engine
  std::optional<std::uint64_t> hash_seed;  // nullopt: random
  std::string eviction{kDefaultEviction};  // of the host tier: one of eviction_choices()
  DiskOptions disk;
  bool ghosts = true;      // EngineStats::ghost_host, ghost_disk
  std::size_t events = 0;  // that take_events() keeps; 0: none

  Status validate() const;
  // How host_bytes is shared out: equal numbers of blocks for every group, groups of equal slots together.
  ArenaGeometry geometry() const;
  std::vector<std::size_t> class_of_group() const;
  // What host_bytes and a disk's capacity must be for so many blocks of every group.
  std::uint64_t host_bytes_for(std::uint64_t blocks) const;
  std::uint64_t disk_bytes_for(std::uint64_t blocks) const;
};

// State of one key in one group. The numbers are part of the Python API.
enum class BlockState : std::uint8_t {
  miss = 0,
  pending = 1,  // being stored, in no tier yet
  ready = 2,    // in the host tier
  on_disk = 3,  // in the disk tier alone, or on its way from there to the host tier
};
// Whether a load gets it, from any tier.
constexpr bool is_ready(BlockState state) { return state >= BlockState::ready; }

// What lookup() found. Advisory: nothing holds the blocks until they are pinned or loaded.
struct Match {
  std::size_t num_keys = 0;
  std::vector<std::vector<BlockState>> states;  // [group][key]
  std::vector<std::vector<EntryId>> found;      // [group][key], for pin(): where the host tier has it
  // Longest prefix that every group can restore: all blocks of it ready for full attention; for a
  // sliding window those that the window reaches back to. In blocks.
  std::size_t ready_blocks = 0;
};

// Pins on the ready prefix of a Match. While it lives the blocks are not evicted. Released by release(),
// by the destructor, when its time to live is over, or by Engine::close(). Threads: any.
class Lease {
 public:
  virtual ~Lease() = default;
  virtual std::size_t num_blocks() const = 0;  // of each group's prefix
  virtual bool active() const = 0;
  virtual void release() = 0;
};

// That a request waits which will want some blocks. Ended by end() or by the destructor. Threads: any.
class Expectation {
 public:
  virtual ~Expectation() = default;
  virtual void end() = 0;
};

// Attached pages of one group on one device. Made by attach(); shared.
class Pages {
 public:
  virtual ~Pages() = default;
  virtual const PageMap& map() const = 0;
  virtual GroupId group() const = 0;
  virtual Device& device() const = 0;
  virtual bool attached() const = 0;
};

struct StoreRequest {
  std::span<const BlockKey> keys;
  std::span<const PageId> pages;  // pages_per_block for each key
  StreamHandle stream{0};
  std::uint32_t first_block = 0;   // depth of keys[0] in its sequence
  std::optional<BlockKey> parent;  // of keys[0]; nullopt at the beginning of a sequence, or when not known
  std::string_view name_space;
  // Of all these blocks, those that are there already too; nullopt leaves them as they are, and new ones
  // normal. A store takes the place of no block of a higher priority.
  std::optional<Priority> priority = std::nullopt;
  // From now. Then they are gone, as if dropped; until then they are not written to a drive. Of several
  // stores the longest counts, nullopt being for ever: a block that has no such time, or is on a drive, gets
  // none.
  std::optional<std::int64_t> ttl_us = std::nullopt;
};

struct LoadRequest {
  std::span<const BlockKey> keys;
  std::span<const PageId> pages;
  StreamHandle stream{0};
  std::uint32_t first_block = 0;
  std::uint32_t layers_per_batch = 0;  // > 0: layer-wise, accepted only when every block is ready
};

// Slots handed to the ranks' workers: the keeper's half of a store or load.
struct Grant {
  std::uint64_t id = 0;               // 0: nothing was granted, all outcomes are final
  std::vector<std::uint32_t> blocks;  // indices into the keys of the request
  std::vector<SlotId> slots;          // of those blocks, in the group's size class
  std::shared_ptr<Ticket> ticket;
};

// Which stores a flush() waits for: those submitted before flush_point().
struct FlushPoint {
  std::uint64_t up_to = 0;    // number of the next store
  std::uint64_t running = 0;  // of those before it
};

struct FlushResult {
  std::uint64_t settled = 0;  // stores that ended since the flush point
  // Of blocks whose fate on disk was decided since the last flush(): each is reported once.
  std::uint64_t durable = 0;  // survive a restart; 0 without a disk tier
  std::uint64_t dropped = 0;  // do not: declined by admission, budget or a busy drive, evicted before, failed
};

// What weights the blocks are of, beside what is in their keys. Zeros: as at the beginning.
using Epoch = std::array<std::byte, kKeyBytes>;

// Threads: every method from any thread. Blocks: only wait-like methods, as said there.
// After fork() every method of the child answers StatusCode::closed.
class Engine {
 public:
  // Errors: invalid_argument for a bad config; resource when memory or threads cannot be had.
  // Blocks until the first chunk of each size class is prefaulted (tens of milliseconds), not for the rest.
  static Result<std::shared_ptr<Engine>> open(EngineConfig config);
  virtual ~Engine() = default;

  // Borrows the tensors' memory until detach() has returned ok. Errors: invalid_argument, device,
  // unsupported, closed.
  virtual Result<std::shared_ptr<Pages>> attach(std::shared_ptr<Device> device, GroupId group,
                                                std::span<const TensorView> tensors) = 0;
  // Refuses further transfers and blocks until none touches the pages. Errors: timeout: the pages must
  // not be freed yet; call again.
  virtual Status detach(Pages& pages, Deadline deadline) = 0;

  // Never waits, never does I/O, never touches recency. A failed engine answers misses.
  virtual Result<Match> lookup(std::span<const BlockKey> keys) = 0;
  // Pins the prefix that is ready now, at most `max_blocks`, in every group. ttl_us: nullopt is for ever.
  // `match`: what lookup() said of these keys, or null; with it each key is searched for only once.
  virtual Result<std::shared_ptr<Lease>> pin(std::span<const BlockKey> keys, std::size_t max_blocks,
                                             std::optional<std::int64_t> ttl_us, const Match* match) = 0;

  // Never wait for copies. Errors: invalid_argument (nothing was done), closed, unsupported.
  virtual Result<std::shared_ptr<Ticket>> store(Pages& pages, const StoreRequest& request) = 0;
  virtual Result<std::shared_ptr<Ticket>> load(Pages& pages, const LoadRequest& request) = 0;

  // The keeper's half. A grant is over when finish_part() was called once for each of `num_parts` ranks;
  // `drained` false means that the rank's copies may still run: a store's slots are then quarantined,
  // a load's pins kept for good.
  virtual Result<Grant> grant_store(GroupId group, const StoreRequest& request, std::uint32_t num_parts) = 0;
  virtual Result<Grant> grant_load(GroupId group, const LoadRequest& request, std::uint32_t num_parts) = 0;
  virtual Status finish_part(std::uint64_t grant_id, const TransferOutcome& outcome) = 0;

  // Brings the blocks that are on disk alone into the host tier, behind all loads. The ticket is done when
  // each block is in the host tier (`loaded`), or is not to be had (`missed`, `failed`). Nothing holds them
  // there but their recency. Reads that have not begun at the deadline are given up. Never waits.
  virtual Result<std::shared_ptr<Ticket>> prefetch(std::span<const BlockKey> keys, Deadline deadline) = 0;
  // Gives up the reads of a prefetch that have not begun and that nobody else waits for. Returns how many.
  virtual Result<std::uint64_t> cancel_prefetch(const std::shared_ptr<Ticket>& ticket) = 0;

  // A request waits that will want these blocks, resident or not: until it runs or is given up, policies that
  // look ahead let them go last. No use of them. prefetch() brings those that are on disk. Never waits.
  virtual Result<std::shared_ptr<Expectation>> expect(std::span<const BlockKey> keys) = 0;

  // Refreshes the blocks that are there, last key oldest. Returns how many, summed over groups.
  virtual Result<std::uint64_t> touch(std::span<const BlockKey> keys) = 0;
  // No lookup finds the blocks any more when it returns, after a restart neither: with a disk tier both wait
  // for the drive (a sync). Running loads of them finish unharmed. Errors: io: they are gone from memory, but
  // the drive did not confirm it, so that they may be found again after a restart.
  virtual Result<std::uint64_t> drop(std::span<const BlockKey> keys) = 0;
  virtual Result<std::uint64_t> drop_namespace(std::string_view name_space) = 0;

  // From its return on every call means blocks that were stored under this epoch: those of another one are
  // misses, and age out of the tiers unless their epoch comes back. Keys are mixed with it (XOR), here and on
  // the drives. Never waits. Who wants it to outlive a restart keeps it (kvtier/epochs.py). Errors: closed.
  virtual Status set_epoch(const Epoch& epoch) = 0;

  // Ends leases whose time is over. Never waits. Returns the number of running transfers.
  virtual Result<std::uint32_t> poll() = 0;
  // Blocks until every store submitted before the point has settled, and with a disk tier until the fate of
  // their blocks there is known. Errors: timeout; then it may be called again for the same point.
  virtual Result<FlushResult> flush(const FlushPoint& point, Deadline deadline) = 0;
  // Of now. Never waits.
  virtual Result<FlushPoint> flush_point() = 0;
  Result<FlushResult> flush(Deadline deadline) {
    const Result<FlushPoint> now = flush_point();
    if (!now) return now.status();
    return flush(now.value(), deadline);
  }
  // Blocks until the whole arena is prefaulted (benchmarks; nobody else needs to wait).
  virtual Status wait_until_whole() = 0;
  // Which blocks came into and left the tiers, oldest first, each told once; at most `most` of them. Who
  // comes late finds the last EngineConfig::events, and how many were lost: what he knows is then wrong until
  // he has asked lookup() again. A block in both tiers is told of twice; what stood on the drives at open()
  // is not. Never waits. Errors: unsupported without EngineConfig::events; closed.
  virtual Result<BlockEvents> take_events(std::size_t most) = 0;
  virtual Result<EngineStats> stats() = 0;
  // Between the two the ghosts note nothing. For benchmarks: what do they cost?
  virtual Status pause_ghosts() = 0;
  virtual Status resume_ghosts() = 0;
  // EngineStats::hops alone: cheap enough for every request.
  virtual Result<Hops> hops() = 0;

  // Refuses new work, blocks until running transfers have ended, ends all leases and frees everything.
  // Idempotent. Errors: timeout: closed for new work, but the memory stays until a later close() succeeds;
  // device: closed, but copies may run for ever, so memory and attached pages are never given back.
  virtual Status close(Deadline deadline) = 0;
  virtual bool closed() const = 0;

  virtual const EngineConfig& config() const = 0;
  // Requires that no close() has succeeded or is under way.
  virtual const Arena& arena() const = 0;
};

}  // namespace kvtier
