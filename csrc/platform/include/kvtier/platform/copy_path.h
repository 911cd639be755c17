// CopyPath: the ways in which a GPU moves a batch of runs, and the choice between them. Pure: no CUDA here.
//
//   plain     one cudaMemcpyAsync for each run
//   merged    runs that continue each other, or stand in rows at equal pitch, in one (2D) cudaMemcpyAsync
//   batched   all runs in one call of the driver's batched copy
//   kernel    a bounded number of SMs read and write the host's memory over the bus (mapped, registered)
//   staged    copy engine between the slot and a ring in HBM, kernel between the ring and the pages
//   bulk      as kernel, by the bulk copy engine of each SM (TMA); sm_90 and later
//
// Which is fastest depends on the run length, the direction, the machine and the driver. So they are measured
// once on scratch memory (a Calibration), and choose_path() picks by measurement; without one, by what is
// known of most machines. Every path stays usable as a fallback of the others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/core/types.h"

namespace kvtier {

enum class CopyPath : std::uint8_t { plain, merged, batched, kernel, staged, bulk, count_ };

std::string_view to_string(CopyPath path);
// Errors: invalid_argument with the names that are allowed.
Result<CopyPath> copy_path_named(std::string_view name);

// Which paths a machine has. `plain` is always in it: it needs nothing.
class CopyPaths {
 public:
  CopyPaths() = default;
  CopyPaths(std::initializer_list<CopyPath> paths) {
    for (const CopyPath path : paths) add(path);
  }
  void add(CopyPath path) { bits_ |= bit(path); }
  void remove(CopyPath path) { bits_ &= ~bit(path) | bit(CopyPath::plain); }
  bool has(CopyPath path) const { return (bits_ & bit(path)) != 0; }
  friend bool operator==(CopyPaths, CopyPaths) = default;

 private:
  static unsigned bit(CopyPath path) { return 1U << static_cast<unsigned>(path); }
  unsigned bits_ = 1U;
};

// What one path did with runs of one length, beside a kernel that reads HBM all the time.
struct PathScore {
  Direction direction = Direction::store;
  std::uint64_t run_bytes = 0;
  CopyPath path = CopyPath::plain;
  double bytes_per_second = 0;
  double slowdown = 0;  // of that kernel: 0.1 is ten percent longer

  friend bool operator==(const PathScore&, const PathScore&) = default;
};

// What a path is worth: its rate, less what it takes from the compute beside it.
double worth(const PathScore& score);

// How much longer a decode step may take because of the copies of one direction: 0.05 is five percent.
struct DecodeShare {
  double share = 0;  // above 0, at most 1
  friend bool operator==(DecodeShare, DecodeShare) = default;
};

// What one direction may take: bytes per second, or a share of decoding.
using CopyLimit = std::variant<std::uint64_t, DecodeShare>;

// The bytes per second at which a path keeps within `limit`, at most its own rate: whoever copies for a part
// of the time slows decoding down by that part of the measured slowdown.
double rate_within(const PathScore& score, DecodeShare limit);

// What makes a measurement comparable; every field is part of the cache's key.
struct CalibrationKey {
  std::string gpu;      // name and compute capability
  std::string link;     // PCIe generation and width
  std::string numa;     // node of the GPU
  std::string driver;   // as the driver says
  std::string pages;    // page size behind the host memory
  std::string version;  // of kvtier

  std::string text() const;
};

struct Calibration {
  std::vector<PathScore> scores;

  bool measured(Direction direction) const;

  // The file's text; parse() refuses what another key wrote, and whatever is not such a text (corruption).
  std::string format(const CalibrationKey& key) const;
  static Result<Calibration> parse(std::string_view text, const CalibrationKey& key);
};

// The path of most worth at the measured run length nearest to `run_bytes` (by ratio); under a limit, the one
// that moves most within it. Paths that are not in `available` do not count. An empty calibration means
// default_path().
CopyPath choose_path(const Calibration& calibration, CopyPaths available, Direction direction,
                     std::uint64_t run_bytes, std::optional<DecodeShare> limit = std::nullopt);

// How fast `path` may go, by its measurement at the length nearest to `run_bytes`; nullopt: as fast as it
// can. A path that was not measured is taken for the slowest of those that were. Requires a measurement of
// the direction.
std::optional<std::uint64_t> rate_within(const Calibration& calibration, CopyPath path, Direction direction,
                                         std::uint64_t run_bytes, DecodeShare limit);

// Copy engines for long runs, batches for middling ones, the staging ring for short ones.
CopyPath default_path(CopyPaths available, std::uint64_t run_bytes);

}  // namespace kvtier
