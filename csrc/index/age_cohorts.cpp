#include "kvtier/index/age_cohorts.h"

#include <functional>

#include "kvtier/core/status.h"

namespace kvtier {

AgeCohorts::AgeCohorts(std::size_t records, std::uint32_t num_classes)
    : num_classes_(num_classes),
      queues_(kMaxCohorts * num_classes, kNone),
      counts_(kMaxCohorts * num_classes, 0),
      links_(records),
      key_of_(kMaxCohorts * num_classes, kNoKey),
      in_heap_(kMaxCohorts * num_classes, false),
      values_(num_classes) {
  cohorts_.reserve(kMaxCohorts);
  rows_.reserve(kMaxCohorts);
  heap_.reserve(kMaxCohorts * num_classes);
  for (std::uint32_t row = kMaxCohorts; row-- > 0;) rows_.push_back(row);
  open_cohort();
}

void AgeCohorts::open_cohort() {
  if (cohorts_.size() == kMaxCohorts) {
    merge(cohorts_[0], cohorts_[1]);
    cohorts_.erase(cohorts_.begin() + 1);
  }
  cohorts_.push_back({now_, now_ + 1, rows_.back()});
  rows_.pop_back();
  ranked_ = false;
}

const AgeCohorts::Cohort& AgeCohorts::cohort_of(Tick used) {
  if (used >= cohorts_.back().end) open_cohort();  // `used` is now
  if (used >= cohorts_.back().begin) return cohorts_.back();
  const auto after = std::upper_bound(cohorts_.begin(), cohorts_.end(), used,
                                      [](Tick tick, const Cohort& cohort) { return tick < cohort.begin; });
  KVTIER_CHECK(after != cohorts_.begin());
  return *(after - 1);
}

std::size_t AgeCohorts::at(Tick used, std::uint32_t block_class) {
  return std::size_t{cohort_of(used).row} * num_classes_ + block_class;
}

void AgeCohorts::merge_old() {
  std::size_t kept = 0;
  for (std::size_t next = 1; next < cohorts_.size(); ++next) {
    Cohort& older = cohorts_[kept];
    const Cohort& younger = cohorts_[next];
    if (younger.end - older.begin <= (now_ - (younger.end - 1)) / kPrecision) {
      merge(older, younger);
    } else {
      cohorts_[++kept] = younger;
    }
  }
  cohorts_.resize(kept + 1);
}

void AgeCohorts::merge(Cohort& older, const Cohort& younger) {
  std::uint32_t* into = &queues_[std::size_t{older.row} * num_classes_];
  std::uint32_t* from = &queues_[std::size_t{younger.row} * num_classes_];
  for (std::uint32_t c = 0; c < num_classes_; ++c) {
    std::uint32_t& count = counts_[std::size_t{younger.row} * num_classes_ + c];
    counts_[std::size_t{older.row} * num_classes_ + c] += std::exchange(count, 0);
    const std::uint32_t head = std::exchange(from[c], kNone);
    if (into[c] == kNone) {
      into[c] = head;
    } else if (head != kNone) {
      const std::uint32_t last = links_[into[c]].before;
      const std::uint32_t end = links_[head].before;
      links_[last].after = head;
      links_[head].before = last;
      links_[end].after = into[c];
      links_[into[c]].before = end;
    }
  }
  older.end = younger.end;
  rows_.push_back(younger.row);
}

void AgeCohorts::filled(std::size_t queue) {
  if (!ranked_ || in_heap_[queue]) return;
  if (key_of_[queue] == kNoKey) {
    ranked_ = false;
    return;
  }
  in_heap_[queue] = true;
  heap_.push_back(key_of_[queue]);
  std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
}

void AgeCohorts::insert_before_first(std::uint32_t id, std::size_t queue) {
  const std::uint32_t first = queues_[queue];
  if (first == kNone) {
    links_[id] = {id, id};
    queues_[queue] = id;
    filled(queue);
    return;
  }
  const std::uint32_t last = links_[first].before;
  links_[id] = {last, first};
  links_[last].after = id;
  links_[first].before = id;
}

void AgeCohorts::add_last(EntryId id, Tick used, std::uint32_t block_class) {
  insert_before_first(raw(id), at(used, block_class));  // the list is a circle
}

void AgeCohorts::add_first(EntryId id, Tick used, std::uint32_t block_class) {
  const std::size_t queue = at(used, block_class);
  insert_before_first(raw(id), queue);
  queues_[queue] = raw(id);
}

void AgeCohorts::remove(EntryId id, Tick used, std::uint32_t block_class) {
  const std::size_t queue = at(used, block_class);
  const Link link = links_[raw(id)];
  if (link.after == raw(id)) {
    queues_[queue] = kNone;
    return;
  }
  links_[link.before].after = link.after;
  links_[link.after].before = link.before;
  if (queues_[queue] == raw(id)) queues_[queue] = link.after;
}

std::optional<EntryId> AgeCohorts::first() {
  KVTIER_CHECK(ranked_);
  while (!heap_.empty()) {
    const auto at = static_cast<std::uint32_t>(heap_.front());  // the lower half
    const std::size_t queue = std::size_t{cohorts_[at / num_classes_].row} * num_classes_ + at % num_classes_;
    if (queues_[queue] != kNone) return EntryId{queues_[queue]};
    in_heap_[queue] = false;
    std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
    heap_.pop_back();
  }
  return std::nullopt;
}

double AgeCohorts::bytes_for(std::size_t records, std::uint32_t num_classes) {
  constexpr std::size_t kPerQueue = 2 * sizeof(std::uint32_t) + 2 * sizeof(std::uint64_t) + 1;
  return static_cast<double>(records * sizeof(Link) +
                             kMaxCohorts * (num_classes * kPerQueue + sizeof(Cohort)));
}

}  // namespace kvtier
