#include "kvtier/platform/simulated_drive.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <utility>
#include <vector>

#include "drive_file.h"
#include "io_transfer.h"

#include "kvtier/core/mutex.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kSectorBytes = 512;
// A transfer that stops short has moved so much: more than IoTransfer may go back.
constexpr std::uint64_t kLeastMovedBytes = 4096;
// How often, per request, the drive writes something back unasked.
constexpr double kWhim = 1.0 / 16;

enum class Fate : std::uint8_t { good, io_error, no_space, bit_flip, misplaced, lost, cut_short };

void flip_bit(std::span<std::byte> bytes, DriveRandom& random) {
  if (bytes.empty()) return;
  const std::uint64_t bit = random.below(bytes.size() * 8);
  bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
}

// 0, or what the kernel would say to the request at once.
int refusal(const IoRequest& request) {
  const int flags = ::fcntl(request.fd, F_GETFL);
  if (flags < 0) return EBADF;
  if (request.op == IoOp::sync) return 0;
  if ((flags & O_ACCMODE) == (request.op == IoOp::read ? O_WRONLY : O_RDONLY)) return EBADF;
  const std::uint64_t all = request.offset | request.bytes | reinterpret_cast<std::uintptr_t>(request.data);
  return (flags & O_DIRECT) != 0 && all % kSectorBytes != 0 ? EINVAL : 0;
}

}  // namespace

struct SimulatedDrive::State {
  class Queue;
  using FileId = std::pair<dev_t, ino_t>;

  struct Pending {
    IoTransfer transfer;
    IoRequest request;  // its piece that is next
    std::shared_ptr<DriveFile> file;
    int refused = 0;
    Fate fate = Fate::good;
    std::uint64_t moment = 0;  // of submission, in acknowledged completions
    bool delayed = false;
    bool stuck = false;             // delayed until release_delayed()
    std::uint64_t released_at = 0;  // in completions of the queue
  };

  // What a queue has in the drive. Guarded by the drive's mutex.
  struct Line {
    std::vector<Pending> pending;
    std::uint64_t completed = 0;
    bool woken = false;
    CondVar changed;
  };

  explicit State(const DriveFaults& first) : random(first.seed), faults(first) {}

  Pending accept(const MutexLock&, const IoRequest& request) KVTIER_REQUIRES(mutex);
  Fate draw_fate(const MutexLock&, const IoRequest& request) KVTIER_REQUIRES(mutex);
  Result<std::shared_ptr<DriveFile>> file_of(const MutexLock&, int fd) KVTIER_REQUIRES(mutex);
  // Performs the next piece. Returns how the request has ended, or nullopt if there is another piece.
  std::optional<int> go_on(const MutexLock& lock, Pending& pending) KVTIER_REQUIRES(mutex);
  int perform(const MutexLock&, const Pending& pending) KVTIER_REQUIRES(mutex);
  int perform_write(const MutexLock&, const Pending& pending) KVTIER_REQUIRES(mutex);
  std::uint64_t other_place(const MutexLock&, const Pending& pending) KVTIER_REQUIRES(mutex);
  void put(const MutexLock&, DriveFile& file, std::uint64_t offset, std::span<const std::byte> data)
      KVTIER_REQUIRES(mutex);
  void write_back_at_whim(const MutexLock&) KVTIER_REQUIRES(mutex);
  // Performs a random part of what may go on, in any order. Returns whether anything may.
  bool perform_some(const MutexLock& lock, Line& line, std::vector<IoCompletion>& completions)
      KVTIER_REQUIRES(mutex);
  std::size_t gather_ready(const MutexLock&, Line& line) KVTIER_REQUIRES(mutex);
  void lose_power(const MutexLock& lock) KVTIER_REQUIRES(mutex);
  std::uint64_t num_cached(const MutexLock&) const KVTIER_REQUIRES(mutex);

  mutable Mutex mutex;
  DriveRandom random KVTIER_GUARDED_BY(mutex);
  DriveFaults faults KVTIER_GUARDED_BY(mutex);
  bool dead KVTIER_GUARDED_BY(mutex) = false;
  std::uint64_t num_requests KVTIER_GUARDED_BY(mutex) = 0;
  std::uint64_t num_since_faults KVTIER_GUARDED_BY(mutex) = 0;  // since set_faults()
  std::uint64_t injected KVTIER_GUARDED_BY(mutex) = 0;
  std::vector<SpoiledRange> spoiled KVTIER_GUARDED_BY(mutex);
  std::uint64_t moment KVTIER_GUARDED_BY(mutex) = 0;  // completions that owners have been given
  std::map<FileId, std::shared_ptr<DriveFile>> files KVTIER_GUARDED_BY(mutex);
  std::vector<Line*> lines KVTIER_GUARDED_BY(mutex);
  // Of the requests being performed in one wait(): acknowledged together when it returns.
  std::vector<std::pair<DriveFile*, std::uint64_t>> unacknowledged KVTIER_GUARDED_BY(mutex);
};

