#ifdef KVTIER_HAVE_CUDA

#include "cuda_staging.h"

#include <memory>
#include <vector>

namespace kvtier::cuda {
namespace {

Status record(const RawEvent& event, cudaStream_t stream) {
  return to_status("cudaEventRecord", cudaEventRecord(event.get(), stream));
}

Status wait(cudaStream_t stream, const RawEvent& event) {
  return to_status("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, event.get(), 0));
}

// Between a stage and the pages.
std::vector<MappedRun> within_hbm(const StagePlan& plan, const std::byte* stage, Direction direction) {
  std::vector<MappedRun> runs;
  runs.reserve(plan.pages.size());
  for (const StagedPiece& piece : plan.pages) {
    const auto page = reinterpret_cast<std::uint64_t>(piece.at);
    const auto ring = reinterpret_cast<std::uint64_t>(stage + piece.ring);
    runs.push_back(direction == Direction::load ? MappedRun{page, ring, piece.bytes}
                                                : MappedRun{ring, page, piece.bytes});
  }
  return runs;
}

// Between host memory and a stage.
std::vector<CopyRun> over_the_bus(const StagePlan& plan, std::byte* stage, Direction direction) {
  std::vector<CopyRun> runs;
  runs.reserve(plan.host.size());
  for (const StagedPiece& piece : plan.host) {
    std::byte* ring = stage + piece.ring;
    runs.push_back(direction == Direction::load ? CopyRun{ring, piece.at, piece.bytes}
                                                : CopyRun{piece.at, ring, piece.bytes});
  }
  return runs;
}

}  // namespace

Result<std::unique_ptr<StagingLane>> StagingLane::create(cudaStream_t main, int priority) {
  std::unique_ptr<StagingLane> lane(new StagingLane(main));
  void* ring = nullptr;
  if (const Status status = to_status("cudaMalloc", cudaMalloc(&ring, kStages * kStageBytes)); !status) {
    return Status::resource("the staging ring: " + status.message(), status.native_code());
  }
  lane->ring_ = static_cast<std::byte*>(ring);
  KVTIER_RETURN_IF_ERROR(to_status(
      "cudaStreamCreate", cudaStreamCreateWithPriority(&lane->side_, cudaStreamNonBlocking, priority)));
  for (auto* events : {&lane->full_, &lane->empty_}) {
    for (RawEvent& event : *events) KVTIER_RETURN_IF_ERROR(event.create());
  }
  KVTIER_RETURN_IF_ERROR(lane->forking_.create());
  KVTIER_RETURN_IF_ERROR(lane->joining_.create());
  return lane;
}

StagingLane::~StagingLane() {
  if (side_ != nullptr) static_cast<void>(cudaStreamDestroy(side_));
  if (ring_ != nullptr) static_cast<void>(cudaFree(ring_));
}

void StagingLane::abandon() {
  side_ = nullptr;
  ring_ = nullptr;
  for (auto* events : {&full_, &empty_}) {
    for (RawEvent& event : *events) event.abandon();
  }
  forking_.abandon();
  joining_.abandon();
}

Status StagingLane::fork() {
  if (forked_) return Status::ok();
  KVTIER_RETURN_IF_ERROR(record(forking_, main_));
  KVTIER_RETURN_IF_ERROR(wait(side_, forking_));
  forked_ = true;
  return Status::ok();
}

Status StagingLane::join() {
  if (!unjoined_) return Status::ok();
  KVTIER_RETURN_IF_ERROR(record(joining_, side_));
  KVTIER_RETURN_IF_ERROR(wait(main_, joining_));
  unjoined_ = false;
  return Status::ok();
}

Status StagingLane::copy(std::span<const CopyRun> runs, Direction direction, unsigned num_sms) {
  if (direction == Direction::store) {
    forked_ = false;  // a load that follows reads behind this store
    return store(runs, num_sms);
  }
  KVTIER_RETURN_IF_ERROR(join());
  return load(runs, num_sms);
}

Status StagingLane::load(std::span<const CopyRun> runs, unsigned num_sms) {
  KVTIER_RETURN_IF_ERROR(fork());
  StageCursor cursor;
  while (true) {
    const StagePlan plan = plan_stage(runs, Direction::load, kStageBytes, cursor);
    if (plan.pages.empty()) return Status::ok();
    const std::size_t index = next_++ % kStages;
    KVTIER_RETURN_IF_ERROR(wait(side_, empty_[index]));
    KVTIER_RETURN_IF_ERROR(
        submit_plain(side_, over_the_bus(plan, stage(index), Direction::load), Direction::load));
    KVTIER_RETURN_IF_ERROR(record(full_[index], side_));
    KVTIER_RETURN_IF_ERROR(wait(main_, full_[index]));
    KVTIER_RETURN_IF_ERROR(
        submit_kernel(main_, within_hbm(plan, stage(index), Direction::load), CopyKernel::lanes, num_sms));
    KVTIER_RETURN_IF_ERROR(record(empty_[index], main_));
  }
}

Status StagingLane::store(std::span<const CopyRun> runs, unsigned num_sms) {
  StageCursor cursor;
  while (true) {
    const StagePlan plan = plan_stage(runs, Direction::store, kStageBytes, cursor);
    if (plan.pages.empty()) return Status::ok();
    const std::size_t index = next_++ % kStages;
    KVTIER_RETURN_IF_ERROR(wait(main_, empty_[index]));
    KVTIER_RETURN_IF_ERROR(
        submit_kernel(main_, within_hbm(plan, stage(index), Direction::store), CopyKernel::lanes, num_sms));
    KVTIER_RETURN_IF_ERROR(record(full_[index], main_));
    KVTIER_RETURN_IF_ERROR(wait(side_, full_[index]));
    unjoined_ = true;
    KVTIER_RETURN_IF_ERROR(
        submit_plain(side_, over_the_bus(plan, stage(index), Direction::store), Direction::store));
    KVTIER_RETURN_IF_ERROR(record(empty_[index], side_));
  }
}

}  // namespace kvtier::cuda

#endif
