// Two GPUs that are host memory, for tests of the cuda device's host side where there is no GPU: the CUDA
// runtime and driver functions that it calls (runtime.cpp, driver.cpp), and the kernels' bodies run by the
// CPU (kernels.cpp).
//
// What CUDA promises is kept, and no more: streams run in order and at once with each other, on several
// threads and in an order left to chance; source bytes are read when a copy runs; a wait keeps the record of
// its moment, and one on an unrecorded event is a no-op; a batch's copies run in any order; pageable memory
// is staged; in relaxed capture mode alone may a thread do what a capture elsewhere forbids. A copy across
// two allocations or registrations is refused; a kernel that touches what is neither ends the test.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>

namespace fake_cuda {

inline constexpr int kNumGpus = 2;

// One record of an event.
struct Moment {
  bool done = false;
  std::chrono::steady_clock::time_point at;
};

struct Operation {
  std::function<void()> run;            // may be empty
  std::shared_ptr<Moment> waits_for;    // null: nothing
  std::shared_ptr<Moment> is_done_for;  // null: nobody
};

class Machine {
 public:
  static Machine& get();

  // --- memory ---
  std::byte* allocate(std::size_t bytes);  // of a GPU; poisoned
  bool free(void* begin);                  // waits for all streams, as cudaFree
  std::size_t allocated_bytes();
  cudaError_t pin(void* begin, std::size_t bytes);
  bool unpin(void* begin);
  std::pair<std::byte*, std::size_t> allocation_of(const void* address);  // null where there is none
  // Whether the GPU can reach all of it, in one allocation or registration.
  bool reaches(const void* begin, std::size_t bytes);
  bool is_pinned(const void* begin, std::size_t bytes);

  // --- streams; handles as the runtime's: 0 to 2 are default streams ---
  cudaStream_t create_stream();
  void destroy_stream(cudaStream_t stream);
  void submit(cudaStream_t stream, Operation operation);
  void finish(cudaStream_t stream);
  void finish_all();
  void finish(const std::shared_ptr<Moment>& moment);
  bool is_done(const std::shared_ptr<Moment>& moment);
  std::uint32_t random();

  // --- graph capture, in global mode ---
  void begin_capture(cudaStream_t stream);
  bool end_capture(cudaStream_t stream);  // whether nothing has spoilt it
  bool captures(cudaStream_t stream);
  // False, and every capture is spoilt, where a capture forbids this thread what it is about to do.
  bool may_do_unsafe();

 private:
  struct Stream {
    std::deque<Operation> queue;
    bool running = false;
    bool capturing = false;
    bool spoilt = false;
    bool destroyed = false;
    std::chrono::steady_clock::time_point sleeps_until;
    bool idle() const { return queue.empty() && !running; }
  };

  Machine();
  void work();
  Stream& of(cudaStream_t stream);  // under mutex_
  bool within(const std::map<std::uintptr_t, std::size_t>& ranges, const void* begin,
              std::size_t bytes) const;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::mt19937 random_{20261121};
  std::map<std::uintptr_t, std::size_t> device_;
  std::map<std::uintptr_t, std::size_t> pinned_;
  std::map<std::uintptr_t, std::unique_ptr<Stream>> streams_;
  std::uintptr_t next_stream_ = 0x1000;
  int waiting_hosts_ = 0;  // threads within finish() and finish_all()
};

// Of this thread.
cudaStreamCaptureMode& capture_mode();
std::vector<CUcontext>& context_stack();

[[noreturn]] void illegal(const char* what);

}  // namespace fake_cuda
