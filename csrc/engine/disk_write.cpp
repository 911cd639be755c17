// host -> disk: which blocks are written back, when, and what becomes of them.
//
// Blocks are candidates in the order in which they were stored, head first, so that a prefix is on disk
// before what hangs on it; a block whose parent is not there is not written. Write-backs under way pin at
// most an eighth of the host slots. A candidate is not pinned: if it is evicted before its turn, it is gone,
// and nobody waited for a drive.
#include <algorithm>
#include <ctime>
#include <utility>

#include "engine_impl.h"

namespace kvtier {
namespace {

constexpr std::size_t kEntriesPerHold = 1024;
constexpr std::size_t kWritesPerHold = 64;
constexpr double kSecondsPerDay = 86400;
constexpr std::uint64_t kSavesPerDay = 64;  // while a day's worth is written

}  // namespace

KeptBudget::KeptBudget(std::optional<std::uint64_t> bytes_per_day, const std::optional<SavedBudget>& saved,
                       std::int64_t unix_s, std::int64_t now_us)
    : bytes_per_day_(bytes_per_day), budget_(bytes_per_day, now_us), saved_bytes_(bytes_per_day.value_or(0)) {
  if (!bytes_per_day || !saved) return;
  const std::uint64_t most = *bytes_per_day;
  // A clock that was set back fills nothing.
  const auto away_s = static_cast<double>(std::max<std::int64_t>(0, unix_s - saved->at_s));
  const double filled =
      static_cast<double>(saved->left_bytes) + static_cast<double>(most) / kSecondsPerDay * away_s;
  const std::uint64_t left = filled >= static_cast<double>(most) ? most : static_cast<std::uint64_t>(filled);
  budget_.take(most - left, now_us);
  saved_bytes_ = std::min(left, saved->left_bytes);
}

std::optional<SavedBudget> KeptBudget::to_save(std::int64_t unix_s) {
  const std::uint64_t left = left_bytes();
  if (!bytes_per_day_ || left >= saved_bytes_) return std::nullopt;
  saved_bytes_ = left - std::min(left, *bytes_per_day_ / kSavesPerDay);
  return SavedBudget{*bytes_per_day_, saved_bytes_, unix_s};
}

std::optional<SavedBudget> KeptBudget::at_close(std::int64_t unix_s) const {
  if (!bytes_per_day_) return std::nullopt;
  return SavedBudget{*bytes_per_day_, left_bytes(), unix_s};
}

// On every drive: whichever of them is there the next time knows it.
void EngineImpl::save_budget(const SavedBudget& budget) {
  for (const DiskTier::Volume& volume : disk_->volumes) volume.store->save_budget(budget);
}

// After a store's blocks were committed: each becomes a candidate, and the ticket's durable moment waits for
// all.
void EngineImpl::track_store(const Operation& operation) {
  const auto tracker = std::make_shared<DurableTracker>();
  tracker->ticket = operation.ticket;
  tracker->store_number = operation.store_number;
  Settled settled;
  {
    MutexLock lock(mutex_);
    disk_->tracked_stores.insert(tracker->store_number);
    if (disk_->candidates.size() >= disk_->most_candidates) drop_gone_candidates(settled);
  }
  // What was there already comes first: it is the head of the prompt.
  for (std::size_t begin = 0; begin < operation.seen.size(); begin += kEntriesPerHold) {
    MutexLock lock(mutex_);
    for (std::size_t i = begin; i < std::min(begin + kEntriesPerHold, operation.seen.size()); ++i) {
      Entry& entry = tier_.index().at(operation.seen[i].first);
      if (entry.generation == operation.seen[i].second && entry.linked && entry.state == SlotState::ready) {
        add_candidate(entry, tracker);
      }
    }
  }
  for (std::size_t begin = 0; begin < operation.entries.size(); begin += kEntriesPerHold) {
    MutexLock lock(mutex_);
    for (std::size_t i = begin; i < std::min(begin + kEntriesPerHold, operation.entries.size()); ++i) {
      if (operation.outcomes[operation.blocks[i]] != BlockOutcome::stored) continue;
      Entry& entry = tier_.index().at(operation.entries[i]);
      // It may have been evicted since its commit, and its record be another's: then that one is offered too
      // early.
      if (entry.linked && entry.state == SlotState::ready) add_candidate(entry, tracker);
    }
  }
  {
    MutexLock lock(mutex_);
    tracker->complete = true;
    end_tracked(*tracker, settled);
  }
  settle_durable(settled);
  pump_write_backs();
}

void EngineImpl::add_candidate(Entry& entry, const std::shared_ptr<DurableTracker>& tracker) {
  DiskTier& disk = *disk_;
  if (entry.expires) {  // a drive does not know of times, and would have it again after a restart
    ++counters_.disk_declined_ttl;
    return;
  }
  if (Entry* on_disk = disk.index.index().find(entry.key, entry.group)) {
    if (const auto undurable = disk.undurable_at(disk.index.index().id(*on_disk))) {
      undurable->trackers.push_back(tracker);
      ++tracker->waiting;
      return;
    }
    if (on_disk->state == SlotState::ready) {
      tracker->ticket->add_durable(1);
      return;
    }
  }
  const EntryId id = tier_.index().id(entry);
  if (disk.held.contains(raw(id))) {  // a drive may still read it: nobody seals it for another write
    ++counters_.disk_declined_busy;
    return;
  }
  std::shared_ptr<WriteBack>& slot = disk.by_host[raw(id)];
  if (!slot || slot->host_generation != entry.generation) {
    slot = std::make_shared<WriteBack>();  // one of a former block stays among the candidates and ends there
    slot->key = entry.key;
    slot->host = id;
    slot->host_generation = entry.generation;
    disk.candidates.push_back(slot);
  }
  slot->trackers.push_back(tracker);
  ++tracker->waiting;
}

void EngineImpl::end_write_back(WriteBack& write_back, bool durable, std::uint64_t EngineStats::* counter,
                                const Status& status, Settled& settled) {
  if (write_back.step == WriteBack::Step::over) return;
  write_back.step = WriteBack::Step::over;
  if (counter != nullptr) ++(counters_.*counter);
  for (const std::shared_ptr<DurableTracker>& tracker : write_back.trackers) {
    if (durable) tracker->ticket->add_durable(1);
    if (!status && tracker->failure) tracker->failure = status;
    KVTIER_CHECK(tracker->waiting > 0);
    --tracker->waiting;
    end_tracked(*tracker, settled);
  }
  write_back.trackers.clear();
  const auto found = disk_->by_host.find(raw(write_back.host));
  if (found != disk_->by_host.end() && found->second.get() == &write_back) disk_->by_host.erase(found);
  idle_.notify_all();
}

// A host slot has one candidate at most that is not gone: where there are twice as many, half of them are.
void EngineImpl::drop_gone_candidates(Settled& settled) {
  std::erase_if(disk_->candidates, [&](const std::shared_ptr<WriteBack>& each) KVTIER_REQUIRES(mutex_) {
    if (each->step != WriteBack::Step::queued) return true;
    const Entry& host = tier_.index().at(each->host);
    if (host.generation == each->host_generation && host.linked && host.state == SlotState::ready)
      return false;
    end_write_back(*each, /*durable=*/false, &EngineStats::disk_gone, Status::ok(), settled);
    return true;
  });
}

void EngineImpl::end_tracked(DurableTracker& tracker, Settled& settled) {
  if (!tracker.complete || tracker.waiting > 0) return;
  settled.emplace_back(tracker.ticket, tracker.store_number);
}

// Tickets first: who comes back from flush() finds them settled.
void EngineImpl::settle_durable(const Settled& settled) {
  if (settled.empty()) return;
  for (const auto& [ticket, number] : settled) ticket->settle(Moment::durable);
  MutexLock lock(mutex_);
  for (const auto& [ticket, number] : settled) disk_->tracked_stores.erase(number);
  idle_.notify_all();
}

// Starts as many write-backs as may run. From any thread, without the mutex.
void EngineImpl::pump_write_backs() {
  wipe_what_is_owed();
  for (bool more = true; more;) {
    std::vector<DiskWrite> writes;
    Settled settled;
    std::optional<SavedBudget> budget;
    std::uint64_t number = 0;
    {
      MutexLock lock(mutex_);
      more = !closed_;
      for (std::size_t n = 0; more && n < kWritesPerHold; ++n) more = next_write(writes, settled);
      if (!writes.empty()) disk_->submitting.insert(number = ++disk_->submissions);
      budget = disk_->budget.to_save(std::time(nullptr));
    }
    if (budget) save_budget(*budget);
    settle_durable(settled);
    if (writes.empty()) continue;
    // A store that is out of service calls back in here, hence the mutex is free.
    for (DiskWrite& each : writes) disk_->volumes[each.volume].store->write(std::move(each.write));
    MutexLock lock(mutex_);
    disk_->submitting.erase(number);
    idle_.notify_all();
  }
}

// The drive that has the least to do, of those that take writes; one with a free slot before one that must
// evict.
std::optional<std::uint32_t> EngineImpl::choose_volume(std::size_t class_index) {
  DiskTier& disk = *disk_;
  std::optional<std::uint32_t> best;
  bool best_free = false;
  const auto num_volumes = static_cast<std::uint32_t>(disk.volumes.size());
  for (std::uint32_t i = 0; i < num_volumes; ++i) {
    const std::uint32_t v = (disk.next_volume + i) % num_volumes;
    if (!disk.volumes[v].store->can_write()) continue;
    const bool free = disk.index.slots(v * disk.index.classes_per_volume() + class_index).has_free();
    const bool better = !best || (free && !best_free) ||
                        (free == best_free && disk.volumes[v].writing < disk.volumes[*best].writing);
    if (!better) continue;
    best = v;
    best_free = free;
  }
  disk.next_volume = (disk.next_volume + 1) % std::max(num_volumes, 1U);
  return best;
}

// Handles one candidate; false when there is none, or no more may run.
bool EngineImpl::next_write(std::vector<DiskWrite>& writes, Settled& settled) {
  DiskTier& disk = *disk_;
  if (disk.candidates.empty() || disk.writing >= disk.most_writing) return false;
  const std::shared_ptr<WriteBack> write_back = std::move(disk.candidates.front());
  disk.candidates.pop_front();
  const auto decline = [&](std::uint64_t EngineStats::* counter) KVTIER_REQUIRES(mutex_) {
    end_write_back(*write_back, /*durable=*/false, counter, Status::ok(), settled);
    return true;
  };
  if (write_back->step != WriteBack::Step::queued) return true;
  Entry& host = tier_.index().at(write_back->host);
  if (host.generation != write_back->host_generation || !host.linked || host.state != SlotState::ready) {
    return decline(&EngineStats::disk_gone);
  }
  if (Entry* there = disk.index.index().find(host.key, host.group)) {
    // On disk since it became a candidate: by another's write, or found by the scan after an unclean end.
    if (there->state == SlotState::ready && !disk.undurable_at(disk.index.index().id(*there))) {
      end_write_back(*write_back, /*durable=*/true, &EngineStats::disk_durable, Status::ok(), settled);
      return true;
    }
    if (const auto undurable = disk.undurable_at(disk.index.index().id(*there))) {
      undurable->trackers.insert(undurable->trackers.end(), write_back->trackers.begin(),
                                 write_back->trackers.end());
      write_back->trackers.clear();  // they wait for that one
    }
    return decline(&EngineStats::disk_gone);
  }

  const Entry* above = tier_.index().parent(host);
  Entry* parent = above == nullptr ? nullptr : disk.index.index().find(above->key, above->group);
  const GroupSpec& spec = config_.groups[raw(host.group)];
  Offer offer{.block = {host.key, host.group},
              .victim = std::nullopt,
              .bytes = spec.slot_stride_bytes(),
              .budget = disk.budget.fullness(clock_->now_us())};
  if (above != nullptr && parent == nullptr) {
    // Else a prompt that comes again would get one block further on each time.
    disk.admission_policy.note(offer);
    return decline(&EngineStats::disk_declined_parent);
  }
  const std::size_t class_index = class_of_group_[raw(host.group)];
  const std::optional<std::uint32_t> volume = choose_volume(class_index);
  if (!volume) return decline(&EngineStats::disk_declined_busy);
  const std::size_t disk_class = disk.index.class_of(host.group, *volume);
  const bool has_free = disk.index.slots(disk_class).has_free();
  const SlotStore& store = *disk.volumes[*volume].store;
  const auto of_store = static_cast<std::uint32_t>(class_index);
  // In this order: the store's last step ends growing() before on_grown() has told us of its slots.
  const bool more_slots = !has_free && (store.growing(of_store) ||
                                        disk.index.slots(disk_class).usable() < store.usable_slots(of_store));
  if (more_slots && disk.candidates.size() < disk.most_candidates) {
    disk.candidates.push_front(write_back);  // a slot is being made ready: on_grown() comes back here
    return false;
  }
  const Entry* victim = has_free ? nullptr : disk.index.next_victim(disk_class, host.priority);
  if (victim != nullptr) offer.victim.emplace(BlockName{victim->key, victim->group});
  const bool admitted = disk.admission_policy.admit(offer);
  if (!admitted && host.priority != Priority::high) {
    return decline(&EngineStats::disk_declined_admission);
  }
  if (!has_free && victim == nullptr) return decline(&EngineStats::disk_declined_full);
  if (!disk.budget.take(spec.slot_stride_bytes(), clock_->now_us())) {
    return decline(&EngineStats::disk_declined_budget);
  }
  const TierIndex::Reservation place =
      disk.index.reserve(host.key, host.group, host.name_space, host.depth, parent, *volume, host.priority);
  if (place.outcome != ReserveOutcome::reserved) return decline(&EngineStats::disk_declined_full);

  tier_.pin(host);
  write_back->step = WriteBack::Step::writing;
  write_back->disk = disk.index.index().id(*place.entry);
  write_back->volume = *volume;
  ++disk.writing;
  ++disk.volumes[*volume].writing;

  DiskWrite next;
  next.volume = *volume;
  next.write.place = {static_cast<std::uint32_t>(class_index), place.entry->slot};
  next.write.block.key = host.key;
  next.write.block.group = host.group;
  if (above != nullptr) next.write.block.parent = above->key;
  next.write.block.depth = host.depth;
  next.write.block.name_space = namespace_tags_[raw(host.name_space)];
  next.write.payload_bytes = spec.payload_bytes();
  next.write.image = arena_->slot(class_index, host.slot);
  next.write.on_written = [this, write_back](const Status& status) {
    contained([&] { on_written(write_back, status); });
  };
  next.write.on_let_go = [this, write_back] { contained([&] { on_write_let_go(write_back); }); };
  next.write.on_durable = [this, write_back](const Status& status) {
    contained([&] { on_durable(write_back, status); });
  };
  writes.push_back(std::move(next));
  return true;
}

void EngineImpl::on_written(const std::shared_ptr<WriteBack>& write_back, const Status& status) {
  Settled settled;
  std::optional<OwedWipe> wipe;
  {
    MutexLock lock(mutex_);
    tick();
    DiskTier& disk = *disk_;
    Entry& entry = disk.index.index().at(write_back->disk);
    const bool given_up = status.code() == StatusCode::timeout;  // both slots: until on_write_let_go()
    if (!given_up) tier_.unpin(tier_.index().at(write_back->host));
    DiskTier::Volume& volume = disk.volumes[write_back->volume];
    --disk.writing;
    --volume.writing;
    if (status) {  // on_durable() follows, dropped meanwhile or not
      ++volume.undurable;
      volume.flush_failed = false;
    }
    if (status && entry.linked) {
      disk.index.commit(entry);
      write_back->step = WriteBack::Step::written;
      write_back->disk_generation = entry.generation;
      disk.undurable[raw(write_back->disk)] = write_back;
      const auto found = disk.by_host.find(raw(write_back->host));
      if (found != disk.by_host.end() && found->second == write_back) disk.by_host.erase(found);
    } else {
      // Dropped meanwhile, and counted as doomed there; or nobody knows what stands in the slot.
      if (given_up) {
        if (!entry.linked) --disk.doomed;  // it is wiped some day, and drop() does not wait for that
        disk.held.insert(raw(write_back->host));
      } else {
        if (entry.linked) ++disk.doomed;
        wipe = owed_of(write_back->disk, /*pinned=*/false);
      }
      disk.index.quarantine(entry);
      const bool gone = status.is_ok();
      end_write_back(*write_back, /*durable=*/false,
                     gone ? &EngineStats::disk_gone : &EngineStats::disk_failed, status, settled);
    }
    idle_.notify_all();
  }
  settle_durable(settled);
  if (wipe) wipe_doomed(write_back->volume, *wipe);
  pump_write_backs();
}

void EngineImpl::on_write_let_go(const std::shared_ptr<WriteBack>& write_back) {
  {
    MutexLock lock(mutex_);
    tier_.unpin(tier_.index().at(write_back->host));
    disk_->held.erase(raw(write_back->host));
    disk_->volumes[write_back->volume].owed_wipes.push_back(owed_of(write_back->disk, /*pinned=*/false));
    idle_.notify_all();
  }
  pump_write_backs();
}

// Once the drive is in service again: out of service it refuses wipes.
void EngineImpl::wipe_what_is_owed() {
  for (std::uint32_t v = 0; v < disk_->volumes.size(); ++v) {
    DiskTier::Volume& volume = disk_->volumes[v];
    std::vector<OwedWipe> owed;
    {
      MutexLock lock(mutex_);
      if (volume.owed_wipes.empty() || !volume.store->can_write()) continue;
      owed.swap(volume.owed_wipes);
      disk_->doomed += static_cast<std::uint32_t>(owed.size());
    }
    for (const OwedWipe& each : owed) wipe_doomed(v, each);
  }
}

void EngineImpl::on_durable(const std::shared_ptr<WriteBack>& write_back, const Status& status) {
  Settled settled;
  {
    MutexLock lock(mutex_);
    --disk_->volumes[write_back->volume].undurable;
    if (!status) lose_undurable(*write_back);
    const auto found = disk_->undurable.find(raw(write_back->disk));
    if (found != disk_->undurable.end() && found->second == write_back) disk_->undurable.erase(found);
    end_write_back(*write_back, status.is_ok(),
                   status ? &EngineStats::disk_durable : &EngineStats::disk_failed, status, settled);
  }
  settle_durable(settled);
}

// The drive may have lost it, and may show what stood in its slot before after a crash: it is stored anew, or
// not at all, and a drop finds the slot among what is owed.
void EngineImpl::lose_undurable(const WriteBack& write_back) {
  TierIndex& index = disk_->index;
  Entry& entry = index.index().at(write_back.disk);
  const bool stands =
      entry.generation == write_back.disk_generation && entry.linked && entry.state == SlotState::ready;
  if (!stands) return;
  index.pin(entry);
  index.lose(entry);
  disk_->volumes[write_back.volume].owed_wipes.push_back(owed_of(write_back.disk, /*pinned=*/true));
}

// What is written needs its sync and the catalog, and those need not wait for their time: one flush at a time
// on each drive that has something to make durable. A drive that fails says so to each block's tracker.
bool EngineImpl::can_be_hurried(const DiskTier::Volume& volume) {
  return !volume.flushing && !volume.flush_failed && (volume.writing > 0 || volume.undurable > 0);
}

void EngineImpl::hurry_drives() {
  for (DiskTier::Volume& volume : disk_->volumes) {
    {
      MutexLock lock(mutex_);
      if (!can_be_hurried(volume)) continue;
      volume.flushing = true;
    }
    volume.store->begin_flush([this, &volume](const Status& status) {
      contained([&] {
        MutexLock lock(mutex_);
        volume.flushing = false;
        volume.flush_failed = !status;
        idle_.notify_all();
      });
    });
  }
}

// Blocks until the fate of every block of stores numbered below `up_to` is known.
Status EngineImpl::wait_durable(std::uint64_t up_to, Deadline deadline) {
  const auto waiting = [&]() KVTIER_REQUIRES(mutex_) {
    return !disk_->tracked_stores.empty() && *disk_->tracked_stores.begin() < up_to;
  };
  const auto at_rest = [&]() KVTIER_REQUIRES(mutex_) {
    return std::ranges::none_of(disk_->volumes, [](const auto& volume) { return can_be_hurried(volume); });
  };
  while (true) {
    hurry_drives();
    MutexLock lock(mutex_);
    while (waiting() && at_rest()) {
      if (!deadline) {
        idle_.wait(lock);
      } else if (!idle_.wait_until(lock, *deadline) && waiting()) {
        return Status::timeout("flush: blocks of " + std::to_string(disk_->tracked_stores.size()) +
                               " stores are not durable yet; they go on");
      }
    }
    if (!waiting()) return Status::ok();
  }
}

}  // namespace kvtier
