// kvtier-catalog: keeps one store's catalog for a server that must not map a file (kvtier/storage/catalog.h).
//
//   kvtier-catalog DIRECTORY MAX_BYTES PARENT_PID      descriptor 3: the client's socket; 4: the memfd
//
// Started by the client, with no other descriptors and in a session of its own, so that a terminal's Ctrl-C
// does not reach it. It ends at the end of file on the socket or when the parent's process has ended,
// whichever is first: a forked child of the server may keep the socket's other end open for hours.
// (PR_SET_PDEATHSIG would end it with the *thread* that started it.)
#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "../catalog_protocol.h"
#include "database.h"

namespace kvtier::catalog_helper {
namespace {

using protocol::Item;
using protocol::kMemoryFd;
using protocol::kSocketFd;
using protocol::Op;
using protocol::Outcome;
using protocol::Reply;
using protocol::Request;

enum ExitCode : int { kDone = 0, kUsage = 2, kSetup = 3, kLostClient = 4 };

template <typename T>
bool parse(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

// What other libraries of the server left without close-on-exec.
void close_other_descriptors() {
#ifdef SYS_close_range
  if (::syscall(SYS_close_range, static_cast<unsigned>(kMemoryFd + 1), ~0U, 0U) == 0) return;
#endif
  std::vector<int> others;
  if (DIR* list = ::opendir("/proc/self/fd"); list != nullptr) {
    while (const dirent* entry = ::readdir(list)) {
      int fd = 0;
      if (parse(entry->d_name, fd) && fd > kMemoryFd && fd != ::dirfd(list)) others.push_back(fd);
    }
    ::closedir(list);
  }
  for (const int fd : others) ::close(fd);
}

// The process whose end is ours, as a descriptor; -1 where the kernel has none (before 5.3): then the socket
// alone says it. Exits if the parent has ended already.
int watch_parent(pid_t parent) {
  int fd = -1;
#ifdef SYS_pidfd_open
  fd = static_cast<int>(::syscall(SYS_pidfd_open, parent, 0U));
#endif
  if (::getppid() != parent) std::_Exit(kLostClient);
  return fd;
}

void send_reply(const Reply& reply) {
  for (;;) {
    if (::send(kSocketFd, &reply, sizeof reply, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof reply)) return;
    if (errno != EINTR) std::_Exit(kLostClient);
  }
}

bool receive(int parent_fd, Request& request) {
  for (;;) {
    std::array<pollfd, 2> waits = {pollfd{kSocketFd, POLLIN, 0}, pollfd{parent_fd, POLLIN, 0}};
    if (::poll(waits.data(), waits.size(), -1) < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    if (waits[1].revents != 0) return false;
    const ssize_t got = ::recv(kSocketFd, &request, sizeof request, 0);
    if (got < 0 && errno == EINTR) continue;
    return got == static_cast<ssize_t>(sizeof request);
  }
}

Failure memory_failure(const char* what) {
  const int error = errno;
  return {Outcome::io, error, std::string(what) + " the memfd: " + std::generic_category().message(error)};
}

Failure write_items(std::span<const Item> items) {
  std::span<const std::byte> bytes = std::as_bytes(items);
  for (off_t at = 0; !bytes.empty();) {
    const ssize_t done = ::pwrite(kMemoryFd, bytes.data(), bytes.size(), at);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return memory_failure("writing to");
    at += done;
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
  return {};
}

Failure read_items(std::span<Item> items) {
  std::span<std::byte> bytes = std::as_writable_bytes(items);
  for (off_t at = 0; !bytes.empty();) {
    const ssize_t done = ::pread(kMemoryFd, bytes.data(), bytes.size(), at);
    if (done < 0 && errno == EINTR) continue;
    if (done == 0) errno = ENODATA;
    if (done <= 0) return memory_failure("reading from");
    at += done;
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
  return {};
}

class Session {
 public:
  explicit Session(std::uint64_t max_bytes) : database_(max_bytes) {}

  Failure handle(const Request& request, Reply& reply) {
    switch (request.op) {
      case Op::open: return database_.open(OpenMode::keep);
      case Op::make_anew: return database_.open(OpenMode::anew);
      case Op::read_first:
        if (Failure failed = database_.rewind(reply.total); !failed.is_ok()) return failed;
        return read(reply);
      case Op::read_next: return read(reply);
      case Op::apply_more:
      case Op::apply_last:
      case Op::apply_complete: return apply(request);
    }
    return {Outcome::io, EPROTO, "unknown request"};
  }

 private:
  Failure read(Reply& reply) {
    items_.resize(protocol::kPieceItems);
    std::size_t count = 0;
    if (Failure failed = database_.read(items_, count); !failed.is_ok()) return failed;
    reply.count = count;
    reply.has_more = count == items_.size() ? 1 : 0;
    return write_items(std::span(items_).first(count));
  }

  Failure apply(const Request& request) {
    if (request.count > protocol::kPieceItems) return {Outcome::io, EPROTO, "too many items in one message"};
    items_.resize(request.count);
    if (Failure failed = read_items(items_); !failed.is_ok()) return failed;
    if (Failure failed = database_.apply(items_); !failed.is_ok()) return failed;
    if (request.op == Op::apply_more) return {};
    if (request.op == Op::apply_complete) {
      if (Failure failed = database_.mark_complete(); !failed.is_ok()) return failed;
    }
    return database_.commit();
  }

  Database database_;
  std::vector<Item> items_;
};

// After a failure the file's state is unknown to LMDB, too: the answer is the last one.
int serve(std::uint64_t max_bytes, int parent_fd) {
  Session session(max_bytes);
  send_reply(Reply{});
  Request request;
  while (receive(parent_fd, request)) {
    Reply reply;
    const Failure failed = session.handle(request, reply);
    reply.outcome = failed.outcome;
    reply.native_code = failed.native_code;
    std::copy_n(failed.text.begin(), std::min(failed.text.size(), reply.text.size() - 1), reply.text.begin());
    send_reply(reply);
    if (!failed.is_ok()) return kDone;
  }
  return kDone;
}

int run(std::span<char*> arguments) {
  std::uint64_t max_bytes = 0;
  pid_t parent = 0;
  if (arguments.size() != 4 || !parse(arguments[2], max_bytes) || !parse(arguments[3], parent)) return kUsage;
  close_other_descriptors();
  // It ends with its server, not with whoever signals all processes of a terminal or a container.
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE})
    static_cast<void>(std::signal(signal, SIG_IGN));
  // A cut file is an expected end (SIGBUS), not worth a core file with block keys in it.
  const rlimit no_core{0, 0};
  static_cast<void>(::setrlimit(RLIMIT_CORE, &no_core));
  const int parent_fd = watch_parent(parent);
  const int directory = ::open(arguments[1], O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (directory < 0 || ::fchdir(directory) != 0) {
    Reply reply;
    reply.outcome = Outcome::io;
    reply.native_code = errno;
    std::strncpy(reply.text.data(), "the store's directory cannot be opened", reply.text.size() - 1);
    send_reply(reply);
    return kSetup;
  }
  ::close(directory);
  return serve(max_bytes, parent_fd);
}

}  // namespace
}  // namespace kvtier::catalog_helper

int main(int argc, char** argv) {
  const int code = kvtier::catalog_helper::run({argv, static_cast<std::size_t>(argc)});
  std::_Exit(code);
}
