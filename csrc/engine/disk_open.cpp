// Opening the disk tier, finding what it holds, and closing it.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <ctime>

#include "engine_impl.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kCatalogBytesPerSlot = 1536;  // catalog_bound_bytes()
// Of a registered part of the arena: told of in 15 ms, which requests in flight outlast.
constexpr std::uint64_t kBufferBytes = std::uint64_t{64} << 20;
constexpr std::uint64_t kFixedBytes = std::uint64_t{4} << 20;  // an empty catalog, superblock, directories

// How many slots of each class a drive holds: shared out as the host tier is.
std::vector<StoreClass> disk_classes(const EngineConfig& config, std::uint64_t capacity_bytes) {
  const ArenaGeometry host = config.geometry();
  std::vector<std::uint64_t> groups_of_class(host.classes.size(), 0);
  for (const std::size_t c : config.class_of_group()) ++groups_of_class[c];
  std::uint64_t bytes = 0;
  for (std::size_t c = 0; c < host.classes.size(); ++c) {
    bytes += groups_of_class[c] * (host.classes[c].slot_stride_bytes + kCatalogBytesPerSlot);
  }
  const std::uint64_t room = capacity_bytes > kFixedBytes ? capacity_bytes - kFixedBytes : 0;
  const std::uint64_t blocks = room / std::max<std::uint64_t>(bytes, 1);
  std::vector<StoreClass> classes;
  for (std::size_t c = 0; c < host.classes.size(); ++c) {
    const std::uint64_t slots = std::min<std::uint64_t>(blocks * groups_of_class[c], std::uint64_t{1} << 30);
    classes.push_back({host.classes[c].slot_stride_bytes, static_cast<std::uint32_t>(slots)});
  }
  return classes;
}

std::uint64_t least_capacity(const EngineConfig& config) {
  std::uint64_t bytes = kFixedBytes;
  for (const GroupSpec& group : config.groups) bytes += group.slot_stride_bytes() + kCatalogBytesPerSlot;
  return bytes;
}

const char* to_string(OpenReport::Source source) {
  switch (source) {
    case OpenReport::Source::fresh: return "fresh";
    case OpenReport::Source::catalog: return "catalog";
    case OpenReport::Source::headers: return "headers";
  }
  return "";
}

// One line on stderr every two seconds while a catalog is rebuilt, since open() waits for it; none for a
// rebuild that is shorter.
std::function<void(std::uint64_t, std::uint64_t)> rebuild_lines(const std::string& path) {
  static constexpr std::chrono::seconds kEvery{2};
  return [path, told = std::chrono::steady_clock::now()](std::uint64_t done, std::uint64_t total) mutable {
    const auto now = std::chrono::steady_clock::now();
    if (now - told < kEvery) return;
    told = now;
    std::fprintf(stderr, "kvtier: disk %s: its catalog is rebuilt from the slots: %llu of %llu read\n",
                 path.c_str(), static_cast<unsigned long long>(done), static_cast<unsigned long long>(total));
  };
}

}  // namespace

std::uint64_t EngineConfig::disk_bytes_for(std::uint64_t blocks) const {
  return kFixedBytes + blocks * (host_bytes_for(1) + groups.size() * kCatalogBytesPerSlot);
}

SlotStoreOptions EngineImpl::store_options(std::size_t disk) {
  SlotStoreOptions options;
  options.classes = disk_classes(config_, config_.disk.disks[disk].capacity_bytes);
  options.queue_depth = config_.disk.queue_depth;
  options.commit_interval = config_.disk.commit_interval;
  options.answer_within = config_.disk.answer_within;
  options.cipher = config_.disk.cipher;
  options.catalog.helper_path = config_.disk.catalog_helper;
  std::uint64_t slots = 0;
  for (const StoreClass& of : options.classes) slots += of.num_slots;
  options.catalog.max_bytes = catalog_bound_bytes(slots);
  options.on_progress = rebuild_lines(config_.disk.disks[disk].path);
  if (config_.disk.adjust) config_.disk.adjust(options, disk);
  return options;
}

