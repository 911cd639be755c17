// SimulatedDrive: an IoQueue over real files that does to them what drives do at their worst, by a seed.
//
// Writes are kept in memory ("the drive's cache") and reach the file only by a sync, or at the drive's whim.
// Reads see them. power_loss() ends the drive: of what was not synced, and of writes still in flight, a
// random part reaches the files, whichever came first, and mostly one is torn: a random part of its sectors
// of 512 or 4096 bytes. Then the files are what a new start would find.
//
// What happens to a request is drawn at its submission, so one sequence of requests meets the same faults
// whenever the owner waits.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kvtier/platform/io_queue.h"

namespace kvtier {

struct DriveFaults {
  std::uint64_t seed = 1;
  // Probability, per request, of each fault.
  double read_error = 0;   // EIO
  double write_error = 0;  // EIO; a random part may have been written
  double sync_error = 0;   // EIO; each write that any file's cache has by then is made durable, kept or lost
  double no_space = 0;     // ENOSPC on writes
  double bit_flip = 0;     // a bit of what was read, or of what stands on the drive, flips
  // A write lands elsewhere in its file, at a multiple of its own size from its place (another slot's), or
  // nowhere in a file without such a place.
  double misplaced = 0;
  double lost_write = 0;  // reported done and never done, even though synced
  // A read or write of more than 4096 bytes moves only a part, of at least so many: the queue has to go on
  // with the rest, which meets faults of its own.
  double short_transfer = 0;
  // Completes late: after `delayed_requests` others of its queue, or when only such are in flight, or at
  // release_delayed().
  double delay = 0;
  std::uint32_t delayed_requests = 8;
  bool never_completes = false;                          // delayed requests come only at release_delayed()
  std::optional<std::uint64_t> fail_nth = std::nullopt;  // the n-th request from now (from 0) fails with EIO
};

// Bytes of a file on which the drive has lied: it flipped a bit of what was written there, put it elsewhere,
// or put there what belongs elsewhere.
struct SpoiledRange {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

// Shared by all queues over the same files. Threads: any.
class SimulatedDrive {
 public:
  explicit SimulatedDrive(const DriveFaults& faults);
  ~SimulatedDrive();

  // A queue on this drive; the drive must outlive it. Completions come out of order by the seed.
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth);
  void set_faults(const DriveFaults& faults);  // of requests submitted from now on; seeds anew
  void release_delayed();
  // See above. Afterwards every request fails with EIO, those in flight too. The drive has its own
  // descriptors of the files: it does not matter who has closed theirs.
  void power_loss();
  std::uint64_t requests() const;         // submitted so far
  std::uint64_t unsynced_writes() const;  // that a power loss now may lose
  std::uint64_t faults_injected() const;
  // Of all files, in any order. Later good writes are not subtracted.
  std::vector<SpoiledRange> spoiled() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvtier
