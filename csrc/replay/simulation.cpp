#include "kvtier/replay/simulation.h"

#include <algorithm>
#include <deque>
#include <utility>

#include "tiers.h"

#include "kvtier/core/status.h"

namespace kvtier::replay {
namespace {

constexpr std::size_t kRequestsPerCall = 1024;  // of progress

TierIndex::Options tier_options(const SimulationOptions& options, std::uint32_t blocks,
                                std::string_view eviction,
                                const std::optional<SimulationOptions::Custom>& custom) {
  TierIndex::Options tier;
  tier.slots_per_class = {blocks};
  tier.class_of_group = {0};
  tier.hash_seed = options.seed;
  tier.eviction = eviction;
  if (custom) {
    tier.make_eviction = custom->make;
    tier.leaf_first = custom->leaf_first;
  }
  if (options.form == Form::plain) tier.leaf_first = false;
  tier.block_bytes = {options.block_bytes};
  return tier;
}

}  // namespace

Tiers::Tiers(const SimulationOptions& options)
    : host_(tier_options(options, options.host_blocks, options.host_eviction, options.host_custom)),
      block_bytes_(options.block_bytes),
      admission_(options.admission, {.host_blocks = options.host_blocks, .disk_blocks = options.disk_blocks},
                 options.seed),
      bytes_per_day_(options.write_bytes_per_day) {
  KVTIER_CHECK(options.host_blocks > 0);
  host_.slots(0).grow(options.host_blocks);
  if (options.disk_blocks == 0) return;
  host_.tell_uses_to(admission_.observer());
  disk_ = std::make_unique<TierIndex>(
      tier_options(options, options.disk_blocks, options.disk_eviction, options.disk_custom));
  disk_->slots(0).grow(options.disk_blocks);
}

Tiers::Prefix Tiers::look_up() {
  in_host_.resize(keys_.size());
  host_.index().find_each(keys_, kGroup, [this](std::size_t i, Entry* entry) {
    in_host_[i] = entry != nullptr && entry->state == SlotState::ready ? entry : nullptr;
  });
  Prefix found;
  for (std::size_t i = 0; i < keys_.size(); ++i) {
    if (in_host_[i] != nullptr) {
      ++found.host;
    } else if (disk_ && ready(*disk_, keys_[i]) != nullptr) {
      ++found.disk;
    } else {
      break;
    }
  }
  return found;
}

Offer Tiers::offer_of(const BlockKey& key) {
  return {.block = {key, kGroup},
          .victim = std::nullopt,
          .bytes = std::max<std::uint64_t>(1, block_bytes_),
          .budget = budget_ ? budget_->fullness(now_us_) : 1};
}

bool Tiers::admitted(const BlockKey& key, SimulationResult& result) {
  const bool has_free = disk_->slots(0).has_free();
  const Entry* victim = has_free ? nullptr : disk_->next_victim(0);
  Offer offer = offer_of(key);
  if (victim != nullptr) offer.victim.emplace(BlockName{victim->key, victim->group});
  if (!admission_.admit(offer)) {
    ++result.declined_admission;
    return false;
  }
  if (!has_free && victim == nullptr) return false;
  if (budget_ && !budget_->take(block_bytes_, now_us_)) {
    ++result.declined_budget;
    return false;
  }
  return true;
}

void Tiers::advance(std::int64_t at_us) {
  now_us_ = at_us;
  if (disk_ && !budget_) budget_.emplace(bytes_per_day_, at_us);
  host_.advance(at_us);
  if (disk_) disk_->advance(at_us);
}

void Tiers::take_keys(std::span<const std::uint32_t> blocks) {
  keys_.clear();
  for (const std::uint32_t block : blocks) keys_.push_back(key_of(block));
}

void Tiers::request(std::span<const std::uint32_t> blocks, SimulationResult& result) {
  take_keys(blocks);
  host_.fetch(keys_, kGroup);
  if (disk_) disk_->fetch(keys_, kGroup);
  const Prefix hit = run(result);
  loaded_ = std::size_t{hit.host} + hit.disk;
  result.references += blocks.size();
  result.hits_host += hit.host;
  result.hits_disk += hit.disk;
  result.host_of_request.push_back(hit.host);
  result.disk_of_request.push_back(hit.disk);
}

Tiers::Expected Tiers::expect(std::span<const std::uint32_t> blocks, SimulationResult& result) {
  take_keys(blocks);
  const Prefix found = look_up();
  Expected expected;
  expected.blocks = std::size_t{found.host} + found.disk;
  for (std::size_t i = 0; i < expected.blocks; ++i) {
    if (in_host_[i] == nullptr) expected.on_disk.push_back(static_cast<std::uint32_t>(i));
    host_.expect(keys_[i], kGroup);
    if (disk_) disk_->expect(keys_[i], kGroup);
  }
  prefetch(expected.blocks, result);
  return expected;
}

void Tiers::expect_no_more(std::span<const std::uint32_t> blocks, const Expected& expected) {
  for (const std::uint32_t block : blocks.first(expected.blocks)) {
    host_.expect_no_more(key_of(block), kGroup);
    if (disk_) disk_->expect_no_more(key_of(block), kGroup);
  }
}

std::uint64_t Tiers::hidden(const Expected& expected) const {
  return static_cast<std::uint64_t>(
      std::count_if(expected.on_disk.begin(), expected.on_disk.end(),
                    [this](std::uint32_t i) { return i < loaded_ && in_host_[i] != nullptr; }));
}

void Tiers::finish(SimulationResult& result) const {
  result.evictions_host = host_.evictions();
  result.orphans_host = host_.orphans();
  if (!disk_) return;
  result.evictions_disk = disk_->evictions();
  result.orphans_disk = disk_->orphans();
}

SimulationResult simulate(const TraceView& trace, const SimulationOptions& options) {
  KVTIER_CHECK(options.look_ahead == 0 || options.form == Form::engine);
  const std::unique_ptr<Tiers> tiers =
      options.form == Form::engine ? make_engine_form(options) : make_plain_form(options);
  SimulationResult result;
  result.host_of_request.reserve(trace.num_requests());
  result.disk_of_request.reserve(trace.num_requests());
  std::deque<Tiers::Expected> waiting(std::min<std::size_t>(options.look_ahead, trace.num_requests()));
  for (std::size_t r = 0; r < trace.num_requests(); ++r) {
    if (options.progress && r % kRequestsPerCall == 0 && !options.progress(r)) break;
    tiers->advance(trace.at_us[r]);
    Tiers::Expected expected;
    if (options.look_ahead > 0) {
      expected = std::move(waiting.front());
      waiting.pop_front();
      tiers->expect_no_more(trace.request(r), expected);
      const std::size_t comes = r + options.look_ahead;
      if (comes < trace.num_requests()) waiting.push_back(tiers->expect(trace.request(comes), result));
    }
    tiers->request(trace.request(r), result);
    result.reads_hidden += tiers->hidden(expected);
  }
  tiers->finish(result);
  return result;
}

}  // namespace kvtier::replay
