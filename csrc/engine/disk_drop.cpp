// Forgetting blocks on disk for good: what was dropped never comes back, after a restart neither.
//
// A slot on disk keeps its old image until it is overwritten, and a rebuild from the headers would believe
// it. So a slot is `doomed` until its header is wiped, and only then free. What was evicted and is being
// overwritten is covered by the stores' barrier: a wipe is done only when all writes before it are.
#include <algorithm>
#include <chrono>

#include "engine_impl.h"

namespace kvtier {
namespace {

// A drive that does not answer for so long is reported; its blocks are out of memory's reach by then.
constexpr std::chrono::seconds kWipePatience{60};

}  // namespace

// The entry may be ready, with readers or without, or being written.
void EngineImpl::doom(Entry& entry, DiskVictims& victims) {
  if (entry.state == SlotState::filling) {
    ++disk_->doomed;
    disk_->index.drop(entry);  // on_written() finds it dropped, and wipes it
    return;
  }
  victims[entry.volume].push_back(disk_->index.index().id(entry));  // may throw, and nothing has changed
  ++disk_->doomed;
  disk_->index.pin(entry);
  disk_->index.drop(entry);
}

OwedWipe EngineImpl::owed_of(EntryId disk, bool pinned) {
  const Entry& entry = disk_->index.index().at(disk);
  return {{static_cast<std::uint32_t>(class_of_group_[raw(entry.group)]), entry.slot}, disk, pinned};
}

// Wipes one slot that is counted as doomed.
void EngineImpl::wipe_doomed(std::uint32_t volume, const OwedWipe& wipe) {
  disk_->volumes[volume].store->wipe({wipe.place}, [this, volume, wipe](const Status& status) {
    contained([&] {
      MutexLock lock(mutex_);
      end_wipe(volume, wipe, status);
      idle_.notify_all();
    });
  });
}

// Not wiped: nobody knows what stands there, so the slot stays `leaving`, and it is tried again.
void EngineImpl::end_wipe(std::uint32_t volume, const OwedWipe& wipe, const Status& status) {
  --disk_->doomed;
  TierIndex& index = disk_->index;
  if (!status) {
    disk_->volumes[volume].owed_wipes.push_back(wipe);
  } else if (!wipe.entry) {
    index.slots(volume * index.classes_per_volume() + wipe.place.class_index)
        .step(wipe.place.slot, SlotState::free);
  } else if (wipe.pinned) {
    index.unpin(index.index().at(*wipe.entry));
  } else {
    index.release_quarantined(index.index().at(*wipe.entry));
  }
}

Status EngineImpl::wait_for_scans() {
  const bool done = std::all_of(disk_->volumes.begin(), disk_->volumes.end(),
                                [](const DiskTier::Volume& volume) { return volume.store->scan_done(); });
  return done ? Status::ok() : wipe_and_wait(DiskVictims(disk_->volumes.size()));
}

Status EngineImpl::wipe_and_wait(DiskVictims victims) {
  struct Wait {
    std::size_t left = 0;  // for each volume, the wipes and the barrier
    Status failure;
  };
  const auto deadline = std::chrono::steady_clock::now() + kWipePatience;
  const auto wait = std::make_shared<Wait>();
  wait->left = 2 * victims.size();
  std::vector<std::vector<OwedWipe>> wipes(victims.size());
  {
    MutexLock lock(mutex_);
    // A write that is to go over a dropped block's slot comes before the barrier.
    const std::uint64_t up_to = disk_->submissions;
    while (!disk_->submitting.empty() && *disk_->submitting.begin() <= up_to && wait->failure) {
      if (!idle_.wait_until(lock, deadline)) wait->failure = Status::timeout("a write is not submitted yet");
    }
    for (std::uint32_t volume = 0; volume < victims.size(); ++volume) {
      // With what is owed from before: it may hold what is dropped.
      wipes[volume].swap(disk_->volumes[volume].owed_wipes);
      disk_->doomed += static_cast<std::uint32_t>(wipes[volume].size());
      for (const EntryId id : victims[volume]) wipes[volume].push_back(owed_of(id, /*pinned=*/true));
    }
  }
  for (std::uint32_t volume = 0; volume < victims.size(); ++volume) {
    SlotStore& store = *disk_->volumes[volume].store;
    const auto note = [this, wait](const Status& status) KVTIER_REQUIRES(mutex_) {
      if (!status && wait->failure) wait->failure = status;
      --wait->left;
      idle_.notify_all();
    };
    std::vector<SlotPlace> places;
    places.reserve(wipes[volume].size());
    for (const OwedWipe& wipe : wipes[volume]) places.push_back(wipe.place);
    if (places.empty()) {
      MutexLock lock(mutex_);
      note(Status::ok());
    } else {
      store.wipe(std::move(places),
                 [this, note, volume, mine = std::move(wipes[volume])](const Status& status) {
                   contained([&] {
                     MutexLock lock(mutex_);
                     for (const OwedWipe& wipe : mine) end_wipe(volume, wipe, status);
                     note(status);
                   });
                 });
    }
    store.wipe({}, [this, note](const Status& status) {
      contained([&] {
        MutexLock lock(mutex_);
        note(status);
      });
    });
  }
  MutexLock lock(mutex_);
  while (wait->left > 0 || disk_->doomed > 0) {
    if (!idle_.wait_until(lock, deadline) && (wait->left > 0 || disk_->doomed > 0)) {
      return {StatusCode::io,
              "drop: the blocks are gone from memory, but a drive has not confirmed within " +
                  std::to_string(kWipePatience.count()) + " s that they are gone from it",
              ETIMEDOUT};
    }
  }
  for (const DiskTier::Volume& volume : disk_->volumes) {
    if (wait->failure && !volume.owed_wipes.empty()) {
      wait->failure = Status::io(std::to_string(volume.owed_wipes.size()) + " slots of " + volume.path +
                                 " could not be wiped yet");
    }
  }
  if (!wait->failure) {
    return {StatusCode::io,
            "drop: the blocks are gone from memory, but may be found on a drive after a restart: " +
                wait->failure.message(),
            wait->failure.native_code()};
  }
  return Status::ok();
}

}  // namespace kvtier