class SimulatedDrive::State::Queue final : public IoQueue {
 public:
  Queue(std::shared_ptr<State> state, std::uint32_t depth) : state_(std::move(state)), depth_(depth) {
    const MutexLock lock(state_->mutex);
    state_->lines.push_back(&line_);
  }
  ~Queue() override {
    std::vector<IoCompletion> completions;
    while (in_flight_ > 0) static_cast<void>(wait(completions, std::nullopt));
    const MutexLock lock(state_->mutex);
    std::erase(state_->lines, &line_);
  }

  std::string description() const override { return "simulated drive"; }
  std::uint32_t depth() const override { return depth_; }
  std::uint32_t in_flight() const override { return in_flight_; }

  void submit(std::span<const IoRequest> requests) override {
    KVTIER_CHECK(in_flight_ + requests.size() <= depth_);
    in_flight_ += static_cast<std::uint32_t>(requests.size());
    const MutexLock lock(state_->mutex);
    for (const IoRequest& request : requests) {
      line_.pending.push_back(state_->accept(lock, request));
      line_.pending.back().released_at = line_.completed + state_->faults.delayed_requests;
    }
  }

  Status wait(std::vector<IoCompletion>& completions, std::optional<TimePoint> deadline) override {
    const std::size_t before = completions.size();
    MutexLock lock(state_->mutex);
    for (bool in_time = true;;) {
      const bool goes_on = state_->perform_some(lock, line_, completions);
      if (completions.size() > before || line_.woken || !in_time) break;
      if (goes_on) continue;  // with the rest of what was cut short
      if (deadline) {
        in_time = line_.changed.wait_until(lock, *deadline);
      } else {
        line_.changed.wait(lock);
      }
    }
    line_.woken = false;
    in_flight_ -= static_cast<std::uint32_t>(completions.size() - before);
    return Status::ok();
  }

  void wake() override {
    {
      const MutexLock lock(state_->mutex);
      line_.woken = true;
    }
    line_.changed.notify_one();
  }

  Status register_buffer(std::span<std::byte>) override {
    return Status::unsupported("a simulated drive has no use for registered buffers");
  }
  Status register_file(int) override {
    return Status::unsupported("a simulated drive has no use for registered files");
  }

 private:
  const std::shared_ptr<State> state_;
  const std::uint32_t depth_;
  std::uint32_t in_flight_ = 0;  // the owner's
  Line line_;
};

bool SimulatedDrive::State::perform_some(const MutexLock& lock, Line& line,
                                         std::vector<IoCompletion>& completions) {
  std::size_t num_ready = gather_ready(lock, line);
  if (num_ready == 0) return false;
  for (std::uint64_t count = 1 + random.below(num_ready); count > 0; --count, --num_ready) {
    const auto chosen = line.pending.begin() + static_cast<std::ptrdiff_t>(random.below(num_ready));
    const std::optional<int> error = go_on(lock, *chosen);
    // Keeps the ready ones in front.
    const auto last_ready = line.pending.begin() + static_cast<std::ptrdiff_t>(num_ready - 1);
    std::iter_swap(chosen, last_ready);
    if (error) {
      completions.push_back({.tag = last_ready->request.tag, .error = *error});
      line.pending.erase(last_ready);
      ++line.completed;
    }
    write_back_at_whim(lock);
  }
  for (const auto& [file, number] : unacknowledged) file->acknowledge(number, moment);
  unacknowledged.clear();
  ++moment;
  return true;
}

// Brings what may end to the front.
std::size_t SimulatedDrive::State::gather_ready(const MutexLock&, Line& line) {
  const auto begin = line.pending.begin();
  const auto end = line.pending.end();
  auto ready = std::partition(begin, end, [all = dead, &line](const Pending& p) {
    return all || !p.delayed || (!p.stuck && line.completed >= p.released_at);
  });
  // Nothing is left that the delayed ones could come after.
  if (ready == begin) ready = std::partition(begin, end, [](const Pending& p) { return !p.stuck; });
  return static_cast<std::size_t>(ready - begin);
}

