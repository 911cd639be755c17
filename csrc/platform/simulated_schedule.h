// Schedule: the streams of a SimulatedDevice and the adversary that picks what runs next.
//
// A pure machine: no lock, no thread, no clock. All it does follows from the seed and the calls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/device.h"

namespace kvtier::simulated {

// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): the standard distributions differ between libraries.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31);
  }
  std::uint64_t below(std::uint64_t bound) { return next() % bound; }
  bool percent(unsigned chance) { return below(100) < chance; }

 private:
  std::uint64_t state_;
};

// Memory that copies touch: an allocation or a registration. Shared by the copies that will touch it.
struct Region {
  std::byte* begin;
  std::size_t bytes;
  bool alive = true;
  std::size_t pending = 0;  // pieces submitted and not yet run
};

// One record of an event. Waits hold on to it, so that a later record does not move them.
struct Mark {
  StreamHandle stream;
  std::uint64_t position;  // of the record among the stream's operations
  bool done = false;
};

struct Kernel {
  std::function<void()> run;
};
struct Record {
  std::shared_ptr<Mark> mark;
};
struct Wait {
  std::shared_ptr<const Mark> mark;
};
struct Piece {
  std::byte* destination;
  const std::byte* source;
  std::size_t bytes;
  std::shared_ptr<Region> device;
  std::shared_ptr<Region> host;  // null: pageable, so outside our sight
};
struct Copy {
  std::vector<Piece> pieces;  // whole runs when submitted; then shuffled, split and taken from the back
  std::vector<std::unique_ptr<std::byte[]>> staged;  // of pageable sources
  Direction direction = Direction::store;
  bool begun = false;
};
using Work = std::variant<Kernel, Record, Wait, Copy>;

class Schedule {
 public:
  explicit Schedule(std::uint64_t seed);

  StreamHandle add_stream();
  bool has_stream(StreamHandle stream) const;
  void retire_stream(StreamHandle stream);  // its pending work still runs
  std::size_t pending(StreamHandle stream) const;
  std::size_t pending() const;

  // Requires: has_stream(stream).
  void submit(StreamHandle stream, Work work);
  std::shared_ptr<const Mark> submit_record(StreamHandle stream);

  void hold(StreamHandle stream) { stream_of(stream).held = true; }
  void release(StreamHandle stream) { stream_of(stream).held = false; }

  // For each stream that `mark` depends on, the end of the operations that have to run for it. Streams
  // being queues, it never grows: a waiter asks once.
  using Needs = std::map<StreamHandle, std::uint64_t>;
  Needs needs_of(const Mark& mark) const;

  // Each runs at most one step and says whether it did.
  bool step();                            // any
  bool step(StreamHandle stream);         // of this stream, though it be held
  bool step_towards(const Needs& needs);  // usually one of the needed
  bool step_overdue();                    // any, if something has waited from one tick to the next

  void tick() { ++tick_; }
  // Right after a submission or in a query: some seeds cannot wait.
  bool is_eager() { return random_.percent(eagerness_); }
  Random& random() { return random_; }

  // Drops all pending work; health() is the error from now on.
  void fail(Status status);
  void fail_at_copy(std::uint64_t n, Status status);
  const Status& health() const { return health_; }

  void report(std::string violation) { violations_.push_back(std::move(violation)); }
  const std::vector<std::string>& violations() const { return violations_; }

 private:
  struct Operation {
    Work work;
    std::uint64_t tick;
  };
  struct Stream {
    std::deque<Operation> operations;
    std::uint64_t first = 0;  // position of operations.front()
    bool held = false;
    bool retired = false;
  };
  using Streams = std::map<StreamHandle, Stream>;  // ordered: iteration must not depend on addresses

  Stream& stream_of(StreamHandle handle) { return streams_.at(handle); }
  static bool is_ready(const Stream& stream);
  static bool is_runnable(const Stream& stream) { return !stream.held && is_ready(stream); }
  bool fails_now();  // counts a copy that begins
  void run_front(Streams::iterator it);
  static Copy* following_copy(Stream& stream);
  void run_piece(Copy& copy);
  void shuffle_and_split(Copy& copy);

  Random random_;
  unsigned eagerness_;    // chance in percent that work runs as soon as it is submitted
  unsigned distraction_;  // chance in percent that a waiter is made to wait for something it does not need
  Streams streams_;
  std::uintptr_t next_handle_ = 0;
  std::uint64_t tick_ = 0;
  std::uint64_t copies_until_failure_ = 0;  // 0: none planned
  Status planned_failure_;
  Status health_;
  std::vector<std::string> violations_;
};

}  // namespace kvtier::simulated
