// IoQueue: the seam to a drive's data path. One queue belongs to one thread.
//
//   owner:   submit(reads, writes, syncs) ... wait() -> completions ... submit ...
//   others:  wake()                              (new work for the owner; ends its wait)
//
// Implementations: io_uring (make_uring_queue), a pool of threads with pread/pwrite for machines where
// io_uring is forbidden (make_thread_queue), and a simulated drive that loses, tears, reorders and delays
// (simulated_drive.h). One conformance suite, tests/cpp/conformance/, runs against all.
//
// What callers may rely on:
//  * A request is whole or has failed: short transfers are continued inside; a read beyond the end of the
//    file fails with ENODATA; EINTR and EAGAIN are repeated inside.
//  * Requests in flight are unordered, also on the same bytes. A sync (fdatasync) makes durable the writes of
//    its file whose completions wait() had returned before the sync was submitted, and promises nothing else.
//  * Each request completes exactly once. Buffers belong to the queue until then (I5): nothing is cancelled.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/status.h"

namespace kvtier {

enum class IoOp : std::uint8_t { read, write, sync };

struct IoRequest {
  IoOp op = IoOp::read;
  int fd = -1;
  std::uint64_t offset = 0;   // unused by sync
  std::byte* data = nullptr;  // unused by sync; a write only reads it
  std::uint64_t bytes = 0;
  std::uint64_t tag = 0;  // the caller's, given back in the completion
};

struct IoCompletion {
  std::uint64_t tag = 0;
  int error = 0;  // 0, or an errno
};

// Threads: wake() from any thread. The others from one thread, the owner: whoever calls submit() or wait()
// first. The maker may register buffers and files before that, and may destroy the queue once nothing is in
// flight. The owner's thread must not end before (the kernel then cancels requests, and tells nobody when
// they have ended). Blocks: wait(), the destructor.
class IoQueue {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // Waits for what is in flight. A queue whose completions may never come must be kept for ever instead.
  virtual ~IoQueue() = default;

  // For messages and `kvtier doctor`: "io_uring", "io_uring with registered buffers", "threads" ...
  virtual std::string description() const = 0;
  virtual std::uint32_t depth() const = 0;
  virtual std::uint32_t in_flight() const = 0;

  // Starts requests. Requires in_flight() + requests.size() <= depth(). What cannot be started completes with
  // its errno. On direct files offset, data and bytes are aligned as BlockFile::alignment() says.
  virtual void submit(std::span<const IoRequest> requests) = 0;
  // Appends completions to `completions`. Blocks until there is one, or wake() was called since the last
  // wait() returned, or the deadline has passed (nullopt: no deadline). Returns at once when nothing is in
  // flight only if woken or past the deadline. Errors: io when the queue itself is broken: completions may
  // never come.
  virtual Status wait(std::vector<IoCompletion>& completions, std::optional<TimePoint> deadline) = 0;
  virtual void wake() = 0;

  // Makes one more buffer known to the kernel, so that requests inside it are cheaper: its pages are pinned
  // once (some 20 ms for 256 MiB), and not for each request. Also while requests are in flight. Best effort:
  // after a failure, which says why, all else goes on. At most 1 GiB. The memory must stay mapped until the
  // destructor. Errors: unsupported; invalid_argument; resource (ENOMEM: the memlock limit).
  virtual Status register_buffer(std::span<std::byte> buffer) = 0;
  // The same for an open file; it must stay open until the destructor.
  virtual Status register_file(int fd) = 0;
};

struct IoQueueOptions {
  std::uint32_t depth = 64;   // requests in flight, 1 to 4096
  std::uint32_t threads = 8;  // of the thread queue, 1 to 256
};

// Errors: unsupported where io_uring is not compiled in or refused by the kernel (the default seccomp profile
// of containers answers EPERM); resource; invalid_argument. native_code() is the errno.
Result<std::unique_ptr<IoQueue>> make_uring_queue(const IoQueueOptions& options);
// Errors: resource, invalid_argument.
Result<std::unique_ptr<IoQueue>> make_thread_queue(const IoQueueOptions& options);

// io_uring where a probe (one real read through a ring) works, else threads. `why_not`, if given, receives
// the reason for the lesser choice, empty for the best.
Result<std::unique_ptr<IoQueue>> make_io_queue(const IoQueueOptions& options, std::string* why_not);

namespace internal {

Status check(const IoQueueOptions& options);

// For tests: what a ring may use, as if the kernel were not newer.
enum class UringLevel : std::uint8_t {
  basic,         // 5.10: waits with ppoll
  timed_wait,    // 5.13: the ring waits with a deadline
  cooperative,   // 5.19
  single_owner,  // 6.0
  deferred,      // 6.1: completions are gathered when the owner asks for them
};
Result<std::unique_ptr<IoQueue>> make_uring_queue(const IoQueueOptions& options, UringLevel highest);

}  // namespace internal

}  // namespace kvtier
