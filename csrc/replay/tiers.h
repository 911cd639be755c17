// The two tiers of a simulation, and what both forms do with them.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "kvtier/index/tier_index.h"
#include "kvtier/index/write_budget.h"
#include "kvtier/replay/simulation.h"

namespace kvtier::replay {

inline constexpr GroupId kGroup{0};
inline constexpr NamespaceId kNamespace{0};

class Tiers {
 public:
  explicit Tiers(const SimulationOptions& options);
  virtual ~Tiers() = default;

  // The time of what follows.
  void advance(std::int64_t at_us);
  // One request: counts its hits into the result and changes the tiers.
  void request(std::span<const std::uint32_t> blocks, SimulationResult& result);

  // What is known of a request that waits.
  struct Expected {
    std::size_t blocks = 0;              // of its prefix that was there, and is expected
    std::vector<std::uint32_t> on_disk;  // of them those that were on disk alone
  };
  // As a server that tells Engine::expect() what is there of a request that has come.
  Expected expect(std::span<const std::uint32_t> blocks, SimulationResult& result);
  // Its end, before request(); and, behind it, what of it did not have to be read any more.
  void expect_no_more(std::span<const std::uint32_t> blocks, const Expected& expected);
  std::uint64_t hidden(const Expected& expected) const;
  void finish(SimulationResult& result) const;

 protected:
  struct Prefix {
    std::uint32_t host = 0;
    std::uint32_t disk = 0;
  };
  // The blocks of the request are in keys_; what was hit.
  virtual Prefix run(SimulationResult& result) = 0;
  // Brings the first `n` blocks into the host tier, those of them that are on disk alone.
  virtual void prefetch(std::size_t n, SimulationResult& result) = 0;

  static Entry* ready(TierIndex& tier, const BlockKey& key) {
    Entry* entry = tier.index().find(key, kGroup);
    return entry != nullptr && entry->state == SlotState::ready ? entry : nullptr;
  }
  // Where the blocks of the longest prefix are.
  Prefix look_up();
  // Whether the drive takes a block that it does not hold: admission and budget, asked in the engine's order.
  bool admitted(const BlockKey& key, SimulationResult& result);
  // It was refused because of its parent.
  void note_refused(const BlockKey& key) { admission_.note(offer_of(key)); }

  TierIndex host_;                   // NOLINT: the forms are written in terms of these
  std::unique_ptr<TierIndex> disk_;  // NOLINT: null without a disk tier
  std::vector<BlockKey> keys_;       // NOLINT: of the request
  std::vector<Entry*> in_host_;      // NOLINT: of each key at look_up(); null: not ready there
  std::int64_t now_us_ = 0;          // NOLINT
  std::size_t loaded_ = 0;           // NOLINT: blocks that the last request loaded
  std::uint64_t block_bytes_;        // NOLINT

 private:
  void take_keys(std::span<const std::uint32_t> blocks);
  Offer offer_of(const BlockKey& key);

  AdmissionPolicy admission_;
  std::optional<WriteBudget> budget_;
  std::optional<std::uint64_t> bytes_per_day_;
};

std::unique_ptr<Tiers> make_engine_form(const SimulationOptions& options);
std::unique_ptr<Tiers> make_plain_form(const SimulationOptions& options);

}  // namespace kvtier::replay