Fate SimulatedDrive::State::draw_fate(const MutexLock&, const IoRequest& request) {
  const std::uint64_t nth = num_since_faults++;
  if (faults.fail_nth == nth) return Fate::io_error;
  const bool can_be_cut = request.op != IoOp::sync && request.bytes > kLeastMovedBytes;
  if (can_be_cut && faults.short_transfer > 0 && random.chance(faults.short_transfer)) return Fate::cut_short;
  switch (request.op) {
    case IoOp::read:
      if (random.chance(faults.read_error)) return Fate::io_error;
      return random.chance(faults.bit_flip) ? Fate::bit_flip : Fate::good;
    case IoOp::sync: return random.chance(faults.sync_error) ? Fate::io_error : Fate::good;
    case IoOp::write: break;
  }
  if (random.chance(faults.write_error)) return Fate::io_error;
  if (random.chance(faults.no_space)) return Fate::no_space;
  if (random.chance(faults.bit_flip)) return Fate::bit_flip;
  if (random.chance(faults.misplaced)) return Fate::misplaced;
  return random.chance(faults.lost_write) ? Fate::lost : Fate::good;
}

Result<std::shared_ptr<DriveFile>> SimulatedDrive::State::file_of(const MutexLock&, int fd) {
  struct stat status{};
  if (::fstat(fd, &status) != 0) return Status::io("no such file", errno);
  std::shared_ptr<DriveFile>& file = files[{status.st_dev, status.st_ino}];
  if (file == nullptr) {
    Result<std::unique_ptr<DriveFile>> opened = DriveFile::open_again(fd);
    if (!opened) return opened.status();
    file = std::move(*opened);
  }
  return file;
}

SimulatedDrive::State::Pending SimulatedDrive::State::accept(const MutexLock& lock,
                                                             const IoRequest& request) {
  ++num_requests;
  Pending pending{.transfer = IoTransfer(request), .request = request, .file = nullptr, .moment = moment};
  pending.fate = draw_fate(lock, request);
  pending.delayed = random.chance(faults.delay);
  pending.stuck = pending.delayed && faults.never_completes;
  injected += (pending.fate != Fate::good ? 1U : 0U) + (pending.delayed ? 1U : 0U);
  pending.refused = refusal(request);
  if (pending.refused == 0) {
    Result<std::shared_ptr<DriveFile>> file = file_of(lock, request.fd);
    if (file) {
      pending.file = std::move(*file);
    } else {
      pending.refused = file.status().native_code();
    }
  }
  return pending;
}

std::optional<int> SimulatedDrive::State::go_on(const MutexLock& lock, Pending& pending) {
  IoRequest& piece = pending.request;
  if (pending.fate == Fate::cut_short && !dead && pending.refused == 0) {
    piece.bytes = kLeastMovedBytes + random.below(piece.bytes - kLeastMovedBytes);
    pending.fate = Fate::good;
  }
  const int error = perform(lock, pending);
  const std::int64_t result = error != 0 ? -std::int64_t{error} : static_cast<std::int64_t>(piece.bytes);
  if (const std::optional<int> ended = pending.transfer.advance(result)) return ended;
  piece = pending.transfer.next_piece();
  pending.fate = draw_fate(lock, piece);
  injected += pending.fate != Fate::good ? 1U : 0U;
  return std::nullopt;
}

int SimulatedDrive::State::perform(const MutexLock& lock, const Pending& pending) {
  if (dead) return EIO;
  if (pending.refused != 0) return pending.refused;
  DriveFile& file = *pending.file;
  switch (pending.request.op) {
    case IoOp::read: {
      if (pending.fate == Fate::io_error) return EIO;
      const std::span<std::byte> into(pending.request.data, pending.request.bytes);
      const int error = file.read(pending.request.offset, into);
      if (error == 0 && pending.fate == Fate::bit_flip) flip_bit(into, random);
      return error;
    }
    case IoOp::sync:
      if (pending.fate != Fate::io_error) return file.sync(pending.moment);
      for (const auto& [id, each] : files) {
        if (each) each->fail_sync(random);
      }
      return EIO;
    case IoOp::write: break;
  }
  return perform_write(lock, pending);
}

