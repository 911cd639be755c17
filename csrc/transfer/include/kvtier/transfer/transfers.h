// Transfers: runs moves on one device and says when they are over.
//
//   submit()                                   (caller's thread, no lock held)
//     framework stream --record--> event         what the framework did to the pages so far
//     our stream       --wait----> event         load_/store_after_framework_stream
//     our stream       --copy, copy, copy-->     plan() in pieces of bounded size
//     our stream       --record--> end event     and one event per layer batch
//   waiter thread: synchronize(end event), then on_end(outcome)
//
// There is one stream and one waiter thread per direction. A waiter sleeps in the device (blocking-sync
// events); there is no polling tick and no host callback, which a sticky error would skip.
//
// What proves that no copy of a transfer runs any more, and nothing else does:
//   * an event recorded behind it has completed: its end event, or, where recording that one failed, one
//     that the waiter records anew at the end of the stream;
//   * device.health() reports a sticky error: the driver has torn the context down, and its DMA with it;
//   * no copy was accepted by the device in the first place.
// A failed synchronize() or record() proves nothing, so the waiter tries again: a few times within about
// half a second, and for up to a minute where a graph capture was in the way. After that the transfer
// ends with `drained` false.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/device.h"
#include "kvtier/transfer/page_map.h"
#include "kvtier/transfer/plan.h"

namespace kvtier {

struct TransferRequest {
  std::shared_ptr<const PageMap> map;
  std::vector<BlockMove> moves;  // at least one
  std::vector<PageId> pages;     // checked by check_pages()
  Direction direction = Direction::store;
  StreamHandle framework_stream{0};
  // What Transfers::mark() returned: the copies come behind that point instead of behind what the framework's
  // stream has been given by the time of submit(). For loads whose blocks come from a drive first.
  std::shared_ptr<Event> after;
  // Layers per batch of a layer-wise load, each with an event of its own; 0 moves whole blocks.
  std::uint32_t layers_per_batch = 0;
};

struct TransferOutcome {
  Status status;  // ok: every byte was copied, and no copy runs any more
  // No copy of this transfer runs or will run any more (proved: see above). False only when the device
  // could not prove it: then its slots and pages must never be reused by this process.
  bool drained = true;
};

// A submitted move. Shared by whoever may order a stream behind it. Threads: any. May outlive its
// Transfers, not the Device.
class Transfer {
 public:
  virtual ~Transfer() = default;
  // Orders later work of a framework stream behind all copies (or behind the batch that has `layer`).
  // Does not block on asynchronous devices; on `cpu`, where the framework's stream is the calling
  // thread, blocks until they have run. Errors: invalid_argument for a layer out of range, unsupported
  // for wait_layer on a transfer of whole blocks, or the submission's own failure: nothing was ordered.
  virtual Status wait_stream(StreamHandle stream) = 0;
  virtual Status wait_layer(std::uint32_t layer, StreamHandle stream) = 0;
};

// Owns: its streams and waiter threads. Borrows: the Device. Threads: submit() from any thread.
// Blocks: the destructor, until every submitted transfer has ended; so never destroy it inside on_end.
// After fork() the child's submit() ends every transfer with `closed`, and its destructor leaks at once: the
// threads and what they may hold or wait for belong to the parent.
class Transfers {
 public:
  // Called exactly once per submit(), without locks held: on a waiter thread, or inside submit() when
  // nothing reached our stream. Must not throw: on a waiter thread nobody is there to catch it, so it is
  // only printed, and later transfers still end.
  using OnEnd = std::function<void(const TransferOutcome& outcome)>;

  static Result<std::unique_ptr<Transfers>> create(Device& device);
  virtual ~Transfers() = default;

  // Never fails as a call: failures reach on_end. Unless it failed, all events are recorded when it
  // returns.
  virtual std::shared_ptr<Transfer> submit(TransferRequest request, OnEnd on_end) = 0;

  // The point that a framework's stream has reached, for TransferRequest::after. The event must not outlive
  // the Device.
  virtual Result<std::shared_ptr<Event>> mark(StreamHandle framework_stream) = 0;
};

}  // namespace kvtier
