// StoreReader: the slot files of one store, opened for reading alone. Private to storage; for verify.h.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "store_accounts.h"

#include "kvtier/core/status.h"
#include "kvtier/platform/block_file.h"
#include "kvtier/storage/verify.h"

namespace kvtier {

// A store directory, opened without making or changing anything in it.
struct FoundDirectory {
  Directory root;
  Directory stores;
  Ledger ledger;
};
// Errors: as survey_stores().
Result<FoundDirectory> find_directory(const std::string& path);

std::string slot_file_name(std::size_t class_index);

// Opens one file of `directory` without making it; direct where that is to be had. Errors: io.
Result<FileHandle> open_for_reading(const Directory& directory, const std::string& name);

// Reads [offset, offset + bytes.size()); what lies behind the end of the file reads as nothing: returns how
// many bytes there were. Errors: io.
Result<std::uint64_t> read_at(const FileHandle& file, std::uint64_t offset, std::span<std::byte> bytes,
                              const std::string& name);

}  // namespace kvtier