int SimulatedDrive::State::perform_write(const MutexLock& lock, const Pending& pending) {
  const IoRequest& request = pending.request;
  std::vector<std::byte> data(request.data, request.data + request.bytes);
  const bool lies =
      pending.fate == Fate::bit_flip || pending.fate == Fate::misplaced || pending.fate == Fate::lost;
  if (lies) spoiled.push_back({request.offset, request.bytes});
  switch (pending.fate) {
    case Fate::cut_short:  // go_on() has cut it
    case Fate::good: put(lock, *pending.file, request.offset, data); return 0;
    case Fate::io_error:
      data.resize(random.below(data.size() / kSectorBytes + 1) * kSectorBytes);
      if (!data.empty()) put(lock, *pending.file, request.offset, data);
      return EIO;
    case Fate::no_space: return ENOSPC;
    case Fate::bit_flip:
      flip_bit(data, random);
      put(lock, *pending.file, request.offset, data);
      return 0;
    case Fate::misplaced:
      if (const std::uint64_t place = other_place(lock, pending); place != request.offset) {
        put(lock, *pending.file, place, data);
        spoiled.push_back({place, data.size()});
      }
      return 0;
    case Fate::lost: break;
  }
  return 0;
}

std::uint64_t SimulatedDrive::State::other_place(const MutexLock&, const Pending& pending) {
  const IoRequest& request = pending.request;
  const std::uint64_t step = request.bytes;
  const std::uint64_t size = pending.file->size_bytes();
  if (step == 0 || size < request.offset % step + step) return request.offset;
  const std::uint64_t count = (size - request.offset % step) / step;
  if (count < 2) return request.offset;
  const std::uint64_t own = request.offset / step;
  std::uint64_t other = random.below(count - 1);
  if (other >= own) ++other;
  return request.offset % step + other * step;
}

void SimulatedDrive::State::put(const MutexLock&, DriveFile& file, std::uint64_t offset,
                                std::span<const std::byte> data) {
  unacknowledged.emplace_back(&file, file.write(offset, data));
}

void SimulatedDrive::State::write_back_at_whim(const MutexLock&) {
  if (dead || files.empty() || !random.chance(kWhim)) return;
  const auto chosen = std::next(files.begin(), static_cast<std::ptrdiff_t>(random.below(files.size())));
  if (chosen->second != nullptr) chosen->second->write_back_one(random);
}

SimulatedDrive::SimulatedDrive(const DriveFaults& faults) : state_(std::make_shared<State>(faults)) {}
SimulatedDrive::~SimulatedDrive() = default;

std::unique_ptr<IoQueue> SimulatedDrive::make_queue(std::uint32_t depth) {
  return std::make_unique<State::Queue>(state_, depth);
}

void SimulatedDrive::set_faults(const DriveFaults& faults) {
  const MutexLock lock(state_->mutex);
  state_->faults = faults;
  state_->random = DriveRandom(faults.seed);
  state_->num_since_faults = 0;
}

void SimulatedDrive::release_delayed() {
  const MutexLock lock(state_->mutex);
  for (State::Line* line : state_->lines) {
    for (State::Pending& pending : line->pending) pending.delayed = pending.stuck = false;
    line->changed.notify_one();
  }
}

void SimulatedDrive::power_loss() {
  const MutexLock lock(state_->mutex);
  state_->lose_power(lock);
}

void SimulatedDrive::State::lose_power(const MutexLock& lock) {
  if (dead) return;
  for (Line* line : lines) {
    for (Pending& pending : line->pending) {
      if (pending.request.op == IoOp::write) static_cast<void>(go_on(lock, pending));
    }
  }
  unacknowledged.clear();
  const std::uint64_t count = num_cached(lock);
  std::uint64_t torn = count > 0 && random.chance(0.75) ? random.below(count) : count;
  for (const auto& [id, file] : files) {
    if (file == nullptr) continue;
    const std::uint64_t here = file->num_cached();
    file->lose_power(std::min(torn, here), random);
    torn = torn >= here ? torn - here : count;
  }
  dead = true;
  for (Line* line : lines) line->changed.notify_one();
}

std::uint64_t SimulatedDrive::State::num_cached(const MutexLock&) const {
  std::uint64_t count = 0;
  for (const auto& [id, file] : files) count += file ? file->num_cached() : 0;
  return count;
}

std::uint64_t SimulatedDrive::requests() const {
  const MutexLock lock(state_->mutex);
  return state_->num_requests;
}

std::uint64_t SimulatedDrive::unsynced_writes() const {
  const MutexLock lock(state_->mutex);
  return state_->num_cached(lock);
}

std::uint64_t SimulatedDrive::faults_injected() const {
  const MutexLock lock(state_->mutex);
  return state_->injected;
}

std::vector<SpoiledRange> SimulatedDrive::spoiled() const {
  const MutexLock lock(state_->mutex);
  return state_->spoiled;
}

}  // namespace kvtier
