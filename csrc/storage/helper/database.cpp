#include "database.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <system_error>

namespace kvtier::catalog_helper {
namespace {

using protocol::Item;
using protocol::ItemKind;
using protocol::Outcome;

constexpr std::uintptr_t kPageBytes = 4096;  // what LMDB's pages have at least
constexpr char kVersionKey[] = "version";
constexpr char kCompleteKey[] = "complete";

// LMDB's values are not const; it does not write to what it is given.
MDB_val value_of(std::span<const std::byte> bytes) {
  return {bytes.size(), const_cast<std::byte*>(bytes.data())};
}
MDB_val value_of(const char* text) { return {std::strlen(text), const_cast<char*>(text)}; }

std::span<const std::byte> bytes_of(const MDB_val& value) {
  return {static_cast<const std::byte*>(value.mv_data), value.mv_size};
}
std::span<const std::byte> place_of(std::span<const std::byte> value) {
  return value.subspan(protocol::kPlaceAt, protocol::kPlaceBytes);
}
bool same(std::span<const std::byte> a, std::span<const std::byte> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

// A leaf's records stand in it in the order in which they were written: without this, each is waited for.
// `within` is mapped, so all of its page is.
void fetch_page(const void* within) {
  constexpr std::size_t kLine = 64;
  const auto* const page =
      static_cast<const std::byte*>(within) - reinterpret_cast<std::uintptr_t>(within) % kPageBytes;
  for (std::size_t at = 0; at < kPageBytes; at += kLine) __builtin_prefetch(page + at);
}

Failure corrupt(std::string text) { return {Outcome::corruption, 0, std::move(text)}; }
Failure system_failure(const std::string& what) {
  const int error = errno;
  return {Outcome::io, error, what + ": " + std::generic_category().message(error)};
}

}  // namespace

Failure Database::failure(int lmdb_error, const char* what) const {
  if (lmdb_error == 0) return {};
  std::string text = std::string(what) + ": " + mdb_strerror(lmdb_error);
  switch (lmdb_error) {
    case MDB_MAP_FULL:
      return {Outcome::io, ENOSPC, text + "; the bound is " + std::to_string(max_bytes_) + " bytes"};
    case MDB_NOTFOUND:
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_VERSION_MISMATCH:
    case MDB_INVALID:
    case MDB_INCOMPATIBLE:
    case MDB_BAD_VALSIZE:
    case MDB_BAD_DBI:
    case MDB_PANIC: return corrupt(std::move(text));
    default: return {Outcome::io, lmdb_error > 0 ? lmdb_error : 0, std::move(text)};
  }
}

Database::~Database() {
  end_reading();
  if (writing_ != nullptr) mdb_txn_abort(writing_);
  if (env_ != nullptr) mdb_env_close(env_);
}

// --- opening ---

Failure Database::refuse_strange_files(bool& exists) const {
  exists = false;
  for (const char* name : {protocol::kFileName, protocol::kLockFileName}) {
    struct stat file{};
    if (::fstatat(AT_FDCWD, name, &file, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;
      return system_failure(name);
    }
    // LMDB would follow a symbolic link, and wait for ever on a FIFO.
    if (!S_ISREG(file.st_mode)) return corrupt(std::string(name) + " is not a regular file");
    if (std::string_view(name) == protocol::kFileName) {
      exists = file.st_size > 0;
      if (static_cast<std::uint64_t>(file.st_size) > max_bytes_) {
        return corrupt(std::string(name) + " has " + std::to_string(file.st_size) +
                       " bytes, more than its bound of " + std::to_string(max_bytes_));
      }
    }
  }
  return {};
}

Failure Database::open(OpenMode mode) {
  if (mode == OpenMode::anew) {
    for (const char* name : {protocol::kFileName, protocol::kLockFileName}) {
      if (::unlinkat(AT_FDCWD, name, 0) != 0 && errno != ENOENT)
        return system_failure(std::string("removing ") + name);
    }
  }
  bool exists = false;
  if (Failure strange = refuse_strange_files(exists); !strange.is_ok()) return strange;
  int error = mdb_env_create(&env_);
  if (error == 0) error = mdb_env_set_mapsize(env_, max_bytes_ & ~std::uint64_t{4095});
  if (error == 0) error = mdb_env_set_maxdbs(env_, 3);
  if (error == 0) error = mdb_env_open(env_, protocol::kFileName, MDB_NOSUBDIR, 0600);
  if (error != 0) return failure(error, "opening the catalog");
  Failure opened = open_databases(mode, exists);
  if (!opened.is_ok() || exists) return opened;
  // The name, too, must survive a power loss.
  const int directory = ::open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) return system_failure("opening the store's directory");
  const int synced = ::fsync(directory);
  const int sync_error = errno;
  ::close(directory);
  errno = sync_error;
  return synced == 0 ? Failure{} : system_failure("syncing the store's directory");
}

Failure Database::open_databases(OpenMode mode, bool exists) {
  if (Failure begun = begin_writing(); !begun.is_ok()) return begun;
  MDB_stat root{};
  int error = mdb_env_stat(env_, &root);
  if (error != 0) return failure(error, "opening the catalog");
  // A file without any database was made, and its first transaction never committed.
  const bool fresh = !exists || root.ms_entries == 0;
  for (const auto& [name, dbi] : {std::pair{"blocks", &blocks_}, {"slots", &slots_}, {"meta", &meta_}}) {
    error = mdb_dbi_open(writing_, name, fresh ? MDB_CREATE : 0, dbi);
    if (error != 0) return failure(error, (std::string("opening the database ") + name).c_str());
    unsigned flags = 0;
    error = mdb_dbi_flags(writing_, *dbi, &flags);
    if (error != 0) return failure(error, "opening the catalog");
    if (flags != 0)
      return corrupt(std::string("the database ") + name + " has flags " + std::to_string(flags));
  }
  if (Failure checked = check_meta(mode, fresh); !checked.is_ok()) return checked;
  return commit();
}

Failure Database::check_meta(OpenMode mode, bool fresh) {
  std::array<std::byte, 4> version{};
  version[0] = std::byte{protocol::kCatalogVersion};
  static_assert(protocol::kCatalogVersion < 256);
  MDB_val key = value_of(kVersionKey);
  if (fresh) {
    MDB_val value = value_of(version);
    if (const int error = mdb_put(writing_, meta_, &key, &value, 0); error != 0)
      return failure(error, "making meta");
    return mode == OpenMode::anew ? Failure{} : mark_complete();
  }
  MDB_val found{};
  if (const int error = mdb_get(writing_, meta_, &key, &found); error != 0) {
    return failure(error, "reading the catalog's version");
  }
  if (!same(bytes_of(found), version)) {
    return corrupt("the catalog has another version than " + std::to_string(protocol::kCatalogVersion));
  }
  key = value_of(kCompleteKey);
  if (const int error = mdb_get(writing_, meta_, &key, &found); error != 0) {
    return failure(error, "the catalog was being filled when its writer ended");
  }
  return {};
}

Failure Database::mark_complete() {
  if (Failure begun = begin_writing(); !begun.is_ok()) return begun;
  MDB_val key = value_of(kCompleteKey);
  MDB_val value = value_of("1");
  return failure(mdb_put(writing_, meta_, &key, &value, 0), "marking the catalog complete");
}

// --- reading ---

void Database::end_reading() {
  if (cursor_ != nullptr) mdb_cursor_close(cursor_);
  if (reading_ != nullptr) mdb_txn_abort(reading_);
  cursor_ = nullptr;
  reading_ = nullptr;
}

Failure Database::rewind(std::uint64_t& total) {
  end_reading();
  if (Failure gone = check_still_ours(); !gone.is_ok()) return gone;
  int error = mdb_txn_begin(env_, nullptr, MDB_RDONLY, &reading_);
  if (error == 0) error = mdb_cursor_open(reading_, blocks_, &cursor_);
  MDB_stat stat{};
  if (error == 0) error = mdb_stat(reading_, blocks_, &stat);
  total = stat.ms_entries;
  return failure(error, "reading the catalog");
}

Failure Database::read(std::span<Item> items, std::size_t& count) {
  count = 0;
  if (cursor_ == nullptr) return corrupt("nothing is being read");
  std::uintptr_t fetched = 0;
  while (count < items.size()) {
    MDB_val key{};
    MDB_val value{};
    const int error = mdb_cursor_get(cursor_, &key, &value, MDB_NEXT);
    if (error == MDB_NOTFOUND) {
      end_reading();
      return {};
    }
    if (error != 0) return failure(error, "reading the catalog");
    if (key.mv_size != protocol::kKeyAndGroupBytes || value.mv_size != protocol::kValueBytes) {
      return corrupt("a record has " + std::to_string(key.mv_size) + " and " + std::to_string(value.mv_size) +
                     " bytes; this version writes 34 and 88");
    }
    const auto within = reinterpret_cast<std::uintptr_t>(value.mv_data);
    if ((within ^ fetched) >= kPageBytes) fetch_page(value.mv_data);
    fetched = within;
    Item& item = items[count++];
    item = {};
    std::memcpy(item.key.data(), key.mv_data, item.key.size());
    std::memcpy(item.value.data(), value.mv_data, item.value.size());
  }
  return {};
}

// --- writing ---

// A file that was cut or replaced under us would take commits that nobody finds again. (A cut behind this
// look is a SIGBUS: this process then ends.)
Failure Database::check_still_ours() {
  mdb_filehandle_t fd = -1;
  struct stat opened{};
  struct stat named{};
  if (mdb_env_get_fd(env_, &fd) != 0 || ::fstat(fd, &opened) != 0) return system_failure(protocol::kFileName);
  if (::fstatat(AT_FDCWD, protocol::kFileName, &named, AT_SYMLINK_NOFOLLOW) != 0 ||
      named.st_dev != opened.st_dev || named.st_ino != opened.st_ino) {
    return corrupt(std::string(protocol::kFileName) + " was removed or replaced while it was open");
  }
  if (opened.st_size < seen_bytes_) {
    return corrupt(std::string(protocol::kFileName) + " was cut from " + std::to_string(seen_bytes_) +
                   " to " + std::to_string(opened.st_size) + " bytes while it was open");
  }
  seen_bytes_ = opened.st_size;
  return {};
}

Failure Database::begin_writing() {
  if (writing_ != nullptr) return {};
  return failure(mdb_txn_begin(env_, nullptr, 0, &writing_), "beginning a transaction");
}

int Database::forget_block_at(MDB_val block, std::span<const std::byte> place) {
  MDB_val value{};
  const int error = mdb_get(writing_, blocks_, &block, &value);
  if (error == MDB_NOTFOUND) return 0;
  if (error != 0) return error;
  if (value.mv_size != protocol::kValueBytes) return MDB_CORRUPTED;
  if (!same(place_of(bytes_of(value)), place)) return 0;  // it has moved
  return mdb_del(writing_, blocks_, &block, nullptr);
}

int Database::forget(std::span<const std::byte> place) {
  MDB_val slot = value_of(place);
  MDB_val block{};
  int error = mdb_get(writing_, slots_, &slot, &block);
  if (error == MDB_NOTFOUND) return 0;
  if (error != 0) return error;
  // What LMDB gave points into its pages, and a change may move them.
  std::array<std::byte, protocol::kKeyAndGroupBytes> copy{};
  if (block.mv_size != copy.size()) return MDB_CORRUPTED;
  std::memcpy(copy.data(), block.mv_data, copy.size());
  error = forget_block_at(value_of(copy), place);
  if (error != 0) return error;
  return mdb_del(writing_, slots_, &slot, nullptr);
}

int Database::put(const Item& item) {
  const std::span<const std::byte> place = place_of(item.value);
  int error = forget(place);
  if (error != 0) return error;
  MDB_val block = value_of(item.key);
  MDB_val elsewhere{};
  error = mdb_get(writing_, blocks_, &block, &elsewhere);
  if (error == 0) {
    std::array<std::byte, protocol::kPlaceBytes> old_place{};
    if (elsewhere.mv_size != protocol::kValueBytes) return MDB_CORRUPTED;
    std::memcpy(old_place.data(), place_of(bytes_of(elsewhere)).data(), old_place.size());
    error = forget(old_place);
  }
  if (error != 0 && error != MDB_NOTFOUND) return error;
  MDB_val slot = value_of(place);
  error = mdb_put(writing_, slots_, &slot, &block, 0);
  if (error != 0) return error;
  MDB_val value = value_of(item.value);
  return mdb_put(writing_, blocks_, &block, &value, 0);
}

int Database::touch(const Item& item) {
  MDB_val slot = value_of(place_of(item.value));
  MDB_val block{};
  int error = mdb_get(writing_, slots_, &slot, &block);
  if (error == MDB_NOTFOUND) return 0;
  if (error != 0) return error;
  std::array<std::byte, protocol::kKeyAndGroupBytes> key{};
  if (block.mv_size != key.size()) return MDB_CORRUPTED;
  std::memcpy(key.data(), block.mv_data, key.size());
  MDB_val name = value_of(key);
  MDB_val found{};
  error = mdb_get(writing_, blocks_, &name, &found);
  if (error == MDB_NOTFOUND) return 0;
  if (error != 0) return error;
  if (found.mv_size != protocol::kValueBytes) return MDB_CORRUPTED;
  if (!same(place_of(bytes_of(found)), place_of(item.value))) return 0;
  std::array<std::byte, protocol::kValueBytes> changed{};
  std::memcpy(changed.data(), found.mv_data, changed.size());
  std::memcpy(changed.data() + protocol::kLastUseAt, item.value.data() + protocol::kLastUseAt,
              protocol::kLastUseBytes);
  MDB_val value = value_of(changed);
  return mdb_put(writing_, blocks_, &name, &value, 0);
}

Failure Database::apply(std::span<const Item> items) {
  if (Failure gone = check_still_ours(); !gone.is_ok()) return gone;
  if (Failure begun = begin_writing(); !begun.is_ok()) return begun;
  for (const Item& item : items) {
    int error = MDB_INCOMPATIBLE;
    switch (item.kind) {
      case ItemKind::put: error = put(item); break;
      case ItemKind::forget: error = forget(place_of(item.value)); break;
      case ItemKind::touch: error = touch(item); break;
    }
    if (error != 0) return failure(error, "changing the catalog");
  }
  return {};
}

Failure Database::commit() {
  MDB_txn* const transaction = writing_;
  writing_ = nullptr;  // LMDB frees it, whatever comes
  if (transaction == nullptr) return {};
  if (const int error = mdb_txn_commit(transaction); error != 0)
    return failure(error, "committing to the catalog");
  return check_still_ours();
}

}  // namespace kvtier::catalog_helper
