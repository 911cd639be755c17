#include "kvtier/index/return_hazards.h"

#include <algorithm>

namespace kvtier {
namespace {

// What is believed before anything was seen, and how many returns that belief is worth.
constexpr double kPriorHazard = 0.09;  // per tick, divided by the age
constexpr double kPriorReturns = 20;
// Blocks return in prompts of dozens, so a few returns are hardly an observation.
constexpr double kRatioReturns = 50;  // of a class, against all
constexpr double kBinReturns = 30;    // of a class at one age, against its own ratio

constexpr double kHardlyAnyLeft = 0.001;  // share of blocks that have not returned: no need to look further

}  // namespace

Tick ReturnHazards::begin(std::uint32_t bin) {
  if (bin < kExact) return bin;
  const std::uint32_t octave = (bin - kExact) / 4 + 3;
  return (Tick{1} << octave) + ((bin - kExact) % 4) * (Tick{1} << (octave - 2));
}

ReturnHazards::ReturnHazards(std::uint32_t num_classes)
    : counts_(std::size_t{num_classes} * kBins), values_(counts_.size()), left_(counts_.size()) {
  learn();
}

void ReturnHazards::returned(std::uint32_t block_class, Tick age) {
  counts_[std::size_t{block_class} * kBins + bin(age)].returns += 1;
}

void ReturnHazards::halve() {
  for (Counts& counts : counts_) {
    counts.returns *= 0.5;
    counts.block_ticks *= 0.5;
  }
}

std::vector<double> ReturnHazards::common_hazard() const {
  std::vector<double> hazard(kBins);
  for (std::uint32_t b = 0; b < kBins; ++b) {
    const double believed = kPriorHazard / (static_cast<double>(begin(b)) + 1);
    double returns = kPriorReturns;
    double block_ticks = kPriorReturns / believed;
    for (std::size_t at = b; at < counts_.size(); at += kBins) {
      returns += counts_[at].returns;
      block_ticks += counts_[at].block_ticks;
    }
    hazard[b] = returns / block_ticks;
  }
  return hazard;
}

void ReturnHazards::learn() {
  const std::vector<double> common = common_hazard();
  for (std::size_t c = 0; c < num_classes(); ++c) learn_class(c, common);
}

void ReturnHazards::learn_class(std::size_t block_class, const std::vector<double>& common) {
  const Counts* counts = &counts_[block_class * kBins];
  double returns = kRatioReturns;
  double expected = kRatioReturns;
  for (std::uint32_t b = 0; b < kBins; ++b) {
    returns += counts[b].returns;
    expected += counts[b].block_ticks * common[b];
  }
  // Per bin: the share that returns of those who are left at its beginning, and how long it is waited for.
  double share[kBins];
  double wait[kBins];
  for (std::uint32_t b = 0; b < kBins; ++b) {
    const double own = common[b] * returns / expected;
    const double hazard = (counts[b].returns + kBinReturns) / (counts[b].block_ticks + kBinReturns / own);
    const double width = b + 1 < kBins ? static_cast<double>(begin(b + 1) - begin(b)) : 1.0;
    share[b] = hazard * width / (1 + hazard * width);
    wait[b] = width * (1 - 0.5 * share[b]);
  }
  double* all_left = &left_[block_class * kBins];
  all_left[0] = 1;
  for (std::uint32_t b = 1; b < kBins; ++b) all_left[b] = all_left[b - 1] * (1 - share[b - 1]);
  for (std::uint32_t from = 0; from < kBins; ++from) {
    double left = 1;
    double gained = 0;
    double held = 0;
    double most = 0;  // gained by the best horizon, and held for it; not their quotient, to divide once
    double most_held = 1;
    for (std::uint32_t b = from; b < kBins && left > kHardlyAnyLeft; ++b) {
      const double rest = b == from ? 0.5 : 1.0;  // half of the first bin is over
      gained += left * share[b] * rest;
      held += left * wait[b] * rest;
      left *= 1 - share[b] * rest;
      if (gained * most_held > most * held) {
        most = gained;
        most_held = held;
      }
    }
    values_[block_class * kBins + from] = static_cast<float>(most / most_held);
  }
}

// The share of the class that has not returned by `age`: evenly fewer within a bin.
double ReturnHazards::waiting(std::uint32_t block_class, Tick age) const {
  const std::uint32_t b = bin(age);
  const double* left = &left_[std::size_t{block_class} * kBins];
  if (b + 1 == kBins) return left[b];
  const double part = static_cast<double>(age - begin(b)) / static_cast<double>(begin(b + 1) - begin(b));
  return left[b] + (left[b + 1] - left[b]) * part;
}

double ReturnHazards::returning(std::uint32_t block_class, Tick age, Tick ticks) const {
  const Tick until = ticks > ~age ? ~Tick{0} : age + ticks;
  const double now = waiting(block_class, age);
  return now > 0 ? 1 - waiting(block_class, until) / now : 0;
}

}  // namespace kvtier
