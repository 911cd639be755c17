// Who may occupy how much of a store directory. Private to storage; the rules are in
// docs/formats/directory.md.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/block_file.h"
#include "kvtier/storage/store_directory.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier {

inline constexpr char kRootLockFile[] = "lock";
inline constexpr char kStoreLockFile[] = "lock";
inline constexpr char kLedgerFile[] = "ledger";
inline constexpr char kVersionFile[] = "VERSION";
inline constexpr char kStoresDirectory[] = "stores";
inline constexpr char kSuperblockFile[] = "superblock";

// What a store costs beyond what it was granted: its small files (superblock, locks, their replacements: 64
// KiB), and the file system's own blocks (extents; st_blocks counts them), by a 1024th. And what the
// directory itself costs.
inline constexpr std::uint64_t kStoreOverheadBytes = 64 << 10;
inline constexpr std::uint64_t kRootOverheadBytes = 64 << 10;
inline constexpr std::uint64_t kGrantPerOverhead = 1024;
std::uint64_t charge_of_grant(std::uint64_t granted_bytes);
std::uint64_t grant_within(std::uint64_t charge_bytes);

struct SharedDirectory {
  Directory root;
  Directory stores;
  std::uint64_t capacity_bytes = 0;

  // For the moments in which the ledger or the list of stores changes. Errors: timeout, io.
  Result<std::unique_ptr<FileLock>> lock() const;
};

// The superblock of a store as it stands there. Errors: io, only when nothing can be said (no descriptors).
struct FoundSuperblock {
  RecordVerdict verdict = RecordVerdict::damaged;  // also when there is none
  Superblock superblock;
  std::string why_unread;  // not empty: it is there, and may be read another time
};
Result<FoundSuperblock> find_superblock(const Directory& store);

struct StoreUse {
  StoreName name;
  std::uint64_t granted_bytes = 0;
  std::uint64_t allocated_bytes = 0;
  std::int64_t last_open_s = 0;
  bool in_use = false;       // a process has it open
  bool untouchable = false;  // of a newer version, or it cannot be removed

  // One that nobody has open cannot grow.
  std::uint64_t charge_bytes() const;
};

// A look at the directory, and what may change by it. Requires that the directory's lock is held, but for
// looking.
class StoreAccounts {
 public:
  explicit StoreAccounts(const SharedDirectory& shared) : shared_(shared) {}

  // Errors: io; unsupported for a ledger of a newer version. A lost or damaged ledger is made up from what
  // stands on the drive.
  Status load();
  // Atomic and durable; nothing when nothing has changed.
  Status save();

  std::vector<StoreUse>& stores() { return stores_; }
  StoreUse* find(const StoreName& name);
  void set_capacity(std::uint64_t capacity_bytes) { capacity_bytes_ = capacity_bytes; }

  // The most that may be granted to `name` (a new store if unknown), after stores that nobody has open were
  // removed, oldest first, for as long as that is less than `wanted`. nullopt: there is not even room for its
  // small files.
  Result<std::optional<std::uint64_t>> make_room(const StoreName& name, std::uint64_t wanted);

 private:
  Status survey(const StoreName& name, const Ledger& ledger);
  std::optional<std::uint64_t> grantable(const StoreName& name, std::uint64_t free_bytes) const;
  // Whether there was one to remove, or to give up.
  Result<bool> remove_oldest(const StoreName& except);

  const SharedDirectory& shared_;
  std::uint64_t capacity_bytes_ = 0;
  std::uint64_t other_bytes_ = 0;  // of what is no store
  std::vector<StoreUse> stores_;
  std::optional<Ledger> saved_;
};

}  // namespace kvtier
