// The inside of Arena, in two files: arena.cpp makes, describes and ends it; arena_thread.cpp has the
// background thread and the devices.
//
// One thread does all the slow work, one step at a time: next_step() chooses under the lock, the step runs
// without it, and its outcome is written down under the lock again. The state is a few counters over the
// chunks in the order of prefaulting:
//
//   chunks_  | announced ......... | prefaulted ............ | untouched ........ |
//            0                announced_                prefaulted_          chunks_.size()
//
//   each device has a `next` of its own in 0..prefaulted_; a chunk is announced when it lies before
//   prefaulted_ and before every device's `next`, and so has been offered to all of them.
//
// Whether there is anything left to do is a function of these counters; no flag can disagree with them.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"
#include "kvtier/memory/arena.h"

namespace kvtier {

class Arena::Impl {
 public:
  class Fd {
   public:
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Fd& operator=(Fd&&) = delete;
    ~Fd() {
      if (fd_ >= 0) ::close(fd_);
    }
    int get() const { return fd_; }

   private:
    int fd_;
  };

  // Who prefaults: the creator, with callbacks, or nobody here.
  enum class Role { creator, guest };

  static Result<std::unique_ptr<Arena>> open(const ArenaGeometry& geometry, Fd fd, HostMemory& memory,
                                             Role role, OnUsable on_usable, OnFailure on_failure,
                                             std::optional<NumaPlacement> placement);
  Impl(const ArenaGeometry& geometry, Fd fd, std::byte* base, HostMemory& memory, Role role,
       OnUsable on_usable, OnFailure on_failure);
  ~Impl();

  // "64.0 GiB (68719476736 bytes)"
  static std::string readable(std::uint64_t bytes);

  bool in_forked_child() const { return process_generation() != generation_; }
  void close_in_forked_child();

  const ArenaGeometry& geometry() const { return geometry_; }
  int fd() const { return fd_.get(); }
  std::byte* slot(std::size_t class_index, SlotId slot) const;

  void register_with(Device& device) KVTIER_EXCLUDES(mutex_);
  void wait_until_offered(const Device& device) KVTIER_EXCLUDES(mutex_);
  void unregister_from(Device& device) KVTIER_EXCLUDES(mutex_);
  Status wait_until_whole() KVTIER_EXCLUDES(mutex_);
  Stats stats() const KVTIER_EXCLUDES(mutex_);
  void stop();  // joins the thread

 private:
  // A device and how far it has come. `next` and `registered` are written by the background thread; once
  // `leaving` is set and no call is under way, they belong to the thread that takes the device out.
  struct Attachment {
    explicit Attachment(Device& d) : device(&d) {}

    Device* const device;
    std::size_t next = 0;                              // the first chunk not offered to it yet
    std::vector<std::byte*> registered;                // where the chunks begin that it accepted
    std::chrono::steady_clock::time_point retry_at{};  // not before, after a capture conflict
    bool leaving = false;
  };

  enum class StepKind { stop, offer_chunk, announce_chunk, report_failure, prefault_chunk };
  struct Step {
    StepKind kind;
    std::size_t chunk = 0;
    Attachment* attachment = nullptr;  // stays alive: whoever takes it out waits for calling_
  };

  Status start();
  void run();
  Step next_step() KVTIER_EXCLUDES(mutex_);
  void offer(const ArenaChunk& chunk, Attachment& attachment) KVTIER_EXCLUDES(mutex_);
  void announce(const ArenaChunk& chunk) KVTIER_EXCLUDES(mutex_);
  void report_failure() KVTIER_EXCLUDES(mutex_);
  void prefault(const ArenaChunk& chunk) KVTIER_EXCLUDES(mutex_);
  Status prefault_unlocked(const ArenaChunk& chunk);

  // Chunks that are prefaulted and were offered to every device.
  std::size_t settled() const KVTIER_REQUIRES(mutex_);
  bool whole() const KVTIER_REQUIRES(mutex_);
  // Returns whether the device knows nothing of the arena any more.
  static bool unregister_all(Attachment& attachment);
  Attachment* find(const Device& device) const KVTIER_REQUIRES(mutex_);

  const ArenaGeometry geometry_;
  const std::vector<ArenaChunk> chunks_;
  std::vector<std::uint64_t> class_offsets_;
  HostMemory& memory_;
  const OnUsable on_usable_;
  const OnFailure on_failure_;
  const Fd fd_;
  std::byte* const base_;
  const std::uint64_t generation_ = process_generation();
  std::uint64_t huge_page_bytes_ = 0;
  std::optional<int> numa_node_;
  dev_t file_device_ = 0;  // with inode_: what fd_ was when it was ours
  ino_t inode_ = 0;

  mutable Mutex mutex_;
  CondVar changed_;  // after every change of what follows
  std::size_t prefaulted_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::size_t announced_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint64_t prefaulted_bytes_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint64_t refused_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::vector<std::unique_ptr<Attachment>> attachments_ KVTIER_GUARDED_BY(mutex_);
  const Attachment* calling_ KVTIER_GUARDED_BY(mutex_) =
      nullptr;  // whose device the background thread is calling
  Status failure_ KVTIER_GUARDED_BY(mutex_);
  bool failure_reported_ KVTIER_GUARDED_BY(mutex_) = false;
  bool still_registered_ KVTIER_GUARDED_BY(mutex_) =
      false;  // a device could not be made to forget the mapping
  bool stopping_ KVTIER_GUARDED_BY(mutex_) = false;

  std::thread thread_;
};

}  // namespace kvtier
