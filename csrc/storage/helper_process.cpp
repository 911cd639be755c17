#include "helper_process.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"

namespace kvtier {
namespace {

using catalog_protocol::Outcome;
using catalog_protocol::Reply;
using catalog_protocol::Request;
using std::chrono::steady_clock;

std::string text_of(int error) { return std::generic_category().message(error); }

// Above the numbers that the child wants, so that no dup2 there overwrites what the next one needs.
constexpr int kFirstSpareFd = 16;

// Of the server's environment the helper gets what a loader or a sanitizer needs: no master key, no token.
std::vector<std::string> helper_environment() {
  std::vector<std::string> kept;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const std::string_view name = text.substr(0, text.find('='));
    if (name == "LD_LIBRARY_PATH" || name.ends_with("SAN_OPTIONS")) kept.emplace_back(text);
  }
  return kept;
}

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> result;
  result.reserve(texts.size() + 1);
  for (std::string& text : texts) result.push_back(text.data());
  result.push_back(nullptr);
  return result;
}

// Processes that were killed and had not gone when their owner could wait no longer (a drive that hangs keeps
// them). Looked at again whenever another one is collected.
Mutex left_mutex;
std::vector<pid_t>& left_behind() KVTIER_REQUIRES(left_mutex) {
  static auto* const list = new std::vector<pid_t>;
  return *list;
}

// Whether it is gone. Somebody else's waitpid(-1) may have collected it: that is gone as well.
bool collected(pid_t pid) {
  int status = 0;
  const pid_t answer = ::waitpid(pid, &status, WNOHANG);
  return answer == pid || (answer < 0 && errno != EINTR);
}

// Polls, since only the collector's own wait says that a process id is free: about one tick in practice.
bool collected_until(pid_t pid, steady_clock::time_point deadline) {
  while (!collected(pid)) {
    if (steady_clock::now() >= deadline) return false;
    static_cast<void>(::poll(nullptr, 0, 1));
  }
  return true;
}

}  // namespace

HelperProcess::HelperProcess(FileHandle socket, FileHandle memory, std::chrono::milliseconds deadline)
    : socket_(std::move(socket)),
      memory_(std::move(memory)),
      deadline_(deadline),
      process_generation_(process_generation()) {}

// --- start and end ---

Result<std::unique_ptr<HelperProcess>> HelperProcess::start(const Arguments& arguments,
                                                            const std::function<void()>& meanwhile) {
  int ends[2] = {-1, -1};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) {
    const int error = errno;
    return Status::resource("no socket pair for the catalog: " + text_of(error), error);
  }
  FileHandle own(ends[0]);
  FileHandle childs(ends[1]);
  FileHandle memory(::memfd_create("kvtier-catalog", MFD_CLOEXEC));
  if (!memory.is_open()) {
    const int error = errno;
    return Status::resource("no memfd for the catalog: " + text_of(error), error);
  }
  std::unique_ptr<HelperProcess> process(
      new HelperProcess(std::move(own), std::move(memory), arguments.deadline));
  KVTIER_RETURN_IF_ERROR(process->spawn(arguments, childs.fd()));
  // The child's end is closed here before the wait: its end then shows as the end of file.
  childs = FileHandle();
  if (meanwhile) meanwhile();
  const Result<Reply> ready = process->receive();
  if (ready) return process;
  const int error = ready.status().native_code();
  if (error != EPIPE && error != ETIMEDOUT) return ready.status();
  return Status(
      StatusCode::unsupported,
      "the catalog's helper " + arguments.helper_path + " does not run: " + ready.status().message(), error);
}

Status HelperProcess::spawn(const Arguments& arguments, int child_socket) {
  const FileHandle spare_socket(::fcntl(child_socket, F_DUPFD_CLOEXEC, kFirstSpareFd));
  const FileHandle spare_memory(::fcntl(memory_.fd(), F_DUPFD_CLOEXEC, kFirstSpareFd));
  if (!spare_socket.is_open() || !spare_memory.is_open()) {
    const int error = errno;
    return Status::resource("no descriptors for the catalog: " + text_of(error), error);
  }

  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&actions);
  posix_spawnattr_init(&attributes);
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    posix_spawn_file_actions_addopen(&actions, fd, "/dev/null", O_RDWR, 0);
  }
  posix_spawn_file_actions_adddup2(&actions, spare_socket.fd(), catalog_protocol::kSocketFd);
  posix_spawn_file_actions_adddup2(&actions, spare_memory.fd(), catalog_protocol::kMemoryFd);
  sigset_t signals;
  sigfillset(&signals);
  posix_spawnattr_setsigdefault(&attributes, &signals);
  sigemptyset(&signals);
  posix_spawnattr_setsigmask(&attributes, &signals);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSID);

  // The loader would fetch it page by page, and each page wait behind others' reads of a cold drive.
  const FileHandle program(::open(arguments.helper_path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (program.is_open()) static_cast<void>(::posix_fadvise(program.fd(), 0, 0, POSIX_FADV_WILLNEED));

  std::vector<std::string> words = {arguments.helper_path, arguments.directory_path,
                                    std::to_string(arguments.max_bytes), std::to_string(::getpid())};
  std::vector<std::string> environment = helper_environment();
  const int error = ::posix_spawn(&pid_, arguments.helper_path.c_str(), &actions, &attributes,
                                  pointers(words).data(), pointers(environment).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    pid_ = 0;
    return Status(StatusCode::unsupported,
                  "the catalog's helper " + arguments.helper_path + " cannot be started: " + text_of(error),
                  error);
  }
  return Status::ok();
}

HelperProcess::~HelperProcess() {
  if (process_generation() != process_generation_) return;
  static_cast<void>(::shutdown(socket_.fd(), SHUT_RDWR));
  collect();
}

void HelperProcess::kill() {
  if (process_generation() != process_generation_) return;
  // Not collected yet, so the number is still its own.
  if (pid_ != 0 && !collected(pid_)) {
    ::kill(pid_, SIGKILL);
    collect();
  }
  pid_ = 0;
}

void HelperProcess::collect() {
  constexpr std::chrono::seconds kToEnd{2};
  constexpr std::chrono::milliseconds kToDie{500};
  if (pid_ != 0 && !collected_until(pid_, steady_clock::now() + kToEnd)) {
    ::kill(pid_, SIGKILL);
    if (!collected_until(pid_, steady_clock::now() + kToDie)) {
      MutexLock lock(left_mutex);
      left_behind().push_back(pid_);
    }
  }
  pid_ = 0;
  MutexLock lock(left_mutex);
  std::erase_if(left_behind(), collected);
}

// --- messages ---

Result<Reply> HelperProcess::call(const Request& request) {
  KVTIER_RETURN_IF_ERROR(send(request));
  return receive();
}

Status HelperProcess::send(const Request& request) {
  while (::send(socket_.fd(), &request, sizeof request, MSG_NOSIGNAL) !=
         static_cast<ssize_t>(sizeof request)) {
    const int error = errno;
    if (error == EINTR) continue;
    return Status::io("the catalog's helper is gone: " + text_of(error), error);
  }
  return Status::ok();
}

Result<Reply> HelperProcess::receive() {
  const steady_clock::time_point deadline = steady_clock::now() + deadline_;
  Reply reply;
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - steady_clock::now()).count();
    pollfd wait{socket_.fd(), POLLIN, 0};
    const int ready = ::poll(&wait, 1, static_cast<int>(std::max<std::int64_t>(left, 0)));
    if (ready < 0 && errno == EINTR) continue;
    if (ready == 0) {
      return Status::io(
          "the catalog's helper has not answered for " + std::to_string(deadline_.count()) + " ms",
          ETIMEDOUT);
    }
    const ssize_t got = ::recv(socket_.fd(), &reply, sizeof reply, MSG_DONTWAIT);
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) continue;
    if (got != static_cast<ssize_t>(sizeof reply)) {
      return Status::io("the catalog's helper has ended (killed, or its file was cut under it)", EPIPE);
    }
    break;
  }
  if (reply.protocol != catalog_protocol::kProtocol) {
    return Status::unsupported("the catalog's helper speaks protocol " + std::to_string(reply.protocol) +
                               ", not " + std::to_string(catalog_protocol::kProtocol));
  }
  reply.text.back() = 0;
  switch (reply.outcome) {
    case Outcome::ok: return reply;
    case Outcome::corruption: return Status(StatusCode::corruption, reply.text.data());
    case Outcome::io: break;
  }
  return Status::io(reply.text.data(), reply.native_code);
}

Status HelperProcess::write_items(std::span<const catalog_protocol::Item> items) {
  std::span<const std::byte> bytes = std::as_bytes(items);
  for (off_t at = 0; !bytes.empty();) {
    const ssize_t done = ::pwrite(memory_.fd(), bytes.data(), bytes.size(), at);
    const int error = errno;
    if (done < 0 && error == EINTR) continue;
    if (done <= 0) return Status::io("writing to the catalog's memfd: " + text_of(error), error);
    at += done;
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
  return Status::ok();
}

Status HelperProcess::read_items(std::span<catalog_protocol::Item> items) {
  std::span<std::byte> bytes = std::as_writable_bytes(items);
  for (off_t at = 0; !bytes.empty();) {
    const ssize_t done = ::pread(memory_.fd(), bytes.data(), bytes.size(), at);
    const int error = done == 0 ? ENODATA : errno;
    if (done < 0 && error == EINTR) continue;
    if (done <= 0) return Status::io("reading from the catalog's memfd: " + text_of(error), error);
    at += done;
    bytes = bytes.subspan(static_cast<std::size_t>(done));
  }
  return Status::ok();
}

void HelperProcess::empty_memory() { static_cast<void>(::ftruncate(memory_.fd(), 0)); }

// --- where it is ---

Result<std::string> find_catalog_helper() {
  if (const char* given = std::getenv("KVTIER_CATALOG_HELPER"); given != nullptr && *given != '\0') {
    return std::string(given);
  }
  Dl_info here{};
  if (::dladdr(reinterpret_cast<const void*>(&find_catalog_helper), &here) == 0 ||
      here.dli_fname == nullptr) {
    return Status::unsupported(
        "the catalog's helper kvtier-catalog cannot be found: dladdr does not say where "
        "this library is; set KVTIER_CATALOG_HELPER");
  }
  const std::string library = here.dli_fname;
  const std::size_t slash = library.rfind('/');
  return (slash == std::string::npos ? std::string() : library.substr(0, slash + 1)) + "kvtier-catalog";
}

}  // namespace kvtier
