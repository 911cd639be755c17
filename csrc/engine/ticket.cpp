#include "kvtier/engine/ticket.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace kvtier {

Ticket::Ticket(Direction direction, std::size_t num_blocks, bool has_disk)
    : direction_(direction), has_disk_(has_disk), outcomes_(num_blocks, BlockOutcome::running) {}

Ticket::~Ticket() {
  if (done_fd_ >= 0) ::close(done_fd_);
}

bool Ticket::settled(Moment moment) const {
  MutexLock lock(mutex_);
  switch (moment) {
    case Moment::released: return released_;
    case Moment::ready: return ready_;
    case Moment::durable: return false;
  }
  return false;
}

Status Ticket::wait(Moment moment, Deadline deadline) const {
  if (moment == Moment::durable && !has_disk_) {
    return Status::unsupported("durable: this engine has no disk tier, so no block becomes durable");
  }
  MutexLock lock(mutex_);
  const bool& reached = moment == Moment::released ? released_ : ready_;
  while (!reached) {
    if (!deadline) {
      changed_.wait(lock);
    } else if (!changed_.wait_until(lock, *deadline) && !reached) {
      return Status::timeout("the transfer is still running; it goes on");
    }
  }
  return moment == Moment::released ? released_error_ : Status::ok();
}

Status Ticket::failure() const {
  MutexLock lock(mutex_);
  return failure_;
}

std::vector<BlockOutcome> Ticket::outcomes() const {
  MutexLock lock(mutex_);
  return outcomes_;
}

std::size_t Ticket::valid_blocks() const {
  MutexLock lock(mutex_);
  std::size_t n = 0;
  const auto valid = [](BlockOutcome outcome) {
    return outcome == BlockOutcome::loaded || outcome == BlockOutcome::stored || outcome == BlockOutcome::present ||
           outcome == BlockOutcome::pending;
  };
  while (n < outcomes_.size() && valid(outcomes_[n]) &&
         (direction_ == Direction::store || outcomes_[n] == BlockOutcome::loaded)) {
    ++n;
  }
  return n;
}

Status Ticket::wait_stream(StreamHandle stream) const {
  std::shared_ptr<Transfer> transfer;
  {
    MutexLock lock(mutex_);
    transfer = transfer_;
    if (!transfer) return failure_;
  }
  return transfer->wait_stream(stream);
}

Status Ticket::wait_layer(std::uint32_t layer, StreamHandle stream) const {
  std::shared_ptr<Transfer> transfer;
  {
    MutexLock lock(mutex_);
    transfer = transfer_;
    if (!transfer) return failure_;
  }
  return transfer->wait_layer(layer, stream);
}

Result<int> Ticket::done_fd() {
  MutexLock lock(mutex_);
  if (done_fd_ < 0) {
    done_fd_ = ::eventfd(ready_ ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (done_fd_ < 0) {
      return Status::resource(std::string("cannot make an eventfd: ") + std::strerror(errno), errno);
    }
  }
  return done_fd_;
}

void Ticket::set_outcomes(std::vector<BlockOutcome> outcomes) {
  MutexLock lock(mutex_);
  outcomes_ = std::move(outcomes);
}

void Ticket::set_transfer(std::shared_ptr<Transfer> transfer) {
  MutexLock lock(mutex_);
  transfer_ = std::move(transfer);
}

void Ticket::fail(const Status& status) {
  MutexLock lock(mutex_);
  if (failure_) failure_ = status;
}

void Ticket::settle(Moment moment, Status error) {
  MutexLock lock(mutex_);
  if (moment == Moment::released) {
    if (released_) return;
    released_ = true;
    released_error_ = std::move(error);
  } else if (moment == Moment::ready) {
    if (ready_) return;
    ready_ = true;
    if (done_fd_ >= 0) static_cast<void>(::eventfd_write(done_fd_, 1));
  }
  changed_.notify_all();
}

}  // namespace kvtier
