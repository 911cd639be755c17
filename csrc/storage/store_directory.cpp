#include "kvtier/storage/store_directory.h"

#include <sys/random.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>

#include "store_accounts.h"

namespace kvtier {
namespace {

constexpr std::string_view kVersionPrefix = "kvtier store directory ";
constexpr std::uint32_t kVersion = 1;
// Below, not even an empty store and the directory's own files have room.
constexpr std::uint64_t kMinCapacityBytes = std::uint64_t{1} << 20;

std::int64_t now_s() {
  return std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
      .count();
}

// nullopt: there is none. Errors: unsupported for a newer one, invalid_argument for anything else.
Result<std::optional<std::uint32_t>> read_version(const Directory& root) {
  const Result<std::vector<std::byte>> bytes = root.read_file(kVersionFile);
  if (!bytes) {
    if (bytes.status().native_code() == ENOENT) return std::optional<std::uint32_t>();
    return bytes.status();
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.value().data()), bytes.value().size());
  std::uint32_t version = 0;
  bool sound = text.starts_with(kVersionPrefix) && text.ends_with('\n');
  if (sound) {
    const std::string_view digits =
        text.substr(kVersionPrefix.size(), text.size() - kVersionPrefix.size() - 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), version);
    sound = error == std::errc() && end == digits.data() + digits.size() && version > 0;
  }
  const std::string path = root.path() + "/" + kVersionFile;
  if (!sound) {
    return Status::invalid_argument(path +
                                    " is not a store directory's; it is left as it is. It should read '" +
                                    std::string(kVersionPrefix) + std::to_string(kVersion) + "'");
  }
  if (version > kVersion) {
    return Status::unsupported(path + " says " + std::to_string(version) +
                               ", of a newer kvtier; this one knows " + std::to_string(kVersion) +
                               ". It is left as it is");
  }
  return std::optional(version);
}

Status check_path(const std::string& path) {
  if (path.empty() || path.front() != '/') {
    return Status::invalid_argument("the disk directory '" + path + "' is not an absolute path");
  }
  std::string trimmed = path;
  while (trimmed.size() > 1 && trimmed.back() == '/') trimmed.pop_back();
  struct stat status{};
  if (::lstat(trimmed.c_str(), &status) != 0 || S_ISDIR(status.st_mode)) return Status::ok();
  return Status::invalid_argument("the disk directory '" + path + "' is " +
                                  (S_ISLNK(status.st_mode) ? "a symbolic link" : "no directory"));
}

class Lease final : public StoreLease {
 public:
  Lease(std::shared_ptr<const SharedDirectory> shared, StoreName name, Directory directory,
        std::unique_ptr<FileLock> lock, Superblock superblock, bool is_new, std::uint64_t reserved_bytes,
        std::int64_t opened_s)
      : shared_(std::move(shared)),
        store_name_(std::move(name)),
        name_(store_name_.text()),
        directory_(std::move(directory)),
        lock_(std::move(lock)),
        superblock_(std::move(superblock)),
        is_new_(is_new),
        opened_s_(opened_s),
        reserved_bytes_(reserved_bytes) {}

  const Directory& directory() const override { return directory_; }
  const std::string& name() const override { return name_; }
  const Superblock& superblock() const override { return superblock_; }
  bool is_new() const override { return is_new_; }

  Status write_superblock(const Superblock& superblock) override {
    KVTIER_CHECK(superblock.fingerprint == superblock_.fingerprint);
    KVTIER_CHECK(superblock.class_strides == superblock_.class_strides);
    KVTIER_RETURN_IF_ERROR(directory_.replace_file(kSuperblockFile, encode_superblock(superblock)));
    superblock_ = superblock;
    return Status::ok();
  }

