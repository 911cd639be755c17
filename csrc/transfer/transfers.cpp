#include "kvtier/transfer/transfers.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <list>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "kvtier/core/mutex.h"
#include "kvtier/core/ordering.h"
#include "kvtier/core/process.h"

namespace kvtier {
namespace {

// Runs handed to the device at once. The first part is small, so that the copies begin early; planning the
// others overlaps with copying. The longest is as much as a second-level cache holds, so that the runs are
// written and read there; a call costs little beside the copying of so many.
constexpr std::size_t kRunsOfFirstCopy = 1024;
constexpr std::size_t kMaxRunsPerCopy = 16384;

// How often, and how long during a graph capture, the waiter asks the device for a proof (transfers.h).
constexpr int kProofAttempts = 10;
constexpr std::chrono::seconds kCapturePatience{60};
constexpr std::chrono::milliseconds kLongestPause{128};

class SubmittedTransfer final : public Transfer {
 public:
  explicit SubmittedTransfer(Device& device) : device_(device) {}

  Status wait_stream(StreamHandle stream) override {
    KVTIER_RETURN_IF_ERROR(failure);
    if (!ordering_enabled(OrderingPoint::wait_stream_event)) return Status::ok();
    return device_.wait(stream, *end_event);
  }

  Status wait_layer(std::uint32_t layer, StreamHandle stream) override {
    KVTIER_RETURN_IF_ERROR(failure);
    if (layers_per_batch == 0) {
      return Status::unsupported("wait_layer needs a load that was submitted layer by layer");
    }
    if (layer >= num_layers) {
      return Status::invalid_argument("layer is " + std::to_string(layer) + "; allowed: 0 to " +
                                      std::to_string(num_layers - 1));
    }
    if (!ordering_enabled(OrderingPoint::wait_layer_event)) return Status::ok();
    return device_.wait(stream, *layer_events[layer / layers_per_batch]);
  }

  // Written by submit() before anybody else sees the transfer, immutable afterwards.
  Status failure;
  bool reached_stream = false;  // something was submitted to our stream: copies, or the wait before them
  bool reached_copies = false;
  bool end_recorded = false;
  std::uint32_t layers_per_batch = 0;
  std::uint32_t num_layers = 0;
  std::unique_ptr<Event> end_event;
  std::vector<std::unique_ptr<Event>> layer_events;

 private:
  Device& device_;
};

struct Waiting {
  std::shared_ptr<SubmittedTransfer> transfer;
  Transfers::OnEnd on_end;
};

// What an OnEnd throws against its contract must not end the process, nor the transfers behind it.
void call(const Transfers::OnEnd& on_end, const TransferOutcome& outcome) noexcept {
  try {
    on_end(outcome);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvtier: a transfer's on_end threw: %s\n", error.what());
  } catch (...) {
    std::fprintf(stderr, "kvtier: a transfer's on_end threw\n");
  }
}

// One direction: a stream and the thread that waits for its events in order.
class Lane {
 public:
  Lane(Device& device, OwnedStream stream)
      : state_(std::make_unique<State>(device, std::move(stream))), born_in_(process_generation()) {
    state_->waiter = std::thread([state = state_.get()] { state->run(); });
  }

  ~Lane() {
    if (process_generation() != born_in_) {
      // A child of fork(): the thread is the parent's, the mutex may be locked for good, and destroying a
      // condition variable waits for its waiters. Nothing of it may be touched, so it is leaked whole.
      static_cast<void>(state_.release());
      return;
    }
    {
      MutexLock lock(state_->mutex);
      state_->stopping = true;
      state_->changed.notify_one();
    }
    state_->waiter.join();
  }

  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  StreamHandle stream() const { return state_->stream.handle(); }

  // Takes over the one element of `waiting`. Never throws for want of memory: the copies are running.
  void push(std::list<Waiting>& waiting) {
    MutexLock lock(state_->mutex);
    state_->queue.splice(state_->queue.end(), waiting);
    state_->changed.notify_one();
  }

