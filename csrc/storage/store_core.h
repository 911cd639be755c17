// The inside of SlotStore, in several files:
//
//   store_open.cpp    files, catalog, threads                    store_rebuild.cpp  without a catalog
//   store_scan.cpp    headers after an unclean end
//   store_io.cpp      the I/O thread's loop, its end             store_growth.cpp files grow and are
//   prewritten store_jobs.cpp    reads and writes                           store_probe.cpp  out of service,
//   and back store_commit.cpp  batches: sync, catalog, on_durable         slot_store.cpp   the public face
//
// Who owns what. Callers put jobs into queues under `mutex_` and wake the I/O thread. The I/O thread owns
// everything that is not guarded: slot table, requests in flight, batches, growth, health; it takes no lock
// while it seals, verifies or calls back. Two workers do what blocks, one task after another, and post what
// came of it back to the I/O thread as a message: the committer (superblock, catalog), the grower (ledger,
// fallocate).
//
// The I/O thread's round: messages; whatever is due; fill the drive's queue; wait; fill again, and only then
// verify what was read, about a mebibyte at a time, so that the queue is deep while the processor works.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <unordered_set>
#include <utility>
#include <vector>

#include "aligned_buffers.h"
#include "catalog_keeper.h"
#include "header_scan.h"
#include "job_queue.h"
#include "slot_table.h"
#include "store_health.h"
#include "worker.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"
#include "kvtier/platform/io_queue.h"
#include "kvtier/storage/slot_store.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {

class StoreCore : public std::enable_shared_from_this<StoreCore> {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  using OnFound = SlotStore::OnFound;
  using OnStatus = std::function<void(const Status& status)>;
  using OnGrown = std::function<void(std::uint32_t class_index, std::uint32_t usable)>;

  StoreCore(std::unique_ptr<StoreLease> lease, SlotStoreOptions options, OnFound on_found);
  ~StoreCore();

  // store_open.cpp. In this order, once.
  static Status validate(const StoreLease& lease, const SlotStoreOptions& options);
  void begin_opening_catalog();
  Status open_files(OpenReport& report);
  Status find_blocks(SlotStore::Opened& opened);
  Status start(OpenReport& report);

  // The public face; see SlotStore.
  StoreJob write(SlotWrite write) KVTIER_EXCLUDES(mutex_);
  StoreJob read(SlotRead read) KVTIER_EXCLUDES(mutex_);
  // What it waits for besides the writes before it.
  enum class BarrierKind : std::uint8_t { wipe, flush };  // a wipe waits for the scan
  void barrier(BarrierKind kind, std::vector<SlotPlace> places, OnStatus on_done) KVTIER_EXCLUDES(mutex_);
  void note_use(const SlotPlace& place);
  bool cancel(StoreJob job) KVTIER_EXCLUDES(mutex_);
  void hurry(StoreJob job) KVTIER_EXCLUDES(mutex_);
  bool can_write() const KVTIER_EXCLUDES(mutex_);
  bool can_read() const KVTIER_EXCLUDES(mutex_);
  void add_buffers(std::vector<std::span<std::byte>> buffers) KVTIER_EXCLUDES(mutex_);
  std::optional<SavedBudget> read_budget();
  void save_budget(const SavedBudget& budget);
  void set_on_grown(OnGrown callback) KVTIER_EXCLUDES(mutex_);
  StoreStats stats() const KVTIER_EXCLUDES(mutex_);
  std::uint32_t usable_slots(std::uint32_t class_index) const { return usable_[class_index].load(); }
  bool growing(std::uint32_t class_index) const {
    return !growth_stopped_ && usable_slots(class_index) < options_.classes[class_index].num_slots;
  }
  bool scan_done() const { return scan_done_.load(); }
  const StoreId& id() const { return superblock_.store; }

  // Asks the I/O thread to end; waits for it. Errors: timeout.
  Status close(std::optional<TimePoint> deadline) KVTIER_EXCLUDES(mutex_);
  // The I/O thread goes on alone, and with its last completion all ends by itself.
  void abandon() { thread_.detach(); }
  void join() { thread_.join(); }
  bool in_forked_child() const { return process_generation() != generation_; }

