#include "kvtier/index/write_budget.h"

#include <algorithm>

namespace kvtier {
namespace {

constexpr double kSecondsPerDay = 86400;

}  // namespace

WriteBudget::WriteBudget(std::optional<std::uint64_t> bytes_per_day, std::int64_t now_us)
    : bytes_per_day_(bytes_per_day), at_us_(now_us) {
  left_ = most_ = static_cast<double>(bytes_per_day.value_or(0));
}

void WriteBudget::fill(std::int64_t now_us) {
  const double rate_per_us = most_ / (kSecondsPerDay * 1e6);
  left_ = std::min(most_, left_ + rate_per_us * static_cast<double>(now_us - at_us_));
  at_us_ = now_us;
}

bool WriteBudget::take(std::uint64_t bytes, std::int64_t now_us) {
  if (!bytes_per_day_) return true;
  fill(now_us);
  if (left_ < static_cast<double>(bytes)) return false;
  left_ -= static_cast<double>(bytes);
  return true;
}

double WriteBudget::fullness(std::int64_t now_us) {
  if (!bytes_per_day_ || most_ <= 0) return 1;
  fill(now_us);
  return left_ / most_;
}

}  // namespace kvtier
