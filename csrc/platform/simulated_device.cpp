#include "kvtier/platform/simulated_device.h"

#include <cstdlib>
#include <utility>

#include "simulated_state.h"

#include "kvtier/core/process.h"

namespace kvtier {

using simulated::Copy;
using simulated::inherited_error;
using simulated::invalid_handle;
using simulated::invalid_value;
using simulated::Mark;
using simulated::Piece;
using simulated::Region;
using simulated::Schedule;
using simulated::Wait;

namespace {

struct SimulatedEvent final : Event {
  explicit SimulatedEvent(const SimulatedDevice* device) : owner(device) {}
  const SimulatedDevice* owner;
  std::shared_ptr<const Mark> mark;  // null until recorded; guarded by the device's mutex
};

// Null if it is some other device's.
SimulatedEvent* own_event(Event& event, const SimulatedDevice* device) {
  auto* own = dynamic_cast<SimulatedEvent*>(&event);
  return own != nullptr && own->owner == device ? own : nullptr;
}

}  // namespace

SimulatedDevice::SimulatedDevice(SimulatedOptions options)
    : generation_(process_generation()), state_(std::make_unique<State>(options)) {
  if (options.max_delay_us > 0)
    state_->background = std::thread([state = state_.get()] { state->run_background(); });
}

SimulatedDevice::~SimulatedDevice() {
  if (inherited()) {
    static_cast<void>(state_.release());
    return;
  }
  {
    MutexLock lock(state_->mutex);
    state_->stopping = true;
    state_->submitted.notify_one();
  }
  if (state_->background.joinable()) state_->background.join();
  // Device memory that the framework did not free.
  MutexLock lock(state_->mutex);
  while (std::shared_ptr<Region> region = state_->allocations.take_any()) std::free(region->begin);
}

bool SimulatedDevice::inherited() const { return generation_ != process_generation(); }
int SimulatedDevice::ordinal() const { return state_->options.ordinal; }
std::string SimulatedDevice::name() const {
  return "simulated device, seed " + std::to_string(state_->options.seed);
}

Status SimulatedDevice::health() const {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  return state_->schedule.health();
}

Result<StreamHandle> SimulatedDevice::create_stream() {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_unsafe(lock));
  return state_->schedule.add_stream();
}

void SimulatedDevice::destroy_stream(StreamHandle stream) {
  if (inherited()) return;
  MutexLock lock(state_->mutex);
  Schedule& schedule = state_->schedule;
  if (!schedule.has_stream(stream)) return schedule.report("destroy_stream of no stream");
  if (schedule.pending(stream) > 0) schedule.report("a stream was destroyed with work pending");
  schedule.retire_stream(stream);
}

Result<std::unique_ptr<Event>> SimulatedDevice::create_event() {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->schedule.health());
  return std::unique_ptr<Event>(std::make_unique<SimulatedEvent>(this));
}

Status SimulatedDevice::record(Event& event, StreamHandle stream) {
  if (inherited()) return inherited_error();
  SimulatedEvent* own = own_event(event, this);
  if (own == nullptr) return invalid_handle("the event");
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_stream(stream, lock));
  own->mark = state_->schedule.submit_record(stream);
  state_->after_submission(lock);
  return Status::ok();
}

Status SimulatedDevice::wait(StreamHandle stream, Event& event) {
  if (inherited()) return inherited_error();
  SimulatedEvent* own = own_event(event, this);
  if (own == nullptr) return invalid_handle("the event");
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_stream(stream, lock));
  if (own->mark == nullptr) return Status::ok();  // CUDA: never recorded, so nothing to wait for
  state_->schedule.submit(stream, Wait{own->mark});
  state_->after_submission(lock);
  return Status::ok();
}

Result<bool> SimulatedDevice::query(Event& event) {
  if (inherited()) return inherited_error();
  SimulatedEvent* own = own_event(event, this);
  if (own == nullptr) return invalid_handle("the event");
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_unsafe(lock));
  // One who polls gets on, one who asks once may be told "not yet".
  if (!state_->held && state_->schedule.random().percent(50) && state_->schedule.step()) {
    state_->stepped.notify_all();
    KVTIER_RETURN_IF_ERROR(state_->schedule.health());
  }
  return own->mark == nullptr || own->mark->done;
}

Status SimulatedDevice::synchronize(Event& event) {
  if (inherited()) return inherited_error();
  SimulatedEvent* own = own_event(event, this);
  if (own == nullptr) return invalid_handle("the event");
  std::shared_ptr<const Mark> mark;
  {
    MutexLock lock(state_->mutex);
    KVTIER_RETURN_IF_ERROR(state_->check_unsafe(lock));
    mark = own->mark;
  }
  return mark == nullptr ? Status::ok() : state_->wait_for(*mark);
}

Status SimulatedDevice::copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) {
  if (inherited()) return inherited_error();
  std::shared_ptr<const Mark> copied;
  {
    MutexLock lock(state_->mutex);
    KVTIER_RETURN_IF_ERROR(state_->check_stream(stream, lock));
    Copy batch;
    batch.direction = direction;
    bool pageable = false;
    batch.pieces.reserve(2 * runs.size());
    for (const CopyRun& run : runs) {
      if (run.bytes == 0) continue;
      Result<Piece> piece = state_->check_run(run, direction);
      if (!piece) return piece.status();
      pageable = pageable || piece->host == nullptr;
      batch.pieces.push_back(std::move(*piece));
    }
    if (pageable) KVTIER_RETURN_IF_ERROR(state_->check_unsafe(lock));
    if (pageable && direction == Direction::load) State::stage(batch);
    state_->schedule.submit(stream, std::move(batch));
    if (pageable && direction == Direction::store) copied = state_->schedule.submit_record(stream);
    state_->after_submission(lock);
  }
  return copied == nullptr ? Status::ok() : state_->wait_for(*copied);
}

Status SimulatedDevice::register_host(void* begin, std::size_t bytes) {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_unsafe(lock));
  if (begin == nullptr || bytes == 0 || state_->allocations.overlap(begin, bytes)) {
    return invalid_value("register_host of nothing, or of device memory");
  }
  if (state_->registrations.overlap(begin, bytes)) {
    return Status::device("the range is already registered", cuda_error::kHostMemoryAlreadyRegistered);
  }
  state_->registrations.add(static_cast<std::byte*>(begin), bytes);
  return Status::ok();
}

Status SimulatedDevice::unregister_host(void* begin) {
  if (inherited()) return inherited_error();
  MutexLock lock(state_->mutex);
  KVTIER_RETURN_IF_ERROR(state_->check_unsafe(lock));
  const std::shared_ptr<Region> region = state_->registrations.take(begin);
  if (region == nullptr) {
    return Status::device("no registration begins there", cuda_error::kHostMemoryNotRegistered);
  }
  if (region->pending > 0) state_->schedule.report("unregister_host under a submitted copy");
  return Status::ok();
}

}  // namespace kvtier
