// StoreHealth: when a drive is taken out of service, and when it is tried again. Pure: time is handed in.
//
//   in_service --a write, wipe or sync fails--> out_for_writes --3 reads in a row fail--> out
//        '---------------------- a request is not answered in time --------------------> out
//        ^                                            |                                    |
//        '-------------- a probe succeeds (1 s later, then 2 s, 4 s ... 60 s) ------------'
//
// A store that goes out again within a minute of coming back goes on where its waiting was, so a drive that
// fails every second write is not tried (and told of) every second.
#pragma once

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>

#include "kvtier/core/status.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier {

enum class Service : std::uint8_t { in_service, out_for_writes, out };

// Threads: one.
class StoreHealth {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  static constexpr std::chrono::milliseconds kLongestPause{60'000};
  static constexpr unsigned kReadErrorsInARow = 3;

  explicit StoreHealth(std::chrono::milliseconds first_pause)
      : first_pause_(first_pause), pause_(first_pause) {}

  Service service() const { return service_; }
  // Why it is out of service; empty when it is not.
  const std::string& reason() const { return reason_; }

  void write_failed(const Status& why, TimePoint now) {
    leave(is_silence(why) ? Service::out : std::max(service_, Service::out_for_writes), why, now);
  }
  void read_failed(const SlotPlace& place, const Status& why, TimePoint now) {
    if (is_silence(why)) return leave(Service::out, why, now);
    if (last_failed_read_ && *last_failed_read_ == place) return;  // one bad spot is not a bad drive
    last_failed_read_ = place;
    if (++read_errors_ >= kReadErrorsInARow) leave(Service::out, why, now);
  }
  void read_worked() {
    read_errors_ = 0;
    last_failed_read_.reset();
  }

  // When to try again; nullopt in service and while a probe runs.
  std::optional<TimePoint> probe_at() const { return probe_at_; }
  void probe_begins() { probe_at_.reset(); }
  void probe_failed(const Status& why, TimePoint now) {
    reason_ = why.message();
    pause_ = std::min(2 * pause_, kLongestPause);
    probe_at_ = now + pause_;
  }
  void probe_worked(TimePoint now) {
    service_ = Service::in_service;
    reason_.clear();
    back_at_ = now;
    probe_at_.reset();
    read_worked();
  }

 private:
  static bool is_silence(const Status& why) { return why.code() == StatusCode::timeout; }
  void leave(Service to, const Status& why, TimePoint now) {
    if (to == service_) return;
    const bool was_in_service = service_ == Service::in_service;
    service_ = to;
    reason_ = why.message();
    if (!was_in_service) return;
    const bool soon = back_at_ && now - *back_at_ < kLongestPause;
    pause_ = soon ? std::min(2 * pause_, kLongestPause) : first_pause_;
    probe_at_ = now + pause_;
  }

  const std::chrono::milliseconds first_pause_;
  std::chrono::milliseconds pause_;
  Service service_ = Service::in_service;
  std::string reason_;
  unsigned read_errors_ = 0;
  std::optional<SlotPlace> last_failed_read_;
  std::optional<TimePoint> probe_at_;
  std::optional<TimePoint> back_at_;
};

}  // namespace kvtier