 private:
  struct State {
    State(Device& on, OwnedStream owned) : device(on), stream(std::move(owned)) {}
    ~State() {
      if (!left_alone) stream.~OwnedStream();
    }
    State(const State&) = delete;
    State& operator=(const State&) = delete;

    void run();
    TransferOutcome outcome_of(const SubmittedTransfer& transfer);

    Device& device;
    union {
      OwnedStream stream;  // destroyed only when all its work has completed (device.h)
    };
    bool left_alone = false;  // the waiter's own until it was joined
    Mutex mutex;
    CondVar changed;
    std::list<Waiting> queue KVTIER_GUARDED_BY(mutex);
    bool stopping KVTIER_GUARDED_BY(mutex) = false;
    std::thread waiter;
  };

  std::unique_ptr<State> state_;
  const std::uint64_t born_in_;
};

void Lane::State::run() {
  while (true) {
    std::list<Waiting> first;
    {
      MutexLock lock(mutex);
      while (queue.empty() && !stopping) changed.wait(lock);
      if (queue.empty()) return;
      first.splice(first.end(), queue, queue.begin());
    }
    const TransferOutcome outcome = outcome_of(*first.front().transfer);
    call(first.front().on_end, outcome);
  }
}

// Blocks until it is proved that no copy of the transfer runs any more, or that the device cannot prove it.
TransferOutcome Lane::State::outcome_of(const SubmittedTransfer& transfer) {
  using std::chrono::steady_clock;
  const steady_clock::time_point give_up_on_capture = steady_clock::now() + kCapturePatience;
  std::chrono::milliseconds pause{1};
  std::unique_ptr<Event> anew;  // where the transfer's own end was not recorded
  bool recorded = transfer.end_recorded;
  Event* end = transfer.end_event.get();
  int failures = 0;
  while (true) {
    Status status;
    if (!recorded && !anew) {
      Result<std::unique_ptr<Event>> created = device.create_event();
      status = created.status();
      if (created) {
        anew = std::move(*created);
        end = anew.get();
      }
    }
    if (status && !recorded) {
      status = device.record(*end, stream.handle());
      recorded = status.is_ok();
    }
    if (status) status = device.synchronize(*end);
    if (status) return {transfer.failure, true};

    const Status& why = transfer.failure ? status : transfer.failure;
    const Status health = device.health();
    const bool drained = !may_still_run(health) && (!transfer.reached_copies || !health);
    const bool give_up = is_capture_conflict(status) ? steady_clock::now() >= give_up_on_capture
                                                     : ++failures == kProofAttempts;
    if (drained || give_up) {
      left_alone = true;  // even if only the wait before the copies is left in it
      return {why, drained};
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, kLongestPause);
  }
}

class DeviceTransfers final : public Transfers {
 public:
  DeviceTransfers(Device& device, OwnedStream store_stream, OwnedStream load_stream)
      : device_(device), store_(device, std::move(store_stream)), load_(device, std::move(load_stream)) {}

  std::shared_ptr<Transfer> submit(TransferRequest request, OnEnd on_end) override {
    static const Status kNoMemory = Status::resource("out of memory while a transfer was submitted");
    auto transfer = std::make_shared<SubmittedTransfer>(device_);
    std::list<Waiting> waiting;  // all that push() needs is allocated before the first copy
    waiting.push_back({transfer, std::move(on_end)});
    try {
      transfer->failure = submit_all(request, *transfer);
    } catch (const std::bad_alloc&) {
      transfer->failure = kNoMemory;
    } catch (const std::exception& error) {
      transfer->failure = Status::internal(std::string("while a transfer was submitted: ") + error.what());
    }
    if (transfer->reached_stream) {
      lane_of(request.direction).push(waiting);
    } else {
      call(waiting.front().on_end, {transfer->failure, true});
    }
    return transfer;
  }

  Result<std::shared_ptr<Event>> mark(StreamHandle framework_stream) override {
    Result<std::unique_ptr<Event>> event = device_.create_event();
    if (!event) return event.status();
    KVTIER_RETURN_IF_ERROR(device_.record(**event, framework_stream));
    return std::shared_ptr<Event>(std::move(*event));
  }

