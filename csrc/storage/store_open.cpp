// How a store finds itself: its files, its blocks, its threads.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <numeric>
#include <system_error>

#include "record_order.h"
#include "store_core.h"

namespace kvtier {
namespace {

constexpr char kBudgetFile[] = "budget";
constexpr std::uint32_t kMaxQueueDepth = 4096;
constexpr int kMostKeyLooks = 16;  // of the youngest openings; at older keys, whoever meets one says it
constexpr std::uint32_t kMaxOpenCounter = (1U << (64 - kSequenceBits)) - 1;
// By so many openings a superblock may be older than what was written: it was put back. Beyond, it is a lie,
// which would use up the counter.
constexpr std::uint32_t kMostOpeningsBehind = 1U << 16;

Status make_buffered(const BlockFile& file) {
  const int flags = ::fcntl(file.fd(), F_GETFL);
  if (flags < 0 || ::fcntl(file.fd(), F_SETFL, flags & ~O_DIRECT) != 0) {
    return Status::io("cannot leave direct I/O: " + std::generic_category().message(errno), errno);
  }
  return Status::ok();
}

std::uint64_t max_stride(const SlotStoreOptions& options) {
  std::uint64_t most = 0;
  for (const StoreClass& store_class : options.classes) most = std::max(most, store_class.slot_stride_bytes);
  return most;
}

}  // namespace

StoreCore::StoreCore(std::unique_ptr<StoreLease> lease, SlotStoreOptions options, OnFound on_found)
    : options_(std::move(options)),
      on_found_(std::move(on_found)),
      lease_(std::move(lease)),
      name_(lease_->name()),
      superblock_(lease_->superblock()),
      images_(superblock_.fingerprint, superblock_.store, options_.cipher),
      catalog_(
          [this](bool read_follows) -> Result<std::unique_ptr<Catalog>> {
            if (options_.make_catalog) return options_.make_catalog(lease_->directory());
            CatalogOptions catalog = options_.catalog;
            catalog.read_follows = read_follows;
            return open_catalog(lease_->directory().path(), catalog);
          },
          lease_->directory()),
      usable_(options_.classes.size()),
      table_(options_.classes.size()),
      bounce_(max_stride(options_)),
      dirty_(options_.classes.size()),
      file_slots_(options_.classes.size()),
      health_(options_.first_probe) {}

StoreCore::~StoreCore() = default;

Status StoreCore::validate(const StoreLease& lease, const SlotStoreOptions& options) {
  if (options.classes.empty()) return Status::invalid_argument("a slot store needs at least one size class");
  std::vector<std::uint64_t> strides;
  for (const StoreClass& store_class : options.classes) {
    const std::uint64_t stride = store_class.slot_stride_bytes;
    if (stride <= kSlotHeaderBytes || stride % kSlotAlignment != 0) {
      return Status::invalid_argument("slot_stride_bytes = " + std::to_string(stride) +
                                      ": allowed are multiples of 4096 above 4096");
    }
    strides.push_back(stride);
  }
  if (strides != lease.superblock().class_strides) {
    return Status::invalid_argument("the size classes are not those of the store " + lease.name());
  }
  if (options.queue_depth < 1 || options.queue_depth > kMaxQueueDepth) {
    return Status::invalid_argument("queue_depth = " + std::to_string(options.queue_depth) +
                                    ": allowed are 1 to 4096");
  }
  if (options.answer_within.count() <= 0) {
    return Status::invalid_argument("answer_within = " + std::to_string(options.answer_within.count()) +
                                    " ms: allowed are times above 0");
  }
  if (lease.superblock().open_counter >= kMaxOpenCounter) {
    return Status::unsupported("the store " + lease.name() + " was opened " +
                               std::to_string(kMaxOpenCounter) +
                               " times, which is as often as its generations can tell");
  }
  return Status::ok();
}

// While the ledger is synced: the helper starts, and its file is read (25 to 30 MB of 100,000 blocks).
void StoreCore::begin_opening_catalog() {
  try {
    catalog_opened_ = std::async(std::launch::async, [this] { return catalog_.open(); });
  } catch (const std::system_error&) {  // no thread for it: then in turn
    catalog_opened_ = std::async(std::launch::deferred, [this] { return catalog_.open(); });
  }
}

Status StoreCore::open_files(OpenReport& report) {
  std::uint64_t held = kOverheadBytes + options_.catalog.max_bytes;
  report.direct_io = options_.use_direct_io;
  for (std::uint32_t c = 0; c < options_.classes.size(); ++c) {
    Result<std::unique_ptr<BlockFile>> file =
        BlockFile::open(lease_->directory(), "slots." + std::to_string(c));
    if (!file) return file.status();
    const bool direct = file.value()->is_direct() && file.value()->alignment() <= kSlotAlignment;
    report.direct_io = report.direct_io && direct;
    if (file.value()->is_direct() && !(direct && options_.use_direct_io)) {
      KVTIER_RETURN_IF_ERROR(make_buffered(*file.value()));
    }
    // What the last opening could not bring to the drive may stand in the page cache, and look as if it were
    // there.
    if (!(direct && options_.use_direct_io) && !superblock_.clean) {
      static_cast<void>(::posix_fadvise(file.value()->fd(), 0, 0, POSIX_FADV_DONTNEED));
    }
    const Result<std::uint64_t> size = file.value()->size_bytes();
    if (!size) return size.status();
    file_slots_[c] = static_cast<std::uint32_t>(std::min<std::uint64_t>(
        size.value() / options_.classes[c].slot_stride_bytes, options_.classes[c].num_slots));
    if (size.value() > std::uint64_t{file_slots_[c]} * options_.classes[c].slot_stride_bytes) {
      oversized_ = true;
    }
    held += file_slots_[c] * options_.classes[c].slot_stride_bytes;
    files_.push_back(std::move(file.value()));
  }
  const Result<std::uint64_t> granted = lease_->reserve(held);
  if (!granted) return granted.status();
  KVTIER_RETURN_IF_ERROR(shrink_to_grant(granted.value()));
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    table_.grow(c, file_slots_[c]);
    usable_[c].store(file_slots_[c]);
  }
  zeros_ = make_aligned_buffer(kPrewriteBytes);
  probe_buffer_ = make_aligned_buffer(kSlotHeaderBytes);
  if (zeros_ == nullptr || probe_buffer_ == nullptr)
    return Status::resource("no memory for the store's buffers");
  const Result<std::uint64_t> allocated = lease_->directory().allocated_bytes();
  MutexLock lock(mutex_);
  stats_.capacity_bytes = lease_->reserved_bytes();
  if (allocated) stats_.allocated_bytes = allocated.value();
  return Status::ok();
}

// The directory's capacity, or the number of slots, may be less than it was: the files' ends go, and what
// stood there.
Status StoreCore::shrink_to_grant(std::uint64_t granted) {
  const auto bytes_of = [this](std::uint32_t c) {
    return std::uint64_t{file_slots_[c]} * options_.classes[c].slot_stride_bytes;
  };
  std::uint64_t held = kOverheadBytes + options_.catalog.max_bytes;
  for (std::uint32_t c = 0; c < files_.size(); ++c) held += bytes_of(c);
  while (held > granted) {
    std::uint32_t longest = 0;
    for (std::uint32_t c = 1; c < files_.size(); ++c) longest = bytes_of(c) > bytes_of(longest) ? c : longest;
    if (file_slots_[longest] == 0) break;
    const std::uint64_t stride = options_.classes[longest].slot_stride_bytes;
    const std::uint64_t excess =
        std::min<std::uint64_t>((held - granted + stride - 1) / stride, file_slots_[longest]);
    file_slots_[longest] -= static_cast<std::uint32_t>(excess);
    held -= excess * stride;
    oversized_ = true;
  }
  if (!oversized_) return Status::ok();
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    const Result<std::uint64_t> size = files_[c]->size_bytes();
    if (!size) return size.status();
    if (size.value() > bytes_of(c) && ::ftruncate(files_[c]->fd(), static_cast<off_t>(bytes_of(c))) != 0) {
      return Status::io("cannot shorten slots." + std::to_string(c) + " in " + name_ + ": " +
                            std::generic_category().message(errno),
                        errno);
    }
  }
  return Status::ok();
}

Result<std::unique_ptr<IoQueue>> StoreCore::make_queue(std::string* why_not) const {
  // What is read on demand need not wait for room behind writes.
  const std::uint32_t depth = std::min(kMaxQueueDepth, options_.queue_depth + options_.queue_depth / 8);
  if (options_.make_queue) return options_.make_queue(depth);
  IoQueueOptions queue;
  queue.depth = depth;
  return make_io_queue(queue, why_not);
}

