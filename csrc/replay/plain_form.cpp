// The plain form: one block after the other, tail first.
#include "tiers.h"

namespace kvtier::replay {
namespace {

class PlainForm final : public Tiers {
 public:
  explicit PlainForm(const SimulationOptions& options) : Tiers(options) {}

 private:
  void prefetch(std::size_t /*n*/, SimulationResult& /*result*/) override {}  // there is no look-ahead here

  // An entry that may be evicted meanwhile.
  struct Noted {
    EntryId id{0};
    std::uint32_t generation = 0;  // even: none
  };

  Prefix run(SimulationResult& result) override {
    const Prefix hit = look_up();
    const std::uint32_t loaded = hit.host + hit.disk;
    Noted below_in_host;
    Noted below_on_disk;
    for (std::size_t i = keys_.size(); i-- > 0;) {
      const bool was_there = use(host_, i, below_in_host);
      if (!disk_) continue;
      if (ready(*disk_, keys_[i]) != nullptr) {
        if (!was_there && i < loaded) ++result.promotions;
        use(*disk_, i, below_on_disk);
      } else if (admitted(keys_[i], result)) {
        use(*disk_, i, below_on_disk);
        ++result.disk_blocks_written;
      } else {
        below_on_disk = {};
      }
    }
    return hit;
  }

  // Touches or inserts a block. Returns whether it was there.
  bool use(TierIndex& tier, std::size_t i, Noted& below) {
    const TierIndex::Reservation found =
        tier.reserve(keys_[i], kGroup, kNamespace, static_cast<std::uint32_t>(i), nullptr);
    const bool was_there = found.outcome == ReserveOutcome::present;
    if (was_there) {
      tier.touch(*found.entry);
    } else {
      tier.commit(*found.entry);  // nothing is held here, so a slot was had
    }
    Entry& child = tier.index().at(below.id);
    if (below.generation % 2 == 1 && child.generation == below.generation) tier.adopt(child, *found.entry);
    below = {tier.index().id(*found.entry), found.entry->generation};
    return was_there;
  }
};

}  // namespace

std::unique_ptr<Tiers> make_plain_form(const SimulationOptions& options) {
  return std::make_unique<PlainForm>(options);
}

}  // namespace kvtier::replay
