// Arena: the host tier's memory, one shared range cut into slots.
//
//   memfd  | class 0: slot slot slot ... | class 1: slot slot ... |     (mapped shared, MADV_DONTFORK)
//          '--chunk--''--chunk--'...      '--chunk--'                    prefaulted and registered chunk by
//          chunk
//
// A *size class* holds the slots of all cache groups whose slots have the same stride. A *chunk* is the
// unit of prefaulting and of registration with devices; it holds whole slots of one class, so no slot
// ever straddles two registrations. A background thread prefaults chunk after chunk (first touch runs at
// a tenth of the second) and registers each with every device; slots are usable from the first chunk on.
//
// The memory is a memfd, so that other processes on this host can map the same slots (fd()), nothing
// named is left behind by a crash, and the kernel frees it with its last mapping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/core/types.h"
#include "kvtier/platform/device.h"
#include "kvtier/platform/host_memory.h"

namespace kvtier {

struct ArenaClass {
  std::uint64_t slot_stride_bytes = 0;  // a multiple of kSlotAlignment
  std::uint32_t num_slots = 0;
};

// Whole slots of one class, and for the last ones of a class the padding behind them.
struct ArenaChunk {
  std::size_t class_index;
  std::uint32_t first_slot;
  std::uint32_t end_slot;  // half-open
  std::uint64_t offset;    // from the start of the arena
  std::uint64_t bytes;
};

// Where everything is: all that another process needs, beside the descriptor, to map the same arena.
// Each class begins at a multiple of 2 MiB, and so does the end: huge pages are not shared by classes.
struct ArenaGeometry {
  std::vector<ArenaClass> classes;
  std::uint64_t chunk_bytes = std::uint64_t{128} << 20;  // upper bound; at least one slot

  // Errors: invalid_argument with the name, the value and what is allowed. All below require Ok.
  Status validate() const;
  std::uint64_t total_bytes() const;
  // Byte offset of a slot image from the start of the arena.
  std::uint64_t slot_offset(std::size_t class_index, SlotId slot) const;
  // Every chunk in the order of prefaulting: the classes take turns, so that each has slots early.
  std::vector<ArenaChunk> chunks() const;
};

// Where the arena's pages are to come from: the NUMA node that the GPU hangs on.
struct NumaPlacement {
  int node = 0;
  bool required = false;  // a refusal is an error of create(); else the kernel chooses, and stats() tells
};

// Owns: the mapping, the descriptor, the background thread. Borrows: HostMemory and every Device given
// to register_with(), which must outlive it or be taken out by unregister_from().
// Threads: slot(), fd() and geometry() from any thread; the rest from any thread, serialised inside.
// Blocks: create() and map() do not wait for prefaulting; unregister_from() and the destructor wait for
// at most the chunk in hand. Devices are called without any lock of the engine held (I6).
//
// Callbacks may come before create() has returned and until the destructor has joined the thread, never
// after it returned. They may call every method but the waiting ones and the destructor, and must not
// throw. Whoever destroys the arena holds no lock that they take.
//
// A child of fork() has neither the thread nor the mapping. There the destructor closes the inherited
// descriptor and leaves all else alone, slot() points nowhere, and the other methods do nothing.
class Arena {
 public:
  // Called on the background thread, without locks held, when the first `usable` slots of a class may be
  // handed out; `usable` only grows. The last call for each class says num_slots, unless a chunk failed.
  // A chunk that a device refused is handed out all the same; one that waits for the end of a capture is not.
  using OnUsable = std::function<void(std::size_t class_index, std::uint32_t usable)>;
  // Called once, on the background thread, when prefaulting failed: no further slot becomes usable, and
  // those that were prefaulted before have all been handed out.
  using OnFailure = std::function<void(const Status& status)>;

  // Reserves and begins to prefault a new arena. Errors: invalid_argument for a geometry that is not
  // allowed; resource when the cgroup or the machine has not that much memory left, naming both figures.
  static Result<std::unique_ptr<Arena>> create(const ArenaGeometry& geometry, HostMemory& memory,
                                               OnUsable on_usable, OnFailure on_failure,
                                               std::optional<NumaPlacement> placement = {});

  // Maps an arena that another process created, from its descriptor (which is duplicated). Nothing is
  // prefaulted: the creator does that. register_with() registers every chunk, prefaulted there or not.
  // Errors: invalid_argument for a descriptor that is not a file of exactly geometry.total_bytes().
  static Result<std::unique_ptr<Arena>> map(const ArenaGeometry& geometry, int fd, HostMemory& memory);

  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  const ArenaGeometry& geometry() const;
  int fd() const;
  // First byte of a slot's image (its header; the payload is kSlotHeaderBytes further).
  std::byte* slot(std::size_t class_index, SlotId slot) const;

  // Registers what is prefaulted now, and every later chunk, with `device`, in the background. A chunk
  // that cannot be registered stays pageable, which is legal and slow: it is counted and retried only
  // after a capture conflict. Idempotent.
  void register_with(Device& device);
  // Blocks until every chunk that is prefaulted now was offered to `device`, but not for the end of a
  // capture. Until then a copy may find pageable memory, which would block its submitter. Not to be called
  // from a callback.
  void wait_until_offered(const Device& device);
  // Takes all chunks out again. Requires that no submitted copy of `device` touches the arena. Retries for
  // a second what a capture refuses. A chunk that stays registered keeps the whole mapping in place until
  // the process ends: were the addresses used again, the device would copy the old pages, wrong bytes.
  void unregister_from(Device& device);

  // Ends the background thread, and so all callbacks: nothing more is prefaulted or registered. Blocks for
  // what it is at. For an arena that is kept because somebody may write into it for ever.
  void stop();

  // Blocks until prefaulting and all registrations are over (tests and benchmarks). Returns the first
  // prefault failure, if any; a refused registration is not one.
  Status wait_until_whole();

  struct Stats {
    std::uint64_t total_bytes = 0;
    std::uint64_t prefaulted_bytes = 0;   // by this process; total_bytes once whole
    std::uint64_t registered_chunks = 0;  // summed over devices
    std::uint64_t refused_chunks = 0;     // registrations that failed, ever; captures do not count
    std::optional<int> numa_node;         // that its pages come from, as far as it has any
    std::uint64_t huge_page_bytes = 0;    // in reserved huge pages: all or 0 (transparent ones are not known)
  };
  Stats stats() const;

 private:
  class Impl;
  explicit Arena(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvtier
