// FileLock: fcntl(F_SETLK) on a whole file, and the table of those that this process holds.
//
// A lock dies with *any* descriptor of its file that the process closes. So the file is opened and closed
// only under the table's mutex, never while the table has it, and a descriptor that was opened before
// somebody else here took the lock is kept until that lock ends.
//
// Waiting for another process without a polling tick: its lock ends when it dies (a pidfd says so) or when it
// gives the lock up (then it touches the file, and inotify says so).
#include <fcntl.h>
#include <poll.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "file_calls.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace kvtier {
namespace {

using TimePoint = std::chrono::steady_clock::time_point;
using FileId = std::pair<dev_t, ino_t>;

constexpr std::chrono::milliseconds kBlindPause{10};

struct flock whole_file(int type) {
  struct flock range{};
  range.l_type = static_cast<short>(type);
  range.l_whence = SEEK_SET;
  return range;
}

struct Held {
  FileHandle file;
  std::vector<FileHandle> others;
};

class LockTable {
 public:
  Mutex mutex;
  CondVar freed;

  Held* find(const MutexLock&, FileId id) KVTIER_REQUIRES(mutex) {
    const auto entry = held_.find(id);
    return entry != held_.end() ? &entry->second : nullptr;
  }
  void add(const MutexLock&, FileId id, FileHandle file) KVTIER_REQUIRES(mutex) {
    held_.insert_or_assign(id, Held{std::move(file), {}});
  }
  void remove(const MutexLock&, FileId id) KVTIER_REQUIRES(mutex) { held_.erase(id); }
  // Closes a descriptor of the file, when that does no harm.
  void retire(const MutexLock& lock, FileId id, FileHandle file) KVTIER_REQUIRES(mutex) {
    if (Held* held = find(lock, id)) held->others.push_back(std::move(file));
  }

 private:
  std::map<FileId, Held> held_ KVTIER_GUARDED_BY(mutex);
};

// A forked child inherits descriptors, not locks. It leaves its parent's alone: to close one would drop a
// lock that it has taken itself meanwhile.
LockTable& table() { return of_this_process<LockTable>(); }

class HeldLock final : public FileLock {
 public:
  explicit HeldLock(FileId id) : id_(id) {}
  ~HeldLock() override {
    {
      const MutexLock lock(table().mutex);
      const Held* held = table().find(lock, id_);
      if (held == nullptr || generation_ != process_generation()) return;
      struct flock range = whole_file(F_UNLCK);
      static_cast<void>(::fcntl(held->file.fd(), F_SETLK, &range));
      static_cast<void>(::futimens(held->file.fd(), nullptr));  // tells who waits in another process
      table().remove(lock, id_);
    }
    table().freed.notify_all();
  }

 private:
  const FileId id_;
  const std::uint64_t generation_ = process_generation();
};

// One attempt to lock, which may be repeated: the file stays open in between.
class Attempt {
 public:
  enum class Outcome : std::uint8_t { taken, held_here, held_elsewhere };

  Attempt(const Directory& directory, const std::string& name) : directory_(directory), name_(name) {}
  ~Attempt() {
    const MutexLock lock(table().mutex);
    close(lock);
  }
  Attempt(const Attempt&) = delete;
  Attempt& operator=(const Attempt&) = delete;

