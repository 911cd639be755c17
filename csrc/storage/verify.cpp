#include "kvtier/storage/verify.h"

#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "aligned_buffers.h"
#include "store_reader.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kReadBytes = std::uint64_t{8} << 20;
// A slot of a store in use that proves nothing is looked at again: a write takes less.
constexpr int kSecondLooks = 5;
constexpr std::chrono::milliseconds kBetweenLooks{20};

void count(Verdict verdict, SlotCounts& slots) {
  switch (verdict) {
    case Verdict::good: ++slots.good; break;
    case Verdict::blank: ++slots.free; break;
    case Verdict::foreign:
    case Verdict::stale: ++slots.foreign; break;
    case Verdict::newer_version: ++slots.newer; break;
    case Verdict::corrupt_header:
    case Verdict::corrupt_payload: ++slots.corrupt; break;
    case Verdict::unknown_key: ++slots.unreadable; break;
  }
}

std::uint64_t size_of(const FileHandle& file) {
  struct stat status{};
  return ::fstat(file.fd(), &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : 0;
}

// Total is what the files of all stores have that are to be read.
struct Progress {
  std::uint64_t done = 0;
  std::uint64_t total = 0;
};

class StoreSurveyor {
 public:
  StoreSurveyor(const Directory& directory, StoreSurvey& survey, const SurveyOptions& options,
                Progress& progress)
      : directory_(directory),
        survey_(survey),
        options_(options),
        progress_(progress),
        images_(survey.superblock.fingerprint, survey.superblock.store, options.cipher) {}

  Status read() {
    for (std::uint32_t c = 0; c < survey_.superblock.class_strides.size(); ++c) {
      KVTIER_RETURN_IF_ERROR(read_class(c, survey_.superblock.class_strides[c]));
    }
    return Status::ok();
  }

 private:
  Status read_class(std::uint32_t class_index, std::uint64_t stride) {
    const std::string name = slot_file_name(class_index);
    Result<FileHandle> file = open_for_reading(directory_, name);
    if (!file) return file.status().native_code() == ENOENT ? Status::ok() : file.status();
    const std::uint64_t slots = size_of(*file) / stride;
    const bool headers_only = options_.depth == SurveyDepth::headers;
    const std::uint64_t at_once = headers_only ? 1 : std::max<std::uint64_t>(1, kReadBytes / stride);
    const std::uint64_t each = headers_only ? kSlotHeaderBytes : stride;
    const AlignedBuffer buffer = make_aligned_buffer(at_once * each);
    const AlignedBuffer plain = images_.encrypts() && !headers_only ? make_aligned_buffer(stride) : nullptr;
    if (buffer == nullptr || (images_.encrypts() && !headers_only && plain == nullptr)) {
      return Status::resource("no memory for " + std::to_string(at_once * each) + " bytes of " + name);
    }
    for (std::uint64_t first = 0; first < slots; first += at_once) {
      const std::uint64_t n = std::min(at_once, slots - first);
      Result<std::uint64_t> got =
          read_at(*file, first * stride, {buffer.get(), n * each}, directory_.path() + "/" + name);
      for (std::uint64_t i = 0; i < n; ++i) {
        const SlotPlace place{class_index, SlotId{static_cast<std::uint32_t>(first + i)}};
        if (got && *got >= (i + 1) * each) {
          judge(*file, place, buffer.get() + i * each, plain.get(), stride, each);
        } else {
          judge_alone(*file, place, buffer.get(), plain.get(), stride, each);
        }
      }
      survey_.read_bytes += n * each;
      progress_.done += n * stride;
      if (options_.go_on && !options_.go_on(progress_.done, std::max(progress_.done, progress_.total))) {
        return Status::closed("the survey was ended");
      }
    }
    return Status::ok();
  }

  // One slot that a drive cannot read must not hide its neighbours.
  void judge_alone(const FileHandle& file, const SlotPlace& place, std::byte* image, std::byte* plain,
                   std::uint64_t stride, std::uint64_t bytes) {
    Result<std::uint64_t> got = read_at(file, std::uint64_t{raw(place.slot)} * stride, {image, bytes},
                                        slot_file_name(place.class_index));
    if (!got || *got < bytes) {
      ++survey_.slots.failed;
      return;
    }
    judge(file, place, image, plain, stride, bytes);
  }

  void judge(const FileHandle& file, const SlotPlace& place, std::byte* image, std::byte* plain,
             std::uint64_t stride, std::uint64_t bytes) {
    SlotHeader header;
    Verdict verdict = verdict_of(place, image, plain, stride, header);
    for (int look = 0; survey_.in_use && look < kSecondLooks && is_corrupt(verdict); ++look) {
      std::this_thread::sleep_for(kBetweenLooks);
      Result<std::uint64_t> got = read_at(file, std::uint64_t{raw(place.slot)} * stride, {image, bytes},
                                          slot_file_name(place.class_index));
      if (!got || *got < bytes) break;
      verdict = verdict_of(place, image, plain, stride, header);
    }
    count(verdict, survey_.slots);
    if (verdict == Verdict::good && options_.on_block) options_.on_block(survey_, header);
  }

  static bool is_corrupt(Verdict verdict) {
    return verdict == Verdict::corrupt_header || verdict == Verdict::corrupt_payload;
  }

  Verdict verdict_of(const SlotPlace& place, std::byte* image, std::byte* plain, std::uint64_t stride,
                     SlotHeader& header) const {
    if (options_.depth == SurveyDepth::headers) return images_.read_header(image, place, &header);
    return images_.open(plain != nullptr ? plain : image, image, stride, place, nullptr, GroupId{0},
                        Generation{0}, &header);
  }

  const Directory& directory_;
  StoreSurvey& survey_;
  const SurveyOptions& options_;
  Progress& progress_;
  const SlotImages images_;
};

std::string reason_not_to_read(const StoreSurvey& store, const SurveyOptions& options) {
  if (!store.readable) return "its superblock cannot be read";
  if (options.depth == SurveyDepth::superblocks) return "not asked for";
  if (store.in_use && options.in_use == StoresInUse::skip) return "a process has it open";
  return {};
}

std::uint64_t bytes_to_read(const Directory& store, const Superblock& superblock) {
  std::uint64_t bytes = 0;
  for (std::size_t c = 0; c < superblock.class_strides.size(); ++c) {
    Result<FileHandle> file = open_for_reading(store, slot_file_name(c));
    if (file) bytes += size_of(*file) / superblock.class_strides[c] * superblock.class_strides[c];
  }
  return bytes;
}

}  // namespace

