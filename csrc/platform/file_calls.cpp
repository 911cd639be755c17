#include "file_calls.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "io_transfer.h"

namespace kvtier {

FileHandle& FileHandle::operator=(FileHandle&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = other.release();
  }
  return *this;
}

FileHandle::~FileHandle() {
  if (fd_ >= 0) ::close(fd_);
}

int FileHandle::release() {
  const int fd = fd_;
  fd_ = -1;
  return fd;
}

Status file_failure(int error, const std::string& what, const std::string& path) {
  return Status::io("cannot " + what + " " + path + ": " + std::generic_category().message(error) +
                        " (errno " + std::to_string(error) + ")",
                    error);
}

Status check_name(const std::string& name) {
  const bool plain = !name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos &&
                     name.find('\0') == std::string::npos;
  return plain ? Status::ok()
               : Status::invalid_argument("'" + name + "' is not the name of an entry of a directory");
}

std::string path_of(const Directory& directory, const std::string& name) {
  return directory.path() + "/" + name;
}

Result<FileHandle> open_regular(const Directory& directory, const std::string& name, int flags) {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  // O_NONBLOCK: whoever put a FIFO there does not stop us. Regular files do not care.
  FileHandle file(::openat(directory.fd(), name.c_str(), flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600));
  if (!file.is_open()) return file_failure(errno, "open", path_of(directory, name));
  struct stat status{};
  if (::fstat(file.fd(), &status) != 0) return file_failure(errno, "examine", path_of(directory, name));
  if (!S_ISREG(status.st_mode))
    return file_failure(EINVAL, "use what is no regular file:", path_of(directory, name));
  if (status.st_uid != ::geteuid()) {
    return file_failure(EPERM, "use another user's file", path_of(directory, name));
  }
  // io_uring would fail requests of such a file with EAGAIN where a file system cannot do without waiting.
  const int status_flags = ::fcntl(file.fd(), F_GETFL);
  if (status_flags < 0 || ::fcntl(file.fd(), F_SETFL, status_flags & ~O_NONBLOCK) != 0) {
    return file_failure(errno, "open", path_of(directory, name));
  }
  return file;
}

int write_at(int fd, std::span<const std::byte> bytes, std::uint64_t offset) {
  // A write only reads its buffer.
  return perform({.op = IoOp::write,
                  .fd = fd,
                  .offset = offset,
                  .data = const_cast<std::byte*>(bytes.data()),
                  .bytes = bytes.size()});
}

}  // namespace kvtier
