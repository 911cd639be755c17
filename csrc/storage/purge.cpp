// Forgetting blocks of stores that nobody has open. The order is SlotStore::wipe()'s: headers, sync, catalog;
// a crash in between leaves catalog records whose slots prove nothing, which are misses.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <span>
#include <system_error>
#include <utility>

#include "aligned_buffers.h"
#include "slot_header.h"
#include "store_reader.h"

#include "kvtier/storage/verify.h"

namespace kvtier {
namespace {

constexpr char kCatalogFile[] = "catalog.mdb";
constexpr std::size_t kForgottenAtOnce = 4096;

bool is_ours(Verdict verdict, const slot_format::HeaderFields& fields,
             const std::optional<NamespaceTag>& name_space) {
  if (verdict == Verdict::blank || verdict == Verdict::newer_version) return false;
  if (!name_space) return true;
  return verdict == Verdict::good && fields.header.block.name_space == *name_space;
}

class Purge {
 public:
  Purge(const Directory& store, const std::optional<NamespaceTag>& name_space, PurgedStore& purged)
      : store_(store), name_space_(name_space), purged_(purged) {}

  Status run(const Superblock& superblock) {
    for (std::uint32_t c = 0; c < superblock.class_strides.size(); ++c) {
      KVTIER_RETURN_IF_ERROR(wipe_class(c, superblock.class_strides[c]));
    }
    return forgotten_.empty() ? Status::ok() : forget();
  }

 private:
  Status wipe_class(std::uint32_t class_index, std::uint64_t stride) {
    const std::string name = slot_file_name(class_index);
    Result<FileHandle> there = open_for_reading(store_, name);  // BlockFile::open() would make it
    if (!there) return there.status().native_code() == ENOENT ? Status::ok() : there.status();
    Result<std::unique_ptr<BlockFile>> file = BlockFile::open(store_, name);
    if (!file) return file.status();
    Result<std::uint64_t> size = (*file)->size_bytes();
    if (!size) return size.status();
    const AlignedBuffer header = make_aligned_buffer(kSlotHeaderBytes);
    const AlignedBuffer zeros = make_aligned_buffer(kSlotHeaderBytes);
    if (header == nullptr || zeros == nullptr) return Status::resource("no memory to purge " + name);
    const std::string path = store_.path() + "/" + name;
    for (std::uint64_t slot = 0; slot < *size / stride; ++slot) {
      Result<std::uint64_t> got = read_at(*there, slot * stride, {header.get(), kSlotHeaderBytes}, path);
      if (!got) return got.status();
      if (*got < kSlotHeaderBytes) break;
      slot_format::HeaderFields fields;
      const Verdict verdict =
          slot_format::decode(slot_format::ConstHeaderBytes(header.get(), kSlotHeaderBytes), fields);
      if (verdict == Verdict::newer_version) ++purged_.newer;
      if (!is_ours(verdict, fields, name_space_)) continue;
      KVTIER_RETURN_IF_ERROR(write_zeros(**file, slot * stride, zeros.get(), path));
      ++purged_.dropped;
      CatalogChange change;
      change.kind = CatalogChange::Kind::forget;
      change.record.place = {class_index, SlotId{static_cast<std::uint32_t>(slot)}};
      forgotten_.push_back(change);
    }
    if (::fdatasync((*file)->fd()) == 0) return Status::ok();
    return failure("syncing " + path);
  }

  static Status write_zeros(const BlockFile& file, std::uint64_t offset, const std::byte* zeros,
                            const std::string& path) {
    std::uint64_t done = 0;
    while (done < kSlotHeaderBytes) {
      const ssize_t n =
          ::pwrite(file.fd(), zeros + done, kSlotHeaderBytes - done, static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return failure("writing " + path + " at " + std::to_string(offset));
      done += static_cast<std::uint64_t>(n);
    }
    return Status::ok();
  }

  static Status failure(const std::string& what) {
    const int error = errno;
    return Status::io(what + ": " + std::generic_category().message(error), error);
  }

  // A catalog that cannot be opened or changed is removed: the next opening reads the headers.
  Status forget() {
    if (!open_for_reading(store_, kCatalogFile)) return Status::ok();
    const std::uint64_t bound = catalog_bound_bytes(std::uint64_t{1} << 20);
    CatalogOptions options;
    options.max_bytes = bound;
    Result<std::unique_ptr<Catalog>> catalog = open_catalog(store_.path(), options);
    if (catalog && (*catalog)->read_all() && forget_in(**catalog)) return Status::ok();
    KVTIER_RETURN_IF_ERROR(store_.remove_file(kCatalogFile));
    return store_.sync();
  }

  // In pieces: a transaction writes its pages anew, and may use those that the one before has left.
  bool forget_in(Catalog& catalog) const {
    std::span<const CatalogChange> left = forgotten_;
    while (!left.empty()) {
      const std::size_t n = std::min(left.size(), kForgottenAtOnce);
      if (!catalog.commit(left.first(n))) return false;
      left = left.subspan(n);
    }
    return true;
  }

  const Directory& store_;
  const std::optional<NamespaceTag>& name_space_;
  PurgedStore& purged_;
  std::vector<CatalogChange> forgotten_;
};

}  // namespace

Result<std::vector<PurgedStore>> purge_stores(const std::string& path,
                                              const std::optional<NamespaceTag>& name_space) {
  Result<FoundDirectory> found = find_directory(path);
  if (!found) return found.status();
  Result<std::vector<std::string>> names = found->stores.list();
  if (!names) return names.status();
  std::vector<PurgedStore> all;
  for (const std::string& name : *names) {
    if (!parse_store_name(name)) continue;
    Result<Directory> store = found->stores.existing_subdirectory(name);
    if (!store && store.status().native_code() == ENOENT) continue;  // removed meanwhile
    PurgedStore purged;
    purged.name = name;
    if (!store) {
      purged.not_purged = store.status().message();
      all.push_back(std::move(purged));
      continue;
    }
    Result<std::unique_ptr<FileLock>> lock = FileLock::try_lock(*store, kStoreLockFile);
    if (!lock) return lock.status();
    if (*lock == nullptr) {
      purged.in_use = true;
      purged.not_purged = "a process has it open";
    } else {
      Result<FoundSuperblock> superblock = find_superblock(*store);
      if (!superblock) return superblock.status();
      if (superblock->verdict == RecordVerdict::good) {
        KVTIER_RETURN_IF_ERROR(Purge(*store, name_space, purged).run(superblock->superblock));
      } else if (superblock->verdict == RecordVerdict::newer_version) {
        purged.not_purged = "it is of a newer kvtier";
      } else if (!superblock->why_unread.empty()) {
        purged.not_purged = "its superblock cannot be read now: " + superblock->why_unread;
      }  // else: the next opening makes it anew, nothing in it is ever served
    }
    all.push_back(std::move(purged));
  }
  return all;
}

}  // namespace kvtier