 private:
  enum class Purpose : std::uint8_t {
    read,
    write,
    wipe,  // zeros over a header, for the owner or for the store itself
    scan,  // a header, to see what is there
    sync,  // of a batch
    prewrite,
    probe,
  };
  // What a wipe() or flush() waits for.
  struct Barrier {
    StoreJob id{0};  // writes with a smaller one come before it
    std::deque<SlotPlace> to_wipe;
    std::size_t wipes_in_flight = 0;
    bool waits_for_scan = false;  // a wipe: for the store's own wipes too
    bool alone = false;           // it promises nothing but its own slots
    bool swept = false;           // these include what was doubtful then
    Status status;                // the first failure
    OnStatus on_done;
  };
  // A request, from its submission until it was settled. Its index is the request's tag. There are twice as
  // many as the drive may have: it works on while those that have arrived are verified.
  struct Op {
    Purpose purpose = Purpose::read;
    SlotPlace place;  // sync: only the class
    std::uint64_t bytes = 0;
    Generation generation{0};  // read: expected; write: new
    ReadJob read;
    WriteJob write;
    AlignedBuffer buffer;              // the image on the drive where it is not the owner's; a scanned header
    std::shared_ptr<Barrier> barrier;  // wipe; null for the store's own
    TimePoint begun{};
    std::uint64_t failed_syncs = 0;   // when it began: see sync_failed()
    bool arrived = false;             // its completion waits to be settled
    bool given_up = false;            // its end was told, and the drive still has it
    bool holds_slot = false;          // given up, and it may still write to its slot
    bool is_sync = false;             // given up, and it may still fail: see unanswered_syncs_
    std::function<void()> on_let_go;  // the owner's, once it is given up
  };
  // A write that has completed and is not durable yet.
  struct Written {
    StoreJob id{0};
    CatalogRecord record;
    OnStatus on_durable;
    Status status;
  };
  struct Batch {
    std::vector<Written> writes;
    std::vector<std::shared_ptr<Barrier>> barriers;
    std::vector<CatalogChange> changes;
    std::deque<std::uint32_t> to_sync;  // classes
    std::size_t syncs_in_flight = 0;
    bool has_synced = false;
    Status sync_status;  // the first failure
    bool is_syncing() const { return !to_sync.empty() || syncs_in_flight > 0; }
  };
  // A part of a file that is being made ready.
  struct Segment {
    std::uint32_t class_index = 0;
    std::uint32_t end_slot = 0;
    std::uint64_t begin_offset = 0, next_offset = 0, end_offset = 0;
    std::size_t in_flight = 0;
    Status status;
  };
  struct Probe {
    enum class Stage : std::uint8_t { write, sync, read };
    Stage stage = Stage::write;
    SlotPlace place;
    bool has_slot = false;  // that may be written to; else it is a sync and a read
    bool wrote = false;
    bool in_flight = false;
    std::uint64_t failed_syncs = 0;  // when its write began
    bool is_syncing() const { return in_flight && stage == Stage::sync; }
  };
  enum class Begun : std::uint8_t { no, pending, yes };

  // Room for the superblock, the locks and the directories themselves.
  static constexpr std::uint64_t kOverheadBytes = std::uint64_t{256} << 10;
  static constexpr std::uint64_t kPrewriteBytes = std::uint64_t{1} << 20;  // a piece, and the zeros there are
  static constexpr int kNoAnswer = -1;  // in place of an errno: the drive still has the request

  // --- store_open.cpp ---
  Status shrink_to_grant(std::uint64_t granted);
  Result<std::unique_ptr<IoQueue>> make_queue(std::string* why_not) const;
  Result<std::uint64_t> adopt_catalog(std::vector<CatalogRecord>& blocks);
  void forget_adopted();
  void adopt_reset(const Status& reset);
  bool is_likely(Generation generation) const;
  // As SlotImages'; what no opening can have written is corrupt.
  Verdict read_header(const std::byte* bytes, const SlotPlace& place, SlotHeader* header) const;
  bool is_sound(const CatalogRecord& record) const;
  void find_unknown_keys(const std::vector<CatalogRecord>& records);
  void plan_background_scan();

