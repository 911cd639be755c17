#include "ghosts.h"

#include <algorithm>
#include <utility>

#include "engine_impl.h"

namespace kvtier {
namespace {

GhostStats stats_of(const GhostCache& ghost) {
  GhostStats stats;
  stats.sample_rate = ghost.rate();
  stats.asked_blocks = ghost.asked();
  stats.sampled_blocks = ghost.looked();
  stats.memory_bytes = ghost.bytes();
  for (const GhostCache::Point& point : ghost.points()) {
    stats.points.push_back({point.factor, point.capacity_blocks, point.hit_rate});
  }
  return stats;
}

}  // namespace

Ghosts::Ghosts(std::uint64_t host_blocks, std::uint64_t disk_blocks, std::size_t most_at_once)
    : host_(host_blocks), most_at_once_(most_at_once) {
  if (disk_blocks > 0) disk_.emplace(disk_blocks);
  below_ = std::max(host_.threshold(), disk_ ? disk_->threshold() : 0);
  log_.resize(3 * (most_at_once + 1) + 1);  // a note writes one place beyond what it keeps
  part_.reserve(log_.size());
}

bool Ghosts::measures_next() {
  if (asked_in_all_ < kAllBlocks) return true;
  random_ ^= random_ << 13;  // Marsaglia, Xorshift RNGs, 2003
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_ % kOneOf == 0;
}

Ghosts::Notes Ghosts::begin() {
  if (noted_ + most_at_once_ + 2 > log_.size()) drain();
  return {log_.data() + noted_, below_};
}

void Ghosts::end(const Notes& notes, std::size_t num_blocks) {
  asked_ += num_blocks;
  asked_in_all_ += num_blocks;
  const auto noted = static_cast<std::size_t>(notes.next - log_.data());
  if (noted == noted_) return;
  noted_ = noted;
  log_[noted_++] = GhostCache::kNoHash;
}

template <typename F>
void Ghosts::each(std::uint64_t hash, F&& f) {
  if (noted_ > 0) drain();
  if (hash < host_.threshold()) f(host_);
  if (disk_ && hash < disk_->threshold()) f(*disk_);
}

void Ghosts::use(std::uint64_t hash) {
  each(hash, [hash](GhostCache& ghost) { ghost.use(hash); });
}

void Ghosts::touch(std::uint64_t hash) {
  each(hash, [hash](GhostCache& ghost) { ghost.touch(hash); });
}

void Ghosts::erase(std::uint64_t hash) {
  each(hash, [hash](GhostCache& ghost) { ghost.erase(hash); });
}

void Ghosts::restore(std::uint64_t hash) {
  if (disk_ && hash < disk_->threshold()) disk_->use(hash);
}

void Ghosts::drain() {
  const std::span<const std::uint64_t> all(log_.data(), std::exchange(noted_, 0));
  for (GhostCache* ghost : {&host_, disk_ ? &*disk_ : nullptr}) {
    if (ghost != nullptr) ghost->look({}, asked_);
  }
  asked_ = 0;
  for (std::size_t begin = 0; begin < all.size();) {
    const auto end = static_cast<std::size_t>(
        std::find(all.begin() + static_cast<std::ptrdiff_t>(begin), all.end(), GhostCache::kNoHash) -
        all.begin());
    for (GhostCache* ghost : {&host_, disk_ ? &*disk_ : nullptr}) {
      if (ghost == nullptr) continue;
      part_.clear();
      std::copy_if(all.begin() + static_cast<std::ptrdiff_t>(begin),
                   all.begin() + static_cast<std::ptrdiff_t>(end), std::back_inserter(part_),
                   [ghost](std::uint64_t hash) { return hash < ghost->threshold(); });
      ghost->look(part_, 0);
    }
    begin = end + 1;
  }
}

void Ghosts::add_to(EngineStats& stats) {
  drain();
  stats.ghost_host = stats_of(host_);
  if (disk_) stats.ghost_disk = stats_of(*disk_);
}

void EngineImpl::open_ghosts() {
  if (!config_.ghosts) return;
  {
    MutexLock lock(mutex_);
    if (ghosts_) return;  // with the drives
  }
  for (std::size_t g = config_.groups.size(); g-- > 0;) {
    if (!config_.groups[g].window_blocks()) ghost_group_ = GroupId{static_cast<std::uint16_t>(g)};
  }
  const std::size_t class_index = class_of_group_[raw(ghost_group_)];
  const auto sharing =
      static_cast<std::uint64_t>(std::count(class_of_group_.begin(), class_of_group_.end(), class_index));
  MutexLock lock(mutex_);
  std::uint64_t disk_slots = 0;
  for (std::uint32_t v = 0; disk_ && v < disk_->volumes.size(); ++v) {
    disk_slots += disk_->index.slots(disk_->index.class_of(ghost_group_, v)).capacity();
  }
  ghosts_ =
      std::make_unique<Ghosts>(std::max<std::uint64_t>(1, tier_.slots(class_index).capacity() / sharing),
                               disk_slots / sharing, kKeysPerHold);
}

Status EngineImpl::pause_ghosts(bool paused) {
  MutexLock lock(mutex_);
  KVTIER_RETURN_IF_ERROR(check_open());
  ghosts_paused_ = paused;
  return Status::ok();
}

void EngineImpl::note_ghosts(const BlockKey& key, GroupId group, void (Ghosts::*what)(std::uint64_t)) {
  if (!ghosts_ || ghosts_paused_ || group != ghost_group_) return;
  const std::uint64_t hash = tier_.index().hash(key, group);
  if (ghosts_->sampled(hash)) (ghosts_.get()->*what)(hash);
}

void EngineImpl::note_use(std::span<const BlockKey> keys, GroupId group) {
  if (group != ghost_group_) return;
  for (std::size_t end = keys.size(); end > 0;) {  // tail first: the tail becomes the oldest
    const std::size_t begin = end - std::min(kKeysPerHold, end);
    MutexLock lock(mutex_);
    if (!ghosts_ || ghosts_paused_) return;
    for (std::size_t i = end; i-- > begin;) note_ghosts(keys[i], group, &Ghosts::use);
    end = begin;
  }
}

}  // namespace kvtier
