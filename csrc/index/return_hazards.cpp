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

constexpr double kLeastLeft = 1e-280;  // share of blocks that have not returned: quotients stay numbers

}  // namespace

Tick ReturnHazards::begin(std::uint32_t bin) {
  if (bin < kExact) return bin;
  const std::uint32_t octave = (bin - kExact) / 4 + 3;
  return (Tick{1} << octave) + ((bin - kExact) % 4) * (Tick{1} << (octave - 2));
}

ReturnHazards::ReturnHazards(std::uint32_t num_classes, std::size_t returns_until_halved)
    : num_classes_(num_classes),
      returns_until_halved_(returns_until_halved),
      returns_(std::size_t{num_classes} * kBins),
      block_ticks_(returns_.size()),
      values_(returns_.size()),
      left_(returns_.size()),
      share_(returns_.size()),
      wait_(returns_.size()) {
  learn();
}

void ReturnHazards::returned(std::uint32_t block_class, Tick age) {
  returns_[bin(age) * num_classes_ + block_class] += 1;
  if (++returns_since_halved_ >= returns_until_halved_) halve();
}

void ReturnHazards::passed(Tick ticks) {
  ticks_since_halved_ += std::min(ticks, kTicksUntilHalved - ticks_since_halved_);
  if (ticks_since_halved_ == kTicksUntilHalved && returns_since_halved_ >= kLeastReturnsHalved) halve();
}

void ReturnHazards::halve() {
  for (double& returns : returns_) returns *= 0.5;
  for (double& block_ticks : block_ticks_) block_ticks *= 0.5;
  returns_since_halved_ = 0;
  ticks_since_halved_ = 0;
}

std::vector<double> ReturnHazards::common_hazard() const {
  std::vector<double> hazard(kBins);
  for (std::uint32_t b = 0; b < kBins; ++b) {
    const double believed = kPriorHazard / (static_cast<double>(begin(b)) + 1);
    double returns = kPriorReturns;
    double block_ticks = kPriorReturns / believed;
    for (std::size_t at = b * num_classes_; at < (b + 1) * num_classes_; ++at) {
      returns += returns_[at];
      block_ticks += block_ticks_[at];
    }
    hazard[b] = returns / block_ticks;
  }
  return hazard;
}

void ReturnHazards::learn() {
  learn_returns();
  for (std::size_t c = 0; c < num_classes_; ++c) learn_values(c);
}

void ReturnHazards::learn_returns() {
  const std::vector<double> common = common_hazard();
  std::vector<double> returns(num_classes_, kRatioReturns);
  std::vector<double> expected(num_classes_, kRatioReturns);
  for (std::uint32_t b = 0; b < kBins; ++b) {
    for (std::size_t c = 0; c < num_classes_; ++c) {
      returns[c] += returns_[b * num_classes_ + c];
      expected[c] += block_ticks_[b * num_classes_ + c] * common[b];
    }
  }
  for (std::uint32_t b = 0; b < kBins; ++b) {
    const double width = b + 1 < kBins ? static_cast<double>(begin(b + 1) - begin(b)) : 1.0;
    const std::size_t row = b * num_classes_;
    for (std::size_t c = 0; c < num_classes_; ++c) {
      const double own = common[b] * returns[c] / expected[c];
      const double hazard = (returns_[row + c] + kBinReturns) / (block_ticks_[row + c] + kBinReturns / own);
      share_[row + c] = hazard * width / (1 + hazard * width);
      wait_[row + c] = width * (1 - 0.5 * share_[row + c]);
    }
  }
  std::fill_n(left_.begin(), num_classes_, 1.0);
  for (std::size_t at = num_classes_; at < left_.size(); ++at) {
    left_[at] = std::max(kLeastLeft, left_[at - num_classes_] * (1 - share_[at - num_classes_]));
  }
}

void ReturnHazards::learn_values(std::size_t block_class) {
  const auto at = [&](std::uint32_t b) { return b * num_classes_ + block_class; };
  // Drawn as a curve of returns against time held, from the first bin to the last, what the best horizon
  // promises is the steepest line from where one stands to the curve ahead: to a corner of its upper hull.
  struct Corner {
    double ahead;  // time held from here to the end of the last bin
    double left;   // share that has not returned yet
  };
  Corner hull[kBins + 1];  // the nearest corner is the last
  std::size_t corners = 0;
  const auto steepness = [](const Corner& from, const Corner& to) {
    return (from.left - to.left) / (from.ahead - to.ahead);
  };
  Corner next{0, std::max(kLeastLeft, left_[at(kBins - 1)] * (1 - share_[at(kBins - 1)]))};  // behind bin b
  for (std::uint32_t b = kBins; b-- > 0;) {
    while (corners > 1 &&
           steepness(next, hull[corners - 1]) <= steepness(hull[corners - 1], hull[corners - 2]))
      --corners;
    hull[corners++] = next;
    // Half of the bin is over, and few of its own have returned in it.
    const double scale = next.left / (1 - 0.5 * share_[at(b)]);
    const Corner here{next.ahead + 0.5 * wait_[at(b)] * scale, next.left + 0.5 * share_[at(b)] * scale};
    std::size_t best = corners - 1;
    double value = steepness(here, hull[best]);
    while (best > 0 && steepness(here, hull[best - 1]) > value) value = steepness(here, hull[--best]);
    values_[at(b)] = static_cast<float>(value);
    next = {next.ahead + wait_[at(b)] * left_[at(b)], left_[at(b)]};
  }
}

// The share of the class that has not returned by `age`: evenly fewer within a bin.
double ReturnHazards::waiting(std::uint32_t block_class, Tick age) const {
  const std::uint32_t b = bin(age);
  const double left = left_[b * num_classes_ + block_class];
  if (b + 1 == kBins) return left;
  const double part = static_cast<double>(age - begin(b)) / static_cast<double>(begin(b + 1) - begin(b));
  return left + (left_[(b + 1) * num_classes_ + block_class] - left) * part;
}

double ReturnHazards::returning(std::uint32_t block_class, Tick age, Tick ticks) const {
  const Tick until = ticks > ~age ? ~Tick{0} : age + ticks;
  const double now = waiting(block_class, age);
  return now > 0 ? 1 - waiting(block_class, until) / now : 0;
}

}  // namespace kvtier
