// Run plans: how a batch of runs is brought into the form that a copy path wants. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvtier/platform/device.h"

namespace kvtier {

// Rows of equal length at equal pitch on both sides; one row is a plain copy.
struct Rectangle {
  std::byte* destination;
  const std::byte* source;
  std::size_t width_bytes;
  std::size_t height;
  std::size_t destination_pitch;  // of no meaning when height is 1
  std::size_t source_pitch;
};

// The largest pitch that a 2D copy of any CUDA device takes.
inline constexpr std::size_t kMaxPitchBytes = (std::size_t{1} << 31) - 1;

// Runs of 0 bytes vanish; neighbours in the list with one length and rising, equal distances become rows.
// Runs that only touch are not joined: they may be of two allocations, and plan() has joined those that are
// not. Every byte of `runs` is in exactly one rectangle.
std::vector<Rectangle> merge_runs(std::span<const CopyRun> runs);

std::size_t total_bytes(std::span<const CopyRun> runs);

// How many runs, at least one, from the front make up to `bytes`: the bursts of a limited direction.
std::size_t burst_runs(std::span<const CopyRun> runs, std::size_t bytes);

// The same bytes in runs of at most `bytes` each.
std::vector<CopyRun> split_runs(std::span<const CopyRun> runs, std::size_t bytes);

// A piece of a staged move. `ring` counts from the start of the stage.
struct StagedPiece {
  std::byte* at;
  std::size_t ring;
  std::size_t bytes;
};

// What moves through one stage of the ring: few long stretches of host memory, many short ones of pages.
struct StagePlan {
  std::vector<StagedPiece> host;
  std::vector<StagedPiece> pages;
};

// Where staging stands in a list of runs.
struct StageCursor {
  std::size_t run = 0;
  std::size_t done_bytes = 0;
};

inline constexpr std::size_t kStageAlignment = 256;

// Plans one stage of `stage_bytes` (a multiple of kStageAlignment, at least two of it) from the cursor on and
// moves the cursor. In the ring, bytes stand at their host address modulo kStageAlignment, so the ring is
// aligned to the pages as the slot is. Runs that continue each other in host memory share one stretch.
StagePlan plan_stage(std::span<const CopyRun> runs, Direction direction, std::size_t stage_bytes,
                     StageCursor& cursor);

}  // namespace kvtier
