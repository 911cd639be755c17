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
  ++disk_->doomed;
  const std::uint32_t volume = entry.volume;
  if (entry.state == SlotState::filling) {
    disk_->index.drop(entry);  // on_written() finds it dropped, and wipes it
    return;
  }
  disk_->index.pin(entry);
  disk_->index.drop(entry);
  victims[volume].push_back(disk_->index.index().id(entry));
}

// Wipes one slot whose entry is `leaving`: quarantined, or pinned by the caller.
void EngineImpl::wipe_doomed(std::uint32_t volume, EntryId disk, bool pinned) {
  SlotPlace place;
  {
    MutexLock lock(mutex_);
    const Entry& entry = disk_->index.index().at(disk);
    place = {static_cast<std::uint32_t>(class_of_group_[raw(entry.group)]), entry.slot};
  }
  disk_->volumes[volume].store->wipe({place}, [this, disk, pinned](const Status& status) {
    contained([&] {
      MutexLock lock(mutex_);
      // Not wiped: nobody knows what stands there, so the slot stays `leaving`.
      if (status) {
        Entry& entry = disk_->index.index().at(disk);
        if (pinned) {
          disk_->index.unpin(entry);
        } else {
          disk_->index.release_quarantined(entry);
        }
      }
      --disk_->doomed;
      idle_.notify_all();
    });
  });
}

Status EngineImpl::wait_for_scans() {
  const bool done = std::all_of(disk_->volumes.begin(), disk_->volumes.end(),
                                [](const DiskTier::Volume& volume) { return volume.store->scan_done(); });
  return done ? Status::ok() : wipe_and_wait(DiskVictims(disk_->volumes.size()));
}

Status EngineImpl::wipe_and_wait(DiskVictims victims) {
  struct Wait {
    std::size_t left = 0;  // volumes
    Status failure;
  };
  const auto wait = std::make_shared<Wait>();
  wait->left = victims.size();
  for (std::uint32_t volume = 0; volume < victims.size(); ++volume) {
    const auto mine = std::make_shared<const std::vector<EntryId>>(std::move(victims[volume]));
    std::vector<SlotPlace> places;
    places.reserve(mine->size());
    {
      MutexLock lock(mutex_);
      for (const EntryId id : *mine) {
        const Entry& entry = disk_->index.index().at(id);
        places.push_back({static_cast<std::uint32_t>(class_of_group_[raw(entry.group)]), entry.slot});
      }
    }
    disk_->volumes[volume].store->wipe(std::move(places), [this, wait, mine](const Status& status) {
      contained([&] {
        MutexLock lock(mutex_);
        for (const EntryId id : *mine) {
          if (status) disk_->index.unpin(disk_->index.index().at(id));
          --disk_->doomed;
        }
        if (!status && wait->failure) wait->failure = status;
        --wait->left;
        idle_.notify_all();
      });
    });
  }
  const auto deadline = std::chrono::steady_clock::now() + kWipePatience;
  MutexLock lock(mutex_);
  while (wait->left > 0 || disk_->doomed > 0) {
    if (!idle_.wait_until(lock, deadline) && (wait->left > 0 || disk_->doomed > 0)) {
      return {StatusCode::io,
              "drop: the blocks are gone from memory, but a drive has not confirmed within " +
                  std::to_string(kWipePatience.count()) + " s that they are gone from it",
              ETIMEDOUT};
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
