#include "record_order.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <random>
#include <utility>

#include "kvtier/core/prefetch.h"

namespace kvtier {
namespace {

struct Keyed {
  std::uint64_t use;
  std::uint64_t generation;
  std::uint32_t from;  // index of the record
};

constexpr unsigned kDigitBits = 11;
constexpr unsigned kDigits = (64 + kDigitBits - 1) / kDigitBits;
constexpr std::uint64_t kDigitMask = (1U << kDigitBits) - 1;

std::size_t digit(std::uint64_t number, unsigned d) { return (number >> (d * kDigitBits)) & kDigitMask; }

// By `number`. Stable. Digits that are the same in all cost nothing: of times and generations most are.
void radix_sort(std::vector<Keyed>& keyed, std::uint64_t Keyed::* number) {
  std::uint64_t varying = 0;
  for (const Keyed& each : keyed) varying |= each.*number ^ keyed.front().*number;
  std::vector<Keyed> other(keyed.size());
  for (unsigned d = 0; d < kDigits; ++d) {
    if (digit(varying, d) == 0) continue;
    std::array<std::uint32_t, kDigitMask + 1> begins{};
    for (const Keyed& each : keyed) ++begins[digit(each.*number, d)];
    std::uint32_t begin = 0;
    for (std::uint32_t& count : begins) begin += std::exchange(count, begin);
    for (const Keyed& each : keyed) other[begins[digit(each.*number, d)]++] = each;
    keyed.swap(other);
  }
}

// Afterwards records[i] is what records[from[i]] was; `from` names each once. In place, circle by circle;
// what comes a few steps later is asked for (where a circle ends it stands still, which costs nothing).
void rearrange(std::vector<CatalogRecord>& records, std::vector<std::uint32_t> from) {
  constexpr int kAhead = 8;
  const auto count = static_cast<std::uint32_t>(from.size());
  for (std::uint32_t start = 0; start < count; ++start) {
    if (from[start] == start) continue;
    const CatalogRecord first = records[start];
    std::uint32_t ahead = start;
    for (int i = 0; i < kAhead; ++i) ahead = from[ahead];
    std::uint32_t to = start;
    while (from[to] != start) {
      prefetch(&records[ahead], sizeof records[ahead]);
      ahead = from[ahead];
      const std::uint32_t next = std::exchange(from[to], to);
      records[to] = records[next];
      to = next;
    }
    from[to] = to;
    records[to] = first;
  }
}

// Of times before 1970 and after 2106 nobody has blocks.
std::uint64_t use_number(const CatalogRecord& record) {
  const auto seconds = static_cast<std::uint64_t>(std::clamp<std::int64_t>(record.last_use_s, 0, UINT32_MAX));
  return (seconds << 32) | record.block.depth;
}

// Where each block stands in a list of records: open addressing at a load of at most one half.
class Positions {
 public:
  explicit Positions(const std::vector<CatalogRecord>& records)
      : records_(records),
        seed_((std::uint64_t{std::random_device{}()} << 32) | std::random_device{}()),
        buckets_(2 * std::max<std::size_t>(records.size(), 8), Bucket{0, kNone}) {
    for (std::uint32_t i = 0; i < records.size(); ++i) {
      const BlockIdentity& block = records[i].block;
      Bucket& bucket = find_bucket(block.key, block.group);
      if (bucket.position == kNone) bucket = {tag(hash(block.key, block.group)), i};
    }
  }

  static constexpr std::uint32_t kNone = UINT32_MAX;
  std::uint32_t find(const BlockKey& key, GroupId group) { return find_bucket(key, group).position; }

 private:
  struct Bucket {
    std::uint32_t tag;
    std::uint32_t position;
  };

  // Keys are often digests already, but may be numbers: the upper bits of the product depend on all of them.
  // Seeded, and each word multiplied with the one before: a file made to collide in one process does not in
  // the next.
  std::uint64_t hash(const BlockKey& key, GroupId group) const {
    std::array<std::uint64_t, 4> words{};
    std::memcpy(words.data(), key.bytes.data(), sizeof words);
    std::uint64_t folded = seed_ ^ raw(group);
    for (const std::uint64_t word : words) {
      folded = (folded ^ word) * 0x9e3779b97f4a7c15ULL;
      folded ^= folded >> 32;
    }
    return folded * 0x9e3779b97f4a7c15ULL;
  }
  static std::uint32_t tag(std::uint64_t h) { return static_cast<std::uint32_t>(h); }

  Bucket& find_bucket(const BlockKey& key, GroupId group) {
    const std::uint64_t h = hash(key, group);
    std::size_t at = static_cast<std::size_t>(((h >> 32) * buckets_.size()) >> 32);
    for (; buckets_[at].position != kNone; at = at + 1 == buckets_.size() ? 0 : at + 1) {
      if (buckets_[at].tag != tag(h)) continue;
      const BlockIdentity& block = records_[buckets_[at].position].block;
      if (block.key == key && block.group == group) break;
    }
    return buckets_[at];
  }

  const std::vector<CatalogRecord>& records_;
  const std::uint64_t seed_;
  std::vector<Bucket> buckets_;
};

// The order of `records`, but for blocks that are to wait for their parents.
std::vector<std::uint32_t> parents_first(const std::vector<CatalogRecord>& records) {
  Positions positions(records);
  std::vector<std::uint32_t> ordered;
  ordered.reserve(records.size());
  std::vector<bool> placed(records.size());
  std::vector<std::uint32_t> chain;
  for (std::uint32_t i = 0; i < records.size(); ++i) {
    // Up to the first ancestor that stands already; a circle ends at itself.
    for (std::uint32_t at = i; at != Positions::kNone && !placed[at];) {
      placed[at] = true;
      chain.push_back(at);
      const BlockIdentity& block = records[at].block;
      at = block.parent ? positions.find(*block.parent, block.group) : Positions::kNone;
    }
    for (; !chain.empty(); chain.pop_back()) ordered.push_back(chain.back());
  }
  return ordered;
}

}  // namespace

void sort_by_use(std::vector<CatalogRecord>& records) {
  std::vector<Keyed> keyed;
  keyed.reserve(records.size());
  for (const CatalogRecord& record : records) {
    keyed.push_back({use_number(record), static_cast<std::uint64_t>(record.generation),
                     static_cast<std::uint32_t>(keyed.size())});
  }
  radix_sort(keyed, &Keyed::generation);
  radix_sort(keyed, &Keyed::use);
  std::vector<std::uint32_t> from;
  from.reserve(keyed.size());
  for (const Keyed& each : keyed) from.push_back(each.from);
  rearrange(records, std::move(from));
  rearrange(records, parents_first(records));  // a prefix that was used later than what hangs on it
}

}  // namespace kvtier
