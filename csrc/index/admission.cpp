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

AdmissionPolicy::AdmissionPolicy(Admission kind, std::size_t capacity, std::uint64_t seed)
    : kind_(kind), seen_(kind == Admission::all ? 1 : capacity, seed) {}

void AdmissionPolicy::note(const BlockKey& key) {
  if (kind_ != Admission::all) seen_.add(key);
}

bool AdmissionPolicy::admit(const BlockKey& key, const BlockKey* victim) {
  if (kind_ == Admission::all) return true;
  const std::uint32_t before = seen_.estimate(key);
  seen_.add(key);
  if (victim == nullptr) return true;
  if (kind_ == Admission::second_use) return before > 0;
  return before + 1 > seen_.estimate(*victim);
}

}  // namespace kvtier
