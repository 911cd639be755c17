// HeaderScan: finds blocks by the headers of their slots, where the catalog does not tell. Pure: who reads
// the headers hands in what they say.
//
// The same block may stand in several slots: the newest generation wins. Losers and headers that prove
// nothing are to be wiped, so that they never come back; images of a newer version are left alone.
#pragma once

#include <cstdint>
#include <optional>
#include <unordered_map>
#include <vector>

#include "kvtier/storage/catalog.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier {

struct BlockName {
  BlockKey key;
  GroupId group;
  friend bool operator==(const BlockName&, const BlockName&) = default;
};
struct BlockNameHash {
  std::size_t operator()(const BlockName& name) const;  // keys are hashes already
};

class HeaderScan {
 public:
  struct Outcome {
    std::vector<CatalogRecord> found;    // one a block
    std::vector<SlotPlace> to_wipe;      // losers, and what proves nothing
    std::vector<SlotPlace> untouchable;  // of a newer version
    std::uint32_t discarded = 0;         // to_wipe and unreadable ones
    std::uint32_t highest_open_counter = 0;
  };

  void add(const SlotPlace& place) { places_.push_back(place); }
  std::uint64_t total() const { return places_.size(); }
  std::uint64_t judged() const { return judged_; }
  bool all_judged() const { return judged_ == places_.size(); }
  // The next slot whose header is to be read; nullopt when all were given out.
  std::optional<SlotPlace> next();
  void judge(const SlotPlace& place, Verdict verdict, const SlotHeader& header);
  void unreadable();

  // Once, when all are judged. Blocks for which `is_known` says true stand elsewhere for certain: they lose.
  template <typename IsKnown>
  Outcome finish(const IsKnown& is_known) {
    for (const SlotHeader& header : sound_)
      compete(header, is_known(BlockName{header.block.key, header.block.group}));
    return collect();
  }

 private:
  void compete(const SlotHeader& header, bool known_elsewhere);
  Outcome collect();

  std::vector<SlotPlace> places_;
  std::size_t given_ = 0;
  std::uint64_t judged_ = 0;
  std::vector<SlotHeader> sound_;
  std::unordered_map<BlockName, SlotHeader, BlockNameHash> winners_;
  Outcome outcome_;
};

}  // namespace kvtier
