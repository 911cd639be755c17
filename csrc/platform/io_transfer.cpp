#include "io_transfer.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace kvtier {
namespace {

constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{1} << 30;
// No file system wants direct I/O aligned to more.
constexpr std::uint64_t kRestartBytes = 4096;
// A regular file says EAGAIN when a resource of the kernel's is short. Somebody who says it for ever is not
// one.
constexpr unsigned kMaxRepeats = 1000;

}  // namespace

IoRequest IoTransfer::next_piece() const {
  IoRequest piece = request_;
  if (request_.op == IoOp::sync) return piece;
  piece.offset += done_;
  piece.data += done_;
  piece.bytes = std::min(request_.bytes - done_, kMaxPieceBytes);
  return piece;
}

std::optional<int> IoTransfer::advance(std::int64_t result) {
  if (result < 0) {
    const int error = static_cast<int>(-result);
    // What a sync has said once it does not say again: one that is repeated succeeds, and means nothing.
    if (request_.op == IoOp::sync) return error;
    if ((error == EINTR || error == EAGAIN) && ++repeats_ <= kMaxRepeats) return std::nullopt;
    return error;
  }
  if (request_.op == IoOp::sync) return 0;

  const std::uint64_t reached = done_ + static_cast<std::uint64_t>(result);
  if (reached >= request_.bytes) return 0;
  if (reached <= furthest_) return request_.op == IoOp::read ? ENODATA : EIO;
  furthest_ = reached;
  repeats_ = 0;
  // A direct transfer may stop anywhere (at the end of the file, say) and must go on at an aligned place:
  // some bytes move twice.
  done_ = reached - std::min(reached, (request_.offset + reached) % kRestartBytes);
  return std::nullopt;
}

int perform(const IoRequest& request) {
  IoTransfer transfer(request);
  for (;;) {
    const IoRequest piece = transfer.next_piece();
    std::int64_t result = 0;
    switch (piece.op) {
      case IoOp::read:
        result = ::pread(piece.fd, piece.data, piece.bytes, static_cast<off_t>(piece.offset));
        break;
      case IoOp::write:
        result = ::pwrite(piece.fd, piece.data, piece.bytes, static_cast<off_t>(piece.offset));
        break;
      case IoOp::sync: result = ::fdatasync(piece.fd); break;
    }
    if (const std::optional<int> ended = transfer.advance(result < 0 ? -errno : result)) return *ended;
  }
}

}  // namespace kvtier
