#include "kvtier/index/return_admission.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr double kLeastCounted = 1024;  // entries, before they are halved
constexpr double kLongestTicks = 1 << 22;
constexpr double kOfferWeight = 1.0 / 4096;  // of one in the usual
constexpr double kVictimWeight = 1.0 / 256;
constexpr double kRefusalWeight = 1.0 / 2048;
constexpr double kSteepness = 0.25;  // a fifth of the budget asks for the usual worth

void average(double& usual, bool& any, double value, double weight) {
  usual = any ? usual + weight * (value - usual) : value;
  any = true;
}

}  // namespace

void Residence::entered(Tick now) {
  if (entered_ == 0) since_ = static_cast<double>(now);
  entered_ += 1;
  if (entered_ < std::max(kLeastCounted, 2 * blocks_)) return;
  entered_ *= 0.5;
  since_ += 0.5 * (static_cast<double>(now) - since_);
}

Tick Residence::ticks(Tick now) const {
  if (entered_ == 0) return 0;
  const double passed = static_cast<double>(now) - since_;
  return static_cast<Tick>(std::min(kLongestTicks, blocks_ * passed / entered_));
}

ReturnAdmission::ReturnAdmission(std::size_t host_blocks, std::size_t disk_blocks, std::uint64_t seed)
    : book_(host_blocks + disk_blocks, seed), in_host_(host_blocks), on_disk_(disk_blocks) {}

void ReturnAdmission::appears(const BlockKey& key, GroupId group, const BlockKey* parent, Arrival arrival) {
  book_.appears(key, group, parent, arrival);
  in_host_.entered(book_.now());
}

double ReturnAdmission::worth(const BlockName& block) {
  return book_.returning(block.key, block.group, in_host_.ticks(book_.now()), on_disk_.ticks(book_.now()));
}

// Returns what the block is worth.
double ReturnAdmission::weigh(const Offer& offer) {
  const double value = worth(offer.block);
  average(usual_worth_, any_offer_, value / static_cast<double>(offer.bytes), kOfferWeight);
  return value;
}

bool ReturnAdmission::admit(const Offer& offer) {
  const double value = weigh(offer);
  const double price = offer.budget > 0 ? kSteepness * usual_worth_ * (1 / offer.budget - 1) : 0;
  double cost = 0;
  if (offer.victim) cost = any_victim_ ? usual_cost_ : worth(*offer.victim);
  if (offer.budget <= 0 || value - cost < price * static_cast<double>(offer.bytes)) {
    if (value < cost) {
      // Also of a first victim that nobody has beaten yet: it does not keep everybody out for ever.
      usual_cost_ = cost * (1 - kRefusalWeight);
      any_victim_ = true;
    }
    return false;
  }
  if (offer.victim) average(usual_cost_, any_victim_, worth(*offer.victim), kVictimWeight);
  on_disk_.entered(book_.now());
  return true;
}

}  // namespace kvtier
