// DriveFile: a file as a drive with a cache has it (simulated_drive.h). Threads: one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/block_file.h"

namespace kvtier {

// The same numbers on every machine, which std's distributions do not promise.
class DriveRandom {
 public:
  explicit DriveRandom(std::uint64_t seed) : engine_(seed) {}
  std::uint64_t below(std::uint64_t bound) { return engine_() % bound; }
  bool chance(double probability) { return static_cast<double>(engine_() >> 11) * 0x1.0p-53 < probability; }

 private:
  std::mt19937_64 engine_;
};

class DriveFile {
 public:
  // Opens the file of `fd` once more, without O_DIRECT: half sectors can be written, and any open of the file
  // sees them.
  static Result<std::unique_ptr<DriveFile>> open_again(int fd);

  std::uint64_t size_bytes() const;
  // Each returns 0 or an errno.
  int read(std::uint64_t offset, std::span<std::byte> into) const;
  // Into the cache; returns the write's number.
  std::uint64_t write(std::uint64_t offset, std::span<const std::byte> data);
  // The owner has been told, at `moment`, that the write is done.
  void acknowledge(std::uint64_t number, std::uint64_t moment);

  // Writes acknowledged before `moment` reach the file.
  int sync(std::uint64_t moment);
  // A flush of the drive has failed: each write of the cache reaches the file, stays there or is lost.
  void fail_sync(DriveRandom& random);
  // Some write of the cache reaches the file.
  void write_back_one(DriveRandom& random);

  std::size_t num_cached() const { return cached_.size(); }
  // Power is lost: about half of the cache reaches the file, and of its write `torn` (num_cached(): of none)
  // only a part.
  void lose_power(std::size_t torn, DriveRandom& random);

 private:
  struct Write {
    std::uint64_t number = 0;
    std::uint64_t acknowledged = 0;
    std::uint64_t offset = 0;
    std::vector<std::byte> data;
  };

  explicit DriveFile(FileHandle file) : file_(std::move(file)) {}
  int write_back(std::size_t index);
  void tear(const Write& write, DriveRandom& random) const;

  FileHandle file_;
  std::uint64_t next_number_ = 0;
  std::vector<Write> cached_;  // oldest first
};

}  // namespace kvtier