  Result<Outcome> run(const MutexLock& lock) KVTIER_REQUIRES(table().mutex) {
    for (;;) {
      struct stat named{};
      if (::fstatat(directory_.fd(), name_.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0) {
        const FileId there(named.st_dev, named.st_ino);
        if (table().find(lock, there) != nullptr) return Outcome::held_here;
        // Somebody may have put another file in its place: that is the one to lock.
        if (file_.is_open() && there != id_) close(lock);
      } else if (errno == ENOENT) {
        close(lock);
      } else {
        return file_failure(errno, "examine", path_of(directory_, name_));
      }
      if (!file_.is_open()) {
        KVTIER_RETURN_IF_ERROR(open());
        if (table().find(lock, id_) != nullptr) {
          close(lock);
          return Outcome::held_here;
        }
      }
      struct flock range = whole_file(F_WRLCK);
      if (::fcntl(file_.fd(), F_SETLK, &range) != 0) {
        if (errno == EACCES || errno == EAGAIN) return Outcome::held_elsewhere;
        if (errno == EINTR) continue;
        return file_failure(errno, "lock", path_of(directory_, name_));
      }
      if (::fstatat(directory_.fd(), name_.c_str(), &named, AT_SYMLINK_NOFOLLOW) == 0 &&
          FileId(named.st_dev, named.st_ino) == id_) {
        table().add(lock, id_, std::move(file_));
        return Outcome::taken;
      }
      close(lock);  // locked a file that has lost its name
    }
  }

  std::unique_ptr<FileLock> result() const { return std::make_unique<HeldLock>(id_); }
  int fd() const { return file_.fd(); }
  FileId id() const { return id_; }

 private:
  Status open() {
    Result<FileHandle> file = open_regular(directory_, name_, O_RDWR | O_CREAT);
    if (!file) return file.status();
    struct stat status{};
    if (::fstat(file->fd(), &status) != 0) return file_failure(errno, "examine", path_of(directory_, name_));
    file_ = std::move(*file);
    id_ = FileId(status.st_dev, status.st_ino);
    return Status::ok();
  }
  void close(const MutexLock& lock) KVTIER_REQUIRES(table().mutex) {
    if (file_.is_open()) table().retire(lock, id_, std::move(file_));
    file_ = FileHandle();
  }

  const Directory& directory_;
  const std::string& name_;
  FileHandle file_;
  FileId id_;
};

// Says when a lock that another process holds may have ended.
class ReleaseWatch {
 public:
  // Made before the attempt that fails, so that nothing is missed. Where the user has no watches left, wait()
  // looks again and again.
  void watch(int fd, FileId id) {
    if (inotify_.is_open() && watched_ == id) return;
    inotify_ = FileHandle(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
    watched_ = id;
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    if (inotify_.is_open() &&
        ::inotify_add_watch(inotify_.fd(), path.c_str(), IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVE_SELF) < 0) {
      inotify_ = FileHandle();
    }
  }

  // False when the deadline has passed.
  Result<bool> wait(int fd, TimePoint deadline) {
    struct flock range = whole_file(F_WRLCK);
    if (::fcntl(fd, F_GETLK, &range) != 0) return file_failure(errno, "examine the lock", "of a file");
    if (range.l_type == F_UNLCK) return true;
    // A holder in another container has no number here (0); then closing the file is what tells.
    FileHandle holder;
    if (range.l_pid > 0) {
      holder = FileHandle(static_cast<int>(::syscall(SYS_pidfd_open, range.l_pid, 0)));
      if (!holder.is_open() && errno == ESRCH) return true;
    }
    std::chrono::nanoseconds left = deadline - std::chrono::steady_clock::now();
    if (left <= std::chrono::nanoseconds::zero()) return false;
    if (!inotify_.is_open()) left = std::min<std::chrono::nanoseconds>(left, kBlindPause);
    const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
    timespec time{};
    time.tv_sec = ns / 1'000'000'000;
    time.tv_nsec = ns % 1'000'000'000;
    std::array<pollfd, 2> polled{{{.fd = inotify_.fd(), .events = POLLIN, .revents = 0},
                                  {.fd = holder.fd(), .events = POLLIN, .revents = 0}}};
    const int ready = ::ppoll(polled.data(), polled.size(), &time, nullptr);
    if (ready < 0 && errno != EINTR) return file_failure(errno, "wait for the lock", "of a file");
    std::array<char, 4096> events{};
    while (inotify_.is_open() && ::read(inotify_.fd(), events.data(), events.size()) > 0) {
    }
    return true;
  }

 private:
  FileHandle inotify_;
  FileId watched_;
};

}  // namespace

Result<std::unique_ptr<FileLock>> FileLock::try_lock(const Directory& directory, const std::string& name) {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  Attempt attempt(directory, name);
  const MutexLock lock(table().mutex);
  const Result<Attempt::Outcome> outcome = attempt.run(lock);
  if (!outcome) return outcome.status();
  return outcome.value() == Attempt::Outcome::taken ? attempt.result() : nullptr;
}

Result<std::unique_ptr<FileLock>> FileLock::lock(const Directory& directory, const std::string& name,
                                                 TimePoint deadline) {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  Attempt attempt(directory, name);
  ReleaseWatch watch;
  bool in_time = true;
  for (;;) {
    {
      MutexLock lock(table().mutex);
      const Result<Attempt::Outcome> outcome = attempt.run(lock);
      if (!outcome) return outcome.status();
      if (outcome.value() == Attempt::Outcome::taken) return attempt.result();
      if (!in_time) break;
      if (outcome.value() == Attempt::Outcome::held_here) {
        in_time = table().freed.wait_until(lock, deadline);
        continue;
      }
    }
    // From here on a release is noticed; one before is seen by wait(), which asks again.
    watch.watch(attempt.fd(), attempt.id());
    const Result<bool> waited = watch.wait(attempt.fd(), deadline);
    if (!waited) return waited.status();
    in_time = waited.value();
  }
  return Status::timeout(path_of(directory, name) + " is locked, and was until the deadline");
}

Result<bool> FileLock::is_locked(const Directory& directory, const std::string& name) {
  KVTIER_RETURN_IF_ERROR(check_name(name));
  const MutexLock lock(table().mutex);
  struct stat status{};
  if (::fstatat(directory.fd(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
    if (errno == ENOENT) return false;
    return file_failure(errno, "examine", path_of(directory, name));
  }
  if (table().find(lock, {status.st_dev, status.st_ino}) != nullptr) return true;
  Result<FileHandle> file = open_regular(directory, name, O_RDONLY);
  if (!file) {
    if (file.status().native_code() == ENOENT) return false;
    return file.status();
  }
  struct flock range = whole_file(F_WRLCK);
  const int error = ::fcntl(file->fd(), F_GETLK, &range) == 0 ? 0 : errno;
  if (::fstat(file->fd(), &status) == 0) {
    table().retire(lock, {status.st_dev, status.st_ino}, std::move(*file));
    *file = FileHandle();
  }
  if (error != 0) return file_failure(error, "examine the lock of", path_of(directory, name));
  return range.l_type != F_UNLCK;
}

}  // namespace kvtier