  // --- store_rebuild.cpp ---
  Status rebuild(SlotStore::Opened& opened);
  Status read_headers(IoQueue& queue, HeaderScan& scan);
  Status wipe_headers(IoQueue& queue, const std::vector<SlotPlace>& places);

  // --- store_io.cpp ---
  void run();
  void take_messages() KVTIER_EXCLUDES(mutex_);
  void do_what_is_due();
  void fill();
  bool start_next();
  std::uint32_t begin_op(Purpose purpose, const SlotPlace& place);
  void submit_op(std::uint32_t op, IoOp io_op, std::uint64_t offset, std::byte* data, std::uint64_t bytes);
  void submit_staged();
  void wait_for_completions() KVTIER_EXCLUDES(mutex_);
  TimePoint next_deadline() const;
  void register_files();
  void register_next_buffer() KVTIER_EXCLUDES(mutex_);
  bool is_reading() const KVTIER_EXCLUDES(mutex_);
  AlignedBuffer take_bounce();  // null when there is no memory
  void settle_some();
  void settle(const IoCompletion& completion);
  void dispatch(Op& op, int error);
  void give_up(std::uint32_t op);
  void give_up_overdue(TimePoint now);
  void give_up_what_cannot_begin();
  void take_arrivals();
  void let_go(Op& op);
  void queue_broke(const Status& why);
  void wait_beside_broken_queue() KVTIER_EXCLUDES(mutex_);
  void post(std::function<void()> message) KVTIER_EXCLUDES(mutex_);
  void cancel_what_has_not_begun() KVTIER_EXCLUDES(mutex_);
  bool is_idle() const KVTIER_EXCLUDES(mutex_);
  void shut_down() KVTIER_EXCLUDES(mutex_);
  void fail_unfinished(const Status& status);
  void keep_for_ever() KVTIER_EXCLUDES(mutex_);

  // --- store_jobs.cpp ---
  bool start_read(ReadPriority priority) KVTIER_EXCLUDES(mutex_);
  void settle_read(Op& op, int error);
  Verdict verify(const Op& op) const;
  void note_verdict(Verdict verdict) KVTIER_EXCLUDES(mutex_);
  void tell_unknown_key(const std::string& how_many);
  void end_read(const ReadJob& job, const ReadOutcome& outcome, std::uint64_t bytes) KVTIER_EXCLUDES(mutex_);
  bool start_write() KVTIER_EXCLUDES(mutex_);
  bool begin_writing();
  void note_side_sync(const Status& status);
  void settle_write(Op& op, int error);
  void fail_write(const WriteJob& job, const Status& status) KVTIER_EXCLUDES(mutex_);
  void fail_queued_jobs(const Status& status) KVTIER_EXCLUDES(mutex_);
  void release_slot(const SlotPlace& place);
  bool is_usable(const SlotPlace& place) const;
  std::uint64_t offset_of(const SlotPlace& place) const {
    return options_.classes[place.class_index].slot_stride_bytes * raw(place.slot);
  }
  static std::uint64_t image_bytes(std::uint64_t payload_bytes) {
    return round_up(kSlotHeaderBytes + payload_bytes, kSlotAlignment);
  }
  // What `error` means: an errno, or kNoAnswer (then `timeout`, which no errno becomes).
  Status failure(const std::string& what, int error) const;
  Status io_failure(const char* what, const SlotPlace& place, int error) const;
  Status held_failure(const char* what, const SlotPlace& place) const;

