// SimulatedDevice: CUDA's asynchronous semantics without a GPU, run by a seeded adversary.
//
// Most orders that CUDA allows never happen on a given machine until the day they do. Here the order is
// chosen by a seed and chosen badly: the adversary runs the batch's runs shuffled, split and interleaved
// with other streams, and leaves undone whatever nobody needs yet. Code that forgot a wait then reads
// stale bytes for most seeds, not once a month.
//
//   submit --> stream FIFOs --> one step at a time, under one lock, by whoever drives:
//                                 synchronize()    what its event needs, now and then something else
//                                 query(), submit  a few steps or none, as the seed's temper is
//                                 background       whatever has been left alone for long
//                                 step()           the test, while everything is held
//
// What is modelled, and after which CUDA behaviour, stands at each method. What is not: timing, memory
// limits, the legacy default stream's implicit ordering (our streams are non-blocking, so is PyTorch's
// side), the bound on queued work (CUDA blocks a submitter behind about 1024 launches), graph replay.
//
// Deterministic: for one seed and one sequence of calls from one thread the schedule is the same, as long
// as the background does not step in: with max_delay_us = 0, or while held and stepped by hand.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/device.h"

namespace kvtier {

// CUDA's numbers for what the simulated device reports (driver_types.h).
namespace cuda_error {
inline constexpr int kInvalidValue = 1;
inline constexpr int kInvalidResourceHandle = 400;
inline constexpr int kHostMemoryAlreadyRegistered = 712;
inline constexpr int kHostMemoryNotRegistered = 713;
inline constexpr int kStreamCaptureInvalidated = 901;
}  // namespace cuda_error

// What the device's own calls do about somebody else's capture (cudaThreadExchangeStreamCaptureMode).
enum class CaptureMode : std::uint8_t {
  global,   // CUDA's default: potentially unsafe calls are refused, and the attempt spoils the capture
  relaxed,  // as if every call switched its thread to relaxed mode: only the capturing stream is out of
            // bounds
};

struct SimulatedOptions {
  std::uint64_t seed = 1;
  int ordinal = 0;
  // Work that nobody waits for has run after about this time. 0: it runs only when somebody waits, queries or
  // steps.
  std::uint32_t max_delay_us = 3000;
  // synchronize() looks on for up to this time before it drives, so that other threads get in between.
  std::uint32_t patience_us = 100;
  CaptureMode capture_mode = CaptureMode::global;
};

// Owns: device memory, streams, one thread (none if max_delay_us is 0). Threads: any, as Device; the
// methods that only tests call, too.
// Blocks: as Device; with everything held, synchronize() blocks until another thread releases or steps.
// The destructor abandons pending work, as the end of a process does, and waits for none of it; no other
// call may be running. In a forked child every call answers `closed` and the destructor leaks the state:
// the thread and its locks belong to the parent.
class SimulatedDevice final : public Device {
 public:
  explicit SimulatedDevice(SimulatedOptions options = {});
  ~SimulatedDevice() override;
  SimulatedDevice(const SimulatedDevice&) = delete;
  SimulatedDevice& operator=(const SimulatedDevice&) = delete;

  DeviceKind kind() const override { return DeviceKind::simulated; }
  int ordinal() const override;
  std::string name() const override;

  Result<StreamHandle> create_stream() override;
  // Pending work makes it a violation; the work runs all the same, as in CUDA.
  void destroy_stream(StreamHandle stream) override;
  Result<std::unique_ptr<Event>> create_event() override;
  Status record(Event& event, StreamHandle stream) override;
  Status wait(StreamHandle stream, Event& event) override;
  Result<bool> query(Event& event) override;
  Status synchronize(Event& event) override;
  // Checked as a whole at submission, kInvalidValue for a run that leaves its allocation or registration
  // or straddles two. Pageable memory as cudaMemcpyAsync has it ("API synchronization behavior"): a load
  // reads it during the call, a store returns once the copy, and so all before it in the stream, has run.
  Status copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) override;
  Status register_host(void* begin, std::size_t bytes) override;
  Status unregister_host(void* begin) override;
  Status health() const override;

  // --- the framework's side ---

  // Device memory, 256-byte aligned and poisoned. Touch it from kernels only.
  std::byte* allocate(std::size_t bytes);
  void free(std::byte* begin);
  // StreamHandle{0} exists from the start.
  StreamHandle create_framework_stream();
  // A kernel at its place in the stream. It runs under the device's lock: short, and calling neither the
  // device (CUDA's rule for host functions) nor anything that waits. Ignored after a sticky error; in a
  // capturing stream it becomes part of the graph, so it does not run.
  void launch(StreamHandle stream, std::function<void()> kernel);
  Status host_synchronize(StreamHandle stream);

  // The framework captures `stream` into a graph, in global mode. Meanwhile record, wait and copy on that
  // stream are refused with kCaptureConflict in either CaptureMode, since they would land in the graph;
  // and in CaptureMode::global so are create_stream, query, synchronize, register_host, unregister_host
  // and pageable copies. end_capture() returns kStreamCaptureInvalidated when such a call spoiled the
  // capture.
  Status begin_capture(StreamHandle stream);
  Status end_capture();

  // --- the test's side ---

  // Nothing runs until release(), except by step() and run_until_idle().
  void hold();
  void release();
  // The same for one stream. release() leaves these alone.
  void hold(StreamHandle stream);
  void release(StreamHandle stream);
  // One step: a kernel, an event, or a part of one run of a copy. False if nothing could run. With a
  // stream named, a step of that stream, even if it is held.
  bool step();
  bool step(StreamHandle stream);
  // Steps until nothing can run; how many.
  std::size_t run_until_idle();
  // Operations submitted and not yet over.
  std::size_t pending() const;

  // From now on every call fails with device error `code`; pending work never runs (cudaErrorIllegalAddress
  // and its kind: the context is lost for this process). Waiters return at once.
  void fail_sticky(int code);
  // The same, in the middle of the n-th copy to begin to run from now on (n >= 1): an error that no
  // submission reports.
  void fail_sticky_at_copy(std::uint64_t n, int code);

  // What callers did against the contract and CUDA would have punished by wrong bytes or a crash:
  // memory freed or unregistered under a submitted copy, streams destroyed with work pending.
  std::vector<std::string> violations() const;

 private:
  struct State;
  bool inherited() const;  // by a child of fork()

  std::uint64_t generation_;
  std::unique_ptr<State> state_;
};

}  // namespace kvtier
