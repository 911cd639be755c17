// SimulatedDrive: an IoQueue over real files that does to them what drives do at their worst, by a seed.
//
// Writes are kept in memory ("the drive's cache") and reach the file only by a sync, or at the drive's whim.
// Reads see them. power_loss() ends the drive: of what was not synced, a random part reaches the files, whole
// requests in any order, one of them torn at 512 or 4096 bytes. Then the files are what a new start would find.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "kvtier/platform/io_queue.h"

namespace kvtier {

struct DriveFaults {
  std::uint64_t seed = 1;
  // Probability, per request, of each fault.
  double read_error = 0;    // EIO
  double write_error = 0;   // EIO; a random part may have been written
  double sync_error = 0;    // EIO; what it should have made durable stays lost or not, at random
  double no_space = 0;      // ENOSPC on writes
  double bit_flip = 0;      // a bit of what was read, or of what stands on the drive, flips
  double misplaced = 0;     // a write lands at another slot's place (4 KiB aligned)
  double lost_write = 0;    // reported done and never done, even though synced
  double delay = 0;         // completes late: only after `delayed_requests` others, or at release_delayed()
  std::uint32_t delayed_requests = 8;
  bool never_completes = false;               // delayed requests come only at release_delayed()
  std::optional<std::uint64_t> fail_nth;      // the n-th request from now (from 0) fails with EIO
};

// Shared by all queues over the same files. Threads: any.
class SimulatedDrive {
 public:
  explicit SimulatedDrive(const DriveFaults& faults);
  ~SimulatedDrive();

  // A queue on this drive; the drive must outlive it. Completions come out of order by the seed.
  std::unique_ptr<IoQueue> make_queue(std::uint32_t depth);
  void set_faults(const DriveFaults& faults);
  void release_delayed();
  // See above. Afterwards every request fails with EIO. Requires that files are still open under the same fds.
  void power_loss();
  std::uint64_t requests() const;  // so far
  std::uint64_t faults_injected() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvtier
