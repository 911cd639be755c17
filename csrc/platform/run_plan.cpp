#include "kvtier/platform/run_plan.h"

#include <algorithm>
#include <numeric>

#include "kvtier/platform/run_table.h"

namespace kvtier {
namespace {

std::uintptr_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// The distance from one row to the next, or 0 where there is no row to be added.
std::size_t pitch(const std::byte* row, const std::byte* next, std::size_t width) {
  if (address(next) <= address(row)) return 0;
  const std::size_t distance = address(next) - address(row);
  return distance >= width && distance <= kMaxPitchBytes ? distance : 0;
}

bool adds_row(const Rectangle& rows, const CopyRun& run) {
  if (run.bytes != rows.width_bytes) return false;
  const std::byte* to = rows.destination + (rows.height - 1) * rows.destination_pitch;
  const std::byte* from = rows.source + (rows.height - 1) * rows.source_pitch;
  const std::size_t to_pitch = pitch(to, static_cast<std::byte*>(run.destination), rows.width_bytes);
  const std::size_t from_pitch = pitch(from, static_cast<const std::byte*>(run.source), rows.width_bytes);
  if (to_pitch == 0 || from_pitch == 0) return false;
  return rows.height == 1 || (to_pitch == rows.destination_pitch && from_pitch == rows.source_pitch);
}

}  // namespace

std::vector<Rectangle> merge_runs(std::span<const CopyRun> runs) {
  std::vector<Rectangle> rectangles;
  for (const CopyRun& run : runs) {
    if (run.bytes == 0) continue;
    auto* to = static_cast<std::byte*>(run.destination);
    const auto* from = static_cast<const std::byte*>(run.source);
    if (!rectangles.empty() && adds_row(rectangles.back(), run)) {
      Rectangle& rows = rectangles.back();
      if (rows.height == 1) {
        rows.destination_pitch = address(to) - address(rows.destination);
        rows.source_pitch = address(from) - address(rows.source);
      }
      ++rows.height;
    } else {
      rectangles.push_back({to, from, run.bytes, 1, 0, 0});
    }
  }
  return rectangles;
}

std::size_t total_bytes(std::span<const CopyRun> runs) {
  return std::accumulate(runs.begin(), runs.end(), std::size_t{0},
                         [](std::size_t sum, const CopyRun& run) { return sum + run.bytes; });
}

std::size_t burst_runs(std::span<const CopyRun> runs, std::size_t bytes) {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    sum += runs[i].bytes;
    if (sum > bytes) return std::max<std::size_t>(i, 1);
  }
  return runs.size();
}

std::vector<CopyRun> split_runs(std::span<const CopyRun> runs, std::size_t bytes) {
  std::vector<CopyRun> pieces;
  pieces.reserve(runs.size());
  for (const CopyRun& run : runs) {
    for (std::size_t done = 0; done < run.bytes; done += bytes) {
      pieces.push_back({static_cast<std::byte*>(run.destination) + done,
                        static_cast<const std::byte*>(run.source) + done, std::min(bytes, run.bytes - done)});
    }
  }
  return pieces;
}

StagePlan plan_stage(std::span<const CopyRun> runs, Direction direction, std::size_t stage_bytes,
                     StageCursor& cursor) {
  StagePlan plan;
  std::size_t end = 0;  // of what the stage holds so far
  while (cursor.run < runs.size()) {
    const CopyRun& run = runs[cursor.run];
    if (cursor.done_bytes == run.bytes) {
      cursor = {cursor.run + 1, 0};
      continue;
    }
    const bool load = direction == Direction::load;
    auto* to = static_cast<std::byte*>(run.destination) + cursor.done_bytes;
    // Which side is written, the direction says; here both are only places.
    auto* from = const_cast<std::byte*>(static_cast<const std::byte*>(run.source)) + cursor.done_bytes;
    std::byte* host = load ? from : to;
    std::byte* page = load ? to : from;

    const bool continues = !plan.host.empty() && plan.host.back().at + plan.host.back().bytes == host;
    std::size_t begin = end;
    if (!continues) {
      begin =
          (end + kStageAlignment - 1) / kStageAlignment * kStageAlignment + address(host) % kStageAlignment;
    }
    if (begin >= stage_bytes) break;
    const std::size_t bytes = std::min(run.bytes - cursor.done_bytes, stage_bytes - begin);
    if (continues) {
      plan.host.back().bytes += bytes;
    } else {
      plan.host.push_back({host, begin, bytes});
    }
    plan.pages.push_back({page, begin, bytes});
    end = begin + bytes;
    cursor.done_bytes += bytes;
    if (end == stage_bytes && cursor.done_bytes < run.bytes) break;
  }
  return plan;
}

std::size_t compact_prefix(std::span<const MappedRun> runs, const TableCursor& cursor) {
  if (cursor.done_bytes != 0) return 0;
  std::size_t end = cursor.run;
  while (end < runs.size() && runs[end].bytes == runs[cursor.run].bytes &&
         runs[end].bytes <= kMaxCompactRunBytes && suits_bulk(runs[end])) {
    ++end;
  }
  return end - cursor.run;
}

}  // namespace kvtier
