// What stands under the directory of a disk, seen from outside: for `kvtier verify`, `inspect` and `purge`.
//
// Looking changes nothing: files are opened for reading alone, nothing is made, no capacity is set, no lock
// is kept. So it may look at stores that a process has open as well; what is being written meanwhile can seem
// torn, so a slot that proves nothing there is read again before it is called corrupt.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/storage/catalog.h"
#include "kvtier/storage/slot_image.h"
#include "kvtier/storage/store_directory.h"

namespace kvtier {

// The slots of one store, counted by what their images proved.
struct SlotCounts {
  std::uint64_t good = 0;
  std::uint64_t corrupt = 0;     // header or payload does not hold
  std::uint64_t foreign = 0;     // not of this store and place; plain, where a key is given
  std::uint64_t free = 0;        // never written, or wiped
  std::uint64_t unreadable = 0;  // a sound header, but encrypted under a key that is not given
  std::uint64_t newer = 0;       // of a later kvtier
  std::uint64_t failed = 0;      // the drive could not read it
};

struct StoreSurvey {
  std::string name;
  bool in_use = false;    // some process has it open
  std::string not_read;   // why its slots were not looked at; empty if they were
  Superblock superblock;  // meaningful if `readable`
  bool readable = false;  // the superblock is sound
  std::uint64_t granted_bytes = 0;
  std::uint64_t allocated_bytes = 0;  // st_blocks
  std::int64_t last_open_s = 0;       // Unix time
  std::uint64_t read_bytes = 0;
  SlotCounts slots;
};

struct DirectorySurvey {
  std::uint64_t capacity_bytes = 0;   // as the last opener gave it; 0 if nobody can tell
  std::uint64_t allocated_bytes = 0;  // of everything, by st_blocks
  std::vector<StoreSurvey> stores;
};

enum class SurveyDepth : std::uint8_t {
  superblocks,  // which stores there are
  headers,      // and what each slot's header says; payloads unproved
  payloads,     // every byte of every block is read and proved
};
enum class StoresInUse : std::uint8_t { skip, read };

struct SurveyOptions {
  SurveyDepth depth = SurveyDepth::payloads;
  StoresInUse in_use = StoresInUse::skip;
  std::shared_ptr<SlotCipher> cipher;  // null: encrypted images are `unreadable`
  // Every sound header, and whether its payload proved good as well (depth payloads).
  std::function<void(const StoreSurvey& store, const SlotHeader& header)> on_block;
  // After every few MiB: bytes read and to be read, of the slot files. False ends the survey.
  std::function<bool(std::uint64_t done_bytes, std::uint64_t total_bytes)> go_on;
};

// Threads: any. Blocks: for as long as the drive takes to read all of it. Errors: invalid_argument when the
// path is no store directory; unsupported for a newer one; io; closed when go_on() said so.
Result<DirectorySurvey> survey_stores(const std::string& path, const SurveyOptions& options);

// What the catalog in `directory_path` says; an ordinary opening of it, through the helper: call it on a
// copy. Errors: as open_catalog() and Catalog::read_all().
Result<std::vector<CatalogRecord>> read_catalog(const std::string& directory_path,
                                                const std::string& helper_path);

struct PurgedStore {
  std::string name;
  std::string not_purged;  // why not: some process has it open, or it is not sound; empty if it was
  bool in_use = false;
  std::uint64_t dropped = 0;  // blocks
  std::uint64_t newer = 0;    // slots of a later kvtier, left alone
};

// Overwrites the headers of all blocks of a namespace (nullopt: of every slot that holds anything but an
// image of a later kvtier) with zeros, syncs, then forgets them in the catalog; stores that a process has
// open are left alone and named. When it returns, no opening finds them, with the catalog or without. Errors:
// as survey_stores(); after an io error some may be gone and others not: call it again.
Result<std::vector<PurgedStore>> purge_stores(const std::string& path,
                                              const std::optional<NamespaceTag>& name_space);

}  // namespace kvtier