// A drive that cannot be used is left out with one line; without any, the engine runs without a disk tier.
Status EngineImpl::open_disks() {
  const std::vector<DiskConfig>& disks = config_.disk.disks;
  if (disks.empty()) return Status::ok();

  struct OpenedDisk {
    DiskTier::Volume volume;
    std::vector<StoreClass> classes;
    std::vector<CatalogRecord> blocks;
    std::vector<SlotPlace> unusable;
  };
  for (const DiskConfig& disk : disks) {
    for (const StoreClass& of : disk_classes(config_, disk.capacity_bytes)) {
      if (of.num_slots > 0) continue;
      return Status::invalid_argument("disk " + disk.path + ": capacity is " +
                                      std::to_string(disk.capacity_bytes) + " bytes; allowed: at least " +
                                      std::to_string(least_capacity(config_)) +
                                      " (one block of every group, and the catalog)");
    }
  }
  std::vector<OpenedDisk> opened;
  std::uint64_t capacity_bytes = 0;
  std::optional<SavedBudget> last_saved;
  for (std::size_t d = 0; d < disks.size(); ++d) {
    const auto volume = static_cast<std::uint32_t>(opened.size());
    std::string store_name;
    Result<SlotStore::Opened> store = [&]() -> Result<SlotStore::Opened> {
      Result<std::unique_ptr<StoreDirectory>> directory =
          StoreDirectory::open(disks[d].path, disks[d].capacity_bytes);
      if (!directory) return directory.status();
      SlotStoreOptions options = store_options(d);
      std::vector<std::uint64_t> strides;
      strides.reserve(options.classes.size());
      for (const StoreClass& of : options.classes) strides.push_back(of.slot_stride_bytes);
      Result<std::unique_ptr<StoreLease>> lease =
          (*directory)->acquire(config_.disk.fingerprint, strides, config_.disk.second_process);
      if (!lease) return lease.status();
      store_name = (*lease)->name();
      return SlotStore::open(std::move(*lease), std::move(options),
                             [this, volume](const CatalogRecord& found) {
                               std::function<void(const Status&)> on_durable;
                               contained([&] { on_durable = on_found(volume, found); });
                               return on_durable;
                             });
    }();
    if (!store) {
      const Status status = store.status();
      // What the user got wrong is theirs to mend; what the machine lacks is lived without.
      const bool refused = status.code() == StatusCode::resource && status.native_code() == EBUSY;
      if (status.code() == StatusCode::invalid_argument || status.code() == StatusCode::unsupported ||
          refused) {
        return status;
      }
      std::fprintf(stderr, "kvtier: disk %s is left out: %s\n", disks[d].path.c_str(),
                   status.message().c_str());
      left_out_disks_.emplace_back(disks[d].path, status.message());
      continue;
    }
    capacity_bytes += disks[d].capacity_bytes;
    // The youngest is that of all; of one time, the least.
    const std::optional<SavedBudget> saved = store->budget;
    if (saved && (!last_saved || std::pair(-saved->at_s, saved->left_bytes) <
                                     std::pair(-last_saved->at_s, last_saved->left_bytes))) {
      last_saved = saved;
    }
    OpenedDisk next;
    next.volume.path = disks[d].path;
    next.volume.store_name = std::move(store_name);
    next.volume.store = std::move(store->store);
    next.volume.report = std::move(store->report);
    next.classes = disk_classes(config_, disks[d].capacity_bytes);
    next.blocks = std::move(store->blocks);
    next.unusable = std::move(store->unusable);
    opened.push_back(std::move(next));
  }
  if (opened.empty()) return Status::ok();

  TierIndex::Options options;
  options.num_volumes = static_cast<std::uint32_t>(opened.size());
  options.class_of_group = class_of_group_;
  options.hash_seed = hash_seed_;
  options.eviction = config_.disk.eviction;
  for (const StoreClass& of : opened.front().classes) options.block_bytes.push_back(of.slot_stride_bytes);
  for (const OpenedDisk& disk : opened) {
    for (const StoreClass& of : disk.classes) options.slots_per_class.push_back(of.num_slots);
  }
  std::uint32_t host_slots = 0;
  {
    MutexLock lock(mutex_);
    for (std::size_t c = 0; c < tier_.num_classes(); ++c) host_slots += tier_.slots(c).capacity();
  }
  std::optional<std::uint64_t> budget = config_.disk.write_bytes_per_day.value_or(capacity_bytes);
  if (*budget == 0) budget.reset();
  auto disk = std::make_unique<DiskTier>(options, config_.disk.admission,
                                         KeptBudget(budget, last_saved, std::time(nullptr), clock_->now_us()),
                                         host_slots);
  for (OpenedDisk& each : opened) disk->volumes.push_back(std::move(each.volume));
  {
    MutexLock lock(mutex_);
    disk_ = std::move(disk);
    tier_.tell_uses_to(disk_->admission_policy.observer());
  }
  open_ghosts();
  for (std::uint32_t v = 0; v < opened.size(); ++v) {
    SlotStore& store = *disk_->volumes[v].store;
    const auto grow = [this, v](std::uint32_t class_index, std::uint32_t usable) {
      contained([&] {
        {
          MutexLock lock(mutex_);
          disk_->index.slots(v * disk_->index.classes_per_volume() + class_index).grow(usable);
        }
        pump_write_backs();
      });
    };
    store.on_grown(grow);
    for (std::uint32_t c = 0; c < opened[v].classes.size(); ++c) grow(c, store.usable_slots(c));
    {
      MutexLock lock(mutex_);
      for (const SlotPlace& place : opened[v].unusable) {  // of a later version: left alone for good
        SlotPool& slots = disk_->index.slots(v * disk_->index.classes_per_volume() + place.class_index);
        if (slots.take_at(place.slot)) slots.step(place.slot, SlotState::leaving);
      }
    }
    adopt_blocks(v, opened[v].blocks);
  }
  // What the scans after an unclean end have found meanwhile, until there is no more of it.
  while (true) {
    std::vector<Found> early;
    {
      MutexLock lock(mutex_);
      early.swap(found_early_);
      takes_found_ = early.empty();
    }
    if (early.empty()) break;
    for (const Found& each : early) adopt_blocks(each.volume, {&each.block, 1}, each.write_back);
  }
  return Status::ok();
}

