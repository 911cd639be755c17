// ReturnHazards: how likely a block comes back, learned from what comes back.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace kvtier {

// Time since some start, in steps of the policy's choice; and a length of it.
using Tick = std::uint32_t;

// Per class of blocks and age (ticks since the last use, in bins of a quarter octave): returns counted, and
// block-ticks during which they could have come. The quotient is the hazard of returning at that age. Classes
// with few observations lean on the shape that all classes have in common (proportional hazards), and with
// none at all the hazard falls with age, as LRU assumes.
//
// What keeping is worth follows as the Gittins index: the most returns per tick of holding that any horizon
// from now on promises (Gittins, Bandit processes and dynamic allocation indices, JRSS B 1979; for caches the
// hit density of LHD: Beckmann, Chen and Cidon, NSDI'18). A hazard that will rise counts before it does.
//
// Deterministic: IEEE arithmetic without library functions. Memory: 44 bytes per class and bin. Threads: none
// of its own.
class ReturnHazards {
 public:
  // What was counted weighs half after so many returns, or an hour of ticks with a thousand of them: what is
  // learned follows the traffic, however long it was another one, and is not forgotten over night.
  explicit ReturnHazards(std::uint32_t num_classes, std::size_t returns_until_halved = ~std::size_t{0});

  void returned(std::uint32_t block_class, Tick age);
  // blocks[class] of this age were waited for, so many ticks each.
  void waited(Tick age, std::span<const std::uint32_t> blocks, Tick ticks) {
    double* waits = &block_ticks_[bin(age) * num_classes_];
    for (std::size_t c = 0; c < num_classes_; ++c) {
      waits[c] += static_cast<double>(blocks[c]) * static_cast<double>(ticks);
    }
  }
  void passed(Tick ticks);
  // Brings values() and returning() up to date with what was counted: some ten microseconds.
  void learn();
  // returning() alone: less than half of it.
  void learn_returns();
  // By class: expected returns per tick of holding a block of this age; see above.
  std::span<const float> values(Tick age) const { return {&values_[bin(age) * num_classes_], num_classes_}; }

  // Of the blocks of this class that have not returned by `age`, the share that does within `ticks` more; 0
  // to 1.
  double returning(std::uint32_t block_class, Tick age, Tick ticks) const;

  static double bytes_for(std::uint32_t num_classes) {
    return static_cast<double>(std::size_t{num_classes} * kBins * (5 * sizeof(double) + sizeof(float)));
  }

 private:
  static constexpr std::uint32_t kBins = 92;  // up to 2^24 ticks
  static constexpr std::uint32_t kExact = 8;  // ages below have bins of their own
  static constexpr Tick kTicksUntilHalved = 3600;
  static constexpr std::size_t kLeastReturnsHalved = 1024;
  static std::uint32_t bin(Tick age) {
    if (age < kExact) return age;
    const auto octave = static_cast<std::uint32_t>(std::bit_width(age)) - 1;
    return std::min(kBins - 1, kExact + (octave - 3) * 4 + ((age >> (octave - 2)) & 3U));
  }
  static Tick begin(std::uint32_t bin);
  std::vector<double> common_hazard() const;
  void halve();
  void learn_values(std::size_t block_class);
  double waiting(std::uint32_t block_class, Tick age) const;

  std::size_t num_classes_;
  std::size_t returns_until_halved_;
  std::size_t returns_since_halved_ = 0;
  Tick ticks_since_halved_ = 0;
  // [bin][class]: a tick asks for all classes of an age
  std::vector<double> returns_;
  std::vector<double> block_ticks_;
  std::vector<float> values_;
  std::vector<double> left_;   // the share that has not returned at its beginning
  std::vector<double> share_;  // of those, what returns within it
  std::vector<double> wait_;   // ticks that one of those is waited for within it
};

}  // namespace kvtier
