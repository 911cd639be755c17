#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>

#include "file_calls.h"
#include "io_transfer.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kMaxSmallFileBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kStatBlockBytes = 512;  // of st_blocks, whatever the file system's blocks are
constexpr int kOpenDirectory = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;

struct CloseDirectory {
  void operator()(DIR* stream) const { ::closedir(stream); }
};

// 0 or an errno. A new open file description each time: dup() would share its position.
int list_names(int directory_fd, std::vector<std::string>& names) {
  FileHandle handle(::openat(directory_fd, ".", kOpenDirectory));
  if (!handle.is_open()) return errno;
  const std::unique_ptr<DIR, CloseDirectory> stream(::fdopendir(handle.fd()));
  if (stream == nullptr) return errno;
  static_cast<void>(handle.release());  // now the stream's
  for (;;) {
    errno = 0;
    const dirent* entry = ::readdir(stream.get());
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  if (errno != 0) return errno;
  std::sort(names.begin(), names.end());
  return 0;
}

// 0 or an errno; what is gone already is no error. Follows no link: unlinkat() removes the link itself.
int remove_all(int parent_fd, const std::string& name) {
  if (::unlinkat(parent_fd, name.c_str(), 0) == 0 || errno == ENOENT) return 0;
  if (errno != EISDIR && errno != EPERM) return errno;
  const FileHandle directory(::openat(parent_fd, name.c_str(), kOpenDirectory));
  if (!directory.is_open()) return errno == ENOENT ? 0 : errno;
  std::vector<std::string> names;
  if (const int error = list_names(directory.fd(), names); error != 0) return error;
  for (const std::string& entry : names) {
    if (const int error = remove_all(directory.fd(), entry); error != 0) return error;
  }
  return ::unlinkat(parent_fd, name.c_str(), AT_REMOVEDIR) == 0 || errno == ENOENT ? 0 : errno;
}

// 0 or an errno. Entries may vanish meanwhile.
int add_allocated(int directory_fd, std::uint64_t& bytes) {
  std::vector<std::string> names;
  if (const int error = list_names(directory_fd, names); error != 0) return error;
  for (const std::string& name : names) {
    struct stat status{};
    if (::fstatat(directory_fd, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;
      return errno;
    }
    bytes += static_cast<std::uint64_t>(status.st_blocks) * kStatBlockBytes;
    if (!S_ISDIR(status.st_mode)) continue;
    const FileHandle below(::openat(directory_fd, name.c_str(), kOpenDirectory));
    if (!below.is_open()) {
      if (errno == ENOENT || errno == EACCES || errno == EPERM) continue;  // as lost+found, of root
      return errno;
    }
    if (const int error = add_allocated(below.fd(), bytes); error != 0) return error;
  }
  return 0;
}

// open() follows a link that a slash comes after. Empty if it is no path at all.
std::string without_slashes(std::string path) {
  if (path.find('\0') != std::string::npos) return {};
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

// Opens `path` below `parent_fd` (or AT_FDCWD) and sees to it that only this user can put something there.
Result<FileHandle> open_own(int parent_fd, const std::string& name, const std::string& path) {
  FileHandle handle(::openat(parent_fd, name.c_str(), kOpenDirectory));
  if (!handle.is_open()) return file_failure(errno, "open directory", path);
  struct stat status{};
  if (::fstat(handle.fd(), &status) != 0) return file_failure(errno, "examine directory", path);
  if (status.st_uid != ::geteuid()) return file_failure(EPERM, "use another user's directory", path);
  if ((status.st_mode & (S_IWGRP | S_IWOTH)) != 0) {
    return file_failure(EPERM, "use a directory that others may write into,", path);
  }
  return handle;
}

}  // namespace

Result<Directory> Directory::open_or_create(const std::string& path) {
  const std::string name = without_slashes(path);
  if (!name.empty() && ::mkdir(name.c_str(), 0700) != 0 && errno != EEXIST) {
    return file_failure(errno, "make directory", name);
  }
  return open_existing(name);
}

Result<Directory> Directory::open_existing(const std::string& path) {
  std::string name = without_slashes(path);
  if (name.empty()) return Status::invalid_argument("a directory needs a path");
  Result<FileHandle> handle = open_own(AT_FDCWD, name, name);
  if (!handle) return handle.status();
  return Directory(std::move(*handle), std::move(name));
}

Result<Directory> Directory::subdirectory(const std::string& name) const {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  if (::mkdirat(fd(), name.c_str(), 0700) == 0) {
    KVTIER_RETURN_IF_ERROR(sync());
  } else if (errno != EEXIST) {
    return file_failure(errno, "make directory", path_of(*this, name));
  }
  return existing_subdirectory(name);
}

Result<Directory> Directory::existing_subdirectory(const std::string& name) const {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  std::string path = path_of(*this, name);
  Result<FileHandle> handle = open_own(fd(), name, path);
  if (!handle) return handle.status();
  return Directory(std::move(*handle), std::move(path));
}

Result<std::vector<std::string>> Directory::list() const {
  std::vector<std::string> names;
  if (const int error = list_names(fd(), names); error != 0) return file_failure(error, "list", path_);
  return names;
}

Status Directory::remove_file(const std::string& name) const {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  if (::unlinkat(fd(), name.c_str(), 0) == 0 || errno == ENOENT) return Status::ok();
  return file_failure(errno, "remove", path_of(*this, name));
}

Status Directory::remove_tree(const std::string& name) const {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  const int error = remove_all(fd(), name);
  return error == 0 ? Status::ok() : file_failure(error, "remove all of", path_of(*this, name));
}

Status Directory::rename(const std::string& from, const std::string& to) const {
  KVTIER_RETURN_IF_ERROR(check_name(from));
  KVTIER_RETURN_IF_ERROR(check_name(to));
  if (::renameat(fd(), from.c_str(), fd(), to.c_str()) == 0) return Status::ok();
  return file_failure(errno, "rename to " + to, path_of(*this, from));
}

Status Directory::sync() const {
  return ::fsync(fd()) == 0 ? Status::ok() : file_failure(errno, "sync directory", path_);
}

Result<std::uint64_t> Directory::allocated_bytes() const {
  std::uint64_t bytes = 0;
  if (const int error = add_allocated(fd(), bytes); error != 0) return file_failure(error, "measure", path_);
  return bytes;
}

Result<std::uint64_t> Directory::free_bytes() const {
  struct statvfs filesystem{};
  if (::fstatvfs(fd(), &filesystem) != 0) return file_failure(errno, "ask for free space of", path_);
  return std::uint64_t{filesystem.f_bavail} * filesystem.f_frsize;
}

Result<std::vector<std::byte>> Directory::read_file(const std::string& name) const {
  Result<FileHandle> file = open_regular(*this, name, O_RDONLY);
  if (!file) return file.status();
  struct stat status{};
  if (::fstat(file->fd(), &status) != 0) return file_failure(errno, "examine", path_of(*this, name));
  const auto size = static_cast<std::uint64_t>(status.st_size);
  if (size > kMaxSmallFileBytes) return file_failure(EFBIG, "read", path_of(*this, name));
  std::vector<std::byte> content(size);
  const int error = perform({.op = IoOp::read, .fd = file->fd(), .data = content.data(), .bytes = size});
  if (error != 0) return file_failure(error, "read", path_of(*this, name));
  return content;
}

void Directory::read_ahead(const std::string& name, std::uint64_t max_bytes) const {
  Result<FileHandle> file = open_regular(*this, name, O_RDONLY);
  struct stat status{};
  if (!file || ::fstat(file->fd(), &status) != 0) return;
  if (static_cast<std::uint64_t>(status.st_size) > max_bytes) return;
  constexpr off_t kPiece = off_t{128} << 10;  // of more the kernel may read the beginning only
  constexpr off_t kAhead = 32 * kPiece;
  for (off_t at = 0; at < status.st_size; at += kPiece) {
    if (::posix_fadvise(file->fd(), at, kPiece, POSIX_FADV_WILLNEED) != 0) return;
    char last = 0;
    if (at >= kAhead && ::pread(file->fd(), &last, 1, at - kAhead + kPiece - 1) != 1) return;
  }
}

Status Directory::replace_file(const std::string& name, std::span<const std::byte> content) const {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  if (content.size() > kMaxSmallFileBytes) return file_failure(EFBIG, "write", path_of(*this, name));
  // The new file has one name, so that a crash leaves at most one behind, which the next call removes. Hence
  // one call at a time in a directory; there are few. (One drive that hangs must not stop another's.)
  auto& mutexes = of_this_process<std::array<Mutex, 61>>();
  struct stat here{};
  static_cast<void>(::fstat(fd(), &here));
  const MutexLock lock(mutexes[(here.st_dev * 31 + here.st_ino) % mutexes.size()]);
  const std::string fresh = name + ".new";
  KVTIER_RETURN_IF_ERROR(remove_file(fresh));
  Result<FileHandle> file = open_regular(*this, fresh, O_WRONLY | O_CREAT | O_EXCL);
  if (!file) return file.status();
  int error = write_at(file->fd(), content, 0);
  if (error == 0 && ::fsync(file->fd()) != 0) error = errno;
  if (error != 0) {
    static_cast<void>(remove_file(fresh));
    return file_failure(error, "write", path_of(*this, fresh));
  }
  KVTIER_RETURN_IF_ERROR(rename(fresh, name));
  return sync();
}

}  // namespace kvtier
