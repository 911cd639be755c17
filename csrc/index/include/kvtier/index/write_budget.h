// WriteBudget: how much may be written to the drives, so that they last.
#pragma once

#include <cstdint>
#include <optional>

namespace kvtier {

// Bytes that may be written to the drives: a bucket that holds a day's worth and fills at that rate.
class WriteBudget {
 public:
  WriteBudget(std::optional<std::uint64_t> bytes_per_day, std::int64_t now_us);
  // Takes `bytes` if there are as many; without a limit, always.
  bool take(std::uint64_t bytes, std::int64_t now_us);
  // How full the bucket is, 0 to 1; 1 without a limit.
  double fullness(std::int64_t now_us);
  std::uint64_t left_bytes() const { return static_cast<std::uint64_t>(left_); }

 private:
  void fill(std::int64_t now_us);

  std::optional<std::uint64_t> bytes_per_day_;
  double left_ = 0;
  double most_ = 0;
  std::int64_t at_us_;
};

}  // namespace kvtier