  // --- store_commit.cpp ---
  bool start_wipe();
  void settle_wipe(Op& op, int error);
  void sweep();
  void fail_wipes(const Status& status);
  void fail_barriers(const Status& status);
  void fail_barriers_after(StoreJob write, const Status& status);
  bool is_ready(const Barrier& barrier) const KVTIER_EXCLUDES(mutex_);
  void forget(const SlotPlace& place);
  std::optional<TimePoint> commit_due() const;
  void start_batch_if_due(TimePoint now);
  bool start_sync();
  void settle_sync(const Op& op, int error);
  void commit_batch();
  void drop_unsynced();
  void sync_failed();
  void disown_unsynced();
  Status after_failed_sync() const;
  void disown(std::vector<Written>& writes, std::vector<CatalogChange>& changes, const Status& status);
  void committed(const Status& status);
  void reset_catalog();
  void catalog_was_reset(const Status& reset, const Status& marked);
  void finish_batch(const Status& status);
  void set_catalog_health(std::string health) KVTIER_EXCLUDES(mutex_);

  // --- store_scan.cpp ---
  bool scan_is_urgent() const;
  bool start_scan();
  void settle_scan(Op& op, int error);
  void finish_scan();

  // --- store_growth.cpp ---
  std::uint32_t growth_step(std::uint32_t class_index) const;
  bool wants_room(std::uint32_t class_index) const;
  void grow_if_due(TimePoint now);
  void grown(std::uint32_t class_index, std::uint32_t slots, const Status& status);
  bool start_prewrite();
  void settle_prewrite(const Op& op, int error);
  void growth_stopped(const Status& why);

  // --- store_probe.cpp ---
  void write_trouble(const Status& why);
  void read_trouble(const SlotPlace& place, const Status& why);
  void publish_health(Service before) KVTIER_EXCLUDES(mutex_);
  void probe_if_due(TimePoint now);
  std::optional<SlotPlace> probe_place() const;
  bool start_probe();
  void settle_probe(int error);
  void log(const std::string& what) const;

  const SlotStoreOptions options_;
  const OnFound on_found_;
  const std::uint64_t generation_ = process_generation();
  std::unique_ptr<StoreLease> lease_;
  const std::string name_;  // the lease's
  Superblock superblock_;   // as on the drive
  const SlotImages images_;
  std::vector<std::unique_ptr<BlockFile>> files_;  // by class
  CatalogKeeper catalog_;                          // the opener's, then the committer's
  std::future<Status> catalog_opened_;             // of find_blocks()
  std::vector<std::atomic<std::uint32_t>> usable_;
  std::atomic<bool> growth_stopped_{false};
  std::atomic<bool> scan_done_{true};
  std::atomic<std::uint32_t> in_flight_{0};
  std::atomic<std::uint32_t> unanswered_{0};  // of them, those given up
  std::uint32_t held_slots_ = 0;              // to which such may still write (the I/O thread's)

  // --- shared ---
  mutable Mutex mutex_;
  CondVar ended_changed_;
  CondVar attention_changed_;  // waited for where the queue is broken
  JobQueue jobs_ KVTIER_GUARDED_BY(mutex_);
  std::vector<std::function<void()>> messages_ KVTIER_GUARDED_BY(mutex_);
  bool attention_ KVTIER_GUARDED_BY(mutex_) = false;  // something new for the I/O thread
  bool sleeping_ KVTIER_GUARDED_BY(mutex_) = false;   // it must be woken
  bool closing_ KVTIER_GUARDED_BY(mutex_) = false;
  std::optional<Status> ended_ KVTIER_GUARDED_BY(mutex_);  // what close() returns
  bool accepts_writes_ KVTIER_GUARDED_BY(mutex_) = true;
  bool accepts_reads_ KVTIER_GUARDED_BY(mutex_) = true;
  // While a scan runs: slots that the owner has written or wiped meanwhile, by class.
  std::vector<std::vector<bool>> claimed_ KVTIER_GUARDED_BY(mutex_);
  bool queue_broken_ KVTIER_GUARDED_BY(mutex_) = false;  // queue_status_ for others' threads
  StoreStats stats_ KVTIER_GUARDED_BY(mutex_);
  OnGrown on_grown_ KVTIER_GUARDED_BY(mutex_);
  void attend(const MutexLock& lock) KVTIER_REQUIRES(mutex_);
  void claim(const SlotPlace& place, const MutexLock& lock) KVTIER_REQUIRES(mutex_);
  bool is_claimed(const SlotPlace& place, const MutexLock& lock) const KVTIER_REQUIRES(mutex_);
  Status refusal(const MutexLock& lock) const KVTIER_REQUIRES(mutex_);

