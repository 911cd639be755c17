#include "kvtier/index/admission.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace kvtier {
namespace {

constexpr std::size_t kAddsPerKey = 10;  // of capacity, until all counts are halved: the paper's sample size

}  // namespace

FrequencySketch::FrequencySketch(std::size_t capacity, std::uint64_t seed)
    : counts_(std::bit_ceil(std::max<std::size_t>(capacity, 16)) * kRows, 0),
      mask_(counts_.size() / kRows - 1),
      seed_(seed),
      adds_until_halved_((mask_ + 1) * kAddsPerKey) {}

std::size_t FrequencySketch::place(const BlockKey& key, int row) const {
  // Keys are digests: each row takes 8 bytes of its own, spread once more with the seed.
  std::uint64_t word = 0;
  std::memcpy(&word, key.bytes.data() + std::size_t{8} * static_cast<std::size_t>(row), sizeof word);
  word = (word ^ seed_) * 0x9e3779b97f4a7c15ULL;
  word ^= word >> 32;
  return static_cast<std::size_t>(row) * (mask_ + 1) + (static_cast<std::size_t>(word) & mask_);
}

void FrequencySketch::add(const BlockKey& key) {
  for (int row = 0; row < kRows; ++row) {
    std::uint8_t& count = counts_[place(key, row)];
    if (count < kMost) ++count;
  }
  if (++adds_ < adds_until_halved_) return;
  adds_ = 0;
  for (std::uint8_t& count : counts_) count = static_cast<std::uint8_t>(count >> 1);
}

std::uint32_t FrequencySketch::estimate(const BlockKey& key) const {
  std::uint8_t least = kMost;
  for (int row = 0; row < kRows; ++row) least = std::min(least, counts_[place(key, row)]);
  return least;
}

AdmissionPolicy::AdmissionPolicy(Admission kind, const Tiers& tiers, std::uint64_t seed)
    : kind_(kind),
      seen_(kind == Admission::second_use || kind == Admission::tiny_lfu ? tiers.disk_blocks : 1, seed) {
  if (kind == Admission::return_hazard && tiers.disk_blocks > 0) {
    returns_ = std::make_unique<ReturnAdmission>(tiers.host_blocks, tiers.disk_blocks, seed);
  }
}

void AdmissionPolicy::note(const Offer& offer) {
  if (returns_) returns_->note(offer);
  if (kind_ == Admission::second_use || kind_ == Admission::tiny_lfu) seen_.add(offer.block.key);
}

bool AdmissionPolicy::admit(const Offer& offer) {
  if (returns_) return returns_->admit(offer);
  if (kind_ == Admission::all) return true;
  const std::uint32_t before = seen_.estimate(offer.block.key);
  seen_.add(offer.block.key);
  if (!offer.victim) return true;
  if (kind_ == Admission::second_use) return before > 0;
  return before + 1 > seen_.estimate(offer.victim->key);
}

}  // namespace kvtier
