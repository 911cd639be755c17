#include "kvtier/platform/io_queue.h"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "kvtier/platform/block_file.h"

namespace kvtier {
namespace {

constexpr std::uint32_t kMaxDepth = 4096;
constexpr std::uint32_t kMaxThreads = 256;
constexpr std::chrono::seconds kProbeTimeout{5};

// Performs a real read through a ring of its own. Sandboxes exist that grant a ring and refuse what goes
// through it.
Status probe_uring() {
  const FileHandle file(::memfd_create("kvtier-probe", MFD_CLOEXEC));
  std::array<char, 64> expected{};
  expected.fill('k');
  if (!file.is_open() || ::write(file.fd(), expected.data(), expected.size()) != ssize_t{expected.size()}) {
    return Status::resource("cannot make a file to probe io_uring with", errno);
  }
  Result<std::unique_ptr<IoQueue>> ring = make_uring_queue({.depth = 1});
  if (!ring) return ring.status();

  auto found = std::make_unique<std::array<char, expected.size()>>();
  const IoRequest read{.op = IoOp::read,
                       .fd = file.fd(),
                       .data = reinterpret_cast<std::byte*>(found->data()),
                       .bytes = found->size()};
  ring.value()->submit({&read, 1});
  std::vector<IoCompletion> completions;
  const Status status = ring.value()->wait(completions, std::chrono::steady_clock::now() + kProbeTimeout);
  if (completions.empty()) {
    // It may yet come: ring and buffer are kept for ever.
    static_cast<void>(ring.value().release());
    static_cast<void>(found.release());
    return status ? Status::unsupported("a read through io_uring does not end") : status;
  }
  if (completions[0].error != 0) {
    return {StatusCode::unsupported,
            "a read through io_uring fails: " + std::generic_category().message(completions[0].error),
            completions[0].error};
  }
  if (*found != expected) return Status::unsupported("a read through io_uring gives wrong bytes");
  return Status::ok();
}

}  // namespace

namespace internal {

Status check(const IoQueueOptions& options) {
  if (options.depth < 1 || options.depth > kMaxDepth) {
    return Status::invalid_argument("the depth of an I/O queue must be 1 to 4096, not " +
                                    std::to_string(options.depth));
  }
  if (options.threads < 1 || options.threads > kMaxThreads) {
    return Status::invalid_argument("the threads of an I/O queue must be 1 to 256, not " +
                                    std::to_string(options.threads));
  }
  return Status::ok();
}

}  // namespace internal

Result<std::unique_ptr<IoQueue>> make_io_queue(const IoQueueOptions& options, std::string* why_not) {
  if (why_not != nullptr) why_not->clear();
  if (const Status valid = internal::check(options); !valid) return valid;
  Status reason = probe_uring();
  if (reason) {
    Result<std::unique_ptr<IoQueue>> ring = make_uring_queue(options);
    if (ring) return ring;
    reason = ring.status();
  }
  if (why_not != nullptr) *why_not = reason.message();
  return make_thread_queue(options);
}

}  // namespace kvtier
