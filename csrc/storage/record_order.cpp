#include "record_order.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

namespace kvtier {
namespace {

struct Keyed {
  std::uint64_t key;
  std::uint32_t from;  // index of the record
};

constexpr unsigned kDigitBits = 11;
constexpr unsigned kDigits = (64 + kDigitBits - 1) / kDigitBits;
constexpr std::uint64_t kDigitMask = (1U << kDigitBits) - 1;

std::size_t digit(std::uint64_t key, unsigned d) { return (key >> (d * kDigitBits)) & kDigitMask; }

// Stable. Digits that are the same in all keys cost nothing: of places and times most are.
void radix_sort(std::vector<Keyed>& keyed) {
  std::vector<std::array<std::uint32_t, kDigitMask + 1>> counts(kDigits);
  for (const Keyed& each : keyed) {
    for (unsigned d = 0; d < kDigits; ++d) ++counts[d][digit(each.key, d)];
  }
  std::vector<Keyed> other(keyed.size());
  for (unsigned d = 0; d < kDigits; ++d) {
    auto& begins = counts[d];
    if (keyed.empty() || begins[digit(keyed.front().key, d)] == keyed.size()) continue;
    std::uint32_t begin = 0;
    for (std::uint32_t& count : begins) begin += std::exchange(count, begin);
    for (const Keyed& each : keyed) other[begins[digit(each.key, d)]++] = each;
    keyed.swap(other);
  }
}

template <typename KeyOf>
void set_keys(std::vector<Keyed>& keyed, const std::vector<CatalogRecord>& records, const KeyOf& key_of) {
  for (Keyed& each : keyed) each.key = key_of(records[each.from]);
}

std::vector<Keyed> in_their_order(std::size_t count) {
  std::vector<Keyed> keyed(count);
  for (std::size_t i = 0; i < count; ++i) keyed[i].from = static_cast<std::uint32_t>(i);
  return keyed;
}

// Afterwards records[i] is what records[from[i]] was; `from` names each once.
void rearrange(std::vector<CatalogRecord>& records, std::vector<std::uint32_t> from) {
  const auto count = static_cast<std::uint32_t>(from.size());
  for (std::uint32_t start = 0; start < count; ++start) {
    if (from[start] == start) continue;
    const CatalogRecord first = records[start];
    std::uint32_t to = start;
    while (from[to] != start) {
      const std::uint32_t next = std::exchange(from[to], to);
      records[to] = records[next];
      to = next;
    }
    from[to] = to;
    records[to] = first;
  }
}

std::uint64_t place_number(const CatalogRecord& record) {
  return (std::uint64_t{record.place.class_index} << 32) | raw(record.place.slot);
}

// Of times before 1970 and after 2106 nobody has blocks.
std::uint64_t use_number(const CatalogRecord& record) {
  const auto seconds = static_cast<std::uint64_t>(std::clamp<std::int64_t>(record.last_use_s, 0, UINT32_MAX));
  return (seconds << 32) | record.block.depth;
}

// Where each block stands in a list of records: open addressing at a load of at most one half.
class Positions {
 public:
  Positions(const std::vector<CatalogRecord>& records, const std::vector<Keyed>& order)
      : records_(records),
        order_(order),
        buckets_(std::bit_ceil(std::max<std::size_t>(order.size(), 8) * 2), Bucket{0, kNone}) {
    for (std::uint32_t i = 0; i < order.size(); ++i) {
      const BlockIdentity& block = records[order[i].from].block;
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

  // Keys are hashes already, in every store that nobody made to be slow.
  static std::uint64_t hash(const BlockKey& key, GroupId group) {
    std::array<std::uint64_t, 4> words{};
    std::memcpy(words.data(), key.bytes.data(), sizeof words);
    std::uint64_t mixed = raw(group);
    for (const std::uint64_t word : words) {
      mixed = (mixed ^ word) * 0x9e3779b97f4a7c15ULL;
      mixed ^= mixed >> 32;
    }
    return mixed;
  }
  static std::uint32_t tag(std::uint64_t h) { return static_cast<std::uint32_t>(h >> 32); }

  Bucket& find_bucket(const BlockKey& key, GroupId group) {
    const std::uint64_t h = hash(key, group);
    const std::size_t mask = buckets_.size() - 1;
    std::size_t at = h & mask;
    for (; buckets_[at].position != kNone; at = (at + 1) & mask) {
      if (buckets_[at].tag != tag(h)) continue;
      const BlockIdentity& block = records_[order_[buckets_[at].position].from].block;
      if (block.key == key && block.group == group) break;
    }
    return buckets_[at];
  }

  const std::vector<CatalogRecord>& records_;
  const std::vector<Keyed>& order_;
  std::vector<Bucket> buckets_;
};

// `order`, but for blocks that are to wait for their parents; as indices of records.
std::vector<std::uint32_t> parents_first(const std::vector<CatalogRecord>& records,
                                         const std::vector<Keyed>& order) {
  Positions positions(records, order);
  std::vector<std::uint32_t> ordered;
  ordered.reserve(order.size());
  std::vector<bool> placed(order.size());
  std::vector<std::uint32_t> chain;
  for (std::uint32_t i = 0; i < order.size(); ++i) {
    // Up to the first ancestor that stands already; a circle ends at itself.
    for (std::uint32_t at = i; at != Positions::kNone && !placed[at];) {
      placed[at] = true;
      chain.push_back(order[at].from);
      const BlockIdentity& block = records[order[at].from].block;
      at = block.parent ? positions.find(*block.parent, block.group) : Positions::kNone;
    }
    for (; !chain.empty(); chain.pop_back()) ordered.push_back(chain.back());
  }
  return ordered;
}

}  // namespace

void sort_by_place(std::vector<CatalogRecord>& records) {
  std::vector<Keyed> keyed = in_their_order(records.size());
  set_keys(keyed, records, place_number);
  radix_sort(keyed);
  std::vector<std::uint32_t> from;
  from.reserve(keyed.size());
  std::vector<std::uint32_t> lost;
  for (std::size_t i = 0; i < keyed.size(); ++i) {
    const std::uint32_t candidate = keyed[i].from;
    if (i == 0 || keyed[i].key != keyed[i - 1].key) {
      from.push_back(candidate);
    } else if (records[candidate].generation > records[from.back()].generation) {
      lost.push_back(std::exchange(from.back(), candidate));
    } else {
      lost.push_back(candidate);
    }
  }
  const std::size_t kept = from.size();
  from.insert(from.end(), lost.begin(), lost.end());
  rearrange(records, std::move(from));
  records.resize(kept);
}

void sort_by_use(std::vector<CatalogRecord>& records) {
  std::vector<Keyed> keyed = in_their_order(records.size());
  set_keys(keyed, records,
           [](const CatalogRecord& record) { return static_cast<std::uint64_t>(record.generation); });
  radix_sort(keyed);
  set_keys(keyed, records, use_number);
  radix_sort(keyed);
  rearrange(records, parents_first(records, keyed));
}

}  // namespace kvtier
