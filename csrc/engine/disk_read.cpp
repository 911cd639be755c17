// disk -> host: loads and prefetches of blocks that are on disk alone.
//
// A promotion is shared: whoever wants a block that is being read waits for the same read. A load goes on to
// the pages in parts, while later blocks are still being read. A read that fails or does not verify is a miss
// for all who waited, and the disk forgets the block.
#include <algorithm>

#include "engine_impl.h"

#include "kvtier/core/ordering.h"

namespace kvtier {
namespace {

// The next push_back() does not throw.
template <typename T>
void make_room(std::vector<T>& list) {
  if (list.size() == list.capacity()) list.reserve(2 * list.size() + 8);
}

constexpr std::size_t kReadsPerHold = 256;
// A load from disk goes on to the pages in parts. The first is whatever arrives first, each of the others
// twice as much as the one before, up to this: large enough for a batch of copies, small enough that the
// copies overlap with the reads behind them.
constexpr std::uint64_t kLargestPartBytes = std::uint64_t{4} << 20;

}  // namespace

std::uint64_t EngineImpl::readable_volumes() const {
  std::uint64_t readable = 0;
  for (std::size_t v = 0; v < disk_->volumes.size(); ++v) {
    if (disk_->volumes[v].store->can_read()) readable |= std::uint64_t{1} << v;
  }
  return readable;
}

Entry* EngineImpl::find_on_disk(const BlockKey& key, GroupId group, std::uint64_t readable) {
  Entry* entry = disk_->index.index().find(key, group);
  if (entry == nullptr || entry->state != SlotState::ready) return nullptr;
  return ((readable >> entry->volume) & 1) != 0 ? entry : nullptr;
}

bool EngineImpl::promote(const std::shared_ptr<Operation>& operation, std::uint32_t i, const BlockKey& key,
                         GroupId group, ReadPriority priority, std::uint64_t readable, Reads& reads) {
  if (Entry* filling = tier_.index().find(key, group)) {
    const auto found = disk_->promotions.find(raw(tier_.index().id(*filling)));
    if (found == disk_->promotions.end() || found->second->cancelled) return false;
    Promotion& running = *found->second;
    make_room(running.waiting);
    make_room(reads.hurry);
    if (priority == ReadPriority::demand && running.priority == ReadPriority::prefetch) {
      running.priority = ReadPriority::demand;
      tier_.arrive(*filling);
      if (running.job) {
        reads.hurry.emplace_back(running.volume, *running.job);
      }
    }
    running.waiting.emplace_back(operation, i);
    ++operation->pipeline->reads_left;
    return true;
  }
  Entry* on_disk = find_on_disk(key, group, readable);
  return on_disk != nullptr && begin_read(operation, i, *on_disk, priority, reads);
}

// All or nothing: out of memory is a miss, and leaves no slot reserved that nobody reads into.
bool EngineImpl::begin_read(const std::shared_ptr<Operation>& operation, std::uint32_t i, Entry& on_disk,
                            ReadPriority priority, Reads& reads) {
  const BlockKey key = on_disk.key;
  const GroupId group = on_disk.group;
  const std::size_t class_index = class_of_group_[raw(group)];
  const auto promotion = std::make_shared<Promotion>();
  promotion->disk = disk_->index.index().id(on_disk);
  promotion->volume = on_disk.volume;
  promotion->priority = priority;
  promotion->waiting.emplace_back(operation, i);
  DiskRead next;
  next.volume = on_disk.volume;
  next.promotion = promotion;
  next.read.place = {static_cast<std::uint32_t>(class_index), on_disk.slot};
  next.read.key = key;
  next.read.group = group;
  next.read.priority = priority;
  next.read.on_done = [this, promotion](const ReadOutcome& outcome) {
    contained([&] { on_read(promotion, outcome); });
  };
  next.read.on_let_go = [this, promotion] { contained([&] { on_read_let_go(*promotion); }); };
  make_room(reads.begin);

  Entry* above = disk_->index.index().parent(on_disk);
  Entry* parent = above == nullptr ? nullptr : tier_.index().find(above->key, above->group);
  disk_->index.pin(on_disk);
  const TierIndex::Reservation place =
      tier_.reserve(key, group, on_disk.name_space, on_disk.depth, parent, /*volume=*/0, on_disk.priority,
                    priority == ReadPriority::prefetch ? Arrival::ahead : Arrival::used);
  if (place.outcome != ReserveOutcome::reserved) {
    disk_->index.unpin(on_disk);
    ++counters_.promote_declined;
    return false;
  }
  promotion->host = tier_.index().id(*place.entry);
  try {
    disk_->promotions[raw(promotion->host)] = promotion;
  } catch (const std::bad_alloc&) {
    tier_.abort(*place.entry);
    disk_->index.unpin(on_disk);
    throw;
  }
  promotion->flight = from_disk_.begin(config_.groups[raw(group)].payload_bytes(), clock_->now_us());
  next.read.image = arena_->slot(class_index, place.entry->slot);
  ++operation->pipeline->reads_left;
  reads.begin.push_back(std::move(next));
  return true;
}

void EngineImpl::start_reads(Reads& reads) {
  for (DiskRead& each : reads.begin) {
    SlotStore& store = *disk_->volumes[each.volume].store;
    StoreJob job{0};
    try {
      job = store.read(std::move(each.read));
    } catch (const std::bad_alloc&) {
      on_read(each.promotion, {Status::closed("out of memory before it began"), Verdict::blank});
      continue;
    }
    bool hurry = false;
    {
      MutexLock lock(mutex_);
      each.promotion->job = job;
      hurry = each.promotion->priority == ReadPriority::demand;
    }
    if (hurry) store.hurry(job);  // somebody joined before the job had its number
  }
  for (const auto& [volume, job] : reads.hurry) disk_->volumes[volume].store->hurry(job);
}

// A load some of whose blocks are being read: what is there already goes first.
void EngineImpl::load_from_disk(const std::shared_ptr<Operation>& operation, Reads& reads) {
  Pipeline& pipeline = *operation->pipeline;
  // They belong to the part from here on.
  Pipeline::Part there{std::exchange(operation->entries, {}), std::exchange(operation->blocks, {}),
                       std::exchange(operation->slots, {})};
  if (!there.entries.empty()) {
    {
      MutexLock lock(mutex_);
      ++pipeline.holds;
    }
    submit_part(operation, std::move(there));
  }
  start_reads(reads);
  advance(operation);
  release_hold(operation);
}

void EngineImpl::on_read(const std::shared_ptr<Promotion>& promotion, const ReadOutcome& outcome) {
  std::vector<std::shared_ptr<Operation>> waiting;
  std::optional<OwedWipe> wipe;
  {
    MutexLock lock(mutex_);
    tick();
    DiskTier& disk = *disk_;
    Entry& host = tier_.index().at(promotion->host);
    Entry& on_disk = disk.index.index().at(promotion->disk);
    bool good = outcome.good();
    bool keep_pinned = false;
    from_disk_.end(promotion->flight, good, clock_->now_us());
    if (good) {
      ++counters_.promote_good;
      good = tier_.commit(host);  // false: dropped meanwhile
      if (on_disk.linked) disk.index.touch(on_disk);
    } else {
      const bool cancelled = outcome.status.code() == StatusCode::closed;
      const bool given_up = outcome.status.code() == StatusCode::timeout;
      ++(cancelled        ? counters_.promote_cancelled
         : outcome.status ? counters_.promote_bad
                          : counters_.promote_failed);
      if (given_up) {
        tier_.quarantine(host);
        ++counters_.quarantined_blocks;
        keep_pinned = true;  // until on_read_let_go()
      } else {
        tier_.abort(host);
      }
      // A drive that is out of service may come back with what it holds.
      const bool out_of_service = !outcome.status && !disk.volumes[promotion->volume].store->can_read();
      if (!cancelled && !given_up && !out_of_service && on_disk.linked) {
        disk.index.lose(on_disk);  // `leaving`, since it is pinned by us, until it is wiped
        keep_pinned = true;
        // What a later version wrote is not ours to overwrite: that slot is never used again.
        if (!outcome.status || outcome.verdict != Verdict::newer_version) {
          wipe = owed_of(promotion->disk, /*pinned=*/true);
          ++disk.doomed;
        }
      }
    }
    if (!keep_pinned) disk.index.unpin(on_disk);
    disk.promotions.erase(raw(promotion->host));

    for (const auto& [operation, i] : promotion->waiting) {
      Pipeline& pipeline = *operation->pipeline;
      --pipeline.reads_left;
      ++pipeline.holds;
      waiting.push_back(operation);
      if (!good) {
        operation->outcomes[i] = BlockOutcome::missed;
      } else if (operation->pages == nullptr) {
        operation->outcomes[i] = BlockOutcome::loaded;
      } else {
        tier_.pin(host);
        pipeline.arrived.entries.push_back(promotion->host);
        pipeline.arrived.blocks.push_back(i);
        pipeline.arrived.slots.push_back(host.slot);
      }
    }
    promotion->waiting.clear();
  }
  if (wipe) wipe_doomed(promotion->volume, *wipe);
  for (const std::shared_ptr<Operation>& operation : waiting) {
    advance(operation);
    release_hold(operation);
  }
  expire_prefetches();
}

void EngineImpl::on_read_let_go(const Promotion& promotion) {
  MutexLock lock(mutex_);
  tier_.release_quarantined(tier_.index().at(promotion.host));
  --counters_.quarantined_blocks;
  disk_->index.unpin(disk_->index.index().at(promotion.disk));
  idle_.notify_all();
}

// Submits what has arrived, when it is worth a part or is the last. The caller has a hold.
void EngineImpl::advance(const std::shared_ptr<Operation>& operation) {
  Pipeline& pipeline = *operation->pipeline;
  Pipeline::Part part;
  {
    MutexLock lock(mutex_);
    const std::uint64_t bytes =
        pipeline.arrived.entries.size() * config_.groups[raw(operation->group)].payload_bytes();
    if (pipeline.arrived.entries.empty()) return;
    if (pipeline.reads_left > 0 && bytes < pipeline.next_part_bytes) return;
    pipeline.next_part_bytes = std::min(2 * bytes, kLargestPartBytes);
    part = std::move(pipeline.arrived);
    pipeline.arrived = {};
    ++pipeline.holds;
  }
  submit_part(operation, std::move(part));
}

// As break_order_for_tests(), of a load's part.
void EngineImpl::break_part_order_for_tests(const Operation& operation, Pipeline::Part& part) {
  if (!ordering_enabled(OrderingPoint::pins_until_load_copy)) {
    MutexLock lock(mutex_);
    for (const EntryId id : part.entries) tier_.unpin(tier_.index().at(id));
    part.unpinned = true;
  }
  if (!ordering_enabled(OrderingPoint::done_after_load_copy)) {
    Ticket& ticket = *operation.ticket;
    ticket.set_outcomes(std::vector<BlockOutcome>(operation.outcomes.size(), BlockOutcome::loaded));
    ticket.settle(Moment::ready);
  }
}

// Takes over a hold.
void EngineImpl::submit_part(const std::shared_ptr<Operation>& operation, Pipeline::Part part) {
  if (any_ordering_disabled()) break_part_order_for_tests(*operation, part);
  const auto shared = std::make_shared<const Pipeline::Part>(std::move(part));
  HopMeter::Flight flight;
  {
    MutexLock lock(mutex_);
    flight = to_device_.begin(shared->entries.size() * config_.groups[raw(operation->group)].payload_bytes(),
                              clock_->now_us());
  }
  try {
    Pipeline& pipeline = *operation->pipeline;
    KVTIER_CHECK(pipeline.after);
    PagesImpl& target = *operation->pages;
    const GroupSpec& spec = target.map_->spec();
    const std::size_t class_index = class_of_group_[raw(operation->group)];
    TransferRequest request;
    request.map = target.map_;
    request.direction = Direction::load;
    request.after = pipeline.after;
    request.pages = pipeline.pages;
    request.moves.reserve(shared->entries.size());
    for (std::size_t i = 0; i < shared->entries.size(); ++i) {
      const std::uint32_t block = shared->blocks[i];
      request.moves.push_back({arena_->slot(class_index, shared->slots[i]) + kSlotHeaderBytes,
                               block * spec.pages_per_block(),
                               (pipeline.first_block + block) % spec.blocks_per_page()});
    }
    target.transfers_->submit(std::move(request),
                              [this, operation, shared, flight](const TransferOutcome& outcome) {
                                end_part(operation, *shared, flight, outcome);
                              });
  } catch (const std::bad_alloc&) {
    // Transfers::submit() throws only before anything was submitted.
    end_part(operation, *shared, flight,
             {Status::resource("out of memory before anything was submitted"), true});
  }
}

void EngineImpl::end_part(const std::shared_ptr<Operation>& operation, const Pipeline::Part& part,
                          const HopMeter::Flight& flight, const TransferOutcome& outcome) noexcept {
  {
    MutexLock lock(mutex_);
    to_device_.end(flight, outcome.status.is_ok() && outcome.drained, clock_->now_us());
    for (std::size_t i = part.entries.size(); i-- > 0;) {  // tail first, so that the tail is the oldest
      Entry& entry = tier_.index().at(part.entries[i]);
      operation->outcomes[part.blocks[i]] = outcome.status ? BlockOutcome::loaded : BlockOutcome::failed;
      if (outcome.drained && !part.unpinned) tier_.unpin(entry);
    }
    if (operation->outcome.status) operation->outcome.status = outcome.status;
    operation->outcome.drained = operation->outcome.drained && outcome.drained;
  }
  release_hold(operation);
}

void EngineImpl::release_hold(const std::shared_ptr<Operation>& operation) {
  {
    MutexLock lock(mutex_);
    Pipeline& pipeline = *operation->pipeline;
    KVTIER_CHECK(pipeline.holds > 0);
    if (--pipeline.holds > 0 || pipeline.reads_left > 0) return;
    KVTIER_CHECK(pipeline.arrived.entries.empty());
    if (operation->pages == nullptr) std::erase(prefetches_, operation);
  }
  finish_operation(operation);
}

Result<std::shared_ptr<Ticket>> EngineImpl::prefetch(std::span<const BlockKey> keys, Deadline deadline) {
  expire_blocks();
  const std::size_t num_groups = config_.groups.size();
  const std::shared_ptr<Operation> operation =
      make_operation(Direction::load, GroupId{0}, keys.size() * num_groups);
  operation->is_prefetch = true;
  operation->pipeline = std::make_unique<Pipeline>();
  operation->pipeline->read_deadline = deadline;
  const Call call(*this);
  return finished_if_thrown(operation, [&]() -> Result<std::shared_ptr<Ticket>> {
    {
      MutexLock lock(mutex_);
      KVTIER_RETURN_IF_ERROR(admit(*operation));
      expire_leases();
      prefetches_.push_back(operation);
    }
    const std::uint64_t readable = disk_ ? readable_volumes() : 0;
    for (std::size_t begin = 0; begin < keys.size(); begin += kReadsPerHold) {
      Reads reads;
      {
        MutexLock lock(mutex_);
        const bool failed = counters_.health != "ok" || closing_;
        for (std::size_t k = begin; k < std::min(begin + kReadsPerHold, keys.size()); ++k) {
          for (std::size_t g = 0; g < num_groups; ++g) {
            const GroupId group{static_cast<std::uint16_t>(g)};
            const auto i = static_cast<std::uint32_t>(k * num_groups + g);
            const Entry* host = failed ? nullptr : tier_.index().find(keys[k], group);
            if (host != nullptr && host->state == SlotState::ready) {
              operation->outcomes[i] = BlockOutcome::loaded;
              continue;
            }
            bool comes = false;
            try {
              comes = !failed && disk_ &&
                      promote(operation, i, keys[k], group, ReadPriority::prefetch, readable, reads);
            } catch (const std::bad_alloc&) {
              comes = false;  // others are on their way
            }
            if (!comes) {
              operation->outcomes[i] = host != nullptr ? BlockOutcome::pending : BlockOutcome::missed;
            }
          }
        }
      }
      start_reads(reads);
    }
    release_hold(operation);
    return operation->ticket;
  });
}

// Gives up what only these wait for and no drive has begun.
std::uint64_t EngineImpl::cancel_reads(const std::vector<std::shared_ptr<Operation>>& prefetches) {
  std::vector<std::pair<std::shared_ptr<Promotion>, StoreJob>> mine;
  {
    MutexLock lock(mutex_);
    for (const auto& [host, promotion] : disk_->promotions) {
      const bool only_these = std::all_of(
          promotion->waiting.begin(), promotion->waiting.end(), [&prefetches](const auto& waiting) {
            return std::find(prefetches.begin(), prefetches.end(), waiting.first) != prefetches.end();
          });
      if (!only_these || promotion->cancelled || !promotion->job) continue;
      promotion->cancelled = true;  // nobody may join any more
      mine.emplace_back(promotion, *promotion->job);
    }
  }
  std::uint64_t cancelled = 0;
  for (const auto& [promotion, job] : mine) {
    if (disk_->volumes[promotion->volume].store->cancel(job)) {
      ++cancelled;
    } else {
      MutexLock lock(mutex_);
      promotion->cancelled = false;  // the drive has begun: whoever wants the block may wait for it
    }
  }
  return cancelled;
}

Result<std::uint64_t> EngineImpl::cancel_prefetch(const std::shared_ptr<Ticket>& ticket) {
  std::vector<std::shared_ptr<Operation>> mine;
  {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
    for (const std::shared_ptr<Operation>& each : prefetches_) {
      if (each->ticket == ticket) mine.push_back(each);
    }
  }
  if (mine.empty() || !disk_) return std::uint64_t{0};
  return cancel_reads(mine);
}

void EngineImpl::expire_prefetches() {
  std::vector<std::shared_ptr<Operation>> late;
  {
    MutexLock lock(mutex_);
    if (prefetches_.empty()) return;
    const auto now = std::chrono::steady_clock::now();
    for (const std::shared_ptr<Operation>& each : prefetches_) {
      Pipeline& pipeline = *each->pipeline;
      if (!pipeline.read_deadline || *pipeline.read_deadline > now) continue;
      pipeline.read_deadline.reset();  // once
      late.push_back(each);
    }
  }
  if (!late.empty()) cancel_reads(late);
}

}  // namespace kvtier