// --- blocks ---

Status StoreCore::find_blocks(SlotStore::Opened& opened) {
  OpenReport& report = opened.report;
  open_counter_ = superblock_.open_counter;
  std::vector<CatalogRecord> records;
  const Result<std::uint64_t> found = adopt_catalog(records);
  const bool has_slots = std::any_of(file_slots_.begin(), file_slots_.end(), [](auto n) { return n > 0; });
  if (!has_slots || lease_->is_new()) {
    report.source = OpenReport::Source::fresh;
    if (!found || found.value() > 0) {
      forget_adopted();
      adopt_reset(catalog_.reset_with({}));
    }
  } else if (found && found.value() > 0) {
    report.source = OpenReport::Source::catalog;
    report.discarded += static_cast<std::uint32_t>(found.value() - records.size());
    find_unknown_keys(records);
    if (!superblock_.clean) plan_background_scan();
    opened.blocks = std::move(records);
  } else {
    report.source = OpenReport::Source::headers;
    report.why_rebuilt = found ? "the catalog is empty" : found.status().message();
    forget_adopted();
    KVTIER_RETURN_IF_ERROR(rebuild(opened));
    opened.blocks = table_.durable_records();
    adopt_reset(catalog_.reset_with(opened.blocks));
  }
  ++open_counter_;
  sort_by_use(opened.blocks);
  return Status::ok();
}

// Without a catalog that works the marker must stand before anything is said to be durable.
void StoreCore::adopt_reset(const Status& reset) {
  if (reset) {
    MutexLock lock(mutex_);
    ++stats_.catalog_resets;
    return;
  }
  catalog_lost_ = catalog_.mark_lost().is_ok();
  set_catalog_health("there is no catalog until it can be made again: " + reset.message());
}

bool StoreCore::is_likely(Generation generation) const {
  const std::uint64_t counter = static_cast<std::uint64_t>(generation) >> kSequenceBits;
  return generation != Generation{0} &&
         counter <= std::uint64_t{superblock_.open_counter} + kMostOpeningsBehind;
}

Verdict StoreCore::read_header(const std::byte* bytes, const SlotPlace& place, SlotHeader* header) const {
  const Verdict verdict = images_.read_header(bytes, place, header);
  return verdict == Verdict::good && !is_likely(header->generation) ? Verdict::corrupt_header : verdict;
}

bool StoreCore::is_sound(const CatalogRecord& record) const {
  const SlotPlace& place = record.place;
  return is_usable(place) && is_likely(record.generation) &&
         record.payload_bytes <= options_.classes[place.class_index].slot_stride_bytes - kSlotHeaderBytes;
}

// Takes what can be true of the catalog into the table and `blocks`: of two records that claim a place, the
// later writing. While the helper reads on. Returns how many there were.
Result<std::uint64_t> StoreCore::adopt_catalog(std::vector<CatalogRecord>& blocks) {
  KVTIER_RETURN_IF_ERROR(catalog_opened_.get());
  std::uint64_t found = 0;
  bool claimed_twice = false;
  const auto take = [&](const CatalogRecord& record) {
    if (!is_sound(record)) return;
    if (table_.at(record.place).content == SlotContent::durable) {
      claimed_twice = true;
      if (record.generation <= table_.at(record.place).generation) return;
    }
    table_.set_block(record, SlotContent::durable);
    const auto counter = static_cast<std::uint64_t>(record.generation) >> kSequenceBits;
    open_counter_ = std::max(open_counter_, static_cast<std::uint32_t>(counter));
    blocks.push_back(record);
  };
  const auto adopt = [&](std::span<const CatalogRecord> records, std::size_t expected) {
    constexpr std::size_t kAhead = 8;  // they stand in the order of their keys, their slots are anywhere
    found += records.size();
    blocks.reserve(std::min<std::size_t>(
        expected, std::accumulate(file_slots_.begin(), file_slots_.end(), std::size_t{0})));
    for (std::size_t i = 0; i < records.size(); ++i) {
      if (i + kAhead < records.size() && is_usable(records[i + kAhead].place)) {
        table_.fetch(records[i + kAhead].place);
      }
      take(records[i]);
    }
  };
  KVTIER_RETURN_IF_ERROR(catalog_.read(adopt));
  if (claimed_twice) {
    std::erase_if(blocks, [this](const CatalogRecord& record) {
      return record.generation != table_.at(record.place).generation;
    });
  }
  table_.set_uses(blocks);
  return found;
}

