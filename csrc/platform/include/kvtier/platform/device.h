// Device: the seam to the machine that holds the framework's pages (docs/architecture.md, "Devices").
//
// The interface is CUDA's asynchronous model, cut down to what a KV cache needs, and every
// implementation keeps it: `cpu` (copy threads), `simulated` (CUDA's semantics under a seeded
// adversarial schedule), `cuda`. One conformance suite, tests/cpp/conformance/, runs against all.
//
//   framework stream  --kernel writes pages--+-- event --.
//   our store stream                         '----wait----+--copy runs--+-- event --> waiter thread
//
// The rules that callers live by, all but the second CUDA's own:
//  * Work in one stream runs in order; two streams are unordered unless an event orders them.
//  * The runs of one copy() are unordered among themselves, and so are those of copies of one direction
//    that follow each other in a stream, nothing between: a move in parts is one move.
//  * Source bytes are read when they run, not when copy() returns. Source and destination must stay valid
//    until an event recorded behind the copy has completed.
//  * Waiting on an event that was never recorded is a no-op: it orders nothing. Callers must never do so.
//  * Recording an event again moves it; waits already submitted keep the earlier record.
//  * A sticky error ends the device for this process: every later call reports it.
//  * While the framework captures a graph, calls that capture forbids fail with kCaptureConflict; they had no
//    effect
//    and may be repeated later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "kvtier/core/status.h"
#include "kvtier/core/types.h"

namespace kvtier {

enum class DeviceKind : std::uint8_t { cpu, cuda, simulated };

// One contiguous piece of a move. Source and destination do not overlap.
struct CopyRun {
  void* destination;
  const void* source;
  std::size_t bytes;
};

// A stream by its native handle: a cudaStream_t on CUDA. 0 is the framework's default stream; on `cpu`
// it is the only framework stream and stands for "what the calling thread has done before this call".
enum class StreamHandle : std::uintptr_t {};

// A point in a stream's work. Made by one Device and used with that Device only; the Device outlives it.
// Destroying an event that is still pending is allowed and waits for nothing.
class Event {
 public:
  virtual ~Event() = default;
};

// Threads: every method from any thread. Blocks: only synchronize(), and copy() on pageable memory, as
// documented there. No method may be called while holding the engine mutex (I6).
// Errors: StatusCode::device with the driver's number, invalid_argument for a misuse that was detected.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceKind kind() const = 0;
  virtual int ordinal() const = 0;
  virtual std::string name() const = 0;

  // A stream of our own, at low priority where the device has priorities. destroy_stream() requires that
  // all its work has completed.
  virtual Result<StreamHandle> create_stream() = 0;
  virtual void destroy_stream(StreamHandle stream) = 0;

  virtual Result<std::unique_ptr<Event>> create_event() = 0;
  // Marks the point behind everything submitted to `stream` so far.
  virtual Status record(Event& event, StreamHandle stream) = 0;
  // Orders later work in `stream` behind the event's last record. Does not block the caller.
  virtual Status wait(StreamHandle stream, Event& event) = 0;
  // Whether the last record has completed. An unrecorded event counts as complete, as in CUDA.
  virtual Result<bool> query(Event& event) = 0;
  // Blocks the calling thread, without spinning, until the last record has completed.
  virtual Status synchronize(Event& event) = 0;

  // Submits `runs` to `stream`; `runs` itself may be reused at once. Each run lies within one registered
  // range on its host side and within one allocation on its device side. Host memory that is not
  // registered is legal but slow: loads may read it during the call, stores may block until copied.
  // On failure nothing of this call will run later.
  virtual Status copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) = 0;

  // Makes [begin, begin + bytes) known to the device (pinned on CUDA). Ranges must not overlap.
  // unregister_host() requires that no submitted copy touches the range.
  virtual Status register_host(void* begin, std::size_t bytes) = 0;
  virtual Status unregister_host(void* begin) = 0;

  // Whether this can be a framework's stream, as far as that is known without asking anything of it.
  virtual Status check_stream(StreamHandle /*stream*/) const { return Status::ok(); }

  // Ok, or the sticky error that ended this device.
  virtual Status health() const = 0;
};

// Which error number means "a graph is being captured; try again" (cudaErrorStreamCaptureUnsupported).
inline constexpr int kCaptureConflict = 900;
inline bool is_capture_conflict(const Status& status) {
  return status.code() == StatusCode::device && status.native_code() == kCaptureConflict;
}

// The native code of a lost device whose context stands: its copies may still run, now or ever.
inline constexpr int kCopiesUnproved = -2;
inline bool may_still_run(const Status& health) {
  return health.code() == StatusCode::device && health.native_code() == kCopiesUnproved;
}

// A stream of our own, destroyed with the object. Its work must have completed by then.
class OwnedStream {
 public:
  static Result<OwnedStream> create(Device& device);
  OwnedStream(OwnedStream&& other) noexcept;
  OwnedStream& operator=(OwnedStream&& other) noexcept;
  ~OwnedStream();

  StreamHandle handle() const { return handle_; }

 private:
  OwnedStream(Device& device, StreamHandle handle) : device_(&device), handle_(handle) {}
  Device* device_;  // null after a move
  StreamHandle handle_;
};

}  // namespace kvtier
