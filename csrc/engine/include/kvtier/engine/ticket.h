// Ticket: the handle of a running store or load.
//
// A store passes three moments: `released` (the pages may be reused), `ready` (others can hit the blocks)
// and `durable` (they survive a restart). A load has one, `ready`. A moment is *settled* when it was
// reached or will never be; the outcomes say which. Dropping a Ticket cancels nothing: what the transfer
// needs (pins, reservations) belongs to the engine until the copies are over (I5).
//
// In a child of fork() nothing will ever settle and the locks may be held for good: there every moment
// counts as settled, waits answer `closed`, all blocks have failed, and nothing touches what is inherited.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/status.h"
#include "kvtier/transfer/transfers.h"

namespace kvtier {

enum class Moment : std::uint8_t { released, ready, durable };

// What became of one block of a store or load. The numbers are part of the Python API.
enum class BlockOutcome : std::uint8_t {
  running = 0,   // not known yet
  stored = 1,    // store: copied, visible
  present = 2,   // store: was in the tier already
  pending = 3,   // store: somebody else is filling it; load: not ready yet
  declined = 4,  // store: no slot could be freed
  loaded = 5,    // load: its bytes are in the pages
  missed = 6,    // load: not in the tier
  failed = 7,    // the copy failed; a store left nothing visible, a load left its pages undefined
  dropped = 8,   // store: dropped by somebody while it was being copied
};

using Deadline = std::optional<std::chrono::steady_clock::time_point>;

// Threads: any.
class Ticket {
 public:
  Ticket(Direction direction, std::size_t num_blocks, bool has_disk);
  ~Ticket();
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  Direction direction() const { return direction_; }
  bool settled(Moment moment) const;
  bool done() const { return settled(Moment::ready); }
  // Blocks until the moment is settled. A deadline ends the wait (timeout), never the transfer. Errors:
  // timeout; for `released` the device's error when it cannot prove that copies are over (the pages must
  // not be reused); unsupported for `durable` without a disk tier.
  Status wait(Moment moment, Deadline deadline) const;
  // The first failure of the transfer, or ok. Final once done.
  Status failure() const;
  // One per block. Final once done.
  std::vector<BlockOutcome> outcomes() const;
  // Loads: blocks at the beginning whose bytes are in the pages. Stores: that others can hit or will.
  std::size_t valid_blocks() const;
  // Stores: blocks that survive a restart. Final once `durable` is settled.
  std::size_t durable_blocks() const;

  // See Transfer. A ticket that had nothing to copy orders nothing and succeeds.
  Status wait_stream(StreamHandle stream) const;
  Status wait_layer(std::uint32_t layer, StreamHandle stream) const;

  // A descriptor that becomes readable when the ticket is done (an eventfd, owned by the ticket; made at
  // the first call). Errors: resource when the process has no descriptor left.
  Result<int> done_fd();

  // For the engine only.
  void set_outcomes(std::vector<BlockOutcome> outcomes);
  void set_transfer(std::shared_ptr<Transfer> transfer);
  void fail(const Status& status);
  void settle(Moment moment, Status error = Status::ok());
  void add_durable(std::size_t num_blocks);

 private:
  struct State {
    mutable Mutex mutex;
    mutable CondVar changed;
    std::vector<BlockOutcome> outcomes KVTIER_GUARDED_BY(mutex);
    std::shared_ptr<Transfer> transfer KVTIER_GUARDED_BY(mutex);
    Status failure KVTIER_GUARDED_BY(mutex);
    Status released_error KVTIER_GUARDED_BY(mutex);
    bool released KVTIER_GUARDED_BY(mutex) = false;
    bool ready KVTIER_GUARDED_BY(mutex) = false;
    bool durable KVTIER_GUARDED_BY(mutex) = false;
    std::size_t durable_blocks KVTIER_GUARDED_BY(mutex) = 0;
    int done_fd KVTIER_GUARDED_BY(mutex) = -1;
  };
  bool inherited() const;  // by a child of fork()
  Status order(StreamHandle stream, std::optional<std::uint32_t> layer) const;

  const Direction direction_;
  const bool has_disk_;
  const std::size_t num_blocks_;
  const std::uint64_t born_in_;
  std::unique_ptr<State> state_;  // in one piece, so that a forked child can leave it alone
};

}  // namespace kvtier