// What adopt_catalog() took is not to be believed.
void StoreCore::forget_adopted() {
  table_.clear();
  open_counter_ = superblock_.open_counter;
}

// The catalog names no keys, but an opening writes under one: the header of one of its blocks tells of all.
void StoreCore::find_unknown_keys(const std::vector<CatalogRecord>& records) {
  struct Opening {
    std::uint64_t blocks = 0;
    SlotPlace one;
  };
  std::map<std::uint64_t, Opening> openings;
  auto at = openings.end();  // in a catalog's order, too, neighbours are often of one
  for (const CatalogRecord& record : records) {
    const std::uint64_t counter = static_cast<std::uint64_t>(record.generation) >> kSequenceBits;
    if (at == openings.end() || at->first != counter) at = openings.try_emplace(counter).first;
    if (at->second.blocks++ == 0) at->second.one = record.place;
  }
  std::uint64_t unknown = 0;
  int looks = 0;
  for (auto each = openings.rbegin(); each != openings.rend() && looks < kMostKeyLooks; ++each, ++looks) {
    const SlotPlace& place = each->second.one;
    const ssize_t got = ::pread(files_[place.class_index]->fd(), probe_buffer_.get(), kSlotHeaderBytes,
                                static_cast<off_t>(offset_of(place)));
    SlotHeader header;
    if (got == static_cast<ssize_t>(kSlotHeaderBytes) &&
        images_.read_header(probe_buffer_.get(), place, &header) == Verdict::unknown_key) {
      unknown += each->second.blocks;
    }
  }
  if (unknown > 0) tell_unknown_key(std::to_string(unknown) + " of " + std::to_string(records.size()) + " ");
}

void StoreCore::plan_background_scan() {
  scan_ = std::make_unique<HeaderScan>();
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    for (std::uint32_t slot = 0; slot < file_slots_[c]; ++slot) {
      const SlotState& state = table_.at({c, SlotId{slot}});
      if (state.content == SlotContent::durable) {
        known_.insert({state.key, state.group});
      } else {
        scan_->add({c, SlotId{slot}});
      }
    }
  }
  MutexLock lock(mutex_);
  for (const std::uint32_t slots : file_slots_) claimed_.emplace_back(slots);
  scan_done_.store(false);
}

// --- the write budget ---

std::optional<SavedBudget> StoreCore::read_budget() {
  const Result<std::vector<std::byte>> bytes = lease_->directory().read_file(kBudgetFile);
  if (!bytes) return std::nullopt;
  SavedBudget budget;
  const RecordVerdict verdict = decode_budget(bytes.value(), budget);
  if (verdict == RecordVerdict::good) return budget;
  if (verdict == RecordVerdict::newer_version) {
    keeps_budget_ = false;
    log("its write budget is of a newer kvtier: it is left alone, and starts full");
  }
  return std::nullopt;
}

void StoreCore::save_budget(const SavedBudget& budget) {
  if (!keeps_budget_) return;
  committer_.run([this, bytes = encode_budget(budget)] {
    const Status saved = lease_->directory().replace_file(kBudgetFile, bytes);
    if (!saved) post([this, saved] { note_side_sync(saved); });
  });
}

// --- threads ---

Status StoreCore::start(OpenReport& report) {
  Result<std::unique_ptr<IoQueue>> queue = make_queue(&report.queue_problem);
  if (!queue) return queue.status();
  queue_ = std::move(queue.value());
  report.queue = queue_->description();
  {
    MutexLock lock(mutex_);
    stats_.queue = report.queue;
  }
  depth_ = queue_->depth();
  ops_.resize(2 * std::size_t{depth_});
  for (std::uint32_t i = 2 * depth_; i-- > 0;) free_ops_.push_back(i);
  usual_depth_ = std::min(depth_, options_.queue_depth);
  last_batch_at_ = TimePoint::clock::now();
  KVTIER_RETURN_IF_ERROR(committer_.start("kvtier-commit"));
  KVTIER_RETURN_IF_ERROR(grower_.start("kvtier-grow"));
  try {
    thread_ = std::thread([self = shared_from_this()] { self->run(); });
  } catch (const std::system_error& error) {
    return Status::resource(std::string("cannot start the disk's thread: ") + error.what(),
                            error.code().value());
  }
  return Status::ok();
}

}  // namespace kvtier
