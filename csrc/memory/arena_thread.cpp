#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "arena_impl.h"

namespace kvtier {
namespace {

using SteadyTime = std::chrono::steady_clock::time_point;

// A capture takes milliseconds to seconds.
constexpr std::chrono::milliseconds kCaptureRetry{20};
constexpr int kUnregisterRetries = 50;

}  // namespace

Status Arena::Impl::start() {
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    return Status::resource(std::string("cannot start the arena's thread: ") + error.what(),
                            error.code().value());
  }
  return Status::ok();
}

void Arena::Impl::stop() {
  {
    MutexLock lock(mutex_);
    stopping_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Arena::Impl::run() {
  ::pthread_setname_np(::pthread_self(), "kvtier-arena");
  for (;;) {
    const Step step = next_step();
    switch (step.kind) {
      case StepKind::stop: return;
      case StepKind::offer_chunk: offer(chunks_[step.chunk], *step.attachment); break;
      case StepKind::announce_chunk: announce(chunks_[step.chunk]); break;
      case StepKind::report_failure: report_failure(); break;
      case StepKind::prefault_chunk: prefault(chunks_[step.chunk]); break;
    }
  }
}

// Waits until there is something to do. Registering comes first: chunks that wait for it cannot be used.
Arena::Impl::Step Arena::Impl::next_step() {
  MutexLock lock(mutex_);
  for (;;) {
    if (stopping_) return {StepKind::stop};
    std::optional<SteadyTime> retry_at;
    const SteadyTime now = std::chrono::steady_clock::now();
    for (const auto& attachment : attachments_) {
      if (attachment->leaving || attachment->next == prefaulted_) continue;
      if (attachment->retry_at <= now) {
        calling_ = attachment.get();
        return {StepKind::offer_chunk, attachment->next, attachment.get()};
      }
      retry_at = std::min(attachment->retry_at, retry_at.value_or(attachment->retry_at));
    }
    if (announced_ < settled()) return {StepKind::announce_chunk, announced_};
    if (failure_.is_ok()) {
      if (prefaulted_ < chunks_.size()) return {StepKind::prefault_chunk, prefaulted_};
    } else if (!failure_reported_ && announced_ == prefaulted_) {
      return {StepKind::report_failure};
    }
    if (retry_at) {
      changed_.wait_until(lock, *retry_at);
    } else {
      changed_.wait(lock);
    }
  }
}

void Arena::Impl::offer(const ArenaChunk& chunk, Attachment& attachment) {
  const Status status = attachment.device->register_host(base_ + chunk.offset, chunk.bytes);
  MutexLock lock(mutex_);
  calling_ = nullptr;
  if (is_capture_conflict(status)) {
    attachment.retry_at = std::chrono::steady_clock::now() + kCaptureRetry;
  } else {
    ++attachment.next;
    if (status) {
      attachment.registered.push_back(base_ + chunk.offset);
    } else {
      ++refused_;
    }
  }
  changed_.notify_all();
}

void Arena::Impl::announce(const ArenaChunk& chunk) {
  if (on_usable_) on_usable_(chunk.class_index, chunk.end_slot);
  MutexLock lock(mutex_);
  ++announced_;
  changed_.notify_all();
}

void Arena::Impl::prefault(const ArenaChunk& chunk) {
  Status status = prefault_unlocked(chunk);
  MutexLock lock(mutex_);
  if (status) {
    ++prefaulted_;
    prefaulted_bytes_ += chunk.bytes;
  } else {
    failure_ = std::move(status);
  }
  changed_.notify_all();
}

Status Arena::Impl::prefault_unlocked(const ArenaChunk& chunk) {
  // Whatever was left when the arena was created, a framework that loads its weights meanwhile may have
  // taken. An arena that stays smaller is better than the kernel's out-of-memory killer. Huge pages are
  // ours already.
  if (huge_page_bytes_ == 0) {
    const Result<std::uint64_t> available = memory_.available_bytes();
    if (available && available.value() < chunk.bytes) {
      return Status::resource("prefaulting the host arena stopped: the next chunk needs " +
                              readable(chunk.bytes) + ", but the cgroup or the machine leaves only " +
                              readable(available.value()));
    }
  }
  return memory_.populate(base_ + chunk.offset, chunk.bytes);
}

void Arena::Impl::report_failure() {
  Status failure;
  {
    MutexLock lock(mutex_);
    failure = failure_;
  }
  if (on_failure_) on_failure_(failure);
  MutexLock lock(mutex_);
  failure_reported_ = true;
  changed_.notify_all();
}

std::size_t Arena::Impl::settled() const {
  std::size_t settled = prefaulted_;
  for (const auto& attachment : attachments_) {
    if (!attachment->leaving) settled = std::min(settled, attachment->next);
  }
  return settled;
}

bool Arena::Impl::whole() const {
  if (failure_.is_ok() ? prefaulted_ < chunks_.size() : !failure_reported_) return false;
  return announced_ == prefaulted_ && settled() == prefaulted_;
}

// --- devices ---

Arena::Impl::Attachment* Arena::Impl::find(const Device& device) const {
  const auto found = std::find_if(attachments_.begin(), attachments_.end(),
                                  [&](const auto& attachment) { return attachment->device == &device; });
  return found == attachments_.end() ? nullptr : found->get();
}

void Arena::Impl::register_with(Device& device) {
  MutexLock lock(mutex_);
  for (const Attachment* old = find(device); old != nullptr; old = find(device)) {
    if (!old->leaving) return;
    changed_.wait(lock);
  }
  attachments_.push_back(std::make_unique<Attachment>(device));
  changed_.notify_all();
}

void Arena::Impl::wait_until_offered(const Device& device) {
  MutexLock lock(mutex_);
  const std::size_t prefaulted = prefaulted_;
  for (const Attachment* mine = find(device); mine != nullptr && !stopping_; mine = find(device)) {
    const bool in_capture = mine->retry_at != SteadyTime{};
    if (mine->next >= prefaulted || mine->leaving || in_capture) return;
    changed_.wait(lock);
  }
}

void Arena::Impl::unregister_from(Device& device) {
  Attachment* attachment = nullptr;
  {
    MutexLock lock(mutex_);
    for (;;) {
      attachment = find(device);
      if (attachment == nullptr) return;
      if (!attachment->leaving) break;
      changed_.wait(lock);  // another thread is taking it out
    }
    attachment->leaving = true;
    while (calling_ == attachment) changed_.wait(lock);
  }
  const bool clean = unregister_all(*attachment);
  MutexLock lock(mutex_);
  still_registered_ |= !clean;
  std::erase_if(attachments_, [&](const auto& other) { return other.get() == attachment; });
  changed_.notify_all();
}

Status Arena::Impl::wait_until_whole() {
  MutexLock lock(mutex_);
  while (!whole()) changed_.wait(lock);
  return failure_;
}

bool Arena::Impl::unregister_all(Attachment& attachment) {
  bool clean = true;
  int retries = kUnregisterRetries;
  for (std::byte* begin : attachment.registered) {
    Status status = attachment.device->unregister_host(begin);
    while (is_capture_conflict(status) && retries-- > 0) {
      std::this_thread::sleep_for(kCaptureRetry);
      status = attachment.device->unregister_host(begin);
    }
    clean = clean && status.is_ok();
  }
  return clean;
}

}  // namespace kvtier
