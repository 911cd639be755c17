#include "simulated_schedule.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace kvtier::simulated {
namespace {

// A seed has a temper, so that the seeds of a test cover lazy and eager machines and not one average.
constexpr std::array<unsigned, 6> kEagerness{0, 0, 0, 0, 10, 50};  // mostly lazy: it finds more
constexpr std::array<unsigned, 3> kDistraction{0, 5, 25};

}  // namespace

Schedule::Schedule(std::uint64_t seed)
    : random_(seed),
      eagerness_(kEagerness[random_.below(kEagerness.size())]),
      distraction_(kDistraction[random_.below(kDistraction.size())]) {}

StreamHandle Schedule::add_stream() {
  const StreamHandle handle{next_handle_++};
  streams_[handle];
  return handle;
}

bool Schedule::has_stream(StreamHandle stream) const {
  const auto it = streams_.find(stream);
  return it != streams_.end() && !it->second.retired;
}

void Schedule::retire_stream(StreamHandle stream) {
  Stream& retired = stream_of(stream);
  retired.retired = true;
  if (retired.operations.empty()) streams_.erase(stream);
}

std::size_t Schedule::pending(StreamHandle stream) const { return streams_.at(stream).operations.size(); }

std::size_t Schedule::pending() const {
  std::size_t sum = 0;
  for (const auto& [handle, stream] : streams_) sum += stream.operations.size();
  return sum;
}

void Schedule::submit(StreamHandle stream, Work work) {
  if (!health_) return;
  if (Copy* copy = std::get_if<Copy>(&work)) shuffle_and_split(*copy);
  stream_of(stream).operations.push_back({std::move(work), tick_});
}

std::shared_ptr<const Mark> Schedule::submit_record(StreamHandle stream) {
  const Stream& target = stream_of(stream);
  auto mark = std::make_shared<Mark>(Mark{stream, target.first + target.operations.size()});
  submit(stream, Record{mark});
  return mark;
}

// The runs of a batch are unordered (cudaMemcpyBatchAsync), and a DMA engine moves a run in bursts.
void Schedule::shuffle_and_split(Copy& copy) {
  std::vector<Piece>& pieces = copy.pieces;
  const std::size_t runs = pieces.size();
  for (std::size_t i = 0; i < runs; ++i) {
    if (pieces[i].bytes < 2 || !random_.percent(50)) continue;
    const std::size_t cut = 1 + random_.below(pieces[i].bytes - 1);
    Piece tail = pieces[i];
    tail.destination += cut;
    tail.source += cut;
    tail.bytes -= cut;
    pieces[i].bytes = cut;
    pieces.push_back(std::move(tail));
  }
  for (std::size_t i = pieces.size(); i > 1; --i) std::swap(pieces[i - 1], pieces[random_.below(i)]);
  for (Piece& piece : pieces) {
    ++piece.device->pending;
    if (piece.host != nullptr) ++piece.host->pending;
  }
}

bool Schedule::is_ready(const Stream& stream) {
  if (stream.operations.empty()) return false;
  const Wait* wait = std::get_if<Wait>(&stream.operations.front().work);
  return wait == nullptr || wait->mark->done;
}

bool Schedule::step() {
  std::vector<Streams::iterator> runnable;
  for (auto it = streams_.begin(); it != streams_.end(); ++it) {
    if (is_runnable(it->second)) runnable.push_back(it);
  }
  if (runnable.empty()) return false;
  run_front(runnable[random_.below(runnable.size())]);
  return true;
}

bool Schedule::step(StreamHandle stream) {
  const auto it = streams_.find(stream);
  if (it == streams_.end() || !is_ready(it->second)) return false;
  run_front(it);
  return true;
}

// The lazy adversary: while somebody waits for an event, work that the event does not need stays undone.
bool Schedule::step_towards(const Needs& needs) {
  if (random_.percent(distraction_) && step()) return true;
  std::vector<Streams::iterator> runnable;
  for (const auto& [handle, end] : needs) {
    const auto it = streams_.find(handle);
    if (it != streams_.end() && it->second.first < end && is_runnable(it->second)) runnable.push_back(it);
  }
  if (runnable.empty()) return false;
  run_front(runnable[random_.below(runnable.size())]);
  return true;
}

