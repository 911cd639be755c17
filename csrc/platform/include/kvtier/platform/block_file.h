// BlockFile and the few file system calls that a store needs. Linux only; every call is relative to an open
// directory, follows no symbolic link, and makes files 0600 and directories 0700.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvtier/core/status.h"

namespace kvtier {

// Owns a descriptor. Movable.
class FileHandle {
 public:
  FileHandle() = default;
  explicit FileHandle(int fd) : fd_(fd) {}
  FileHandle(FileHandle&& other) noexcept : fd_(other.release()) {}
  FileHandle& operator=(FileHandle&& other) noexcept;
  ~FileHandle();

  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  int release();

 private:
  int fd_ = -1;
};

// A directory that was opened once; what is done in it is done in that very directory, whatever is renamed.
// Threads: any. Errors: io with the errno and the path in the message.
class Directory {
 public:
  // Makes the directory (0700) if it is not there; its parent must be. Refuses a symbolic link as the last
  // component, and a directory that another user owns or may write into.
  static Result<Directory> open_or_create(const std::string& path);
  static Result<Directory> open_existing(const std::string& path);
  Result<Directory> subdirectory(const std::string& name) const;  // made if it is not there
  Result<Directory> existing_subdirectory(const std::string& name) const;

  // Names of entries, sorted, without . and ..
  Result<std::vector<std::string>> list() const;
  Status remove_file(const std::string& name) const;  // a missing file is ok
  // Removes a subdirectory and all below it; follows no link.
  Status remove_tree(const std::string& name) const;
  Status rename(const std::string& from, const std::string& to) const;
  Status sync() const;
  // Bytes on the drive (st_blocks) of everything below.
  Result<std::uint64_t> allocated_bytes() const;
  // Free bytes of the file system for this user.
  Result<std::uint64_t> free_bytes() const;

  // Small files, at most 1 MiB. replace_file() is atomic and durable: a crash leaves the old or the new one.
  Result<std::vector<std::byte>> read_file(const std::string& name) const;  // io/ENOENT when missing
  Status replace_file(const std::string& name, std::span<const std::byte> content) const;
  // Has a file of at most `max_bytes` read into the page cache, in order, and waits for all but the last few
  // MiB. Others who read from the drive meanwhile wait for a few MiB, not for all. What cannot be read is
  // left.
  void read_ahead(const std::string& name, std::uint64_t max_bytes) const;

  const std::string& path() const { return path_; }  // as opened, for messages
  int fd() const { return handle_.fd(); }

 private:
  Directory(FileHandle handle, std::string path) : handle_(std::move(handle)), path_(std::move(path)) {}
  FileHandle handle_;
  std::string path_;
};

// A lock on a file of `directory`, held by this process until destroyed. POSIX record locks (fcntl F_SETLK):
// they die with the process and are not inherited by its forked children, as flock's and OFD locks are. Since
// such locks do not see each other within one process, and die with any descriptor of the file, a table in
// the process keeps what it holds.
class FileLock {
 public:
  virtual ~FileLock() = default;
  // nullptr when another process (or this one) holds it. Never waits. Errors: io.
  static Result<std::unique_ptr<FileLock>> try_lock(const Directory& directory, const std::string& name);
  // Waits until it is free, at most until the deadline. Errors: timeout, io.
  static Result<std::unique_ptr<FileLock>> lock(const Directory& directory, const std::string& name,
                                                std::chrono::steady_clock::time_point deadline);
  // Whether somebody holds it, without taking it.
  static Result<bool> is_locked(const Directory& directory, const std::string& name);
};

// A preallocated file of slots. Owns its descriptor. Threads: any, but grow() from one at a time.
class BlockFile {
 public:
  // Opens or makes it. Direct I/O (O_DIRECT) where the file system takes it, else buffered: is_direct() says.
  static Result<std::unique_ptr<BlockFile>> open(const Directory& directory, const std::string& name);
  ~BlockFile();

  int fd() const { return handle_.fd(); }
  bool is_direct() const { return alignment_ > 1; }
  // What offsets, addresses and lengths of direct I/O must be multiples of, as the file system says (statx
  // STATX_DIOALIGN, the logical block size where it does not); 1 for a buffered file.
  std::uint32_t alignment() const { return alignment_; }
  Result<std::uint64_t> size_bytes() const;  // asked anew: somebody may have truncated it
  // Reserves blocks for [size, new_size) (fallocate), so that later writes cannot meet a full disk. The new
  // part reads as zeros, and is "unwritten" until it was written once: prewrite() it. Errors: io (ENOSPC).
  Status grow(std::uint64_t new_size_bytes);
  // Writes zeros over [begin, end), so that later writes are plain overwrites (measured: writes to unwritten
  // extents reach 0.65 to 0.87 of them). Blocks; calls `go_on` between pieces and stops when it says false.
  Status prewrite(std::uint64_t begin, std::uint64_t end, const std::function<bool()>& go_on);

 private:
  BlockFile(FileHandle handle, std::uint32_t alignment, std::string name);
  FileHandle handle_;
  std::uint32_t alignment_;
  std::string name_;
};

}  // namespace kvtier
