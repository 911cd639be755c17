#ifdef KVTIER_HAVE_CUDA

#include "cuda_bounce.h"

namespace kvtier::cuda {

Status BounceRing::prepare() {
  if (buffer_ != nullptr) return Status::ok();
  for (RawEvent& event : done_) {
    if (event.get() == nullptr) KVTIER_RETURN_IF_ERROR(event.create());
  }
  void* buffer = nullptr;
  KVTIER_RETURN_IF_ERROR(
      to_status("cudaHostAlloc", cudaHostAlloc(&buffer, kParts * kPartBytes, cudaHostAllocDefault)));
  buffer_ = static_cast<std::byte*>(buffer);
  return Status::ok();
}

Result<std::byte*> BounceRing::next_part() {
  last_ = (last_ + 1) % kParts;
  KVTIER_RETURN_IF_ERROR(finish_part());
  return buffer_ + last_ * kPartBytes;
}

Status BounceRing::in_use(cudaStream_t stream) {
  return to_status("cudaEventRecord", cudaEventRecord(done_.at(last_).get(), stream));
}

Status BounceRing::finish_part() {
  return to_status("cudaEventSynchronize", cudaEventSynchronize(done_.at(last_).get()));
}

void BounceRing::free() {
  if (buffer_ != nullptr) static_cast<void>(cudaFreeHost(buffer_));
  buffer_ = nullptr;
  for (RawEvent& event : done_) event = RawEvent();
}

void BounceRing::abandon() {
  buffer_ = nullptr;
  for (RawEvent& event : done_) event.abandon();
}

}  // namespace kvtier::cuda

#endif
