// StoreDirectory: what stands under the directory of one Disk, shared by all stores and processes that use
// it.
//
//   DIR/VERSION            "kvtier store directory 1\n"; a newer number is refused and left untouched
//   DIR/lock               held for the moments in which the ledger or the list of stores changes
//   DIR/ledger             bytes granted to each store, and when it was last opened
//   (docs/formats/directory.md) DIR/stores/<fingerprint, 16 hex>-<n>/
//       lock               held by the process that has the store open
//       superblock         store id, fingerprint, size classes, open counter, clean flag
//       slots.<class>      slot images at multiples of the class's stride
//       catalog.mdb        see catalog.h
//       budget             what is left of a day's writes
//
// The sum of what all stores occupy never exceeds the capacity that the last opener gave (the ledger), and
// stores that nobody has open are removed, oldest first, when another needs their room.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/block_file.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier {

struct StoreClass {
  std::uint64_t slot_stride_bytes = 0;
  std::uint32_t num_slots = 0;  // bound; the file grows towards it
};

// docs/formats/superblock.md. 4096 bytes on the drive, with a checksum.
struct Superblock {
  StoreId store{};
  Fingerprint fingerprint{};
  std::vector<std::uint64_t> class_strides;  // at most 64
  std::uint32_t open_counter = 0;            // of the last opening; made durable before the first write
  bool clean = false;                        // the last opening was closed in order: the catalog is complete
};

// docs/formats/budget.md: what is left of the bytes that may be written in a day.
struct SavedBudget {
  std::uint64_t bytes_per_day = 0;
  std::uint64_t left_bytes = 0;
  std::int64_t at_s = 0;  // Unix time
  friend bool operator==(const SavedBudget&, const SavedBudget&) = default;
};

// What happens to a second process with the same fingerprint.
enum class SecondProcess : std::uint8_t { next_store, refuse };

// A store directory that this process has locked. Threads: any; the ledger calls may wait for other
// processes.
class StoreLease {
 public:
  virtual ~StoreLease() = default;  // unlocks; a ledger entry stays
  virtual const Directory& directory() const = 0;
  virtual const std::string& name() const = 0;  // "<fingerprint>-<n>"
  virtual const Superblock& superblock() const = 0;
  virtual bool is_new() const = 0;
  virtual Status write_superblock(const Superblock& superblock) = 0;  // atomic and durable

  // Asks for room for `bytes` in all (not: more). Reclaims stores that nobody has open, oldest first. Returns
  // what is granted: `bytes`, or less when the directory's capacity or the file system has not that much.
  virtual Result<std::uint64_t> reserve(std::uint64_t bytes) = 0;
  virtual std::uint64_t reserved_bytes() const = 0;
};

class StoreDirectory {
 public:
  // Errors: invalid_argument (a relative path, a file, a symbolic link), io, unsupported (a newer VERSION).
  static Result<std::unique_ptr<StoreDirectory>> open(const std::string& path, std::uint64_t capacity_bytes);
  virtual ~StoreDirectory() = default;

  // Locks the first store of the fingerprint that nobody has open, or makes the next one. Stores whose
  // superblock cannot be read, or has other classes, are made anew (their bytes prove nothing); newer
  // versions are left alone. Errors: resource with EBUSY when another process has it (SecondProcess::refuse);
  // io.
  virtual Result<std::unique_ptr<StoreLease>> acquire(const Fingerprint& fingerprint,
                                                      std::span<const std::uint64_t> class_strides,
                                                      SecondProcess second_process) = 0;

  struct StoreInfo {
    std::string name;
    Superblock superblock;
    bool readable = false;  // the superblock is sound
    bool in_use = false;    // some process has it open
    std::uint64_t granted_bytes = 0;
    std::uint64_t allocated_bytes = 0;
    std::int64_t last_open_s = 0;  // Unix time
  };
  virtual Result<std::vector<StoreInfo>> stores() const = 0;
  virtual Result<std::uint64_t> allocated_bytes() const = 0;  // of everything, by st_blocks
  virtual std::uint64_t capacity_bytes() const = 0;
  virtual const Directory& root() const = 0;
};

}  // namespace kvtier