Result<DirectorySurvey> survey_stores(const std::string& path, const SurveyOptions& options) {
  Result<FoundDirectory> found = find_directory(path);
  if (!found) return found.status();
  DirectorySurvey survey;
  survey.capacity_bytes = found->ledger.capacity_bytes;
  Result<std::uint64_t> allocated = found->root.allocated_bytes();
  if (!allocated) return allocated.status();
  survey.allocated_bytes = *allocated;
  Result<std::vector<std::string>> names = found->stores.list();
  if (!names) return names.status();
  std::vector<Directory> directories;
  Progress progress;
  for (const std::string& name : *names) {
    if (!parse_store_name(name)) continue;
    Result<Directory> directory = found->stores.existing_subdirectory(name);
    if (!directory) continue;  // removed meanwhile
    Result<FoundSuperblock> superblock = find_superblock(*directory);
    if (!superblock) return superblock.status();
    StoreSurvey store;
    store.name = name;
    Result<bool> locked = FileLock::is_locked(*directory, kStoreLockFile);
    store.in_use = locked && *locked;
    store.readable = superblock->verdict == RecordVerdict::good;
    store.superblock = superblock->superblock;
    if (Result<std::uint64_t> bytes = directory->allocated_bytes()) store.allocated_bytes = *bytes;
    const auto& entries = found->ledger.entries;
    const auto entry = std::ranges::find(entries, name, &LedgerEntry::store);
    if (entry != entries.end()) {
      store.granted_bytes = entry->granted_bytes;
      store.last_open_s = entry->last_open_s;
    }
    store.not_read = reason_not_to_read(store, options);
    if (store.not_read.empty()) progress.total += bytes_to_read(*directory, store.superblock);
    survey.stores.push_back(std::move(store));
    directories.push_back(std::move(*directory));
  }
  for (std::size_t i = 0; i < survey.stores.size(); ++i) {
    StoreSurvey& store = survey.stores[i];
    if (!store.not_read.empty()) continue;
    KVTIER_RETURN_IF_ERROR(StoreSurveyor(directories[i], store, options, progress).read());
  }
  return survey;
}

Result<std::vector<CatalogRecord>> read_catalog(const std::string& directory_path,
                                                const std::string& helper_path) {
  struct stat status{};
  const std::string file = directory_path + "/catalog.mdb";
  if (::lstat(file.c_str(), &status) != 0) return Status::io(file + " is not there", errno);
  CatalogOptions options;
  options.helper_path = helper_path;
  // It is only read, but the map must hold all of it.
  options.max_bytes =
      std::max<std::uint64_t>(kMinCatalogBytes, 2 * static_cast<std::uint64_t>(status.st_size));
  Result<std::unique_ptr<Catalog>> catalog = open_catalog(directory_path, options);
  if (!catalog) return catalog.status();
  return (*catalog)->read_all();
}

}  // namespace kvtier
