// What moves bytes: store and load.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "engine_impl.h"

#include "kvtier/core/ordering.h"

namespace kvtier {
namespace {

// Blocks reserved, pinned or committed per hold of the mutex.
constexpr std::size_t kBlocksPerHold = 1024;
constexpr std::size_t kBlocksAhead = 64;  // that are fetched at a time

}  // namespace

EngineImpl::Call::Call(EngineImpl& engine) : engine_(engine) {
  MutexLock lock(engine_.mutex_);
  ++engine_.calls_;
}

EngineImpl::Call::~Call() {
  MutexLock lock(engine_.mutex_);
  --engine_.calls_;
  engine_.idle_.notify_all();
}

Result<PagesImpl*> EngineImpl::checked(Pages& pages) {
  auto* mine = dynamic_cast<PagesImpl*>(&pages);
  if (mine == nullptr || mine->engine_ != this)
    return Status::invalid_argument("these pages are of another engine");
  return mine;
}

Status EngineImpl::check_request(const GroupSpec& spec, std::size_t num_keys, std::size_t num_pages,
                                 std::uint32_t first_block) {
  if (num_pages != num_keys * spec.pages_per_block()) {
    return Status::invalid_argument("page_ids has " + std::to_string(num_pages) + " entries for " +
                                    std::to_string(num_keys) +
                                    " keys; allowed: " + std::to_string(num_keys * spec.pages_per_block()) +
                                    " (" + std::to_string(spec.pages_per_block()) + " for each key)");
  }
  return check_depth(num_keys, first_block);
}

Status EngineImpl::check_depth(std::size_t num_keys, std::uint32_t first_block) {
  if (num_keys > std::numeric_limits<std::uint32_t>::max() - first_block) {
    return Status::invalid_argument("first_block is " + std::to_string(first_block) + " with " +
                                    std::to_string(num_keys) +
                                    " keys; allowed: less than 2^32 blocks in all");
  }
  return Status::ok();
}

std::shared_ptr<Operation> EngineImpl::make_operation(Direction direction, GroupId group,
                                                      std::size_t num_blocks) {
  auto operation = std::make_shared<Operation>();
  operation->direction = direction;
  operation->group = group;
  operation->ticket = std::make_shared<Ticket>(direction, num_blocks, /*has_disk=*/disk_ != nullptr);
  operation->outcomes.assign(num_blocks, BlockOutcome::running);
  operation->entries.reserve(num_blocks);
  operation->blocks.reserve(num_blocks);
  operation->slots.reserve(num_blocks);
  return operation;
}

// From here on close(), detach() and flush() wait for the operation.
Status EngineImpl::admit(Operation& operation) {
  KVTIER_RETURN_IF_ERROR(check_open());
  if (operation.pages != nullptr && !operation.pages->attached_)
    return Status::closed("these pages are detached");
  if (operation.direction == Direction::store) {
    running_stores_.insert(stores_begun_);  // first: it may throw
    operation.store_number = stores_begun_++;
  }
  if (operation.pages != nullptr) ++operation.pages->running_;
  ++running_;
  operation.admitted = true;
  return Status::ok();
}

// Reserves a slot for every block that is not there, in prompt order: when slots run out the prefix is kept
// and the rest declined, since a block without its parents is of no use.
Status EngineImpl::begin_store(Operation& operation, const StoreRequest& request) {
  std::vector<EntryId>& present = operation.present;  // pinned, so that no reservation behind evicts them
  std::optional<EntryId> parent;
  NamespaceId name_space{};
  Wish wish{request.priority, std::nullopt};
  bool declined = false;
  expire_blocks();
  if (request.ttl_us)
    wish.expires_us = clock_->now_us() + std::clamp<std::int64_t>(*request.ttl_us, 0, kLongestTtlUs);
  present.reserve(request.keys.size() + 1);
  for (std::size_t begin = 0; begin < request.keys.size() || begin == 0; begin += kBlocksPerHold) {
    MutexLock lock(mutex_);
    tick();
    if (begin == 0) {
      KVTIER_RETURN_IF_ERROR(check_open());
      name_space = intern(request.name_space);
      KVTIER_RETURN_IF_ERROR(admit(operation));
      if (counters_.health != "ok") {
        declined = true;
        operation.outcome.status = Status::device("the engine has failed: " + counters_.health);
      }
      expire_leases();
      if (request.parent) {
        Entry* entry = tier_.index().find(*request.parent, operation.group);
        if (entry != nullptr && entry->state == SlotState::ready) {
          tier_.pin(*entry);
          parent = tier_.index().id(*entry);
          present.push_back(*parent);
        }
      }
    }
    const std::size_t end = std::min(begin + kBlocksPerHold, request.keys.size());
    for (std::size_t i = begin; i < end; ++i) {
      if ((i - begin) % kBlocksAhead == 0) {
        tier_.fetch(request.keys.subspan(i, std::min(kBlocksAhead, end - i)), operation.group);
      }
      if (declined) {
        operation.outcomes[i] = BlockOutcome::declined;
        continue;
      }
      Entry* above = parent ? &tier_.index().at(*parent) : nullptr;
      const Entry* on_disk = below(request.keys[i], operation.group, wish);
      const Priority otherwise = on_disk == nullptr ? Priority::normal : on_disk->priority;
      const TierIndex::Reservation found = tier_.reserve(
          request.keys[i], operation.group, name_space, request.first_block + static_cast<std::uint32_t>(i),
          above, /*volume=*/0, request.priority.value_or(otherwise));
      switch (found.outcome) {
        case ReserveOutcome::reserved:
          operation.entries.push_back(tier_.index().id(*found.entry));
          operation.blocks.push_back(static_cast<std::uint32_t>(i));
          operation.slots.push_back(found.entry->slot);
          if (wish.expires_us && on_disk == nullptr) tier_.let_expire(*found.entry, *wish.expires_us);
          break;
        case ReserveOutcome::present:
          operation.outcomes[i] = BlockOutcome::present;
          tier_.pin(*found.entry);
          present.push_back(tier_.index().id(*found.entry));
          if (disk_) operation.seen.emplace_back(present.back(), found.entry->generation);
          grant_wish(*found.entry, wish);
          break;
        case ReserveOutcome::pending:
          operation.outcomes[i] = BlockOutcome::pending;
          grant_wish(*found.entry, wish);
          break;
        case ReserveOutcome::declined:
          operation.outcomes[i] = BlockOutcome::declined;
          declined = true;
          break;
      }
      // A pending block of another store may end at any moment, so it is nobody's parent here.
      const bool holds =
          found.outcome == ReserveOutcome::reserved || found.outcome == ReserveOutcome::present;
      parent = holds ? std::optional(tier_.index().id(*found.entry)) : std::nullopt;
    }
    if (wish.expires_us) note_next_expiry();
    if (request.keys.empty()) break;
  }
  release_present(operation);
  note_use(request.keys, operation.group);
  return Status::ok();
}

// What is known of a new block's copy on a drive, where that matters.
const Entry* EngineImpl::below(const BlockKey& key, GroupId group, const Wish& wish) {
  if (!disk_ || (!wish.expires_us && !disk_->index.has_priorities())) return nullptr;
  return disk_->index.index().find(key, group);
}

void EngineImpl::grant_wish(Entry& entry, const Wish& wish) {
  tier_.lengthen(entry, wish.expires_us);
  if (!wish.priority) return;
  tier_.set_priority(entry, *wish.priority);
  Entry* on_disk = disk_ ? disk_->index.index().find(entry.key, entry.group) : nullptr;
  if (on_disk != nullptr) disk_->index.set_priority(*on_disk, *wish.priority);
}

void EngineImpl::release_present(Operation& operation) {
  std::vector<EntryId>& present = operation.present;
  while (!present.empty()) {  // tail first: the tail becomes the oldest
    MutexLock lock(mutex_);
    tick();
    for (std::size_t n = 0; n < kBlocksPerHold && !present.empty(); ++n) {
      Entry& entry = tier_.index().at(present.back());
      present.pop_back();
      if (entry.linked) tier_.touch(entry);
      tier_.unpin(entry);
    }
  }
}

void EngineImpl::take_off(Operation& operation) {
  if (operation.direction != Direction::load) return;
  MutexLock lock(mutex_);
  operation.flight = to_device_.begin(
      operation.entries.size() * config_.groups[raw(operation.group)].payload_bytes(), clock_->now_us());
}

Status EngineImpl::begin_load(const std::shared_ptr<Operation>& shared, const LoadRequest& request,
                              Reads* reads) {
  Operation& operation = *shared;
  const std::uint64_t readable = reads != nullptr ? readable_volumes() : 0;
  bool failed = false;
  for (std::size_t begin = 0; begin < request.keys.size() || begin == 0; begin += kBlocksPerHold) {
    MutexLock lock(mutex_);
    tick();
    if (begin == 0) {
      KVTIER_RETURN_IF_ERROR(admit(operation));
      if (reads != nullptr) expire_leases();  // what comes from disk may need their place
    }
    const std::size_t count = std::min(kBlocksPerHold, request.keys.size() - begin);
    failed = counters_.health != "ok";
    tier_.index().find_each(request.keys.subspan(begin, count), operation.group,
                            [&](std::size_t at, Entry* entry) KVTIER_REQUIRES(mutex_) {
                              const std::size_t i = begin + at;
                              if (failed || entry == nullptr) {
                                operation.outcomes[i] = BlockOutcome::missed;
                              } else if (entry->state != SlotState::ready) {
                                operation.outcomes[i] = BlockOutcome::pending;
                              } else {
                                tier_.pin(*entry);
                                operation.entries.push_back(tier_.index().id(*entry));
                                operation.blocks.push_back(static_cast<std::uint32_t>(i));
                                operation.slots.push_back(entry->slot);
                              }
                            });
    if (request.keys.empty()) break;
  }
  // After all that is in the host tier was pinned, so that what comes from disk takes the place of none of
  // it.
  if (reads != nullptr && !failed && operation.entries.size() < request.keys.size()) {
    // Whole before the first promotion: one that is joined may end at any moment, and goes on to the pages.
    auto pipeline = std::make_unique<Pipeline>();
    pipeline->pages.assign(request.pages.begin(), request.pages.end());
    pipeline->first_block = request.first_block;
    Result<std::shared_ptr<Event>> after = operation.pages->transfers_->mark(request.stream);
    if (after) {
      pipeline->after = std::move(*after);
      operation.pipeline = std::move(pipeline);
    } else {
      operation.outcome.status = after.status();
    }
  }
  bool from_disk = false;
  for (std::uint32_t i = 0; operation.pipeline && i < request.keys.size();) {
    MutexLock lock(mutex_);
    for (std::size_t n = 0; n < kBlocksPerHold && i < request.keys.size(); ++n, ++i) {
      BlockOutcome& outcome = operation.outcomes[i];
      if (outcome != BlockOutcome::missed && outcome != BlockOutcome::pending) continue;
      const BlockOutcome otherwise = std::exchange(outcome, BlockOutcome::running);
      Entry* here = tier_.index().find(request.keys[i], operation.group);
      if (here != nullptr && here->state == SlotState::ready) {  // since it was looked for above
        tier_.pin(*here);
        operation.entries.push_back(tier_.index().id(*here));
        operation.blocks.push_back(i);
        operation.slots.push_back(here->slot);
        continue;
      }
      try {
        outcome = promote(shared, i, request.keys[i], operation.group, ReadPriority::demand, readable, *reads)
                      ? BlockOutcome::running
                      : otherwise;
      } catch (const std::bad_alloc&) {
        outcome = otherwise;  // others are on their way
      }
      from_disk = from_disk || outcome == BlockOutcome::running;
    }
  }
  if (!from_disk) operation.pipeline.reset();
  for (std::size_t end = operation.entries.size(); end > 0;) {  // tail first: the tail becomes the oldest
    const std::size_t begin = end - std::min(kBlocksPerHold, end);
    MutexLock lock(mutex_);
    for (std::size_t i = end; i-- > begin;) {
      Entry& entry = tier_.index().at(operation.entries[i]);
      if (entry.linked) tier_.touch(entry);
    }
    end = begin;
  }
  try {
    note_use(request.keys, operation.group);
  } catch (const std::bad_alloc&) {
    return Status::ok();  // it is for the ghost caches alone, and reads may have been promised
  }
  return Status::ok();
}

// Commits or aborts the reservations of a store, ends the pins of a load.
void EngineImpl::settle_entries(Operation& operation) {
  if (operation.entries_settled) return;
  operation.entries_settled = true;
  const bool good = operation.outcome.status.is_ok();
  for (std::size_t end = operation.entries.size(); end > 0;) {  // tail first, so that the tail is the oldest
    const std::size_t begin = end - std::min(kBlocksPerHold, end);
    MutexLock lock(mutex_);
    tick();
    for (std::size_t i = end; i-- > begin;) {
      Entry& entry = tier_.index().at(operation.entries[i]);
      BlockOutcome& outcome = operation.outcomes[operation.blocks[i]];
      if (operation.direction == Direction::load) {
        outcome = good ? BlockOutcome::loaded : BlockOutcome::failed;
        if (operation.outcome.drained) tier_.unpin(entry);
      } else if (good) {
        outcome = tier_.commit(entry) ? BlockOutcome::stored : BlockOutcome::dropped;
      } else {
        outcome = BlockOutcome::failed;
        if (operation.outcome.drained) {
          tier_.abort(entry);
        } else {
          tier_.quarantine(entry);
        }
      }
    }
    end = begin;
  }
}

void EngineImpl::count(const Operation& operation) {
  if (operation.is_prefetch) return;
  const std::uint64_t bytes = config_.groups[raw(operation.group)].payload_bytes();
  for (const BlockOutcome outcome : operation.outcomes) {
    const bool load = operation.direction == Direction::load;
    switch (outcome) {
      case BlockOutcome::running: break;
      case BlockOutcome::stored:
        ++counters_.store_stored;
        counters_.bytes_stored += bytes;
        break;
      case BlockOutcome::present: ++counters_.store_present; break;
      case BlockOutcome::pending: ++(load ? counters_.load_pending : counters_.store_pending); break;
      case BlockOutcome::declined: ++counters_.store_declined; break;
      case BlockOutcome::loaded:
        ++counters_.load_loaded;
        counters_.bytes_loaded += bytes;
        break;
      case BlockOutcome::missed: ++counters_.load_missed; break;
      case BlockOutcome::failed: ++(load ? counters_.load_failed : counters_.store_failed); break;
      case BlockOutcome::dropped: ++counters_.store_dropped; break;
    }
  }
}

void EngineImpl::finish_operation(const std::shared_ptr<Operation>& operation) noexcept {
  TransferOutcome& outcome = operation->outcome;
  Ticket& ticket = *operation->ticket;
  {
    MutexLock lock(mutex_);
    if (operation->finished) return;
    operation->finished = true;
  }
  bool tracked = false;
  try {
    settle_entries(*operation);
    if (disk_ && operation->direction == Direction::store && outcome.status) {
      tracked = true;
      track_store(*operation);
    }
    if (operation->pages != nullptr && !outcome.status) {
      const Status health = operation->pages->device_->health();
      if (!health) mark_failed("device " + operation->pages->device_->name() + ": " + health.message());
    }
    MutexLock lock(mutex_);
    if (operation->flight) {
      to_device_.end(*operation->flight, outcome.status.is_ok() && outcome.drained, clock_->now_us());
      operation->flight.reset();
    }
    count(*operation);
    if (!outcome.drained && operation->direction == Direction::store) {
      counters_.quarantined_blocks += static_cast<std::uint32_t>(operation->entries.size());
    }
  } catch (const std::exception& bug) {
    fail_operation(operation, Status::internal(bug.what()));
  }
  if (!outcome.status) ticket.fail(outcome.status);
  ticket.set_outcomes(std::move(operation->outcomes));
  ticket.settle(Moment::released, outcome.drained ? Status::ok() : outcome.status);
  ticket.settle(Moment::ready);
  if (!tracked) ticket.settle(Moment::durable);

  MutexLock lock(mutex_);
  --running_;
  if (!outcome.drained) ++undrained_;
  if (operation->direction == Direction::store) running_stores_.erase(operation->store_number);
  if (operation->pages != nullptr) {
    if (outcome.drained) {
      --operation->pages->running_;
    } else {
      operation->pages->undrained_ = true;
    }
  }
  idle_.notify_all();
}

// A bug broke the bookkeeping: what is not known to be good has failed.
void EngineImpl::fail_operation(const std::shared_ptr<Operation>& operation, const Status& why) noexcept {
  for (BlockOutcome& outcome : operation->outcomes) {
    if (outcome == BlockOutcome::running) outcome = BlockOutcome::failed;
  }
  if (operation->outcome.status) operation->outcome.status = why;
  try {
    mark_failed(why.message());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kvtier: cannot mark the engine failed: %s\n", error.what());
  }
}

// What each disabled ordering point would do wrong; see core/ordering.h. Nothing in production.
void EngineImpl::break_order_for_tests(const std::shared_ptr<Operation>& operation) {
  Ticket& ticket = *operation->ticket;
  if (operation->direction == Direction::store) {
    if (!ordering_enabled(OrderingPoint::ready_after_store_copy)) settle_entries(*operation);
    if (!ordering_enabled(OrderingPoint::reservation_until_store_copy)) {
      operation->outcome.status = Status::internal("reservations freed early by a test");
      settle_entries(*operation);
    }
    if (!ordering_enabled(OrderingPoint::released_after_store_copy)) ticket.settle(Moment::released);
  } else {
    if (!ordering_enabled(OrderingPoint::pins_until_load_copy)) settle_entries(*operation);
    if (!ordering_enabled(OrderingPoint::done_after_load_copy)) {
      ticket.set_outcomes(std::vector<BlockOutcome>(operation->outcomes.size(), BlockOutcome::loaded));
      ticket.settle(Moment::ready);
    }
  }
}

void EngineImpl::submit(const std::shared_ptr<Operation>& operation, std::vector<PageId> pages,
                        StreamHandle stream, std::uint32_t first_block, std::uint32_t layers_per_batch) {
  if (operation->entries.empty()) {
    finish_operation(operation);
    return;
  }
  PagesImpl& target = *operation->pages;
  const GroupSpec& spec = target.map_->spec();
  const std::size_t class_index = class_of_group_[raw(operation->group)];
  TransferRequest request;
  request.map = target.map_;
  request.pages = std::move(pages);
  request.direction = operation->direction;
  request.framework_stream = stream;
  request.layers_per_batch = layers_per_batch;
  request.moves.reserve(operation->entries.size());
  for (std::size_t i = 0; i < operation->entries.size(); ++i) {
    const std::uint32_t block = operation->blocks[i];
    request.moves.push_back({arena_->slot(class_index, operation->slots[i]) + kSlotHeaderBytes,
                             block * spec.pages_per_block(), (first_block + block) % spec.blocks_per_page()});
  }
  // A ticket may outlive the engine, but its transfer's events must not outlive their device.
  struct WithDevice {
    std::shared_ptr<Device> device;
    std::shared_ptr<Transfer> transfer;
  };
  const auto held = std::make_shared<WithDevice>(WithDevice{target.device_, nullptr});
  if (any_ordering_disabled()) break_order_for_tests(operation);
  take_off(*operation);
  // From here on nothing throws but submit(), and that only before anything was submitted.
  std::shared_ptr<Transfer> transfer =
      target.transfers_->submit(std::move(request), [this, operation](const TransferOutcome& outcome) {
        if (!operation->entries_settled) operation->outcome = outcome;
        finish_operation(operation);
      });
  held->transfer = std::move(transfer);
  operation->ticket->set_transfer(std::shared_ptr<Transfer>(held, held->transfer.get()));
}

Result<std::shared_ptr<Ticket>> EngineImpl::store(Pages& pages, const StoreRequest& request) {
  Result<PagesImpl*> target = checked(pages);
  if (!target) return target.status();
  const GroupSpec& spec = (*target)->map_->spec();
  KVTIER_RETURN_IF_ERROR(check_request(spec, request.keys.size(), request.pages.size(), request.first_block));
  // A copy is checked: whoever changes the caller's array meanwhile moves nothing to where no page is.
  std::vector<PageId> ids(request.pages.begin(), request.pages.end());
  KVTIER_RETURN_IF_ERROR(check_pages(*(*target)->map_, {}, ids, Direction::store));
  KVTIER_RETURN_IF_ERROR((*target)->device_->check_stream(request.stream));
  const std::shared_ptr<Operation> operation =
      make_operation(Direction::store, pages.group(), request.keys.size());
  operation->pages = *target;
  const Call call(*this);
  return finished_if_thrown(operation, [&]() -> Result<std::shared_ptr<Ticket>> {
    KVTIER_RETURN_IF_ERROR(begin_store(*operation, request));
    submit(operation, std::move(ids), request.stream, request.first_block, 0);
    return operation->ticket;
  });
}

Result<std::shared_ptr<Ticket>> EngineImpl::load(Pages& pages, const LoadRequest& asked) {
  Result<PagesImpl*> target = checked(pages);
  if (!target) return target.status();
  const GroupSpec& spec = (*target)->map_->spec();
  KVTIER_RETURN_IF_ERROR(check_request(spec, asked.keys.size(), asked.pages.size(), asked.first_block));
  std::vector<PageId> ids(asked.pages.begin(), asked.pages.end());  // as store()'s
  LoadRequest request = asked;
  request.pages = ids;
  std::vector<BlockMove> places;
  places.reserve(request.keys.size());
  for (std::uint32_t i = 0; i < request.keys.size(); ++i) {
    places.push_back(
        {nullptr, i * spec.pages_per_block(), (request.first_block + i) % spec.blocks_per_page()});
  }
  KVTIER_RETURN_IF_ERROR(check_pages(*(*target)->map_, places, request.pages, Direction::load));
  KVTIER_RETURN_IF_ERROR((*target)->device_->check_stream(request.stream));
  const std::shared_ptr<Operation> operation =
      make_operation(Direction::load, pages.group(), request.keys.size());
  operation->pages = *target;
  const Call call(*this);
  return finished_if_thrown(operation, [&]() -> Result<std::shared_ptr<Ticket>> {
    Reads reads;
    expire_blocks();
    const bool from_disk = disk_ && request.layers_per_batch == 0;
    KVTIER_RETURN_IF_ERROR(begin_load(operation, request, from_disk ? &reads : nullptr));
    if (operation->pipeline) {
      load_from_disk(operation, reads);
      return operation->ticket;
    }
    if (request.layers_per_batch > 0 && operation->entries.size() < request.keys.size()) {
      const std::size_t missing = request.keys.size() - operation->entries.size();
      // Waiting for the layers of a block that is not there would be a wait for nothing: wrong bytes.
      operation->outcome.status = Status::unsupported(
          "a layer-wise load needs every block ready in the host tier; " + std::to_string(missing) + " of " +
          std::to_string(request.keys.size()) + " are not");
      finish_operation(operation);
      return operation->outcome.status;
    }
    submit(operation, std::move(ids), request.stream, request.first_block, request.layers_per_batch);
    return operation->ticket;
  });
}

}  // namespace kvtier
