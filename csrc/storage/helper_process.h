// HelperProcess: the client's end of one kvtier-catalog process (catalog_protocol.h). Private to storage.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "catalog_protocol.h"

#include "kvtier/core/status.h"
#include "kvtier/platform/block_file.h"

namespace kvtier {

// Owns: the process, the socket, the memfd. Threads: one caller at a time. Blocks: every method, at most for
// the deadline, and start() for what it calls meanwhile. No signal reaches the server through it: SIGPIPE is
// not raised, its end is collected by its process id alone.
class HelperProcess {
 public:
  struct Arguments {
    std::string helper_path;
    std::string directory_path;
    std::uint64_t max_bytes = 0;
    std::chrono::milliseconds deadline{0};  // for each answer
  };

  // Calls `meanwhile`, if given, while the program is loaded. Errors: unsupported when it cannot be run or
  // does not speak this protocol; resource.
  static Result<std::unique_ptr<HelperProcess>> start(const Arguments& arguments,
                                                      const std::function<void()>& meanwhile = {});
  // In a forked child of the owner: only closes descriptors. Else ends the process, by force if it does not
  // go.
  ~HelperProcess();
  HelperProcess(const HelperProcess&) = delete;
  HelperProcess& operator=(const HelperProcess&) = delete;

  // Errors: io when the process ends first or does not answer in time (it must then be given up); corruption
  // or io as it answers.
  Result<catalog_protocol::Reply> call(const catalog_protocol::Request& request);
  // Its two halves: every request has one answer, in order.
  Status send(const catalog_protocol::Request& request);
  Result<catalog_protocol::Reply> receive();
  Status write_items(std::span<const catalog_protocol::Item> items);
  Status read_items(std::span<catalog_protocol::Item> items);
  // Gives the memfd's pages back.
  void empty_memory();
  // Ends it without asking: it hangs, or its file is to be replaced.
  void kill();

 private:
  HelperProcess(FileHandle socket, FileHandle memory, std::chrono::milliseconds deadline);
  Status spawn(const Arguments& arguments, int child_socket);
  void collect();

  FileHandle socket_;
  FileHandle memory_;
  const std::chrono::milliseconds deadline_;
  const std::uint64_t process_generation_;
  pid_t pid_ = 0;  // 0: none to collect
};

// Where kvtier-catalog is: $KVTIER_CATALOG_HELPER, else beside this library. Errors: unsupported.
Result<std::string> find_catalog_helper();

}  // namespace kvtier
