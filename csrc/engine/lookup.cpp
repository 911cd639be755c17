// What does not move bytes: lookup, leases, touch, drop.
#include <algorithm>
#include <cstring>

#include "engine_impl.h"

namespace kvtier {
namespace {

// How many of the first `limit` states are ready without a gap. Eight at a time: a lookup of 64K keys would
// spend a twentieth of its time here.
std::size_t ready_run(const std::vector<BlockState>& states, std::size_t limit) {
  static_assert(sizeof(BlockState) == 1);
  // `ready` and `on_disk` are the states with this bit (is_ready()).
  constexpr std::uint64_t kAllReady = 0x0101010101010101ULL * static_cast<std::uint8_t>(BlockState::ready);
  std::size_t i = 0;
  for (; i + sizeof kAllReady <= limit; i += sizeof kAllReady) {
    std::uint64_t eight;
    std::memcpy(&eight, &states[i], sizeof eight);
    if ((eight & kAllReady) != kAllReady) break;
  }
  while (i < limit && is_ready(states[i])) ++i;
  return i;
}

}  // namespace

// The longest prefix that all groups can restore. Full attention needs every block of it. A sliding window
// needs only the blocks that the window reaches back to, so there the answer can lie behind a gap.
std::size_t EngineImpl::ready_prefix(const std::vector<std::vector<BlockState>>& states,
                                     std::size_t num_keys) const {
  const auto ready = [](BlockState state) { return is_ready(state); };
  std::size_t limit = num_keys;
  bool windows = false;
  for (std::size_t g = 0; g < states.size(); ++g) {
    if (config_.groups[g].window_blocks()) {
      windows = true;
      continue;
    }
    limit = ready_run(states[g], limit);
  }
  if (!windows) return limit;

  std::vector<bool> usable(limit + 1, true);
  for (std::size_t g = 0; g < states.size(); ++g) {
    const std::optional<std::uint32_t> window = config_.groups[g].window_blocks();
    if (!window) continue;
    std::size_t run = 0;  // ready blocks that end just before position p
    for (std::size_t p = 1; p <= limit; ++p) {
      run = ready(states[g][p - 1]) ? run + 1 : 0;
      if (run < std::min<std::size_t>(*window, p)) usable[p] = false;
    }
  }
  while (!usable[limit]) --limit;  // 0 is always usable
  return limit;
}

Result<Match> EngineImpl::lookup(std::span<const BlockKey> keys) {
  expire_blocks();
  Match match;
  match.num_keys = keys.size();
  match.states.reserve(config_.groups.size());
  for (std::size_t g = 0; g < config_.groups.size(); ++g) {
    match.states.emplace_back(keys.size(), BlockState::miss);  // in place: a model to copy from costs as much
    match.found.emplace_back(keys.size());
  }
  const std::uint64_t readable = disk_ ? readable_volumes() : 0;
  bool measured = false;  // by the ghost caches
  for (std::size_t begin = 0; begin < keys.size(); begin += kKeysPerHold) {
    const std::span<const BlockKey> part = keys.subspan(begin, std::min(kKeysPerHold, keys.size() - begin));
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
    if (begin == 0) measured = ghosts_ && !ghosts_paused_ && ghosts_->measures_next();
    const std::uint64_t asked = part.size() * config_.groups.size();
    counters_.lookup_blocks += asked;
    if (counters_.health != "ok") {
      counters_.lookup_misses_failed += asked;
      continue;
    }
    std::uint64_t hits = 0;
    std::uint64_t pending = 0;
    for (std::size_t g = 0; g < config_.groups.size(); ++g) {
      BlockState* states = match.states[g].data() + begin;
      EntryId* found = match.found[g].data() + begin;
      const GroupId group{static_cast<std::uint16_t>(g)};
      const auto note_state = [&](std::size_t i, const Entry* entry) KVTIER_REQUIRES(mutex_) {
        if (entry == nullptr) return;
        const bool is_ready = entry->state == SlotState::ready;
        states[i] = is_ready ? BlockState::ready : BlockState::pending;
        found[i] = tier_.index().id(*entry);
        hits += is_ready ? 1 : 0;
        pending += is_ready ? 0 : 1;
      };
      if (measured && group == ghost_group_) {
        Ghosts::Notes notes = ghosts_->begin();
        tier_.index().find_each(part, group, note_state, notes);
        ghosts_->end(notes, part.size());
      } else {
        tier_.index().find_each(part, group, note_state);
      }
    }
    std::uint64_t hits_on_disk = 0;
    if (readable != 0 && hits < asked) {
      for (std::size_t g = 0; g < config_.groups.size(); ++g) {
        BlockState* states = match.states[g].data() + begin;
        disk_->index.index().find_each(
            part, GroupId{static_cast<std::uint16_t>(g)}, [&](std::size_t i, const Entry* entry) {
              if (entry == nullptr || states[i] == BlockState::ready) return;
              if (entry->state != SlotState::ready || ((readable >> entry->volume) & 1) == 0) return;
              pending -= states[i] == BlockState::pending ? 1 : 0;  // on its way from there
              states[i] = BlockState::on_disk;
              ++hits_on_disk;
            });
      }
    }
    counters_.lookup_hits_disk += hits_on_disk;
    counters_.lookup_hits_host += hits;
    counters_.lookup_misses_pending += pending;
    counters_.lookup_misses_absent += asked - hits - hits_on_disk - pending;
  }
  if (keys.empty()) {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
  }
  match.ready_blocks = ready_prefix(match.states, keys.size());
  return match;
}

Result<std::shared_ptr<LeaseState>> EngineImpl::pin(std::span<const BlockKey> keys, std::size_t max_blocks,
                                                    std::optional<std::int64_t> ttl_us, const Match* match) {
  expire_blocks();
  const std::size_t num_groups = config_.groups.size();
  if (match != nullptr && (match->num_keys != keys.size() || match->found.size() != num_groups)) {
    match = nullptr;  // of other keys, or of another engine
  }
  keys = keys.first(std::min(keys.size(), max_blocks));
  Pinned pinned;
  pinned.touched = std::none_of(config_.groups.begin(), config_.groups.end(),
                                [](const GroupSpec& group) { return group.window_blocks().has_value(); });
  for (std::size_t g = 0; g < num_groups; ++g) {
    pinned.states.emplace_back(keys.size(), BlockState::miss);
    pinned.entries.emplace_back(keys.size());
  }
  auto lease = std::make_shared<LeaseState>();
  lease->pinned.reserve(num_groups * keys.size());  // nothing throws between the first pin and the last unpin
  if (disk_) lease->pinned_on_disk.reserve(num_groups * keys.size());

  // Everything that is ready is pinned first and what the prefix does not need is let go at the end, so
  // that nothing found early can be evicted while the rest is looked for. Tail first: it becomes the oldest.
  for (std::size_t end = keys.size(); end > 0;) {
    const std::size_t begin = end - std::min(kKeysPerHold, end);
    MutexLock lock(mutex_);
    if (closing_ || counters_.health != "ok") break;
    tick();
    for (std::size_t g = 0; g < num_groups; ++g) pin_part(keys, begin, end, g, match, pinned);
    end = begin;
  }
  lease->num_blocks = ready_prefix(pinned.states, keys.size());

  MutexLock lock(mutex_);
  keep_needed(pinned, *lease);
  KVTIER_RETURN_IF_ERROR(check_open());
  if (ttl_us) lease->expires_us = clock_->now_us() + std::min(*ttl_us, kLongestTtlUs);
  try {
    leases_.push_back(lease);
  } catch (...) {
    end_lease(*lease);
    throw;
  }
  return lease;
}

// Keys [begin, end) of one group.
void EngineImpl::pin_part(std::span<const BlockKey> keys, std::size_t begin, std::size_t end, std::size_t g,
                          const Match* match, Pinned& pinned) {
  const std::span<const BlockKey> part = keys.subspan(begin, end - begin);
  const GroupId group{static_cast<std::uint16_t>(g)};
  BlockState* const states = pinned.states[g].data() + begin;
  EntryId* const entries = pinned.entries[g].data() + begin;
  const auto note_ready = [&](std::size_t i, const Entry* entry) KVTIER_REQUIRES(mutex_) {
    if (entry == nullptr || entry->state != SlotState::ready) return;
    states[i] = BlockState::ready;
    entries[i] = tier_.index().id(*entry);
  };
  if (match != nullptr) {
    tier_.index().find_each(part, group, std::span(match->found[g]).subspan(begin, part.size()), note_ready);
  } else {
    tier_.index().find_each(part, group, note_ready);
  }
  if (const std::uint64_t readable = disk_ ? readable_volumes() : 0; readable != 0) {
    disk_->index.index().find_each(
        part, group, [&](std::size_t i, const Entry* entry) KVTIER_REQUIRES(mutex_) {
          if (entry == nullptr || states[i] == BlockState::ready) return;
          if (entry->state != SlotState::ready || ((readable >> entry->volume) & 1) == 0) return;
          states[i] = BlockState::on_disk;
          entries[i] = disk_->index.index().id(*entry);
        });
  }
  DiskTier* const disk = disk_.get();
  for (std::size_t i = part.size(); i-- > 0;) {
    if (!is_ready(states[i])) continue;
    TierIndex& tier = disk != nullptr && states[i] == BlockState::on_disk ? disk->index : tier_;
    Entry& entry = tier.index().at(entries[i]);
    tier.pin(entry);
    if (pinned.touched) tier.touch(entry);
  }
}

// Ends the pins that a lease of num_blocks does not need, and gives it the others.
void EngineImpl::keep_needed(const Pinned& pinned, LeaseState& lease) {
  tick();
  DiskTier* const disk = disk_.get();
  for (std::size_t g = 0; g < pinned.states.size(); ++g) {
    const std::vector<BlockState>& states = pinned.states[g];
    const std::optional<std::uint32_t> window = config_.groups[g].window_blocks();
    const std::size_t reach = window ? *window : states.size();
    const std::size_t first_needed = lease.num_blocks - std::min(lease.num_blocks, reach);
    for (std::size_t i = states.size(); i-- > 0;) {
      if (!is_ready(states[i])) continue;
      const bool on_disk = disk != nullptr && states[i] == BlockState::on_disk;
      const EntryId id = pinned.entries[g][i];
      if (i >= first_needed && i < lease.num_blocks && !closing_) {
        (on_disk ? lease.pinned_on_disk : lease.pinned).push_back(id);
        if (pinned.touched) continue;
      }
      TierIndex& tier = on_disk ? disk->index : tier_;
      Entry& entry = tier.index().at(id);
      if (i < first_needed || i >= lease.num_blocks || closing_) {
        tier.unpin(entry);
      } else if (entry.linked) {
        tier.touch(entry);
      }
    }
  }
}

void EngineImpl::end_lease(LeaseState& lease) {
  if (!lease.active) return;
  lease.active = false;
  for (const EntryId id : lease.pinned) tier_.unpin(tier_.index().at(id));
  lease.pinned.clear();
  for (const EntryId id : lease.pinned_on_disk) disk_->index.unpin(disk_->index.index().at(id));
  lease.pinned_on_disk.clear();
  std::erase_if(leases_,
                [&lease](const std::shared_ptr<LeaseState>& other) { return other.get() == &lease; });
}

void EngineImpl::release(LeaseState& lease) {
  MutexLock lock(mutex_);
  end_lease(lease);
}

bool EngineImpl::lease_active(const LeaseState& lease) {
  MutexLock lock(mutex_);
  expire_leases();
  return lease.active;
}

void EngineImpl::tick() {
  const std::int64_t now_us = clock_->now_us();
  tier_.advance(now_us);
  if (disk_) disk_->index.advance(now_us);
}

void EngineImpl::expire_leases() {
  const std::int64_t now = clock_->now_us();
  for (std::size_t i = leases_.size(); i-- > 0;) {
    const std::shared_ptr<LeaseState> lease = leases_[i];  // end_lease() takes it off the list
    if (lease->expires_us && *lease->expires_us <= now) end_lease(*lease);
  }
}

void EngineImpl::note_next_expiry() { next_expiry_us_ = tier_.next_expiry_us().value_or(kNever); }

void EngineImpl::expire_blocks() {
  if (next_expiry_us_.load(std::memory_order_relaxed) == kNever) return;
  const std::int64_t now = clock_->now_us();
  while (next_expiry_us_.load(std::memory_order_relaxed) <= now) {
    MutexLock lock(mutex_);
    if (closing_) return;
    for (std::size_t n = 0; n < kKeysPerHold; ++n) {
      Entry* const due = tier_.due(now);
      if (due == nullptr) break;
      note_ghosts(due->key, due->group, &Ghosts::erase);
      tier_.expire(*due);
      ++counters_.expirations;
    }
    note_next_expiry();
  }
}

Result<std::uint32_t> EngineImpl::poll() {
  expire_blocks();
  expire_prefetches();
  MutexLock lock(mutex_);
  KVTIER_RETURN_IF_ERROR(check_open());
  expire_leases();
  return running_;
}

Status EngineImpl::tell_expected(std::span<const BlockKey> keys,
                                 void (TierIndex::*what)(const BlockKey& key, GroupId group),
                                 std::size_t most, std::size_t& told) {
  for (std::size_t begin = 0; begin < keys.size(); begin += kKeysPerHold) {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
    tick();
    for (const BlockKey& key : keys.subspan(begin, std::min(kKeysPerHold, keys.size() - begin))) {
      for (std::size_t g = 0; g < config_.groups.size(); ++g) {
        const GroupId group{static_cast<std::uint16_t>(g)};
        for (TierIndex* tier : {&tier_, disk_ ? &disk_->index : nullptr}) {
          if (told == most) return Status::ok();
          if (tier != nullptr) (tier->*what)(key, group);
          ++told;
        }
      }
    }
  }
  return Status::ok();
}

Result<std::uint64_t> EngineImpl::touch(std::span<const BlockKey> keys) {
  std::uint64_t touched = 0;
  expire_blocks();
  for (std::size_t end = keys.size(); end > 0;) {  // the last part first: tail first over all
    const std::size_t begin = end - std::min(kKeysPerHold, end);
    MutexLock lock(mutex_);
    tick();
    KVTIER_RETURN_IF_ERROR(check_open());
    for (std::size_t i = end; i-- > begin;) {
      for (std::size_t g = 0; g < config_.groups.size(); ++g) {
        const GroupId group{static_cast<std::uint16_t>(g)};
        Entry* entry = tier_.index().find(keys[i], group);
        const bool in_host = entry != nullptr && entry->state == SlotState::ready;
        if (in_host) tier_.touch(*entry);
        touched += touch_on_disk(keys[i], group) || in_host ? 1 : 0;
        note_ghosts(keys[i], group, &Ghosts::touch);
      }
    }
    end = begin;
  }
  return touched;
}

// Also tells the catalog, so that the order survives a restart.
bool EngineImpl::touch_on_disk(const BlockKey& key, GroupId group) {
  if (!disk_) return false;
  Entry* entry = disk_->index.index().find(key, group);
  if (entry == nullptr || entry->state != SlotState::ready) return false;
  disk_->index.touch(*entry);
  disk_->volumes[entry->volume].store->note_use(
      {static_cast<std::uint32_t>(class_of_group_[raw(group)]), entry->slot});
  return true;
}

Result<std::uint64_t> EngineImpl::drop(std::span<const BlockKey> keys) {
  std::uint64_t dropped = 0;
  DiskVictims victims(disk_ ? disk_->volumes.size() : 0);
  const Call call(*this);  // close() waits for the drives' answers
  const Status scans = disk_ ? wait_for_scans() : Status::ok();
  for (std::size_t begin = 0; begin < keys.size(); begin += kKeysPerHold) {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
    const std::uint64_t before = dropped;
    for (const BlockKey& key : keys.subspan(begin, std::min(kKeysPerHold, keys.size() - begin))) {
      for (std::size_t g = 0; g < config_.groups.size(); ++g) {
        const GroupId group{static_cast<std::uint16_t>(g)};
        Entry* entry = tier_.index().find(key, group);
        if (entry != nullptr) tier_.drop(*entry);
        Entry* on_disk = disk_ ? disk_->index.index().find(key, group) : nullptr;
        if (on_disk != nullptr) doom(*on_disk, victims);
        if (entry != nullptr || on_disk != nullptr) ++dropped;
        note_ghosts(key, group, &Ghosts::erase);
      }
    }
    counters_.drops += dropped - before;
  }
  if (disk_) KVTIER_RETURN_IF_ERROR(wipe_and_wait(std::move(victims)));
  KVTIER_RETURN_IF_ERROR(scans);
  return dropped;
}

Result<std::uint64_t> EngineImpl::drop_namespace(std::string_view name_space) {
  std::uint64_t dropped = 0;
  DiskVictims victims(disk_ ? disk_->volumes.size() : 0);
  const NamespaceTag tag = namespace_tag(name_space);
  const Call call(*this);
  const Status scans = disk_ ? wait_for_scans() : Status::ok();
  for (int on_disk = 0; on_disk < (disk_ ? 2 : 1); ++on_disk) {
    std::size_t num_records = 1;
    for (std::size_t begin = 0; begin < num_records; begin += kKeysPerHold) {
      MutexLock lock(mutex_);
      KVTIER_RETURN_IF_ERROR(check_open());
      const auto found = namespace_of_tag_.find(tag);
      if (found == namespace_of_tag_.end()) break;
      TierIndex& tier = on_disk != 0 ? disk_->index : tier_;
      const std::span<Entry> records = tier.index().records();
      num_records = records.size();
      for (std::size_t i = begin; i < std::min(begin + kKeysPerHold, num_records); ++i) {
        Entry& entry = records[i];
        if (!entry.linked || entry.name_space != found->second) continue;
        // A block in both tiers is dropped from both at once, and counted once.
        if (on_disk != 0) {
          // A load may have brought it to the host tier since that was searched.
          if (Entry* above = tier_.index().find(entry.key, entry.group)) tier_.drop(*above);
          doom(entry, victims);
        } else {
          Entry* below = disk_ ? disk_->index.index().find(entry.key, entry.group) : nullptr;
          if (below != nullptr) doom(*below, victims);
          tier_.drop(entry);
        }
        ++dropped;
        ++counters_.drops;
      }
    }
  }
  if (disk_) KVTIER_RETURN_IF_ERROR(wipe_and_wait(std::move(victims)));
  KVTIER_RETURN_IF_ERROR(scans);
  return dropped;
}

NamespaceId EngineImpl::intern(std::string_view name_space) {
  const auto found = namespaces_.find(name_space);
  if (found != namespaces_.end()) return found->second;
  const NamespaceId id = intern_tag(namespace_tag(name_space));
  namespaces_.emplace(name_space, id);
  return id;
}

NamespaceId EngineImpl::intern_tag(const NamespaceTag& tag) {
  const auto found = namespace_of_tag_.find(tag);
  if (found != namespace_of_tag_.end()) return found->second;
  const NamespaceId id{static_cast<std::uint32_t>(namespace_tags_.size())};
  namespace_tags_.push_back(tag);
  namespace_of_tag_.emplace(tag, id);
  return id;
}

}  // namespace kvtier
