#include "kvtier/storage/slot_store.h"

#include "store_core.h"

namespace kvtier {
namespace {

// The public face. Owns the core together with the core's I/O thread: a face that goes while requests are in
// flight, whose end a close() has not seen, leaves the core to that thread.
class OpenStore final : public SlotStore {
 public:
  explicit OpenStore(std::shared_ptr<StoreCore> core) : core_(std::move(core)) {}
  ~OpenStore() override {
    if (core_->in_forked_child()) {
      // The threads are the parent's, and so is everything else.
      static_cast<void>(new std::shared_ptr<StoreCore>(core_));  // NOLINT: kept on purpose
      return;
    }
    if (joined_) return;
    if (timed_out_) {
      core_->abandon();
    } else {
      static_cast<void>(close(std::nullopt));
    }
  }

  void add_buffers(std::vector<std::span<std::byte>> buffers) override {
    core_->add_buffers(std::move(buffers));
  }
  std::uint32_t usable_slots(std::uint32_t class_index) const override {
    return core_->usable_slots(class_index);
  }
  bool growing(std::uint32_t class_index) const override { return core_->growing(class_index); }
  void on_grown(StoreCore::OnGrown callback) override { core_->set_on_grown(std::move(callback)); }
  StoreJob write(SlotWrite write) override { return core_->write(std::move(write)); }
  StoreJob read(SlotRead read) override { return core_->read(std::move(read)); }
  void wipe(std::vector<SlotPlace> places, StoreCore::OnStatus on_done) override {
    core_->barrier(StoreCore::BarrierKind::wipe, std::move(places), std::move(on_done));
  }
  void note_use(SlotPlace place) override { core_->note_use(place); }
  bool cancel(StoreJob job) override { return core_->cancel(job); }
  void hurry(StoreJob job) override { core_->hurry(job); }
  void save_budget(const SavedBudget& budget) override { core_->save_budget(budget); }
  bool can_write() const override { return core_->can_write(); }
  bool can_read() const override { return core_->can_read(); }
  bool scan_done() const override { return core_->scan_done(); }
  StoreStats stats() const override { return core_->stats(); }
  const StoreId& id() const override { return core_->id(); }

  void begin_flush(StoreCore::OnStatus on_done) override {
    core_->barrier(StoreCore::BarrierKind::flush, {}, std::move(on_done));
  }
  Status flush(std::optional<std::chrono::steady_clock::time_point> deadline) override {
    struct Waiting {
      Mutex mutex;
      CondVar changed;
      std::optional<Status> done KVTIER_GUARDED_BY(mutex);
    };
    const auto waiting = std::make_shared<Waiting>();  // it outlives a wait that was given up
    begin_flush([waiting](const Status& status) {
      MutexLock lock(waiting->mutex);
      waiting->done = status;
      waiting->changed.notify_all();
    });
    MutexLock lock(waiting->mutex);
    while (!waiting->done) {
      if (!deadline) {
        waiting->changed.wait(lock);
      } else if (!waiting->changed.wait_until(lock, *deadline) && !waiting->done) {
        return Status::timeout("flushing the store did not end in time; it goes on");
      }
    }
    return *waiting->done;
  }

  Status close(std::optional<std::chrono::steady_clock::time_point> deadline) override {
    if (core_->in_forked_child()) return Status::closed("the store belongs to the parent process");
    const Status status = core_->close(deadline);
    const MutexLock lock(closing_);
    timed_out_ = status.code() == StatusCode::timeout;
    if (!timed_out_ && !joined_) {
      // Of requests without an answer the thread's own end may have to wait, in the kernel, for ever.
      if (core_->stats().in_flight > 0) {
        core_->abandon();
      } else {
        core_->join();
      }
      joined_ = true;
    }
    return status;
  }

 private:
  const std::shared_ptr<StoreCore> core_;
  Mutex closing_;
  bool joined_ = false;     // written under closing_
  bool timed_out_ = false;  // written under closing_
};

}  // namespace

Result<SlotStore::Opened> SlotStore::open(std::unique_ptr<StoreLease> lease, SlotStoreOptions options,
                                          OnFound on_found) {
  KVTIER_RETURN_IF_ERROR(StoreCore::validate(*lease, options));
  const auto core = std::make_shared<StoreCore>(std::move(lease), std::move(options), std::move(on_found));
  Opened opened;
  core->begin_opening_catalog();
  KVTIER_RETURN_IF_ERROR(core->open_files(opened.report));
  KVTIER_RETURN_IF_ERROR(core->find_blocks(opened));
  KVTIER_RETURN_IF_ERROR(core->start(opened.report));
  opened.budget = core->read_budget();
  opened.store = std::make_unique<OpenStore>(core);
  return opened;
}

StoreStats StoreCore::stats() const {
  MutexLock lock(mutex_);
  StoreStats stats = stats_;
  stats.queued_reads = static_cast<std::uint32_t>(jobs_.num_reads());
  stats.queued_writes = static_cast<std::uint32_t>(jobs_.num_writes());
  stats.in_flight = in_flight_.load();
  stats.unanswered = unanswered_.load();
  return stats;
}

void StoreCore::set_on_grown(OnGrown callback) {
  MutexLock lock(mutex_);
  on_grown_ = std::move(callback);
}

}  // namespace kvtier
