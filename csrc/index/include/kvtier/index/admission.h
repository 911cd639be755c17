// AdmissionPolicy: whether a block is worth a place on the drive. Decides, never acts.
//
// 76 of 100 blocks of real traffic are used once, and a drive may be written only so often. While the tier
// has free slots every block is welcome (but to return-hazard, where a write budget runs low).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvtier/core/types.h"
#include "kvtier/index/return_admission.h"

namespace kvtier {

enum class Admission : std::uint8_t {
  all,
  second_use,     // a key that was offered before, within about as many offers as the tier has slots
  tiny_lfu,       // one that was offered more often than the block it would replace
  return_hazard,  // one of which more is to be expected than of the block it would replace: ReturnAdmission
};

inline constexpr Admission kDefaultAdmission = Admission::return_hazard;

// How often keys were seen lately: a count-min sketch whose counts are halved as it ages (Einziger, Friedman
// and Manes, TinyLFU, ACM ToS 2017). Never too low, seldom too high. 4 bytes per key of capacity.
class FrequencySketch {
 public:
  // `capacity`: distinct keys that it should tell apart. `seed` decides where keys land.
  FrequencySketch(std::size_t capacity, std::uint64_t seed);
  void add(const BlockKey& key);
  std::uint32_t estimate(const BlockKey& key) const;

 private:
  static constexpr int kRows = 4;
  static constexpr std::uint8_t kMost = 15;
  std::size_t place(const BlockKey& key, int row) const;

  std::vector<std::uint8_t> counts_;  // row after row
  std::size_t mask_;
  std::uint64_t seed_;
  std::size_t adds_ = 0;
  std::size_t adds_until_halved_;
};

// Threads: none of its own; guarded by its owner.
class AdmissionPolicy {
 public:
  struct Tiers {
    std::size_t host_blocks = 0;
    std::size_t disk_blocks = 0;
  };
  // `seed`: of FrequencySketch, or of block_digest().
  AdmissionPolicy(Admission kind, const Tiers& tiers, std::uint64_t seed);

  // Who must be told of the uses in the host tier; null if nobody.
  UseObserver* observer() { return returns_.get(); }

  // Notes that the block was offered, and says whether it should be written.
  bool admit(const Offer& offer);
  // Notes that the block was offered, though something else has refused it: it counts as a first use.
  void note(const Offer& offer);

 private:
  Admission kind_;
  FrequencySketch seen_;
  std::unique_ptr<ReturnAdmission> returns_;  // null unless `kind_` is return_hazard
};

}  // namespace kvtier