Entry* EngineImpl::restore_block(std::uint32_t volume, const CatalogRecord& block) {
  const std::size_t group = raw(block.block.group);
  if (group >= config_.groups.size() || block.place.class_index != class_of_group_[group] ||
      block.payload_bytes != config_.groups[group].payload_bytes()) {
    return nullptr;
  }
  TierIndex& index = disk_->index;
  if (raw(block.place.slot) >= index.slots(index.class_of(block.block.group, volume)).capacity())
    return nullptr;
  return index.restore(block.block.key, block.block.group, intern_tag(block.block.name_space),
                       block.block.depth, volume, block.place.slot);
}

// Returns what is called once the block is durable, or cannot become so.
std::function<void(const Status&)> EngineImpl::on_found(std::uint32_t volume, const CatalogRecord& block) {
  const Found found{volume, block, std::make_shared<WriteBack>()};
  found.write_back->key = block.block.key;
  found.write_back->volume = volume;
  found.write_back->step = WriteBack::Step::written;
  bool now = false;
  {
    MutexLock lock(mutex_);
    now = takes_found_;
    if (!now) found_early_.push_back(found);
  }
  if (now) adopt_blocks(volume, {&block, 1}, found.write_back);
  return [this, write_back = found.write_back](const Status& status) {
    contained([&] { on_found_durable(write_back, status); });
  };
}

void EngineImpl::note_found(const std::shared_ptr<WriteBack>& found, Entry& entry) {
  found->disk = disk_->index.index().id(entry);
  found->disk_generation = entry.generation;
  if (found->step == WriteBack::Step::written) {
    disk_->found[raw(found->disk)] = found;
    DiskTier::Volume& volume = disk_->volumes[found->volume];
    ++volume.undurable;
    volume.flush_failed = false;
  } else if (found->failed) {
    lose_undurable(*found);
  }
}

