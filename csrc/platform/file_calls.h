// What directory.cpp, block_file.cpp and file_lock.cpp share.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "kvtier/core/status.h"
#include "kvtier/platform/block_file.h"

namespace kvtier {

// errno is an argument, so that it is read before anything else can change it.
Status file_failure(int error, const std::string& what, const std::string& path);

// A name of one component: not empty, "." or "..", no slash, no NUL.
Status check_name(const std::string& name);
std::string path_of(const Directory& directory, const std::string& name);

// Opens a regular file of this user in `directory`, following no link; `flags` as for open(2). O_CREAT makes
// it 0600.
Result<FileHandle> open_regular(const Directory& directory, const std::string& name, int flags);

// Writes all of it at `offset`. Returns 0 or an errno.
int write_at(int fd, std::span<const std::byte> bytes, std::uint64_t offset);

}  // namespace kvtier
