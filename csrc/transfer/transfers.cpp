#include "kvtier/transfer/transfers.h"

#include <algorithm>
#include <deque>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "kvtier/core/mutex.h"
#include "kvtier/core/ordering.h"
#include "kvtier/core/process.h"

namespace kvtier {
namespace {

// Runs handed to the device at once: enough to keep it busy, few enough that planning the next batch
// overlaps with copying this one.
constexpr std::size_t kRunsPerCopy = 4096;

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
    const std::size_t batch = layer / layers_per_batch;
    if (batch >= layer_events.size()) {
      return Status::invalid_argument("layer is " + std::to_string(layer) + "; allowed: 0 to " +
                                      std::to_string(num_layers - 1));
    }
    if (!ordering_enabled(OrderingPoint::wait_layer_event)) return Status::ok();
    return device_.wait(stream, *layer_events[batch]);
  }

  // Written by submit() before anybody else sees the transfer, immutable afterwards.
  Status failure;
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

// One direction: a stream and the thread that waits for its events in order.
class Lane {
 public:
  Lane(Device& device, OwnedStream stream)
      : device_(device), stream_(std::move(stream)), born_in_(process_generation()), waiter_([this] { run(); }) {}

  ~Lane() {
    if (process_generation() != born_in_) {
      waiter_.detach();  // the thread is the parent's; there is nothing to join here
      return;
    }
    {
      MutexLock lock(mutex_);
      stopping_ = true;
      changed_.notify_one();
    }
    waiter_.join();
  }

  StreamHandle stream() const { return stream_.handle(); }

  void push(Waiting waiting) {
    MutexLock lock(mutex_);
    queue_.push_back(std::move(waiting));
    changed_.notify_one();
  }

 private:
  void run() {
    while (true) {
      Waiting waiting;
      {
        MutexLock lock(mutex_);
        while (queue_.empty() && !stopping_) changed_.wait(lock);
        if (queue_.empty()) return;
        waiting = std::move(queue_.front());
        queue_.pop_front();
      }
      TransferOutcome outcome{waiting.transfer->failure, true};
      if (Status waited = device_.synchronize(*waiting.transfer->end_event); !waited) {
        outcome = {outcome.status ? waited : outcome.status, false};
      }
      waiting.on_end(outcome);
    }
  }

  Device& device_;
  OwnedStream stream_;
  const std::uint64_t born_in_;
  Mutex mutex_;
  CondVar changed_;
  std::deque<Waiting> queue_ KVTIER_GUARDED_BY(mutex_);
  bool stopping_ KVTIER_GUARDED_BY(mutex_) = false;
  std::thread waiter_;  // last: it uses everything above
};

class DeviceTransfers final : public Transfers {
 public:
  DeviceTransfers(Device& device, OwnedStream store_stream, OwnedStream load_stream)
      : device_(device), store_(device, std::move(store_stream)), load_(device, std::move(load_stream)) {}

  std::shared_ptr<Transfer> submit(TransferRequest request, OnEnd on_end) override {
    auto transfer = std::make_shared<SubmittedTransfer>(device_);
    Lane& lane = request.direction == Direction::store ? store_ : load_;
    bool anything_submitted = false;
    transfer->failure = submit_all(request, lane.stream(), *transfer, anything_submitted);
    if (anything_submitted && !transfer->failure) {
      // Some copies run although the transfer failed: find out when they are over. The end event may be
      // missing because its own creation or record failed.
      Status recorded = record_end(lane.stream(), *transfer);
      if (!recorded) {
        on_end({transfer->failure, false});
        return transfer;
      }
    }
    if (!anything_submitted) {
      on_end({transfer->failure, true});
      return transfer;
    }
    lane.push({transfer, std::move(on_end)});
    return transfer;
  }

 private:
  Status record_end(StreamHandle stream, SubmittedTransfer& transfer) {
    if (!transfer.end_event) {
      Result<std::unique_ptr<Event>> event = device_.create_event();
      if (!event) return event.status();
      transfer.end_event = std::move(*event);
    }
    return device_.record(*transfer.end_event, stream);
  }

  Status order_after_framework(const TransferRequest& request, StreamHandle stream) {
    const OrderingPoint point = request.direction == Direction::store ? OrderingPoint::store_after_framework_stream
                                                                      : OrderingPoint::load_after_framework_stream;
    if (!ordering_enabled(point)) return Status::ok();
    Result<std::unique_ptr<Event>> event = device_.create_event();
    if (!event) return event.status();
    KVTIER_RETURN_IF_ERROR(device_.record(**event, request.framework_stream));
    return device_.wait(stream, **event);  // keeps the record; the event itself may go
  }

  Status submit_all(const TransferRequest& request, StreamHandle stream, SubmittedTransfer& transfer,
                    bool& anything_submitted) {
    // All events first: a failure here has touched nothing.
    Result<std::unique_ptr<Event>> end = device_.create_event();
    if (!end) return end.status();
    transfer.end_event = std::move(*end);
    const std::uint32_t num_layers = request.map->spec().num_layers;
    const std::uint32_t step = request.layers_per_batch == 0 ? num_layers : request.layers_per_batch;
    transfer.layers_per_batch = request.layers_per_batch;
    transfer.num_layers = num_layers;
    if (request.layers_per_batch > 0) {
      for (std::uint32_t layer = 0; layer < num_layers; layer += step) {
        Result<std::unique_ptr<Event>> event = device_.create_event();
        if (!event) return event.status();
        transfer.layer_events.push_back(std::move(*event));
      }
    }
    KVTIER_RETURN_IF_ERROR(order_after_framework(request, stream));

    std::vector<CopyRun> runs;
    for (std::uint32_t layer = 0; layer < num_layers; layer += step) {
      const std::uint32_t layer_end = std::min(layer + step, num_layers);
      const std::size_t pieces = request.map->pieces_of_layers(layer, layer_end).size();
      const std::size_t blocks_per_copy = std::max<std::size_t>(1, kRunsPerCopy / std::max<std::size_t>(1, pieces));
      const std::span<const BlockMove> moves = request.moves;
      for (std::size_t begin = 0; begin < moves.size(); begin += blocks_per_copy) {
        runs.clear();
        plan(*request.map, moves.subspan(begin, std::min(blocks_per_copy, moves.size() - begin)), request.pages,
             request.direction, layer, layer_end, runs);
        KVTIER_RETURN_IF_ERROR(device_.copy(stream, runs, request.direction));
        anything_submitted = true;
      }
      if (request.layers_per_batch > 0) {
        KVTIER_RETURN_IF_ERROR(device_.record(*transfer.layer_events[layer / step], stream));
      }
    }
    return record_end(stream, transfer);
  }

  Device& device_;
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
    return Status::resource(std::string("cannot start a waiter thread: ") + error.what(), error.code().value());
  }
}

}  // namespace kvtier
