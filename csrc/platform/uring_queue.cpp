// IoQueue over io_uring. For each ring there is one eventfd, which wake() writes and on which the ring polls.
#include "kvtier/platform/io_queue.h"

#if KVTIER_HAVE_URING

#include <liburing.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <string>
#include <system_error>
#include <thread>

#include "io_transfer.h"
#include "registered_buffers.h"

#include "kvtier/platform/block_file.h"

// Newer than some libraries; a kernel that does not know one answers EINVAL.
#ifndef IORING_SETUP_R_DISABLED
#define IORING_SETUP_R_DISABLED (1U << 6)
#endif
#ifndef IORING_SETUP_SUBMIT_ALL
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#endif
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif
#ifndef IORING_FEAT_RSRC_TAGS
#define IORING_FEAT_RSRC_TAGS (1U << 10)
#endif

namespace kvtier {
namespace {

using internal::UringLevel;

constexpr std::uint64_t kWakeTag = ~std::uint64_t{0};
constexpr std::uint64_t kMaxBufferBytes = std::uint64_t{1} << 30;
constexpr unsigned kMaxBuffers = 16384;  // as many as the kernel allows
constexpr unsigned kMaxFiles = 64;
// Without a request under way that could end, a kernel that has no memory for one will not get any by
// waiting.
constexpr unsigned kMaxRefusals = 1000;

struct SetupLevel {
  UringLevel level;
  unsigned flags;
};
// A ring of one owner is made disabled and enabled by its owner, who then is it.
constexpr unsigned kCooperative = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL;
constexpr unsigned kOwned = kCooperative | IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_R_DISABLED;
constexpr std::array<SetupLevel, 4> kSetupLevels{{
    {UringLevel::deferred, kOwned | IORING_SETUP_DEFER_TASKRUN},
    {UringLevel::single_owner, kOwned},
    {UringLevel::cooperative, kCooperative},
    {UringLevel::timed_wait, 0},
}};

Status failure(StatusCode code, int error, const std::string& what) {
  return {code,
          what + ": " + std::generic_category().message(error) + " (errno " + std::to_string(error) + ")",
          error};
}

template <typename Time>
Time kernel_time(std::optional<IoQueue::TimePoint> deadline) {
  const auto left = deadline.value_or(IoQueue::TimePoint{}) - IoQueue::TimePoint::clock::now();
  const auto ns =
      std::max<std::int64_t>(0, std::chrono::duration_cast<std::chrono::nanoseconds>(left).count());
  Time time{};
  time.tv_sec = ns / 1'000'000'000;
  time.tv_nsec = ns % 1'000'000'000;
  return time;
}

// Owns: the ring, the eventfd. At most one entry per slot, and one for the poll, is in the kernel or on its
// way there, and the rings have room for all of them: neither can overflow.
class UringQueue final : public IoQueue {
 public:
  explicit UringQueue(std::uint32_t depth) : slots_(depth), free_(depth) {
    for (std::uint32_t i = 0; i < depth; ++i) free_[i] = depth - 1 - i;
  }
  ~UringQueue() override;

  Status start(UringLevel highest);

  std::string description() const override {
    return buffers_.empty() ? "io_uring" : "io_uring with registered buffers";
  }
  std::uint32_t depth() const override { return static_cast<std::uint32_t>(slots_.size()); }
  std::uint32_t in_flight() const override { return in_flight_; }
  void submit(std::span<const IoRequest> requests) override;
  Status wait(std::vector<IoCompletion>& completions, std::optional<TimePoint> deadline) override;
  void wake() override;
  Status register_buffer(std::span<std::byte> buffer) override;
  Status register_file(int fd) override;

 private:
  void become_owner();
  void prepare(std::uint32_t slot);
  void flush();
  void gather(std::vector<IoCompletion>& completions);
  void sleep_in_ring(std::optional<TimePoint> deadline);
  void sleep_in_poll(std::optional<TimePoint> deadline);
  void note(int result);
  void drain_event();
  io_uring_sqe* next_entry();

  io_uring ring_{};
  bool has_ring_ = false;
  bool can_register_ = false;
  bool has_buffer_table_ = false;
  bool has_file_table_ = false;
  bool timed_wait_ = false;  // the ring itself waits until a deadline or the eventfd; else ppoll does
  bool poll_armed_ = false;
  FileHandle event_;
  std::atomic<bool> woken_{false};