 private:
  Lane& lane_of(Direction direction) { return direction == Direction::store ? store_ : load_; }

  Status order_after_framework(const TransferRequest& request, StreamHandle stream,
                               SubmittedTransfer& transfer) {
    const OrderingPoint point = request.direction == Direction::store
                                    ? OrderingPoint::store_after_framework_stream
                                    : OrderingPoint::load_after_framework_stream;
    if (!ordering_enabled(point)) return Status::ok();
    std::shared_ptr<Event> after = request.after;
    if (!after) {
      Result<std::shared_ptr<Event>> now = mark(request.framework_stream);
      if (!now) return now.status();
      after = std::move(*now);
    }
    KVTIER_RETURN_IF_ERROR(device_.wait(stream, *after));  // keeps the record; the event itself may go
    transfer.reached_stream = true;
    return Status::ok();
  }

  Status submit_all(const TransferRequest& request, SubmittedTransfer& transfer) {
    if (process_generation() != born_in_) {
      return Status::closed("these transfers belong to the process that forked this one");
    }
    const StreamHandle stream = lane_of(request.direction).stream();
    // All events first: a failure here has touched nothing.
    Result<std::unique_ptr<Event>> end = device_.create_event();
    if (!end) return end.status();
    transfer.end_event = std::move(*end);
    const std::uint32_t num_layers = request.map->spec().num_layers;
    const std::uint32_t step =
        request.layers_per_batch == 0 ? num_layers : std::min(request.layers_per_batch, num_layers);
    transfer.layers_per_batch = request.layers_per_batch;
    transfer.num_layers = num_layers;
    if (request.layers_per_batch > 0) {
      for (std::uint32_t layer = 0; layer < num_layers; layer += step) {
        Result<std::unique_ptr<Event>> event = device_.create_event();
        if (!event) return event.status();
        transfer.layer_events.push_back(std::move(*event));
      }
    }
    KVTIER_RETURN_IF_ERROR(order_after_framework(request, stream, transfer));

    std::vector<CopyRun> runs;
    std::size_t most = kRunsOfFirstCopy;
    for (std::uint32_t layer = 0; layer < num_layers; layer += step) {
      const std::uint32_t layer_end = std::min(layer + step, num_layers);
      const std::size_t pieces = request.map->pieces_of_layers(layer, layer_end).size();
      std::span<const BlockMove> moves = request.moves;
      while (!moves.empty()) {
        const std::size_t fit = std::max<std::size_t>(1, most / std::max<std::size_t>(1, pieces));
        const std::size_t blocks = std::min(fit, moves.size());
        runs.clear();
        plan(*request.map, moves.first(blocks), request.pages, request.direction, layer, layer_end, runs);
        moves = moves.subspan(blocks);
        most = std::min(2 * most, kMaxRunsPerCopy);
        KVTIER_RETURN_IF_ERROR(device_.copy(stream, runs, request.direction));
        transfer.reached_stream = transfer.reached_copies = true;
      }
      if (request.layers_per_batch > 0) {
        KVTIER_RETURN_IF_ERROR(device_.record(*transfer.layer_events[layer / step], stream));
      }
    }
    KVTIER_RETURN_IF_ERROR(device_.record(*transfer.end_event, stream));
    transfer.end_recorded = true;
    return Status::ok();
  }

  Device& device_;
  const std::uint64_t born_in_ = process_generation();
  Lane store_;
  Lane load_;
};

}  // namespace

Result<std::unique_ptr<Transfers>> Transfers::create(Device& device) {
  Result<OwnedStream> store = OwnedStream::create(device);
  if (!store) return store.status();
  Result<OwnedStream> load = OwnedStream::create(device);
  if (!load) return load.status();
  try {
    return std::unique_ptr<Transfers>(
        new DeviceTransfers(device, std::move(store).value(), std::move(load).value()));
  } catch (const std::system_error& error) {
    return Status::resource(std::string("cannot start a waiter thread: ") + error.what(),
                            error.code().value());
  }
}

}  // namespace kvtier
