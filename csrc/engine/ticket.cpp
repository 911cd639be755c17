#include "kvtier/engine/ticket.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "kvtier/core/process.h"

namespace kvtier {

namespace {

Status inherited_error() { return Status::closed("this ticket belongs to the parent process"); }

}  // namespace

Ticket::Ticket(Direction direction, std::size_t num_blocks, bool has_disk)
    : direction_(direction),
      has_disk_(has_disk),
      num_blocks_(num_blocks),
      born_in_(process_generation()),
      state_(std::make_unique<State>()) {
  state_->outcomes.assign(num_blocks, BlockOutcome::running);
}

Ticket::~Ticket() {
  if (inherited()) {
    // Destroying a condition variable that the parent waits on would wait here for ever.
    static_cast<void>(state_.release());
  } else if (state_->done_fd >= 0) {
    ::close(state_->done_fd);
  }
}

bool Ticket::inherited() const { return process_generation() != born_in_; }

bool Ticket::settled(Moment moment) const {
  if (inherited()) return true;
  MutexLock lock(state_->mutex);
  switch (moment) {
    case Moment::released: return state_->released;
    case Moment::ready: return state_->ready;
    case Moment::durable: return state_->durable;
  }
  return false;
}

Status Ticket::wait(Moment moment, Deadline deadline) const {
  if (inherited()) return inherited_error();
  if (moment == Moment::durable && !has_disk_) {
    return Status::unsupported("durable: this engine has no disk tier, so no block becomes durable");
  }
  MutexLock lock(state_->mutex);
  const bool& reached = moment == Moment::released ? state_->released
                        : moment == Moment::ready  ? state_->ready
                                                   : state_->durable;
  while (!reached) {
    if (!deadline) {
      state_->changed.wait(lock);
    } else if (!state_->changed.wait_until(lock, *deadline) && !reached) {
      return Status::timeout("the transfer is still running; it goes on");
    }
  }
  return moment == Moment::released ? state_->released_error : Status::ok();
}

Status Ticket::failure() const {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  return state_->failure;
}

std::vector<BlockOutcome> Ticket::outcomes() const {
  if (inherited()) return std::vector<BlockOutcome>(num_blocks_, BlockOutcome::failed);
  MutexLock lock(state_->mutex);
  return state_->outcomes;
}

std::size_t Ticket::valid_blocks() const {
  const auto valid = [this](BlockOutcome outcome) {
    if (direction_ == Direction::load) return outcome == BlockOutcome::loaded;
    return outcome == BlockOutcome::stored || outcome == BlockOutcome::present ||
           outcome == BlockOutcome::pending;
  };
  if (inherited()) return 0;
  MutexLock lock(state_->mutex);
  const std::vector<BlockOutcome>& all = state_->outcomes;
  return static_cast<std::size_t>(std::find_if_not(all.begin(), all.end(), valid) - all.begin());
}

std::size_t Ticket::durable_blocks() const {
  if (inherited()) return 0;
  MutexLock lock(state_->mutex);
  return state_->durable_blocks;
}

Status Ticket::order(StreamHandle stream, std::optional<std::uint32_t> layer) const {
  if (inherited()) return inherited_error();
  std::shared_ptr<Transfer> transfer;
  {
    MutexLock lock(state_->mutex);
    transfer = state_->transfer;
    if (!transfer && !state_->ready) {
      return Status::unsupported(
          "not all copies of this ticket are submitted to a stream of ours: they run in other processes, or "
          "blocks are still being read from disk; use wait()");
    }
    if (!transfer) return state_->failure;
  }
  return layer ? transfer->wait_layer(*layer, stream) : transfer->wait_stream(stream);
}

Status Ticket::wait_stream(StreamHandle stream) const { return order(stream, std::nullopt); }

Status Ticket::wait_layer(std::uint32_t layer, StreamHandle stream) const { return order(stream, layer); }

Result<int> Ticket::done_fd() {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  if (state_->done_fd < 0) {
    state_->done_fd = ::eventfd(state_->ready ? 1 : 0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (state_->done_fd < 0) {
      return Status::resource(std::string("cannot make an eventfd: ") + std::strerror(errno), errno);
    }
  }
  return state_->done_fd;
}

void Ticket::add_durable(std::size_t num_blocks) {
  MutexLock lock(state_->mutex);
  state_->durable_blocks += num_blocks;
}

void Ticket::set_outcomes(std::vector<BlockOutcome> outcomes) {
  MutexLock lock(state_->mutex);
  state_->outcomes = std::move(outcomes);
}

void Ticket::set_transfer(std::shared_ptr<Transfer> transfer) {
  MutexLock lock(state_->mutex);
  state_->transfer = std::move(transfer);
}

void Ticket::fail(const Status& status) {
  MutexLock lock(state_->mutex);
  if (state_->failure) state_->failure = status;
}

void Ticket::settle(Moment moment, Status error) {
  MutexLock lock(state_->mutex);
  if (moment == Moment::released) {
    if (state_->released) return;
    state_->released = true;
    state_->released_error = std::move(error);
  } else if (moment == Moment::ready) {
    if (state_->ready) return;
    state_->ready = true;
    if (state_->done_fd >= 0) static_cast<void>(::eventfd_write(state_->done_fd, 1));
  } else {
    state_->durable = true;
  }
  state_->changed.notify_all();
}

}  // namespace kvtier
