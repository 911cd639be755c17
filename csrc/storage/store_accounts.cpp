#include "store_accounts.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <tuple>
#include <utility>

namespace kvtier {
namespace {

// What says that there is nothing sound, as against that nobody can look now.
bool says_unreadable(int error) {
  return error == ENOENT || error == EFBIG || error == EINVAL || error == ELOOP || error == ENOTDIR ||
         error == EISDIR || error == EIO || error == ENXIO || error == EPERM || error == ENODATA;
}

// The file system's word for when a store was opened or closed last: its superblock is replaced then.
std::int64_t changed_s(const Directory& directory) {
  struct stat status{};
  return ::fstat(directory.fd(), &status) == 0 ? std::int64_t{status.st_mtime} : 0;
}

}  // namespace

std::uint64_t charge_of_grant(std::uint64_t granted_bytes) {
  const std::uint64_t overhead = granted_bytes / kGrantPerOverhead + kStoreOverheadBytes;
  return granted_bytes > ~std::uint64_t{0} - overhead ? ~std::uint64_t{0} : granted_bytes + overhead;
}

std::uint64_t grant_within(std::uint64_t charge_bytes) {
  if (charge_bytes <= kStoreOverheadBytes) return 0;
  const std::uint64_t rest = charge_bytes - kStoreOverheadBytes;
  return rest - (rest + kGrantPerOverhead) / (kGrantPerOverhead + 1);
}

std::uint64_t StoreUse::charge_bytes() const {
  return in_use ? std::max(charge_of_grant(granted_bytes), allocated_bytes) : allocated_bytes;
}

Result<std::unique_ptr<FileLock>> SharedDirectory::lock() const {
  // Held for file operations alone; longer than this, and its holder hangs on a drive.
  constexpr std::chrono::seconds kAtMost{30};
  return FileLock::lock(root, kRootLockFile, std::chrono::steady_clock::now() + kAtMost);
}

Result<FoundSuperblock> find_superblock(const Directory& store) {
  const Result<std::vector<std::byte>> bytes = store.read_file(kSuperblockFile);
  FoundSuperblock found;
  if (bytes) {
    found.verdict = decode_superblock(bytes.value(), found.superblock);
  } else if (!says_unreadable(bytes.status().native_code())) {
    return bytes.status();
  } else if (bytes.status().native_code() != ENOENT) {
    found.why_unread = bytes.status().message();
  }
  return found;
}

// --- looking ---

Status StoreAccounts::load() {
  stores_.clear();
  saved_.reset();
  Ledger ledger;
  const Result<std::vector<std::byte>> bytes = shared_.root.read_file(kLedgerFile);
  if (bytes) {
    switch (decode_ledger(bytes.value(), ledger)) {
      case RecordVerdict::good: saved_ = ledger; break;
      case RecordVerdict::damaged: break;
      case RecordVerdict::newer_version:
        return Status::unsupported(shared_.root.path() + "/" + kLedgerFile +
                                   " was written by a newer kvtier; it is left as it is");
    }
  } else if (!says_unreadable(bytes.status().native_code())) {
    return bytes.status();
  }
  capacity_bytes_ = saved_ ? ledger.capacity_bytes : shared_.capacity_bytes;

  const Result<std::vector<std::string>> names = shared_.stores.list();
  if (!names) return names.status();
  std::uint64_t of_stores = 0;
  for (const std::string& text : names.value()) {
    const std::optional<StoreName> name = parse_store_name(text);
    if (!name) continue;
    const std::size_t before = stores_.size();
    KVTIER_RETURN_IF_ERROR(survey(*name, ledger));
    if (stores_.size() > before) of_stores += stores_.back().allocated_bytes;
  }
  // Measured last: what has grown meanwhile is counted twice rather than not at all.
  const Result<std::uint64_t> all = shared_.root.allocated_bytes();
  if (!all) return all.status();
  other_bytes_ = std::max(all.value() - std::min(of_stores, all.value()), kRootOverheadBytes);
  return Status::ok();
}

Status StoreAccounts::survey(const StoreName& name, const Ledger& ledger) {
  const Result<Directory> store = shared_.stores.existing_subdirectory(name.text());
  if (!store) {
    // Removed meanwhile, or no directory of ours: then it is among the other things here.
    return says_unreadable(store.status().native_code()) ? Status::ok() : store.status();
  }
  const Result<std::uint64_t> allocated = store.value().allocated_bytes();
  const Result<bool> locked = FileLock::is_locked(store.value(), kStoreLockFile);
  if (!allocated) return allocated.status();
  StoreUse use{name, allocated.value(), allocated.value(), changed_s(store.value()), false, false};
  // A lock file that is no regular file of ours: not a store that may be used or removed.
  use.untouchable = !locked;
  use.in_use = locked && locked.value();
  const std::string text = name.text();
  const auto entry = std::find_if(ledger.entries.begin(), ledger.entries.end(),
                                  [&text](const LedgerEntry& e) { return e.store == text; });
  if (entry != ledger.entries.end()) {
    use.granted_bytes = entry->granted_bytes;
    use.last_open_s = entry->last_open_s;
  }
  stores_.push_back(std::move(use));
  return Status::ok();
}

StoreUse* StoreAccounts::find(const StoreName& name) {
  const auto found =
      std::find_if(stores_.begin(), stores_.end(), [&name](const StoreUse& use) { return use.name == name; });
  return found == stores_.end() ? nullptr : &*found;
}

Status StoreAccounts::save() {
  Ledger ledger;
  ledger.capacity_bytes = capacity_bytes_;
  for (const StoreUse& use : stores_) {
    ledger.entries.push_back({use.name.text(), use.granted_bytes, use.last_open_s});
  }
  std::sort(ledger.entries.begin(), ledger.entries.end(),
            [](const LedgerEntry& a, const LedgerEntry& b) { return a.store < b.store; });
  if (ledger.entries.size() > kMaxLedgerEntries) {
    return Status::resource(shared_.stores.path() + " has " + std::to_string(ledger.entries.size()) +
                            " stores; at most " + std::to_string(kMaxLedgerEntries) + " are allowed");
  }
  if (saved_ && *saved_ == ledger) return Status::ok();
  KVTIER_RETURN_IF_ERROR(shared_.root.replace_file(kLedgerFile, encode_ledger(ledger)));
  saved_ = std::move(ledger);
  return Status::ok();
}

// --- room ---

std::optional<std::uint64_t> StoreAccounts::grantable(const StoreName& name, std::uint64_t free_bytes) const {
  std::uint64_t taken = other_bytes_;
  std::uint64_t promised = 0;  // to others, and not written yet
  std::uint64_t own = 0;
  for (const StoreUse& use : stores_) {
    if (use.name == name) {
      own = use.allocated_bytes;
      continue;
    }
    const std::uint64_t charge = use.charge_bytes();
    taken = charge > ~std::uint64_t{0} - taken ? ~std::uint64_t{0} : taken + charge;
    promised += charge - use.allocated_bytes;
  }
  const std::uint64_t within_capacity = capacity_bytes_ - std::min(taken, capacity_bytes_);
  const std::uint64_t within_drive = own + free_bytes - std::min(promised, free_bytes);
  const std::uint64_t room = std::min(within_capacity, within_drive);
  if (room < kStoreOverheadBytes) return std::nullopt;
  return grant_within(room);
}

Result<std::optional<std::uint64_t>> StoreAccounts::make_room(const StoreName& name, std::uint64_t wanted) {
  for (;;) {
    const Result<std::uint64_t> free_bytes = shared_.root.free_bytes();
    if (!free_bytes) return free_bytes.status();
    const std::optional<std::uint64_t> room = grantable(name, free_bytes.value());
    if (room && *room >= wanted) return room;
    const Result<bool> removed = remove_oldest(name);
    if (!removed) return removed.status();
    if (!removed.value()) return room;
  }
}

Result<bool> StoreAccounts::remove_oldest(const StoreName& except) {
  StoreUse* oldest = nullptr;
  for (StoreUse& use : stores_) {
    if (use.in_use || use.untouchable || use.name == except) continue;
    if (oldest == nullptr ||
        std::tie(use.last_open_s, use.name) < std::tie(oldest->last_open_s, oldest->name)) {
      oldest = &use;
    }
  }
  if (oldest == nullptr) return false;

  const std::string name = oldest->name.text();
  {
    const Result<Directory> store = shared_.stores.existing_subdirectory(name);
    if (!store) return store.status();
    const Result<std::unique_ptr<FileLock>> held = FileLock::try_lock(store.value(), kStoreLockFile);
    if (!held) return held.status();
    if (held.value() == nullptr) {
      oldest->in_use = true;
      return true;
    }
    const Result<FoundSuperblock> found = find_superblock(store.value());
    if (!found) return found.status();
    if (found.value().verdict == RecordVerdict::newer_version) {
      oldest->untouchable = true;
      return true;
    }
    // First what makes it a store: half of one must not be opened.
    Status removed = store.value().remove_tree(kSuperblockFile);
    if (removed) removed = store.value().sync();
    if (removed) removed = shared_.stores.remove_tree(name);
    if (!removed) {
      oldest->untouchable = true;
      const Result<std::uint64_t> left = store.value().allocated_bytes();
      if (left) oldest->allocated_bytes = left.value();
      return true;
    }
  }
  stores_.erase(stores_.begin() + (oldest - stores_.data()));
  KVTIER_RETURN_IF_ERROR(shared_.stores.sync());
  return true;
}

}  // namespace kvtier