  std::optional<std::thread::id> owner_;
  int broken_ = 0;  // the errno after which nothing can be expected any more
  unsigned refusals_ = 0;
  std::uint32_t in_flight_ = 0;
  std::vector<IoTransfer> slots_;
  std::vector<std::uint32_t> free_;
  RegisteredBuffers buffers_;
  std::vector<int> files_;  // registered, by the kernel's number
};

Status UringQueue::start(UringLevel highest) {
  event_ = FileHandle(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event_.is_open()) return failure(StatusCode::resource, errno, "cannot make an eventfd");

  int error = EINVAL;
  for (const SetupLevel& setup : kSetupLevels) {
    if (setup.level > highest && setup.level != UringLevel::timed_wait) continue;
    error = -io_uring_queue_init(static_cast<unsigned>(slots_.size()) + 1, &ring_, setup.flags);
    if (error != EINVAL) break;
  }
  if (error == ENOSYS || error == EPERM || error == EACCES || error == EINVAL) {
    return failure(StatusCode::unsupported, error, "the kernel refuses io_uring");
  }
  if (error != 0) return failure(StatusCode::resource, error, "cannot make an io_uring");
  has_ring_ = true;
  // Kernels that let a registration wait for all that is in the ring, the poll too, ended with 5.12.
  const unsigned needed = IORING_FEAT_EXT_ARG | IORING_FEAT_RSRC_TAGS;
  can_register_ = (ring_.features & IORING_FEAT_RSRC_TAGS) != 0;
  timed_wait_ = highest >= UringLevel::timed_wait && (ring_.features & needed) == needed;
  return Status::ok();
}

// The kernel hands completions to the owner only. Nobody else can tell when the requests that are in flight
// end: then the ring is kept for ever, which is not what the caller was to do, but the least harm.
UringQueue::~UringQueue() {
  if (!has_ring_) return;
  std::vector<IoCompletion> completions;
  const bool can_wait = owner_ == std::this_thread::get_id();
  while (can_wait && in_flight_ > 0 && wait(completions, std::nullopt)) {
  }
  if (in_flight_ == 0) io_uring_queue_exit(&ring_);
}

void UringQueue::become_owner() {
  if (owner_) return;
  owner_ = std::this_thread::get_id();
  if ((ring_.flags & IORING_SETUP_R_DISABLED) == 0) return;
  if (const int result = io_uring_enable_rings(&ring_); result < 0) broken_ = -result;
}

io_uring_sqe* UringQueue::next_entry() {
  io_uring_sqe* entry = io_uring_get_sqe(&ring_);
  KVTIER_CHECK(entry != nullptr);
  return entry;
}

void UringQueue::prepare(std::uint32_t slot) {
  const IoRequest piece = slots_[slot].next_piece();
  io_uring_sqe* entry = next_entry();
  const auto bytes = static_cast<unsigned>(piece.bytes);
  const int buffer = piece.op == IoOp::sync ? -1 : buffers_.index_of({piece.data, piece.bytes});
  switch (piece.op) {
    case IoOp::read:
      if (buffer >= 0) {
        io_uring_prep_read_fixed(entry, piece.fd, piece.data, bytes, piece.offset, buffer);
      } else {
        io_uring_prep_read(entry, piece.fd, piece.data, bytes, piece.offset);
      }
      break;
    case IoOp::write:
      if (buffer >= 0) {
        io_uring_prep_write_fixed(entry, piece.fd, piece.data, bytes, piece.offset, buffer);
      } else {
        io_uring_prep_write(entry, piece.fd, piece.data, bytes, piece.offset);
      }
      break;
    case IoOp::sync: io_uring_prep_fsync(entry, piece.fd, IORING_FSYNC_DATASYNC); break;
  }
  // The descriptor is looked up in a short table of the ring, and not counted up and down.
  const auto file = std::find(files_.begin(), files_.end(), piece.fd);
  if (file != files_.end()) {
    entry->fd = static_cast<int>(file - files_.begin());
    entry->flags |= IOSQE_FIXED_FILE;
  }
  entry->user_data = slot;
}

void UringQueue::submit(std::span<const IoRequest> requests) {
  KVTIER_CHECK(in_flight_ + requests.size() <= slots_.size());
  become_owner();
  for (const IoRequest& request : requests) {
    const std::uint32_t slot = free_.back();
    free_.pop_back();
    ++in_flight_;
    slots_[slot] = IoTransfer(request);
    prepare(slot);
  }
  flush();
}

// What entering the ring said. A kernel that is short of memory keeps entries waiting: the next call gives
// them to it again.
void UringQueue::note(int result) {
  if (result >= 0) {
    refusals_ = 0;
  } else if (result == -EAGAIN || result == -EBUSY) {
    if (++refusals_ > kMaxRefusals) broken_ = -result;
  } else if (result != -EINTR && result != -ETIME) {
    broken_ = -result;
  }
}

void UringQueue::flush() {
  while (broken_ == 0 && io_uring_sq_ready(&ring_) > 0) {
    const int result = io_uring_submit(&ring_);
    note(result);
    if (result < 0 && result != -EINTR) return;
  }
}

void UringQueue::gather(std::vector<IoCompletion>& completions) {
  io_uring_cqe* entry = nullptr;
  unsigned head = 0;
  unsigned count = 0;
  io_uring_for_each_cqe(&ring_, head, entry) {
    ++count;
    if (entry->user_data == kWakeTag) {
      poll_armed_ = false;
      drain_event();
      continue;
    }
    const auto slot = static_cast<std::uint32_t>(entry->user_data);
    const std::optional<int> ended = slots_[slot].advance(entry->res);
    if (!ended) {
      prepare(slot);
      continue;
    }
    completions.push_back({.tag = slots_[slot].request().tag, .error = *ended});
    free_.push_back(slot);
    --in_flight_;
  }
  io_uring_cq_advance(&ring_, count);
}

Status UringQueue::wait(std::vector<IoCompletion>& completions, std::optional<TimePoint> deadline) {
  become_owner();
  const std::size_t before = completions.size();
  for (bool last = false;;) {
    // Else nothing enters the kernel any more, and this kind of ring has its completions from there.
    if (broken_ != 0 && (ring_.flags & IORING_SETUP_DEFER_TASKRUN) != 0) {
      static_cast<void>(io_uring_get_events(&ring_));
    }
    gather(completions);
    // After drain_event(): who set it before may have no event left to come.
    const bool woken = woken_.exchange(false);
    if (completions.size() > before || woken || last) break;
    if (broken_ != 0) break;
    last = deadline && TimePoint::clock::now() >= *deadline;  // once more into the kernel even so
    if (timed_wait_) {
      sleep_in_ring(deadline);
    } else {
      flush();
      sleep_in_poll(deadline);
    }
  }
  flush();  // the rest of short transfers
  if (broken_ != 0 && completions.size() == before) {
    return failure(StatusCode::io, broken_, "the io_uring is broken");
  }
  return Status::ok();
}

void UringQueue::sleep_in_ring(std::optional<TimePoint> deadline) {
  if (!poll_armed_) {
    io_uring_sqe* entry = next_entry();
    io_uring_prep_poll_add(entry, event_.fd(), POLLIN);
    entry->user_data = kWakeTag;
    poll_armed_ = true;
  }
  io_uring_cqe* first = nullptr;
  auto time = kernel_time<__kernel_timespec>(deadline);
  note(io_uring_submit_and_wait_timeout(&ring_, &first, 1, deadline ? &time : nullptr, nullptr));
}

void UringQueue::sleep_in_poll(std::optional<TimePoint> deadline) {
  if (broken_ != 0 || io_uring_cq_ready(&ring_) > 0) return;
  // Entries that the kernel had no memory for, and nothing else under way: try again.
  const unsigned waiting = io_uring_sq_ready(&ring_);
  if (waiting > 0 && waiting >= in_flight_) return;
  std::array<pollfd, 2> polled{{{.fd = ring_.ring_fd, .events = POLLIN, .revents = 0},
                                {.fd = event_.fd(), .events = POLLIN, .revents = 0}}};
  const auto time = kernel_time<timespec>(deadline);
  if (::ppoll(polled.data(), polled.size(), deadline ? &time : nullptr, nullptr) < 0) {
    if (errno != EINTR) broken_ = errno;
  } else if (polled[1].revents != 0) {
    drain_event();
  }
}

void UringQueue::drain_event() {
  std::uint64_t count = 0;
  static_cast<void>(::read(event_.fd(), &count, sizeof count));
}

// The event comes after the flag, and the owner looks at the flag after the event: none is lost.
void UringQueue::wake() {
  if (woken_.exchange(true)) return;
  const std::uint64_t one = 1;
  static_cast<void>(::write(event_.fd(), &one, sizeof one));
}

// A table with nothing in it, made with the first buffer: entries of a table may be replaced while requests
// are in flight, and a ring has one table.
Status UringQueue::register_buffer(std::span<std::byte> buffer) {
  if (!can_register_) return Status::unsupported("registered buffers need Linux 5.13");
  if (buffer.empty() || buffer.size() > kMaxBufferBytes) {
    return Status::invalid_argument("a registered I/O buffer has 1 byte to 1 GiB, not " +
                                    std::to_string(buffer.size()));
  }
  if (buffers_.size() == kMaxBuffers) {
    return Status::resource("more than " + std::to_string(kMaxBuffers) + " registered I/O buffers", ENOBUFS);
  }
  int result = 0;
  if (!has_buffer_table_) {
    const std::vector<iovec> nothing(kMaxBuffers);
    result = io_uring_register_buffers(&ring_, nothing.data(), kMaxBuffers);
    has_buffer_table_ = result >= 0;
  }
  if (result >= 0) {
    const iovec vector{.iov_base = buffer.data(), .iov_len = buffer.size()};
    const auto index = static_cast<unsigned>(buffers_.size());
    result = io_uring_register_buffers_update_tag(&ring_, index, &vector, nullptr, 1);
  }
  if (result < 0) {
    return failure(result == -EINVAL ? StatusCode::unsupported : StatusCode::resource, -result,
                   result == -ENOMEM
                       ? "cannot register I/O buffers (is the memlock limit, ulimit -l, too low?)"
                       : "cannot register I/O buffers");
  }
  buffers_.add(buffer);
  return Status::ok();
}

Status UringQueue::register_file(int fd) {
  if (!can_register_) return Status::unsupported("registered files need Linux 5.13");
  if (fd < 0) return Status::invalid_argument("a registered file is open, and not " + std::to_string(fd));
  if (files_.size() == kMaxFiles) {
    return Status::resource("more than " + std::to_string(kMaxFiles) + " registered files", ENFILE);
  }
  int result = 0;
  if (!has_file_table_) {
    std::array<int, kMaxFiles> nothing{};
    nothing.fill(-1);
    result = io_uring_register_files(&ring_, nothing.data(), kMaxFiles);
    has_file_table_ = result >= 0;
  }
  if (result >= 0) {
    result = io_uring_register_files_update(&ring_, static_cast<unsigned>(files_.size()), &fd, 1);
  }
  if (result < 0) return failure(StatusCode::resource, -result, "cannot register a file for I/O");
  files_.push_back(fd);
  return Status::ok();
}

}  // namespace

namespace internal {

Result<std::unique_ptr<IoQueue>> make_uring_queue(const IoQueueOptions& options, UringLevel highest) {
  if (const Status valid = check(options); !valid) return valid;
  auto queue = std::make_unique<UringQueue>(options.depth);
  KVTIER_RETURN_IF_ERROR(queue->start(highest));
  return std::unique_ptr<IoQueue>(std::move(queue));
}

}  // namespace internal
}  // namespace kvtier

#else

namespace kvtier::internal {

Result<std::unique_ptr<IoQueue>> make_uring_queue(const IoQueueOptions& options, UringLevel) {
  if (const Status valid = check(options); !valid) return valid;
  return Status::unsupported("this build of kvtier has no io_uring (liburing was missing)");
}

}  // namespace kvtier::internal

#endif

namespace kvtier {

Result<std::unique_ptr<IoQueue>> make_uring_queue(const IoQueueOptions& options) {
  return internal::make_uring_queue(options, internal::UringLevel::deferred);
}

}  // namespace kvtier
