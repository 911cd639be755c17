#include "store_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string_view>
#include <system_error>
#include <utility>

namespace kvtier {
namespace {

Status failure(const std::string& what, int error) {
  return Status::io(what + ": " + std::generic_category().message(error), error);
}

}  // namespace

std::string slot_file_name(std::size_t class_index) { return "slots." + std::to_string(class_index); }

Result<FoundDirectory> find_directory(const std::string& path) {
  // Directory::open_or_create() would make it.
  struct stat status{};
  if (::lstat(path.c_str(), &status) != 0) return failure(path, errno);
  if (!S_ISDIR(status.st_mode)) return Status::invalid_argument(path + " is no directory");
  Result<Directory> root = Directory::open_or_create(path);
  if (!root) return root.status();
  Result<std::vector<std::byte>> version = root->read_file(kVersionFile);
  if (!version) {
    if (version.status().native_code() != ENOENT) return version.status();
    Result<std::vector<std::string>> names = root->list();
    if (names && names->empty()) {
      return Status::invalid_argument(path + " is empty: no kvtier store directory, which has a file " +
                                      kVersionFile);
    }
    const auto is_of_directory = [](const std::string& name) {
      return name == kSuperblockFile || name == "slots.0";
    };
    const bool is_store = names && std::any_of(names->begin(), names->end(), is_of_directory);
    return Status::invalid_argument(
        path + " is no kvtier store directory: it has no file " + kVersionFile +
        (is_store ? ". It looks like one store of one; allowed: the directory of a Disk, two levels up"
                  : ""));
  }
  const std::string_view text(reinterpret_cast<const char*>(version->data()), version->size());
  if (text != "kvtier store directory 1\n") {
    return Status::unsupported(path + "/" + kVersionFile + " is not of version 1, which this kvtier knows");
  }
  Result<Directory> stores = root->existing_subdirectory(kStoresDirectory);
  if (!stores) return stores.status();
  Ledger ledger;
  if (Result<std::vector<std::byte>> bytes = root->read_file(kLedgerFile)) {
    static_cast<void>(decode_ledger(bytes.value(), ledger));  // without one: no capacity, no grants
  }
  return FoundDirectory{std::move(root).value(), std::move(stores).value(), std::move(ledger)};
}

Result<FileHandle> open_for_reading(const Directory& directory, const std::string& name) {
  constexpr int kFlags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  int fd = ::openat(directory.fd(), name.c_str(), kFlags | O_DIRECT);
  if (fd < 0 && errno == EINVAL) fd = ::openat(directory.fd(), name.c_str(), kFlags);
  if (fd < 0) return failure(directory.path() + "/" + name, errno);
  FileHandle file(fd);
  struct stat status{};
  if (::fstat(fd, &status) != 0) return failure(directory.path() + "/" + name, errno);
  if (!S_ISREG(status.st_mode)) return Status::io(directory.path() + "/" + name + " is no file", EINVAL);
  return file;
}

Result<std::uint64_t> read_at(const FileHandle& file, std::uint64_t offset, std::span<std::byte> bytes,
                              const std::string& name) {
  std::uint64_t done = 0;
  while (done < bytes.size()) {
    const ssize_t n =
        ::pread(file.fd(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return failure("reading " + name + " at " + std::to_string(offset + done), errno);
    if (n == 0) break;
    done += static_cast<std::uint64_t>(n);
    // Direct reads end short only at the end of the file, and cannot go on from an odd place.
    if (static_cast<std::uint64_t>(n) % kSlotAlignment != 0) break;
  }
  return done;
}

}  // namespace kvtier