void EngineImpl::on_found_durable(const std::shared_ptr<WriteBack>& found, const Status& status) {
  Settled settled;
  {
    MutexLock lock(mutex_);
    found->failed = !status;
    if (found->disk_generation == 0) {      // the engine is being opened (note_found() looks then), or it is
      found->step = WriteBack::Step::over;  // a copy that nobody wants
      return;
    }
    if (!status) lose_undurable(*found);
    const auto at = disk_->found.find(raw(found->disk));
    if (at != disk_->found.end() && at->second == found) disk_->found.erase(at);
    --disk_->volumes[found->volume].undurable;
    // It counts as written back where somebody has stored it since, and waits for it.
    std::uint64_t EngineStats::* counter = status ? &EngineStats::disk_durable : &EngineStats::disk_failed;
    if (found->trackers.empty()) counter = nullptr;
    end_write_back(*found, status.is_ok(), counter, status, settled);
  }
  settle_durable(settled);
}

// One group after another, so that their parents are looked up in one go.
void EngineImpl::link_restored(std::span<const CatalogRecord> blocks, std::span<Entry* const> entries) {
  TierIndex& index = disk_->index;
  for (std::size_t g = 0; g < config_.groups.size(); ++g) {
    const GroupId group{static_cast<std::uint16_t>(g)};
    std::vector<BlockKey> parents;
    std::vector<Entry*> children;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      const BlockIdentity& block = blocks[i].block;
      if (entries[i] == nullptr || block.group != group || !block.parent) continue;
      parents.push_back(*block.parent);
      children.push_back(entries[i]);
    }
    index.index().find_each(parents, group, [&](std::size_t i, Entry* parent) {
      if (parent != nullptr && parent != children[i]) index.link_parent(*children[i], *parent);
    });
  }
}

// Blocks found at open(), least recently used first; or one that the scan after an unclean end has `found`.
void EngineImpl::adopt_blocks(std::uint32_t volume, std::span<const CatalogRecord> blocks,
                              const std::shared_ptr<WriteBack>& found) {
  std::vector<OwedWipe> unwanted;
  {
    MutexLock lock(mutex_);
    TierIndex& index = disk_->index;
    std::vector<Entry*> entries;
    entries.reserve(blocks.size());
    constexpr std::size_t kAhead = 8;
    for (std::size_t i = 0; i < blocks.size(); ++i) {
      if (i + kAhead < blocks.size()) {
        const BlockIdentity& soon = blocks[i + kAhead].block;
        index.index().fetch(soon.key, soon.group);
      }
      const CatalogRecord& block = blocks[i];
      Entry* entry = restore_block(volume, block);
      entries.push_back(entry);
      if (entry != nullptr) note_ghosts(block.block.key, block.block.group, &Ghosts::restore);
      // A second copy of a block, or one that does not fit this engine, is of no use, and would come back
      // after a drop. A slot that is taken is being overwritten anyhow.
      if (entry == nullptr && block.place.class_index < index.classes_per_volume()) {
        SlotPool& slots = index.slots(volume * index.classes_per_volume() + block.place.class_index);
        if (raw(block.place.slot) < slots.capacity() && slots.take_at(block.place.slot)) {
          slots.step(block.place.slot, SlotState::leaving);
          unwanted.push_back({block.place, std::nullopt, /*pinned=*/false});
          ++disk_->doomed;
        }
      }
    }
    link_restored(blocks, entries);
    if (found && entries.front() != nullptr) note_found(found, *entries.front());
  }
  for (const OwedWipe& wipe : unwanted) wipe_doomed(volume, wipe);
}

// Tells the drives of the parts of the arena that are prefaulted: whole slots, about kBufferBytes each.
void EngineImpl::offer_buffers() {
  std::vector<std::span<std::byte>> buffers;
  {
    MutexLock lock(mutex_);
    if (!disk_ || closing_) return;  // it is being opened, and asked again behind that; or all is over
    const ArenaGeometry& geometry = arena_->geometry();
    disk_->buffered_slots.resize(geometry.classes.size());
    for (std::size_t c = 0; c < geometry.classes.size(); ++c) {
      const ArenaClass& of = geometry.classes[c];
      const auto each = static_cast<std::uint32_t>(
          std::clamp<std::uint64_t>(kBufferBytes / of.slot_stride_bytes, 1, of.num_slots));
      std::uint32_t& begin = disk_->buffered_slots[c];
      while (begin < of.num_slots) {
        const std::uint32_t end = begin + std::min(each, of.num_slots - begin);
        if (end > tier_.slots(c).usable()) break;
        buffers.emplace_back(arena_->slot(c, SlotId{begin}), (end - begin) * of.slot_stride_bytes);
        begin = end;
      }
    }
  }
  if (buffers.empty()) return;
  for (const DiskTier::Volume& volume : disk_->volumes) volume.store->add_buffers(buffers);
}

