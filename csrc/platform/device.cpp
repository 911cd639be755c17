#include "kvtier/platform/device.h"

#include <utility>

namespace kvtier {

Result<OwnedStream> OwnedStream::create(Device& device) {
  Result<StreamHandle> handle = device.create_stream();
  if (!handle) return handle.status();
  return OwnedStream(device, *handle);
}

OwnedStream::OwnedStream(OwnedStream&& other) noexcept
    : device_(std::exchange(other.device_, nullptr)), handle_(other.handle_) {}

OwnedStream& OwnedStream::operator=(OwnedStream&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  return *this;
}

OwnedStream::~OwnedStream() {
  if (device_ != nullptr) device_->destroy_stream(handle_);
}

}  // namespace kvtier
