// SlotStore: the slots of the disk tier on one drive. It moves images and keeps the promise that what was
// durable is found again; which block stands where, and who goes, is decided above (TierIndex under the
// engine's mutex).
//
//   engine --write/read/wipe--> queues by priority --I/O thread--> IoQueue --> drive
//                                                    |  seals before a write, verifies after a read
//                                                    '--> every second at most: sync, then Catalog::commit
//                                                                     (the committer thread) --> on_durable
//
// A block is committed by, in this order: its write has completed; a sync (fdatasync) of its slot file that
// began afterwards has completed; a catalog transaction with its record is synced. Then on_durable.
// docs/durability.md argues what follows after a crash at any point.
//
// Rules for the owner above:
//  * One operation at a time on a slot, and its image memory is left alone until the operation's callback:
//  reads
//    fill it, writes read it and fill in its header (the 4096 bytes at its start).
//  * A slot whose write failed or did not become durable, or whose read did not verify, may hold anything,
//    what stood there before included: wipe() it before it is reused for nothing (a slot that is overwritten
//    at once need not be).
//  * Slots below usable_slots() may be used; it grows while the file is made ready in the background.
//
// Generations: the open counter is made durable before the first write; the store remembers for each slot the
// generation last written, and a read accepts no other.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/storage/catalog.h"
#include "kvtier/storage/slot_image.h"
#include "kvtier/storage/store_directory.h"

namespace kvtier {

class IoQueue;

// How far the files grow: ahead of what is stored by a step, or to their bounds at once.
enum class Growth : std::uint8_t { ahead_of_need, whole };

enum class ReadPriority : std::uint8_t { demand, prefetch };

struct SlotWrite {
  SlotPlace place;
  BlockIdentity block;
  std::uint64_t payload_bytes = 0;
  std::byte* image = nullptr;  // header (filled in here), then the payload; stride bytes, aligned to 4096
  // Callbacks: exactly once each, on a thread of the store, no locks held; they must not throw or wait. They
  // may call the store. on_durable comes only after an ok on_written, with ok, or with what kept it from
  // being durable. on_let_go comes only after an on_written with `timeout`: the drive has not answered for
  // SlotStoreOptions::answer_within, or its queue is broken, and until on_let_go, which may never come, image
  // and slot are the drive's.
  std::function<void(const Status& status)> on_written;
  std::function<void(const Status& status)> on_durable;
  std::function<void()> on_let_go;
};

struct ReadOutcome {
  // io: the drive failed; closed: cancelled before it began; timeout: the drive has not answered, and image
  // and slot are its own until on_let_go.
  Status status;
  Verdict verdict = Verdict::blank;  // meaningful when status is ok
  bool good() const { return status.is_ok() && verdict == Verdict::good; }
};

struct SlotRead {
  SlotPlace place;
  BlockKey key{};  // expected
  GroupId group{0};
  std::byte* image = nullptr;  // stride bytes, aligned to 4096; undefined unless good
  ReadPriority priority = ReadPriority::demand;
  std::function<void(const ReadOutcome& outcome)> on_done;
  std::function<void()> on_let_go;  // as of a write: only after an on_done with `timeout`
};

// Number of an operation that is queued or running; for cancel() and hurry().
enum class StoreJob : std::uint64_t {};

struct SlotStoreOptions {
  std::vector<StoreClass> classes;
  std::uint32_t queue_depth = 32;
  Growth growth = Growth::ahead_of_need;
  std::uint32_t max_queued_writes = 1024;  // beyond, can_write() says no
  std::chrono::milliseconds commit_interval{500};
  // A request that the drive has not answered for so long is given up: who waits is told, and the store is
  // out of service until the drive answers again. Its memory stays the drive's. Above 0.
  std::chrono::milliseconds answer_within{30'000};
  std::shared_ptr<SlotCipher> cipher;  // null: plain
  CatalogOptions catalog;
  bool use_direct_io = true;  // false: buffered, for file systems without it and for tests
  std::chrono::milliseconds first_probe{
      1000};  // out of service: tried again after this, then twice it ... 60 s
  // For tests: the seams. Null: the real ones.
  std::function<Result<std::unique_ptr<IoQueue>>(std::uint32_t depth)> make_queue;
  std::function<Result<std::unique_ptr<Catalog>>(const Directory&)> make_catalog;
  std::function<void(std::uint64_t done, std::uint64_t total)> on_progress;  // of a rebuild, in slots
};

// How the store found itself at open().
struct OpenReport {
  enum class Source : std::uint8_t { fresh, catalog, headers };
  Source source = Source::fresh;
  std::string why_rebuilt;    // when source is headers
  std::string queue;          // IoQueue::description()
  std::string queue_problem;  // why not io_uring; empty for the best choice
  bool direct_io = false;
  std::uint32_t discarded = 0;  // records or headers that prove nothing, by any cause
};

struct StoreStats {
  std::uint64_t reads = 0, reads_good = 0, reads_failed = 0, writes = 0, writes_failed = 0, wipes = 0;
  // By Verdict. A slot that the store knows to hold nothing is `blank` without a request. reads =
  // reads_failed + the sum of these; verdicts[good] = reads_good. What was cancelled, or came after close(),
  // is in none.
  std::uint64_t verdicts[8] = {};
  std::uint64_t bytes_read = 0, bytes_written = 0;  // physical, prewriting included in bytes_prewritten
  std::uint64_t bytes_prewritten = 0;
  std::uint64_t syncs = 0, commits = 0, catalog_resets = 0;
  std::uint32_t queued_reads = 0, queued_writes = 0, in_flight = 0, undurable_writes = 0;
  std::uint32_t unanswered = 0;  // of those in flight: given up, and never more than the queue's depth
  std::uint64_t capacity_bytes = 0,
                allocated_bytes = 0;  // granted by the ledger / st_blocks when last looked at
  std::string health = "ok";          // or why it is out of service; it comes back by itself
  std::string catalog_health = "ok";
  std::string growth = "ok";    // or why the files have stopped growing; tried again by and by
  std::string queue;            // IoQueue::description(), as of now
  std::string key_problem;      // that there are blocks under a master key that was not given
  std::string buffers_problem;  // why add_buffers() has registered no more; empty when all are
};

// Owns: its lease, files, I/O thread, committer thread, catalog helper. Borrows: image memory of running
// operations. Threads: every method from any thread; none but open(), flush() and close() waits.
class SlotStore {
 public:
  struct Opened;
  // Blocks for the catalog (milliseconds), or, without a usable one, for a rebuild from the headers. After an
  // unclean end, slots that the catalog does not know but that were used are scanned in the background and,
  // where sound, handed to `on_found` (on the I/O thread, before scan_done). A slot that the owner has
  // written to or wiped meanwhile is his: what stood there is not reported, but a report may cross with such
  // a write, and is void then. Of what it does not want the owner wipes the slot. What was found is not
  // durable before it was synced and committed again: what on_found returns is called then, as
  // SlotWrite::on_durable; it may be null.
  using OnFound = std::function<std::function<void(const Status& status)>(const CatalogRecord& found)>;
  static Result<Opened> open(std::unique_ptr<StoreLease> lease, SlotStoreOptions options, OnFound on_found);
  virtual ~SlotStore() = default;  // close() with no deadline

