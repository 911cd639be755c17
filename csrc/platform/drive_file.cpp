#include "drive_file.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "file_calls.h"
#include "io_transfer.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kNotYet = ~std::uint64_t{0};

// Copies to `to`, which stands at `to_offset`, what `from` at `from_offset` has for it.
void overlay(std::span<std::byte> to, std::uint64_t to_offset, std::span<const std::byte> from,
             std::uint64_t from_offset) {
  const std::uint64_t begin = std::max(to_offset, from_offset);
  const std::uint64_t end = std::min(to_offset + to.size(), from_offset + from.size());
  if (begin >= end) return;
  std::memcpy(to.data() + (begin - to_offset), from.data() + (begin - from_offset), end - begin);
}

}  // namespace

Result<std::unique_ptr<DriveFile>> DriveFile::open_again(int fd) {
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  FileHandle file(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (!file.is_open() && errno != ENOENT) file = FileHandle(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.is_open()) return file_failure(errno == ENOENT ? EBADF : errno, "open again", path);
  return std::unique_ptr<DriveFile>(new DriveFile(std::move(file)));
}

std::uint64_t DriveFile::size_bytes() const {
  struct stat status{};
  std::uint64_t size = ::fstat(file_.fd(), &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : 0;
  for (const Write& write : cached_) size = std::max(size, write.offset + write.data.size());
  return size;
}

int DriveFile::read(std::uint64_t offset, std::span<std::byte> into) const {
  if (into.empty()) return 0;
  const std::uint64_t size = size_bytes();
  if (offset + into.size() > size) return ENODATA;
  std::fill(into.begin(), into.end(), std::byte{0});
  // The file itself may end before the cache does.
  const int error = perform(
      {.op = IoOp::read, .fd = file_.fd(), .offset = offset, .data = into.data(), .bytes = into.size()});
  if (error != 0 && error != ENODATA) return error;
  for (const Write& write : cached_) overlay(into, offset, write.data, write.offset);
  return 0;
}

std::uint64_t DriveFile::write(std::uint64_t offset, std::span<const std::byte> data) {
  cached_.push_back({.number = next_number_,
                     .acknowledged = kNotYet,
                     .offset = offset,
                     .data = std::vector<std::byte>(data.begin(), data.end())});
  return next_number_++;
}

void DriveFile::acknowledge(std::uint64_t number, std::uint64_t moment) {
  for (Write& write : cached_) {
    if (write.number == number) write.acknowledged = moment;
  }
}

// An older write of the same bytes must not undo it later.
int DriveFile::write_back(std::size_t index) {
  const Write write = std::move(cached_[index]);
  cached_.erase(cached_.begin() + static_cast<std::ptrdiff_t>(index));
  for (std::size_t older = 0; older < index; ++older) {
    overlay(cached_[older].data, cached_[older].offset, write.data, write.offset);
  }
  return write_at(file_.fd(), write.data, write.offset);
}

int DriveFile::sync(std::uint64_t moment) {
  int first_error = 0;
  for (std::size_t i = 0; i < cached_.size();) {
    if (cached_[i].acknowledged >= moment) {
      ++i;
    } else if (const int error = write_back(i); first_error == 0) {
      first_error = error;
    }
  }
  return first_error;
}

void DriveFile::fail_sync(DriveRandom& random) {
  for (std::size_t i = 0; i < cached_.size();) {
    const std::uint64_t fate = random.below(3);
    if (fate == 0) {
      ++i;
    } else if (fate == 1) {
      static_cast<void>(write_back(i));
    } else {
      cached_.erase(cached_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
}

void DriveFile::write_back_one(DriveRandom& random) {
  if (!cached_.empty()) static_cast<void>(write_back(random.below(cached_.size())));
}

// A random part of its sectors, but neither all nor none.
void DriveFile::tear(const Write& write, DriveRandom& random) const {
  std::uint64_t sector = random.chance(0.5) ? 512 : 4096;
  if (write.data.size() <= sector) sector = 512;
  const std::uint64_t count = (write.data.size() + sector - 1) / sector;
  if (count < 2) return;
  // Half the time in order, as a drive does that is interrupted; else any of them.
  const bool in_order = random.chance(0.5);
  const std::uint64_t cut = 1 + random.below(count - 1);
  const std::uint64_t missing = random.below(count);
  for (std::uint64_t i = 0; i < count; ++i) {
    const bool arrives =
        in_order ? i < cut : i != missing && (i == (missing + 1) % count || random.chance(0.5));
    if (!arrives) continue;
    const std::uint64_t begin = i * sector;
    const std::uint64_t bytes = std::min(sector, write.data.size() - begin);
    static_cast<void>(
        write_at(file_.fd(), std::span(write.data).subspan(begin, bytes), write.offset + begin));
  }
}

void DriveFile::lose_power(std::size_t torn, DriveRandom& random) {
  for (std::size_t i = 0; i < cached_.size(); ++i) {
    const bool arrives = random.chance(0.5);
    if (i == torn) {
      tear(cached_[i], random);
    } else if (arrives) {
      static_cast<void>(write_at(file_.fd(), cached_[i].data, cached_[i].offset));
    }
  }
  cached_.clear();
}

}  // namespace kvtier
