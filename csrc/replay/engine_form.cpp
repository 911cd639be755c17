// The engine's form: the steps of csrc/engine/moves.cpp, disk_read.cpp and disk_write.cpp, each request
// alone.
#include <algorithm>

#include "tiers.h"

namespace kvtier::replay {
namespace {

constexpr std::uint32_t kWriteBackShare = 8;  // DiskTier's

class EngineForm final : public Tiers {
 public:
  explicit EngineForm(const SimulationOptions& options)
      : Tiers(options),
        writes_at_once_(options.writes_at_once > 0 ? options.writes_at_once
                                                   : std::max(1U, options.host_blocks / kWriteBackShare)) {}

 private:
  struct Promoted {
    Entry* host;
    Entry* disk;
  };

  Prefix run(SimulationResult& result) override {
    Prefix hit = look_up();
    hit = load(hit, result);
    store(result);
    return hit;
  }

  // begin_load(): what is in the host tier is held while the rest is promoted, and touched tail first; then
  // the reads end, head first. Returns the prefix that was loaded.
  Prefix load(Prefix wanted, SimulationResult& result) {
    const std::size_t n = std::size_t{wanted.host} + wanted.disk;
    Prefix loaded = wanted;
    promoted_.clear();
    if (wanted.disk > 0) {
      for (std::size_t i = 0; i < n; ++i) {
        if (in_host_[i] != nullptr) host_.pin(*in_host_[i]);
      }
      loaded = promote(n);
    }
    for (std::size_t i = n; i-- > 0;) {
      if (in_host_[i] != nullptr) host_.touch(*in_host_[i]);
    }
    for (const Promoted& each : promoted_) {
      end_read(each);
      host_.pin(*each.host);
    }
    result.promotions += promoted_.size();
    if (wanted.disk > 0) {
      for (std::size_t i = 0; i < n; ++i) {
        if (in_host_[i] != nullptr) host_.unpin(*in_host_[i]);
      }
      for (const Promoted& each : promoted_) host_.unpin(*each.host);
    }
    return loaded;
  }

  Prefix promote(std::size_t n) {
    Prefix loaded;
    bool whole = true;
    for (std::size_t i = 0; i < n; ++i) {
      if (in_host_[i] != nullptr) {
        if (whole) ++loaded.host;
      } else if (begin_read(keys_[i], Arrival::used)) {
        if (whole) ++loaded.disk;
      } else {
        whole = false;
      }
    }
    return loaded;
  }

  // Engine::prefetch(): nothing is held, and what is there may go for what comes.
  void prefetch(std::size_t n, SimulationResult& result) override {
    promoted_.clear();
    for (std::size_t i = 0; disk_ && i < n; ++i) {
      if (ready(host_, keys_[i]) == nullptr && ready(*disk_, keys_[i]) != nullptr)
        begin_read(keys_[i], Arrival::ahead);
    }
    for (const Promoted& each : promoted_) end_read(each);
    result.promotions += promoted_.size();
  }

  // EngineImpl::promote(). False when the host tier has no slot for it.
  bool begin_read(const BlockKey& key, Arrival arrival) {
    Entry* on_disk = ready(*disk_, key);
    Entry* above = disk_->index().parent(*on_disk);
    Entry* parent = above == nullptr ? nullptr : host_.index().find(above->key, kGroup);
    disk_->pin(*on_disk);
    const TierIndex::Reservation place = host_.reserve(key, kGroup, kNamespace, on_disk->depth, parent,
                                                       /*volume=*/0, Priority::normal, arrival);
    if (place.outcome != ReserveOutcome::reserved) {
      disk_->unpin(*on_disk);
      return false;
    }
    promoted_.push_back({place.entry, on_disk});
    return true;
  }

  // on_read().
  void end_read(const Promoted& each) {
    host_.commit(*each.host);
    disk_->touch(*each.disk);
    disk_->unpin(*each.disk);
  }

  // begin_store(), release_present(), settle_entries() and track_store().
  void store(SimulationResult& result) {
    present_.clear();
    stored_.clear();
    Entry* parent = nullptr;
    for (std::size_t i = 0; i < keys_.size(); ++i) {
      const TierIndex::Reservation found =
          host_.reserve(keys_[i], kGroup, kNamespace, static_cast<std::uint32_t>(i), parent);
      if (found.outcome == ReserveOutcome::declined) break;
      if (found.outcome == ReserveOutcome::present) {
        host_.pin(*found.entry);
        present_.push_back(found.entry);
      } else {
        stored_.push_back(found.entry);
      }
      parent = found.entry;
    }
    for (std::size_t i = present_.size(); i-- > 0;) {
      host_.touch(*present_[i]);
      host_.unpin(*present_[i]);
    }
    for (std::size_t i = stored_.size(); i-- > 0;) host_.commit(*stored_[i]);
    if (!disk_) return;
    candidates_.clear();  // add_candidate(): what is on disk now is none, though it may be evicted meanwhile
    for (const std::vector<Entry*>* blocks : {&present_, &stored_}) {
      for (Entry* entry : *blocks) {
        if (disk_->index().find(entry->key, kGroup) == nullptr) candidates_.push_back(entry);
      }
    }
    for (Entry* entry : candidates_) offer(*entry, result);
    while (!writing_.empty()) end_write();
  }

  // next_write(): the drives end the writes in the order in which they began.
  void offer(Entry& host, SimulationResult& result) {
    const Entry* above = host_.index().parent(host);
    if (writing_.size() >= writes_at_once_) end_write();
    Entry* parent = above == nullptr ? nullptr : disk_->index().find(above->key, kGroup);
    if (above != nullptr && parent == nullptr) {
      ++result.declined_parent;
      note_refused(host.key);
      return;
    }
    if (!admitted(host.key, result)) return;
    const TierIndex::Reservation place = disk_->reserve(host.key, kGroup, kNamespace, host.depth, parent);
    if (place.outcome != ReserveOutcome::reserved) return;
    ++result.disk_blocks_written;
    host_.pin(host);
    writing_.push_back({&host, place.entry});
  }

  void end_write() {
    const Promoted first = writing_.front();
    writing_.pop_front();
    host_.unpin(*first.host);
    disk_->commit(*first.disk);
  }

  std::uint32_t writes_at_once_;
  std::vector<Promoted> promoted_;
  std::deque<Promoted> writing_;
  std::vector<Entry*> present_;
  std::vector<Entry*> stored_;
  std::vector<Entry*> candidates_;
};

}  // namespace

std::unique_ptr<Tiers> make_engine_form(const SimulationOptions& options) {
  return std::make_unique<EngineForm>(options);
}

}  // namespace kvtier::replay
