#include "kvtier/platform/copy_path.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <sstream>

namespace kvtier {
namespace {

constexpr auto kNumPaths = static_cast<std::size_t>(CopyPath::count_);
constexpr std::array<std::string_view, kNumPaths> kNames{"plain",  "merged", "batched",
                                                         "kernel", "staged", "bulk"};
constexpr std::string_view kMagic = "kvtier calibration 1";

// From here on a copy engine is as fast as the bus, and one submission costs little beside the copy.
constexpr std::uint64_t kEngineRunBytes = 512 << 10;
// From here on a batch entry costs less than the detour through the staging ring.
constexpr std::uint64_t kBatchRunBytes = 64 << 10;

Status not_a_calibration(const std::string& why) {
  return {StatusCode::corruption, "not a calibration of this machine: " + why};
}

double distance(std::uint64_t a, std::uint64_t b) {
  return std::abs(std::log2(static_cast<double>(std::max<std::uint64_t>(a, 1))) -
                  std::log2(static_cast<double>(std::max<std::uint64_t>(b, 1))));
}

Result<PathScore> parse_score(const std::string& line) {
  std::istringstream words(line);
  std::string direction;
  std::string path;
  PathScore score;
  if (!(words >> direction >> score.run_bytes >> path >> score.bytes_per_second >> score.slowdown) ||
      !(words >> std::ws).eof()) {
    return not_a_calibration("line '" + line + "'");
  }
  if (direction != "store" && direction != "load") return not_a_calibration("direction '" + direction + "'");
  score.direction = direction == "store" ? Direction::store : Direction::load;
  Result<CopyPath> named = copy_path_named(path);
  if (!named) return not_a_calibration(named.status().message());
  score.path = *named;
  if (!std::isfinite(score.bytes_per_second) || !std::isfinite(score.slowdown) ||
      score.bytes_per_second <= 0 || score.slowdown < 0 || score.run_bytes == 0) {
    return not_a_calibration("line '" + line + "' is out of range");
  }
  return score;
}

// The score for which `value` is highest among those that count, at the measured length nearest to
// `run_bytes`. Null: none counts.
template <typename Counts, typename Value>
const PathScore* best_score(const Calibration& calibration, std::uint64_t run_bytes, const Counts& counts,
                            const Value& value) {
  const PathScore* best = nullptr;
  for (const PathScore& score : calibration.scores) {
    if (!counts(score)) continue;
    if (best == nullptr) {
      best = &score;
      continue;
    }
    const double mine = distance(score.run_bytes, run_bytes);
    const double its = distance(best->run_bytes, run_bytes);
    if (mine < its || (mine == its && value(score) > value(*best))) best = &score;
  }
  return best;
}

}  // namespace

std::string_view to_string(CopyPath path) { return kNames.at(static_cast<std::size_t>(path)); }

Result<CopyPath> copy_path_named(std::string_view name) {
  std::string allowed;
  for (std::size_t i = 0; i < kNumPaths; ++i) {
    if (kNames[i] == name) return static_cast<CopyPath>(i);
    allowed += (i > 0 ? ", " : "") + std::string(kNames[i]);
  }
  return Status::invalid_argument("'" + std::string(name) + "' is not a copy path; allowed: " + allowed);
}

double worth(const PathScore& score) { return score.bytes_per_second / (1 + score.slowdown); }

double rate_within(const PathScore& score, DecodeShare limit) {
  return score.slowdown <= limit.share ? score.bytes_per_second
                                       : score.bytes_per_second * limit.share / score.slowdown;
}

std::string CalibrationKey::text() const {
  std::string joined;
  for (const std::string* field : {&gpu, &link, &numa, &driver, &pages, &version}) {
    if (!joined.empty()) joined += " | ";
    for (const char c : *field) joined += c == '\n' || c == '|' ? ' ' : c;
  }
  return joined;
}

bool Calibration::measured(Direction direction) const {
  return std::ranges::any_of(scores, [&](const PathScore& score) { return score.direction == direction; });
}

std::string Calibration::format(const CalibrationKey& key) const {
  std::string text = std::string(kMagic) + "\n" + key.text() + "\n";
  for (const PathScore& score : scores) {
    char line[160];
    std::snprintf(line, sizeof line, "%s %llu %s %.17g %.17g\n",
                  score.direction == Direction::store ? "store" : "load",
                  static_cast<unsigned long long>(score.run_bytes),
                  std::string(to_string(score.path)).c_str(), score.bytes_per_second, score.slowdown);
    text += line;
  }
  return text + "end\n";
}

Result<Calibration> Calibration::parse(std::string_view text, const CalibrationKey& key) {
  std::istringstream lines{std::string(text)};
  std::string line;
  if (!std::getline(lines, line) || line != kMagic) return not_a_calibration("its first line");
  if (!std::getline(lines, line) || line != key.text()) return not_a_calibration("measured on " + line);
  Calibration calibration;
  while (std::getline(lines, line)) {
    if (line == "end") return calibration;
    Result<PathScore> score = parse_score(line);
    if (!score) return score.status();
    calibration.scores.push_back(*score);
  }
  return not_a_calibration("it ends too early");
}

CopyPath choose_path(const Calibration& calibration, CopyPaths available, Direction direction,
                     std::uint64_t run_bytes, std::optional<DecodeShare> limit) {
  const PathScore* best = best_score(
      calibration, run_bytes,
      [&](const PathScore& score) { return score.direction == direction && available.has(score.path); },
      [&](const PathScore& score) { return limit ? rate_within(score, *limit) : worth(score); });
  return best != nullptr ? best->path : default_path(available, run_bytes);
}

std::optional<std::uint64_t> rate_within(const Calibration& calibration, CopyPath path, Direction direction,
                                         std::uint64_t run_bytes, DecodeShare limit) {
  const auto slowest = [&](const PathScore& score) { return -rate_within(score, limit); };
  const PathScore* score = best_score(
      calibration, run_bytes,
      [&](const PathScore& each) { return each.direction == direction && each.path == path; }, slowest);
  const bool measured = score != nullptr;
  if (!measured) {
    score = best_score(
        calibration, run_bytes, [&](const PathScore& each) { return each.direction == direction; }, slowest);
  }
  KVTIER_CHECK(score != nullptr);
  if (measured && score->slowdown <= limit.share) return std::nullopt;
  return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(rate_within(*score, limit)));
}

CopyPath default_path(CopyPaths available, std::uint64_t run_bytes) {
  if (run_bytes < kBatchRunBytes && available.has(CopyPath::staged)) return CopyPath::staged;
  if (run_bytes < kEngineRunBytes && available.has(CopyPath::batched)) return CopyPath::batched;
  if (run_bytes < kBatchRunBytes && available.has(CopyPath::kernel)) return CopyPath::kernel;
  return available.has(CopyPath::merged) ? CopyPath::merged : CopyPath::plain;
}

}  // namespace kvtier