  // --- the I/O thread's (the opener's before it starts) ---
  std::unique_ptr<IoQueue> queue_;
  Status queue_status_;                           // not ok: the queue is broken
  bool ending_ = false;                           // closing_, as of this round
  bool revisit_ = false;                          // something became due while the queue was filled
  std::deque<std::span<std::byte>> new_buffers_;  // that the queue is to be told of
  bool buffers_refused_ = false;
  TimePoint next_buffer_at_{};  // not before, while there are reads
  bool unknown_key_told_ = false;
  std::uint32_t depth_ = 0;              // of the queue
  std::uint32_t usual_depth_ = 0;        // beyond it go only reads on demand, beside writes
  std::uint32_t requests_ = 0;           // that the drive has, staged ones included; at most depth_
  std::optional<TimePoint> overdue_at_;  // when to look for requests to be given up; nullopt: there are none
  std::vector<Op> ops_;
  std::vector<std::uint32_t> free_ops_;
  std::vector<IoRequest> staged_;
  std::uint64_t staged_work_bytes_ = 0;  // sealed for them
  std::deque<IoCompletion> completed_;
  std::vector<IoCompletion> arrivals_;
  std::uint32_t writes_in_flight_ = 0;
  std::uint32_t reads_in_flight_ = 0;
  unsigned turn_ = 0;
  SlotTable table_;
  PiecePool bounce_;  // what is encrypted or to be decrypted
  BufferPool headers_{kSlotHeaderBytes};
  AlignedBuffer zeros_;

  std::uint32_t open_counter_ = 0;  // of this opening, once begun
  std::uint64_t sequence_ = 0;
  Begun begun_ = Begun::no;
  std::atomic<bool> keeps_budget_{true};  // false: the file is of a newer version, and is left alone
  std::deque<WriteJob> deferred_;         // their slots are busy

  std::vector<Written> unsynced_;
  std::vector<CatalogChange> changes_;
  std::vector<bool> dirty_;             // files that must be synced, by class
  std::uint64_t failed_syncs_ = 0;      // in this opening
  std::uint32_t unanswered_syncs_ = 0;  // given up: until they are answered the store stays out of service
  TimePoint first_unsynced_at_{};
  TimePoint last_batch_at_{};
  std::deque<std::shared_ptr<Barrier>> barriers_;
  std::deque<SlotPlace> own_wipes_;
  std::uint32_t own_wipes_in_flight_ = 0;
  std::uint64_t released_doubts_ = 0;  // slots that were doubtful when the store was done with them
  std::uint64_t swept_doubts_ = 0;     // as of the last sweep
  std::unique_ptr<Batch> batch_;
  bool catalog_lost_ = false;
  TimePoint catalog_retry_at_{};
  bool last_batch_done_ = false;  // of closing
  Status close_status_;

  std::unique_ptr<HeaderScan> scan_;
  std::unordered_set<BlockName, BlockNameHash> known_;  // while it runs: blocks that stand in other slots
  std::uint32_t scans_in_flight_ = 0;

  std::vector<std::uint32_t> file_slots_;  // by class, those that the file has room for
  bool oversized_ = false;                 // at open: some file was longer than it may be
  bool growing_ = false;                   // the grower is at it
  std::unique_ptr<Segment> segment_;
  std::uint32_t prewrites_in_flight_ = 0;
  std::optional<TimePoint> growth_retry_at_;
  std::chrono::milliseconds growth_pause_{0};

  StoreHealth health_;
  std::unique_ptr<Probe> probe_;
  std::optional<SlotPlace> probe_failed_at_;
  AlignedBuffer probe_buffer_;

  Worker committer_;
  Worker grower_;
  std::thread thread_;
};

}  // namespace kvtier
