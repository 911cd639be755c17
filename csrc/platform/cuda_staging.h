// StagingLane: the path that goes through a ring in HBM. The copy engine moves long stretches between slots
// and ring at the bus's own rate, a kernel scatters or gathers between ring and pages at HBM's.
//
//   load    side: --DMA--e1--DMA--e2--            store   main: --gather--e1--gather--e2--       .--wait--
//   join()
//           main: -------wait e1--scatter--f1          side: ---------wait e1--DMA--f1--wait e2--DMA--'
//
// Each stage of the ring is used again only behind the event of its last use: no host ever waits. The copies
// of a load begin behind what `main` has been given before (the side stream is forked off it); `main` covers
// a store's only after join(). So whoever puts anything else into `main`, or records an event there, joins
// first.
#pragma once

#include <array>
#include <span>

#include "cuda_paths.h"

namespace kvtier::cuda {

// Owns: its side stream, its ring. Borrows: the main stream. Threads: one at a time. Requires a Scope.
class StagingLane {
 public:
  static constexpr std::size_t kStages = 4;
  static constexpr std::size_t kStageBytes = std::size_t{4} << 20;

  // Errors: resource when HBM has no room for the ring.
  static Result<std::unique_ptr<StagingLane>> create(cudaStream_t main, int priority);
  // Requires that all work is over.
  ~StagingLane();
  StagingLane(const StagingLane&) = delete;
  StagingLane& operator=(const StagingLane&) = delete;

  Status copy(std::span<const CopyRun> runs, Direction direction, unsigned num_sms);
  // Makes `main` cover all copies. Cheap when it does.
  Status join();
  // Something else went into `main`: the next copy begins behind it.
  void fork_again() { forked_ = false; }
  // Where the bus is used, for pacing.
  cudaStream_t bus_stream(Direction direction) const { return direction == Direction::load ? side_ : main_; }
  // Orders the side stream behind `main` if it is not. Before pacing a load.
  Status fork();
  cudaStream_t side() const { return side_; }
  // Gives everything up without a call to the driver.
  void abandon();

 private:
  explicit StagingLane(cudaStream_t main) : main_(main) {}
  Status load(std::span<const CopyRun> runs, unsigned num_sms);
  Status store(std::span<const CopyRun> runs, unsigned num_sms);
  std::byte* stage(std::size_t index) const { return ring_ + index * kStageBytes; }

  cudaStream_t main_;
  cudaStream_t side_ = nullptr;
  std::byte* ring_ = nullptr;
  std::array<RawEvent, kStages> full_;
  std::array<RawEvent, kStages> empty_;
  RawEvent forking_;
  RawEvent joining_;
  std::size_t next_ = 0;
  bool forked_ = false;    // the side stream is behind all of `main` that is not ours
  bool unjoined_ = false;  // a store's copies are in the side stream only
};

}  // namespace kvtier::cuda
