// AgeCohorts: blocks by when they were last used, precise to an eighth of their age.
//
//   oldest                                     newest
//   [ .. 61) [61 .. 75) [75 .. 82) ... [98] [99] [100 = now]     ticks of the last use
//     one queue and one count per class in each
//
// Blocks last used at the same tick are a cohort. Growing old, neighbouring cohorts become one as soon as
// together they span no more than an eighth of their age, so there are about a dozen per octave of age, and a
// block is moved along without being looked at. What is evictable stands in a queue of its cohort and class;
// how many blocks there are, held ones and those no longer resident too, is a count beside it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kvtier/core/huge_vector.h"
#include "kvtier/index/eviction.h"
#include "kvtier/index/return_hazards.h"

namespace kvtier {

// Threads: none of its own. Every operation is O(1) but pass() and rank(), O(cohorts * classes), and the
// search for a cohort and a queue that is filled or emptied, O(log) of them. Memory: 8 bytes per record and 7
// KiB per class, allocated at the start.
class AgeCohorts {
 public:
  AgeCohorts(std::size_t records, std::uint32_t num_classes);

  Tick now() const { return now_; }
  // Lets time pass. waited(age, blocks, ticks) is told of all that were counted in: blocks[class] of about
  // this age, for so long.
  template <typename Waited>
  void pass(Tick ticks, Waited&& waited);

  // The block last used at `used` is one of its class from now on, or no more.
  void count_in(Tick used, std::uint32_t block_class) { ++counts_[at(used, block_class)]; }
  void count_out(Tick used, std::uint32_t block_class) { --counts_[at(used, block_class)]; }

  // The first and last of a queue to be evicted. Remove with what it was added with.
  void add_first(EntryId id, Tick used, std::uint32_t block_class);
  void add_last(EntryId id, Tick used, std::uint32_t block_class);
  void remove(EntryId id, Tick used, std::uint32_t block_class);

  // Orders the queues by their values >= 0, the lowest first; of those that differ by less than a thousandth
  // the older. values(age, into) writes those of all classes.
  template <typename Values>
  void rank(Values&& values);
  // False once time has passed: ages are others.
  bool ranked() const { return ranked_; }
  // Requires ranked(). The first block of the first queue that has any.
  std::optional<EntryId> first();

  static double bytes_for(std::size_t records, std::uint32_t num_classes);

 private:
  friend struct AgeCohortsPeer;  // tests: how many cohorts there are
  static constexpr std::uint32_t kNone = 0xffffffffU;
  static constexpr std::size_t kMaxCohorts = 256;
  static constexpr Tick kPrecision = 8;
  struct Cohort {
    Tick begin;  // of the last uses, half-open
    Tick end;
    std::uint32_t row;  // of queues_ and counts_
  };
  struct Link {
    std::uint32_t before;
    std::uint32_t after;
  };

  Tick age(const Cohort& cohort) const { return now_ - (cohort.begin + (cohort.end - cohort.begin) / 2); }
  Tick newest_age() const { return now_ + 1 - cohorts_.back().end; }
  std::size_t at(Tick used, std::uint32_t block_class);
  const std::uint32_t* row(const std::vector<std::uint32_t>& table, const Cohort& cohort) const {
    return &table[std::size_t{cohort.row} * num_classes_];
  }
  const Cohort& cohort_of(Tick used);
  void open_cohort();
  void merge_old();
  void merge(Cohort& older, const Cohort& younger);
  void insert_before_first(std::uint32_t id, std::size_t queue);
  void filled(std::size_t queue);

  std::uint32_t num_classes_;
  Tick now_ = 0;
  std::vector<Cohort> cohorts_;        // oldest first; never empty
  std::vector<std::uint32_t> rows_;    // free ones
  std::vector<std::uint32_t> queues_;  // [row][class]: the first block, or kNone; circular lists
  std::vector<std::uint32_t> counts_;  // [row][class]
  HugeVector<Link> links_;             // of each record

  // Ranked: value, then cohort and class. Queues that are empty leave the heap when they come up, and enter
  // it when they are filled again.
  static constexpr std::uint64_t kNoKey = ~std::uint64_t{0};
  bool ranked_ = false;
  std::vector<std::uint64_t> heap_;    // keys, the least in front
  std::vector<std::uint64_t> key_of_;  // of each queue, or kNoKey
  std::vector<bool> in_heap_;          // of each queue
  std::vector<float> values_;          // of each class
};

template <typename Waited>
void AgeCohorts::pass(Tick ticks, Waited&& waited) {
  // After a long pause the youngest are old already, and time may pass in longer steps.
  while (ticks > 0) {
    const Tick step = std::min(ticks, std::max<Tick>(1, newest_age() / kPrecision));
    for (const Cohort& cohort : cohorts_) {
      waited(age(cohort), std::span<const std::uint32_t>(row(counts_, cohort), num_classes_), step);
    }
    now_ += step;
    ticks -= step;
  }
  merge_old();
  ranked_ = false;
}

template <typename Values>
void AgeCohorts::rank(Values&& values) {
  if (cohorts_.back().end <= now_) open_cohort();  // what comes next goes there
  heap_.clear();
  std::fill(in_heap_.begin(), in_heap_.end(), false);
  for (std::uint32_t place = 0; place < cohorts_.size(); ++place) {
    const std::size_t row = std::size_t{cohorts_[place].row} * num_classes_;
    values(age(cohorts_[place]), std::span<float>(values_));
    const bool is_newest = place + 1 == cohorts_.size();
    for (std::uint32_t c = 0; c < num_classes_; ++c) {
      const std::size_t queue = row + c;
      if (!is_newest && counts_[queue] == 0 && queues_[queue] == kNone) {
        key_of_[queue] = kNoKey;  // all are ranked anew by filled()
        continue;
      }
      // Floats that are not negative are in the order of their bits, and what is below their upper 22 is less
      // than a thousandth.
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(values_[c]) & ~0x3ffU;
      key_of_[queue] = (std::uint64_t{bits} << 32U) | (place * num_classes_ + c);
      if (queues_[queue] == kNone) continue;
      heap_.push_back(key_of_[queue]);
      in_heap_[queue] = true;
    }
  }
  std::make_heap(heap_.begin(), heap_.end(), std::greater<>());
  ranked_ = true;
}

}  // namespace kvtier