Status EngineImpl::close_disks(Deadline deadline) {
  std::optional<SavedBudget> budget;
  {
    MutexLock lock(mutex_);
    budget = disk_->budget.at_close(std::time(nullptr));
  }
  if (budget) save_budget(*budget);
  wipe_what_is_owed();
  Status worst;
  for (DiskTier::Volume& volume : disk_->volumes) {
    const Status status = volume.store->close(deadline);
    if (status.code() == StatusCode::timeout) return status;
    drives_hold_memory_ = drives_hold_memory_ || volume.store->stats().in_flight > 0;
    if (!status && worst) worst = status;
  }
  if (!worst) std::fprintf(stderr, "kvtier: closing the disk tier: %s\n", worst.message().c_str());
  return Status::ok();  // what could not be committed is a miss of the next opening, not a failure of this
                        // one
}

void EngineImpl::add_disk_stats(EngineStats& stats) {
  for (const auto& [path, why] : left_out_disks_) {
    DiskStats left_out;
    left_out.path = path;
    left_out.health = "left out: " + why;
    stats.disks.push_back(std::move(left_out));
  }
  if (!disk_) return;
  const ArenaGeometry geometry = config_.geometry();
  for (std::size_t v = 0; v < disk_->volumes.size(); ++v) {
    const DiskTier::Volume& volume = disk_->volumes[v];
    const StoreStats store = volume.store->stats();
    DiskStats disk;
    disk.path = volume.path;
    disk.store = volume.store_name;
    for (std::size_t c = 0; c < disk_->index.classes_per_volume(); ++c) {
      const SlotPool& slots = disk_->index.slots(v * disk_->index.classes_per_volume() + c);
      const SlotPool::Counts counts = slots.counts();
      disk.classes.push_back({geometry.classes[c].slot_stride_bytes, slots.capacity(), slots.usable(),
                              counts.free, counts.filling, counts.ready, counts.leaving});
    }
    disk.capacity_bytes = store.capacity_bytes;
    disk.allocated_bytes = store.allocated_bytes;
    disk.bytes_read = store.bytes_read;
    disk.bytes_written = store.bytes_written;
    disk.bytes_prewritten = store.bytes_prewritten;
    disk.reads = store.reads;
    disk.reads_good = store.reads_good;
    disk.reads_failed = store.reads_failed;
    const auto of = [&store](Verdict verdict) { return store.verdicts[static_cast<std::size_t>(verdict)]; };
    disk.bad_blank = of(Verdict::blank);
    disk.bad_foreign = of(Verdict::foreign);
    disk.bad_newer_version = of(Verdict::newer_version);
    disk.bad_corrupt_header = of(Verdict::corrupt_header);
    disk.bad_corrupt_payload = of(Verdict::corrupt_payload);
    disk.bad_stale = of(Verdict::stale);
    disk.bad_unknown_key = of(Verdict::unknown_key);
    disk.writes = store.writes;
    disk.writes_failed = store.writes_failed;
    disk.syncs = store.syncs;
    disk.commits = store.commits;
    disk.catalog_resets = store.catalog_resets;
    disk.unanswered = store.unanswered;
    disk.opened_from = to_string(volume.report.source);
    if (!volume.report.why_rebuilt.empty()) disk.opened_from += ": " + volume.report.why_rebuilt;
    disk.queue = store.queue;
    disk.buffers_problem = store.buffers_problem;
    disk.key_problem = store.key_problem;
    disk.queue_problem = volume.report.queue_problem;
    disk.growth = store.growth;
    disk.health = store.health;
    disk.catalog_health = store.catalog_health;
    stats.disks.push_back(std::move(disk));
  }
  stats.disk_evictions = disk_->index.evictions();
  stats.disk_orphans = disk_->index.orphans();
  stats.disk_waiting = static_cast<std::uint32_t>(disk_->by_host.size() + disk_->undurable.size());
  stats.promotions_running = static_cast<std::uint32_t>(disk_->promotions.size());
  stats.write_budget_left_bytes = disk_->budget.left_bytes();
}

}  // namespace kvtier