  Result<std::uint64_t> reserve(std::uint64_t bytes) override {
    const Result<std::unique_ptr<FileLock>> held = shared_->lock();
    if (!held) return held.status();
    StoreAccounts accounts(*shared_);
    KVTIER_RETURN_IF_ERROR(accounts.load());
    const Result<std::optional<std::uint64_t>> room = accounts.make_room(store_name_, bytes);
    if (!room) return room.status();
    StoreUse* own = accounts.find(store_name_);
    if (own == nullptr) return Status::io("the store " + directory_.path() + " was removed", ENOENT);
    own->granted_bytes = std::min(bytes, room.value().value_or(0));
    own->last_open_s = std::max(own->last_open_s, opened_s_);
    const std::uint64_t granted = own->granted_bytes;
    KVTIER_RETURN_IF_ERROR(accounts.save());
    reserved_bytes_.store(granted, std::memory_order_relaxed);
    return granted;
  }
  std::uint64_t reserved_bytes() const override { return reserved_bytes_.load(std::memory_order_relaxed); }

 private:
  const std::shared_ptr<const SharedDirectory> shared_;
  const StoreName store_name_;
  const std::string name_;
  const Directory directory_;
  const std::unique_ptr<FileLock> lock_;
  Superblock superblock_;
  const bool is_new_;
  const std::int64_t opened_s_;
  std::atomic<std::uint64_t> reserved_bytes_;
};

// Empties it but for its lock, the superblock first, and gives it a new identity.
Result<Superblock> make_anew(const Directory& store, const Fingerprint& fingerprint,
                             std::span<const std::uint64_t> class_strides) {
  KVTIER_RETURN_IF_ERROR(store.remove_tree(kSuperblockFile));  // whatever it is
  KVTIER_RETURN_IF_ERROR(store.sync());
  const Result<std::vector<std::string>> names = store.list();
  if (!names) return names.status();
  for (const std::string& name : names.value()) {
    if (name != kStoreLockFile) KVTIER_RETURN_IF_ERROR(store.remove_tree(name));
  }
  Superblock superblock;
  superblock.fingerprint = fingerprint;
  superblock.class_strides.assign(class_strides.begin(), class_strides.end());
  if (::getrandom(superblock.store.data(), superblock.store.size(), 0) !=
      static_cast<ssize_t>(superblock.store.size())) {
    const int error = errno;
    return Status::resource("no random bytes for a store's id: " + std::generic_category().message(error),
                            error);
  }
  KVTIER_RETURN_IF_ERROR(store.replace_file(kSuperblockFile, encode_superblock(superblock)));
  return superblock;
}

class RealStoreDirectory final : public StoreDirectory {
 public:
  explicit RealStoreDirectory(std::shared_ptr<const SharedDirectory> shared) : shared_(std::move(shared)) {}

  std::uint64_t capacity_bytes() const override { return shared_->capacity_bytes; }
  const Directory& root() const override { return shared_->root; }
  Result<std::uint64_t> allocated_bytes() const override { return shared_->root.allocated_bytes(); }

  Result<std::vector<StoreInfo>> stores() const override {
    StoreAccounts accounts(*shared_);
    KVTIER_RETURN_IF_ERROR(accounts.load());
    std::vector<StoreInfo> infos;
    for (const StoreUse& use : accounts.stores()) {
      StoreInfo info;
      info.name = use.name.text();
      info.in_use = use.in_use;
      info.granted_bytes = use.granted_bytes;
      info.allocated_bytes = use.allocated_bytes;
      info.last_open_s = use.last_open_s;
      const Result<Directory> store = shared_->stores.existing_subdirectory(info.name);
      if (!store) continue;  // removed meanwhile
      const Result<FoundSuperblock> found = find_superblock(store.value());
      if (!found) return found.status();
      info.readable = found.value().verdict == RecordVerdict::good;
      info.superblock = found.value().superblock;
      infos.push_back(std::move(info));
    }
    return infos;
  }