  // Memory that images lie in, which makes their requests cheaper: each part at most 1 GiB, holding whole
  // images. The I/O thread makes them known to the drive's queue, one after another, while requests run.
  // Ordinary buffers serve where that cannot be had (stats().buffers_problem). With encryption images do not
  // go to the drive themselves, and nothing is done: the store makes its own buffers known as it needs them.
  // Never waits. The memory stays mapped until close() has ended.
  virtual void add_buffers(std::vector<std::span<std::byte>> buffers) = 0;

  virtual std::uint32_t usable_slots(std::uint32_t class_index) const = 0;
  // Whether more slots of the class come as they are needed: the file is below its bound, and neither the
  // directory's capacity nor the file system has stopped it.
  virtual bool growing(std::uint32_t class_index) const = 0;
  // Called on a thread of the store when usable_slots() has grown, or growing() has ended. Set once, right
  // after open().
  virtual void on_grown(std::function<void(std::uint32_t class_index, std::uint32_t usable)> callback) = 0;

  // Never wait. A store that is out of service, or closed, answers through the callback at once (on the
  // calling thread).
  virtual StoreJob write(SlotWrite write) = 0;
  virtual StoreJob read(SlotRead read) = 0;
  // Overwrites the headers with zeros, syncs, and forgets the slots in the catalog; on_done(ok) when all that
  // is durable. An empty list is a barrier: on_done(ok) when every write that was queued before it is durable
  // too, and every slot of which nobody knows what it holds (a write, wipe or read of it failed) is wiped.
  // While the drive has writes that were given up a barrier is not done, but io, as these may still land; a
  // wipe that failed may be done later.
  virtual void wipe(std::vector<SlotPlace> places, std::function<void(const Status& status)> on_done) = 0;
  // The block in `place` was used: written to the catalog with some later commit.
  virtual void note_use(SlotPlace place) = 0;

  // A queued operation that has not begun ends with `closed` through its callback; false when it has begun or
  // is over. What stood in the slot of a cancelled write stands there still.
  virtual bool cancel(StoreJob job) = 0;
  // A queued prefetch becomes a demand read.
  virtual void hurry(StoreJob job) = 0;

  // Whether writes are welcome: in service, queue not full. Reads: in service for reads.
  virtual bool can_write() const = 0;
  virtual bool can_read() const = 0;

  // Commits now what was written before the call, and waits. Errors: timeout; io.
  virtual Status flush(std::optional<std::chrono::steady_clock::time_point> deadline) = 0;
  // The same without the wait: `on_done` is called on the I/O thread, or here when it is refused.
  virtual void begin_flush(std::function<void(const Status&)> on_done) = 0;
  // Whether the background scan after an unclean end is over (true at once when there was none).
  virtual bool scan_done() const = 0;
  // Writes it down for the next opening, behind what the committer has to do. Never waits; close() does. One
  // that fails is lost: the next one counts.
  virtual void save_budget(const SavedBudget& budget) = 0;
  virtual StoreStats stats() const = 0;
  virtual const StoreId& id() const = 0;

  // Cancels what has not begun, waits for the rest (for each request at most answer_within), commits, marks
  // the store clean, lets go of the lock. Errors: timeout: operations are still in flight (their memory stays
  // theirs); call again. io: closed, but not clean; if stats().in_flight is not 0 then, their memory is the
  // drive's for ever, and so is the lock.
  virtual Status close(std::optional<std::chrono::steady_clock::time_point> deadline) = 0;
};

struct SlotStore::Opened {
  std::unique_ptr<SlotStore> store;
  std::vector<CatalogRecord> blocks;  // least recently used first, parents before their children where known
  // Slots that hold images of a newer version, found by a rebuild: left alone, so never to be used. Writes to
  // them (and to such that the background scan finds) fail with `unsupported`, wipes pass them over.
  std::vector<SlotPlace> unusable;
  // As it was last saved. nullopt: never, or it is damaged.
  std::optional<SavedBudget> budget;
  OpenReport report;
};

}  // namespace kvtier
