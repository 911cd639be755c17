#include "kvtier/platform/block_file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>

#include "file_calls.h"

namespace kvtier {
namespace {

// The part of the kernel's struct statx (Linux 6.1) that C libraries do not know yet.
struct KernelStatx {
  std::uint32_t mask;
  std::byte unused[148];
  std::uint32_t dio_mem_align;
  std::uint32_t dio_offset_align;
  std::byte spare[96];
};
static_assert(sizeof(KernelStatx) == 256 && offsetof(KernelStatx, dio_mem_align) == 0x98);
constexpr unsigned kStatxDioAlign = 0x2000;

constexpr std::uint32_t kUsualAlignment = 4096;  // no drive wants more
constexpr std::uint64_t kZeroPieceBytes = std::uint64_t{1} << 20;

bool is_sound(std::uint64_t alignment) {
  return alignment >= 2 && alignment <= (std::uint64_t{1} << 20) && std::has_single_bit(alignment);
}

// What the drive below says, else what suits all drives.
std::uint32_t logical_block_bytes(dev_t device) {
  const std::string base =
      "/sys/dev/block/" + std::to_string(major(device)) + ":" + std::to_string(minor(device));
  for (const char* queue : {"/queue/", "/../queue/"}) {  // a partition has its disk's
    std::ifstream file(base + queue + "logical_block_size");
    std::uint32_t bytes = 0;
    if (file >> bytes && is_sound(bytes)) return bytes;
  }
  return kUsualAlignment;
}

// 1: the file system takes no direct I/O.
std::uint32_t direct_alignment(int fd) {
  struct statfs filesystem{};
  // tmpfs takes the flag (since 6.6) and ignores it.
  if (::fstatfs(fd, &filesystem) == 0 && filesystem.f_type == TMPFS_MAGIC) return 1;
  KernelStatx extended{};
  if (::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, kStatxDioAlign, &extended) == 0 &&
      (extended.mask & kStatxDioAlign) != 0) {
    const std::uint32_t alignment = std::max(extended.dio_mem_align, extended.dio_offset_align);
    return is_sound(alignment) ? alignment : 1;
  }
  struct stat status{};
  return ::fstat(fd, &status) == 0 ? logical_block_bytes(status.st_dev) : kUsualAlignment;
}

struct Free {
  void operator()(std::byte* begin) const { std::free(begin); }
};

}  // namespace

BlockFile::BlockFile(FileHandle handle, std::uint32_t alignment, std::string name)
    : handle_(std::move(handle)), alignment_(alignment), name_(std::move(name)) {}

BlockFile::~BlockFile() = default;

Result<std::unique_ptr<BlockFile>> BlockFile::open(const Directory& directory, const std::string& name) {
  Result<FileHandle> file = open_regular(directory, name, O_RDWR | O_CREAT);
  if (!file) return file.status();
  std::uint32_t alignment = direct_alignment(file->fd());
  // Asked for afterwards: some file systems would make the file, and then refuse to open it.
  const int flags = ::fcntl(file->fd(), F_GETFL);
  if (flags < 0) return file_failure(errno, "examine", path_of(directory, name));
  if (alignment > 1 && ::fcntl(file->fd(), F_SETFL, flags | O_DIRECT) != 0) alignment = 1;
  return std::unique_ptr<BlockFile>(new BlockFile(std::move(*file), alignment, path_of(directory, name)));
}

Result<std::uint64_t> BlockFile::size_bytes() const {
  struct stat status{};
  if (::fstat(fd(), &status) != 0) return file_failure(errno, "examine", name_);
  return static_cast<std::uint64_t>(status.st_size);
}

Status BlockFile::grow(std::uint64_t new_size_bytes) {
  const Result<std::uint64_t> size = size_bytes();
  if (!size) return size.status();
  const std::uint64_t old = size.value();
  if (new_size_bytes <= old) return Status::ok();
  int error = 0;
  do {
    error = ::fallocate(fd(), 0, static_cast<off_t>(old), static_cast<off_t>(new_size_bytes - old)) == 0
                ? 0
                : errno;
  } while (error == EINTR);
  if (error == 0) return Status::ok();
  Status failure =
      file_failure(error, "reserve " + std::to_string(new_size_bytes - old) + " bytes for", name_);
  if (error == EOPNOTSUPP) {
    // Zeros reserve as well.
    failure = prewrite(old, new_size_bytes, [] { return true; });
    if (failure) return failure;
  }
  // Part of it may have been reserved.
  static_cast<void>(::ftruncate(fd(), static_cast<off_t>(old)));
  return failure;
}

Status BlockFile::prewrite(std::uint64_t begin, std::uint64_t end, const std::function<bool()>& go_on) {
  const std::size_t address_alignment = std::max(alignment_, kUsualAlignment);
  const std::unique_ptr<std::byte, Free> zeros(
      static_cast<std::byte*>(std::aligned_alloc(address_alignment, kZeroPieceBytes)));
  if (zeros == nullptr) return Status::resource("no memory to write zeros from", ENOMEM);
  std::memset(zeros.get(), 0, kZeroPieceBytes);
  for (std::uint64_t at = begin; at < end && go_on();) {
    const std::uint64_t bytes = std::min(end - at, kZeroPieceBytes);
    if (const int error = write_at(fd(), {zeros.get(), bytes}, at); error != 0) {
      return file_failure(error, "write zeros into", name_);
    }
    at += bytes;
  }
  return Status::ok();
}

}  // namespace kvtier
