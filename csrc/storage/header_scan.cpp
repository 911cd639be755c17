#include "header_scan.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvtier {

std::size_t BlockNameHash::operator()(const BlockName& name) const {
  std::size_t hash = 0;
  std::memcpy(&hash, name.key.bytes.data(), sizeof hash);
  return hash ^ (std::size_t{raw(name.group)} << 48U);
}

std::optional<SlotPlace> HeaderScan::next() {
  if (given_ == places_.size()) return std::nullopt;
  return places_[given_++];
}

void HeaderScan::judge(const SlotPlace& place, Verdict verdict, const SlotHeader& header) {
  ++judged_;
  switch (verdict) {
    case Verdict::good: sound_.push_back(header); break;
    case Verdict::blank: break;
    case Verdict::newer_version: outcome_.untouchable.push_back(place); break;
    case Verdict::foreign:
    case Verdict::corrupt_header:
    case Verdict::corrupt_payload:
    case Verdict::stale:
    case Verdict::unknown_key: outcome_.to_wipe.push_back(place); break;
  }
}

void HeaderScan::unreadable() {
  ++judged_;
  ++outcome_.discarded;
}

void HeaderScan::compete(const SlotHeader& header, bool known_elsewhere) {
  const auto open_counter =
      static_cast<std::uint32_t>(static_cast<std::uint64_t>(header.generation) >> kSequenceBits);
  outcome_.highest_open_counter = std::max(outcome_.highest_open_counter, open_counter);
  if (known_elsewhere) {
    outcome_.to_wipe.push_back(header.place);
    return;
  }
  const auto [winner, is_first] = winners_.try_emplace({header.block.key, header.block.group}, header);
  if (is_first) return;
  const bool wins = header.generation > winner->second.generation;
  outcome_.to_wipe.push_back(wins ? winner->second.place : header.place);
  if (wins) winner->second = header;
}

HeaderScan::Outcome HeaderScan::collect() {
  outcome_.discarded += static_cast<std::uint32_t>(outcome_.to_wipe.size());
  for (const auto& [name, header] : winners_) {
    outcome_.found.push_back({header.block, header.place, header.generation, header.payload_bytes, 0});
  }
  winners_.clear();
  sound_.clear();
  return std::move(outcome_);
}

}  // namespace kvtier