bool Schedule::step_overdue() {
  const bool overdue = std::any_of(streams_.begin(), streams_.end(), [this](const auto& entry) {
    return is_runnable(entry.second) && entry.second.operations.front().tick + 1 < tick_;
  });
  return overdue && step();
}

Schedule::Needs Schedule::needs_of(const Mark& mark) const {
  Needs needs;
  std::vector<const Mark*> open{&mark};
  while (!open.empty()) {
    const Mark& next = *open.back();
    open.pop_back();
    const auto it = streams_.find(next.stream);
    if (next.done || it == streams_.end()) continue;
    const Stream& stream = it->second;
    std::uint64_t& end = needs.try_emplace(next.stream, stream.first).first->second;
    for (; end <= next.position; ++end) {
      const Wait* wait = std::get_if<Wait>(&stream.operations[end - stream.first].work);
      if (wait != nullptr) open.push_back(wait->mark.get());
    }
  }
  return needs;
}

bool Schedule::fails_now() {
  if (copies_until_failure_ == 0) return false;
  --copies_until_failure_;
  return copies_until_failure_ == 0;
}

void Schedule::run_front(Streams::iterator it) {
  Stream& stream = it->second;
  Operation& front = stream.operations.front();
  if (Copy* copy = std::get_if<Copy>(&front.work)) {
    if (!std::exchange(copy->begun, true) && fails_now()) {
      if (!copy->pieces.empty() && random_.percent(50)) run_piece(*copy);
      fail(planned_failure_);
      return;
    }
    if (Copy* const next = following_copy(stream); next != nullptr && random_.percent(50)) {
      run_piece(*next);
      return;
    }
    if (!copy->pieces.empty()) run_piece(*copy);
    if (!copy->pieces.empty()) return;  // more steps to come
  }
  const Operation over = std::move(front);
  stream.operations.pop_front();
  ++stream.first;
  if (stream.retired && stream.operations.empty()) streams_.erase(it);
  if (const Record* record = std::get_if<Record>(&over.work)) record->mark->done = true;
  if (const Kernel* kernel = std::get_if<Kernel>(&over.work)) kernel->run();
}

// The copy right behind the one at the front, if the two are unordered (device.h) and pieces of it are left.
Copy* Schedule::following_copy(Stream& stream) {
  if (stream.operations.size() < 2) return nullptr;
  const Copy& front = std::get<Copy>(stream.operations[0].work);
  Copy* const next = std::get_if<Copy>(&stream.operations[1].work);
  return next != nullptr && next->direction == front.direction && !next->pieces.empty() ? next : nullptr;
}

void Schedule::run_piece(Copy& copy) {
  const Piece piece = std::move(copy.pieces.back());
  copy.pieces.pop_back();
  --piece.device->pending;
  if (piece.host != nullptr) --piece.host->pending;
  if (!piece.device->alive || (piece.host != nullptr && !piece.host->alive)) {
    report("a copy ran after its memory was freed or unregistered");  // CUDA would have touched it
    return;
  }
  std::memcpy(piece.destination, piece.source, piece.bytes);
}

void Schedule::fail(Status status) {
  if (!health_) return;  // the first error stays
  health_ = std::move(status);
  for (auto& [handle, stream] : streams_) {
    for (Operation& operation : stream.operations) {
      Copy* copy = std::get_if<Copy>(&operation.work);
      if (copy == nullptr) continue;
      for (Piece& piece : copy->pieces) {
        --piece.device->pending;
        if (piece.host != nullptr) --piece.host->pending;
      }
    }
    stream.first += stream.operations.size();
    stream.operations.clear();
  }
}

void Schedule::fail_at_copy(std::uint64_t n, Status status) {
  copies_until_failure_ = n;
  planned_failure_ = std::move(status);
}

}  // namespace kvtier::simulated