  Result<std::unique_ptr<StoreLease>> acquire(const Fingerprint& fingerprint,
                                              std::span<const std::uint64_t> class_strides,
                                              SecondProcess second_process) override {
    if (class_strides.empty() || class_strides.size() > kMaxStoreClasses ||
        std::find(class_strides.begin(), class_strides.end(), 0U) != class_strides.end()) {
      return Status::invalid_argument("a store has " + std::to_string(class_strides.size()) +
                                      " size classes; 1 to " + std::to_string(kMaxStoreClasses) +
                                      " are allowed, none of stride 0");
    }
    const Result<std::unique_ptr<FileLock>> held = shared_->lock();
    if (!held) return held.status();
    StoreAccounts accounts(*shared_);
    KVTIER_RETURN_IF_ERROR(accounts.load());

    const std::string prefix = store_name_prefix(fingerprint);
    for (const std::uint32_t number : numbers_of(accounts, prefix)) {
      Result<std::unique_ptr<StoreLease>> lease =
          try_existing(accounts, {prefix, number}, fingerprint, class_strides, second_process);
      if (!lease || lease.value() != nullptr) return lease;
    }
    return make_next(accounts, prefix, fingerprint, class_strides);
  }

 private:
  static std::vector<std::uint32_t> numbers_of(StoreAccounts& accounts, const std::string& prefix) {
    std::vector<std::uint32_t> numbers;
    for (const StoreUse& use : accounts.stores()) {
      if (use.name.prefix == prefix && !use.untouchable) numbers.push_back(use.name.number);
    }
    std::sort(numbers.begin(), numbers.end());
    return numbers;
  }

  // What try_existing() says of a store that is not to be taken.
  static std::unique_ptr<StoreLease> none() { return nullptr; }

  Result<std::unique_ptr<StoreLease>> try_existing(StoreAccounts& accounts, const StoreName& name,
                                                   const Fingerprint& fingerprint,
                                                   std::span<const std::uint64_t> class_strides,
                                                   SecondProcess second_process) {
    Result<Directory> store = shared_->stores.existing_subdirectory(name.text());
    if (!store) return store.status();
    Result<FoundSuperblock> found = find_superblock(store.value());
    if (!found) return found.status();
    const bool sound = found.value().verdict == RecordVerdict::good;
    if (found.value().verdict == RecordVerdict::newer_version) return none();
    if (sound && found.value().superblock.fingerprint != fingerprint) return none();
    Result<std::unique_ptr<FileLock>> lock = FileLock::try_lock(store.value(), kStoreLockFile);
    if (!lock) return lock.status();
    if (lock.value() == nullptr) {
      if (second_process == SecondProcess::next_store) return none();
      return Status::resource("the store " + store.value().path() +
                                  " is open in another process; a second one is refused as configured",
                              EBUSY);
    }
    // Its owner may have been writing it until now.
    found = find_superblock(store.value());
    if (!found) return found.status();
    const Superblock& superblock = found.value().superblock;
    if (found.value().verdict == RecordVerdict::good && superblock.fingerprint != fingerprint) return none();
    const bool usable = found.value().verdict == RecordVerdict::good &&
                        std::equal(superblock.class_strides.begin(), superblock.class_strides.end(),
                                   class_strides.begin(), class_strides.end());
    if (!usable) {
      Result<Superblock> anew = make_anew(store.value(), fingerprint, class_strides);
      if (!anew) return anew.status();
      found.value().superblock = std::move(anew).value();
    }
    return enter(accounts, name, std::move(store).value(), std::move(lock).value(), superblock, !usable);
  }

  Result<std::unique_ptr<StoreLease>> make_next(StoreAccounts& accounts, const std::string& prefix,
                                                const Fingerprint& fingerprint,
                                                std::span<const std::uint64_t> class_strides) {
    Result<StoreName> name = free_name(prefix);
    if (!name) return name.status();
    const Result<std::optional<std::uint64_t>> room = accounts.make_room(name.value(), 0);
    if (!room) return room.status();
    if (!room.value()) {
      return Status::resource(shared_->root.path() +
                              " has no room for another store within its capacity of " +
                              std::to_string(shared_->capacity_bytes) + " bytes");
    }
    Result<Directory> store = shared_->stores.subdirectory(name->text());
    if (!store) return store.status();
    Result<std::unique_ptr<FileLock>> lock = FileLock::try_lock(store.value(), kStoreLockFile);
    if (!lock) return lock.status();
    if (lock.value() == nullptr) {
      return Status::io("the new store " + store.value().path() +
                        " is locked by somebody who does not hold " + shared_->root.path() + "/" +
                        kRootLockFile);
    }
    Result<Superblock> superblock = make_anew(store.value(), fingerprint, class_strides);
    if (!superblock) return superblock.status();
    return enter(accounts, name.value(), std::move(store).value(), std::move(lock).value(),
                 std::move(superblock).value(), true);
  }

