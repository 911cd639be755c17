// RankWorker: one rank's half of a multi-process server (docs/multi-process.md).
//
//   keeper process                               worker process of rank r
//     Engine: index, policy, pins, slots           RankWorker: devices, pages, copies
//       grant_store / grant_load  --slot numbers-->  run()
//       finish_part               <--take_ended()--    its copies are over
//            '------------- one memfd, mapped by both --------------'
//
// A slot of a group with num_stripes = n holds the parts of n ranks side by side: the stripe of rank r
// begins at kSlotHeaderBytes + r * stripe_bytes(). A replicated group (MLA) has one stripe, which rank 0
// writes and every rank reads.
//
// A worker decides nothing: it copies between the slots it is told and its own pages. Which slots it may
// touch, and until when, only the keeper knows; so an order must never be run twice, nor after the keeper
// has been told that it is over. The caller sees to that (src/kvtier/ranks.py does).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvtier/core/layout.h"
#include "kvtier/core/status.h"
#include "kvtier/core/types.h"
#include "kvtier/engine/engine.h"
#include "kvtier/engine/ticket.h"
#include "kvtier/memory/arena.h"
#include "kvtier/platform/device.h"
#include "kvtier/transfer/page_map.h"
#include "kvtier/transfer/transfers.h"

namespace kvtier {

// The part of a grant that one rank carries out.
struct RankOrder {
  std::uint64_t id = 0;  // comes back in EndedOrder
  Direction direction = Direction::store;
  // One per block of the request: `running` for those to copy here, else what has become of them already.
  std::span<const BlockOutcome> outcomes;
  std::span<const SlotId> slots;  // one per `running` block, in order
  std::span<const PageId> pages;  // pages_per_block for each block of the request
  StreamHandle stream{0};
  std::uint32_t first_block = 0;  // depth of the request's first block in its sequence
  std::uint32_t layers_per_batch = 0;
};

// An order whose copies are over, or never will be known to be (`drained` false).
struct EndedOrder {
  std::uint64_t id;
  TransferOutcome outcome;
};

// Owns: its mapping of the arena, the streams and waiter threads of every attached device. Borrows: the
// tensors, until detach() has returned ok. Threads: every method from any thread. Blocks: as said below.
// After fork() every method of the child answers StatusCode::closed.
class RankWorker {
 public:
  // `memory` null: the real one; else it must outlive the worker. Errors: invalid_argument for a bad group
  // or a rank that has no stripe in it; resource.
  static Result<std::shared_ptr<RankWorker>> create(std::vector<GroupSpec> groups, std::uint32_t rank,
                                                    HostMemory* memory = nullptr);
  // Blocks until every running copy has ended.
  virtual ~RankWorker() = default;

  // As Engine's. Pages may be attached before join() and stay attached from one arena to the next.
  virtual Result<std::shared_ptr<Pages>> attach(std::shared_ptr<Device> device, GroupId group,
                                                std::span<const TensorView> tensors) = 0;
  virtual Status detach(Pages& pages, Deadline deadline) = 0;

  // Maps the keeper's arena from its descriptor (which stays the caller's). class_of_group says in which
  // class of `geometry` each group's slots are. Errors: invalid_argument when the slots do not fit the
  // groups, or when an arena is mapped already (leave() first); resource; closed.
  virtual Status join(const ArenaGeometry& geometry, std::span<const std::size_t> class_of_group, int fd) = 0;
  // Refuses further orders and blocks until no copy touches the arena; then unmaps it. Ok when there is
  // none. Errors: timeout: call again; device: a device cannot prove that its copies are over, so the
  // arena stays mapped until the process ends.
  virtual Status leave(Deadline deadline) = 0;
  // Blocks until the arena is registered with every attached device. Before that, copies are as slow as
  // pageable memory is, and run() may wait for them (tests and benchmarks). Errors: closed.
  virtual Status wait_until_whole() = 0;

  // Submits the copies of an order. Never waits for them. The ticket's outcomes are this rank's: `stored`
  // says that its part is in the slot, not that the block is visible. Once this has returned ok, the order
  // comes out of take_ended() exactly once. Errors: invalid_argument (nothing was done), closed when no
  // arena is mapped, unsupported.
  virtual Result<std::shared_ptr<Ticket>> run(Pages& pages, const RankOrder& order) = 0;

  // Readable while take_ended() has something to give. Owned by the worker.
  virtual int ended_fd() const = 0;
  virtual std::vector<EndedOrder> take_ended() = 0;

  // leave() for good. Idempotent. ended_fd() and take_ended() go on working.
  virtual Status close(Deadline deadline) = 0;
};

}  // namespace kvtier