  // The first number that no entry of any kind has.
  Result<StoreName> free_name(const std::string& prefix) const {
    const Result<std::vector<std::string>> names = shared_->stores.list();
    if (!names) return names.status();
    StoreName name{prefix, 0};
    while (std::find(names.value().begin(), names.value().end(), name.text()) != names.value().end())
      ++name.number;
    return name;
  }

  Result<std::unique_ptr<StoreLease>> enter(StoreAccounts& accounts, const StoreName& name, Directory store,
                                            std::unique_ptr<FileLock> lock, const Superblock& superblock,
                                            bool is_new) {
    const Result<std::uint64_t> allocated = store.allocated_bytes();
    if (!allocated) return allocated.status();
    StoreUse* use = accounts.find(name);
    if (use == nullptr) use = &accounts.stores().emplace_back(StoreUse{name, 0, 0, 0, false, false});
    // What stands there is all it may have until it asks: its earlier grant may be another's since.
    const std::uint64_t granted = is_new ? 0 : grant_within(allocated.value());
    use->granted_bytes = granted;
    use->allocated_bytes = allocated.value();
    use->last_open_s = now_s();
    use->in_use = true;
    // Of a store that was there the owner's first reserve() saves it, which comes at once: two syncs less.
    if (is_new) KVTIER_RETURN_IF_ERROR(accounts.save());
    return std::unique_ptr<StoreLease>(new Lease(shared_, name, std::move(store), std::move(lock), superblock,
                                                 is_new, granted, use->last_open_s));
  }

  const std::shared_ptr<const SharedDirectory> shared_;
};

}  // namespace

Result<std::unique_ptr<StoreDirectory>> StoreDirectory::open(const std::string& path,
                                                             std::uint64_t capacity_bytes) {
  KVTIER_RETURN_IF_ERROR(check_path(path));
  if (capacity_bytes < kMinCapacityBytes) {
    return Status::invalid_argument("the capacity of " + path + " is " + std::to_string(capacity_bytes) +
                                    " bytes; at least " + std::to_string(kMinCapacityBytes) + " are needed");
  }
  Result<Directory> root = Directory::open_or_create(path);
  if (!root) return root.status();
  Result<std::optional<std::uint32_t>> version = read_version(root.value());  // before anything is touched
  if (!version) return version.status();
  const Result<std::unique_ptr<FileLock>> held = FileLock::lock(
      root.value(), kRootLockFile, std::chrono::steady_clock::now() + std::chrono::seconds(30));
  if (!held) return held.status();
  version = read_version(root.value());
  if (!version) return version.status();
  if (!version.value()) {
    const std::string text = std::string(kVersionPrefix) + std::to_string(kVersion) + "\n";
    KVTIER_RETURN_IF_ERROR(root.value().replace_file(kVersionFile, std::as_bytes(std::span(text))));
  }
  Result<Directory> stores = root.value().subdirectory(kStoresDirectory);
  if (!stores) return stores.status();
  auto shared = std::make_shared<const SharedDirectory>(
      SharedDirectory{std::move(root).value(), std::move(stores).value(), capacity_bytes});
  StoreAccounts accounts(*shared);
  KVTIER_RETURN_IF_ERROR(accounts.load());
  accounts.set_capacity(capacity_bytes);
  KVTIER_RETURN_IF_ERROR(accounts.save());
  return std::unique_ptr<StoreDirectory>(std::make_unique<RealStoreDirectory>(std::move(shared)));
}

}  // namespace kvtier
