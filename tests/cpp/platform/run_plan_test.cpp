#include "kvtier/platform/run_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#include "support/turns.h"

namespace kvtier {
namespace {

std::byte* at(std::size_t address) { return reinterpret_cast<std::byte*>(address); }
std::size_t address(const void* pointer) { return reinterpret_cast<std::size_t>(pointer); }
CopyRun run(std::size_t to, std::size_t from, std::size_t bytes) { return {at(to), at(from), bytes}; }

// Which source byte goes to which destination byte.
using Bytes = std::map<std::size_t, std::size_t>;

void put(Bytes& bytes, std::size_t to, std::size_t from, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) ASSERT_TRUE(bytes.emplace(to + i, from + i).second);
}

Bytes bytes_of(std::span<const CopyRun> runs) {
  Bytes bytes;
  for (const CopyRun& each : runs) put(bytes, address(each.destination), address(each.source), each.bytes);
  return bytes;
}

Bytes bytes_of(std::span<const Rectangle> rectangles) {
  Bytes bytes;
  for (const Rectangle& each : rectangles) {
    for (std::size_t row = 0; row < each.height; ++row) {
      put(bytes, address(each.destination) + row * each.destination_pitch,
          address(each.source) + row * each.source_pitch, each.width_bytes);
    }
  }
  return bytes;
}

std::vector<CopyRun> random_runs(std::mt19937& random) {
  std::vector<CopyRun> runs;
  std::size_t to = 1 << 20;
  std::size_t from = 1 << 24;
  const std::size_t usual = 1 + random() % 64;
  for (std::size_t i = 0; i < 60; ++i) {
    const std::size_t bytes = random() % 8 == 0 ? random() % 200 : usual;
    runs.push_back(run(to, from, bytes));
    to += bytes + (random() % 3 == 0 ? random() % 64 : 16 * (i % 7 / 3));
    from += bytes + (random() % 4 == 0 ? random() % 64 : 8 * (i % 5 / 2));
  }
  if (random() % 2 == 0) std::reverse(runs.begin(), runs.end());
  return runs;
}

TEST(RunPlan, runs_that_touch_are_rows_but_never_one_run) {
  const std::vector<CopyRun> runs{run(100, 1000, 10), run(110, 1010, 5), run(115, 1020, 5)};
  const std::vector<Rectangle> merged = merge_runs(runs);
  ASSERT_EQ(merged.size(), 2U);
  EXPECT_EQ(merged[0].width_bytes, 10U);
  EXPECT_EQ(merged[0].height, 1U);
  EXPECT_EQ(merged[1].width_bytes, 5U);
  EXPECT_EQ(merged[1].height, 2U);
}

TEST(RunPlan, equal_distances_become_rows) {
  std::vector<CopyRun> runs;
  for (std::size_t i = 0; i < 32; ++i) runs.push_back(run(1000 + i * 4096, 1 << 20 | i * 512, 512));
  const std::vector<Rectangle> merged = merge_runs(runs);
  ASSERT_EQ(merged.size(), 1U);
  EXPECT_EQ(merged[0].height, 32U);
  EXPECT_EQ(merged[0].destination_pitch, 4096U);
  EXPECT_EQ(merged[0].source_pitch, 512U);
}

TEST(RunPlan, rows_that_a_2d_copy_cannot_express_stay_apart) {
  const std::size_t far = kMaxPitchBytes + 1;
  EXPECT_EQ(merge_runs(std::vector{run(5000, 100, 10), run(4000, 200, 10)}).size(), 2U);  // falling
  EXPECT_EQ(merge_runs(std::vector{run(100, 100, 10), run(200, 100, 10)}).size(), 2U);    // same source
  EXPECT_EQ(merge_runs(std::vector{run(100, 100, 10), run(200, 105, 10)}).size(), 2U);    // overlap
  EXPECT_EQ(merge_runs(std::vector{run(100, 100, 10), run(200 + far, 200, 10)}).size(), 2U);
  EXPECT_EQ(merge_runs(std::vector{run(100, 100, 10), run(200, 200, 11)}).size(), 2U);
}

TEST(RunPlan, merging_moves_every_byte_once_and_where_it_belongs) {
  for (unsigned seed = 0; seed < support::turns(300, 30); ++seed) {
    std::mt19937 random(seed);
    const std::vector<CopyRun> runs = random_runs(random);
    ASSERT_EQ(bytes_of(merge_runs(runs)), bytes_of(runs)) << seed;
  }
}

TEST(RunPlan, splitting_moves_the_same_bytes_in_small_pieces) {
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 random(seed);
    const std::vector<CopyRun> runs = random_runs(random);
    const std::size_t most = 1 + random() % 100;
    const std::vector<CopyRun> pieces = split_runs(runs, most);
    EXPECT_TRUE(std::all_of(pieces.begin(), pieces.end(),
                            [&](const CopyRun& piece) { return piece.bytes > 0 && piece.bytes <= most; }));
    ASSERT_EQ(bytes_of(pieces), bytes_of(runs)) << seed;
  }
}

TEST(RunPlan, a_burst_is_as_many_runs_as_fit_and_at_least_one) {
  const std::vector<CopyRun> runs{run(0x1000, 1, 10), run(0x2000, 1, 10), run(0x3000, 1, 10)};
  EXPECT_EQ(burst_runs(runs, 5), 1U);
  EXPECT_EQ(burst_runs(runs, 10), 1U);
  EXPECT_EQ(burst_runs(runs, 20), 2U);
  EXPECT_EQ(burst_runs(runs, 1000), 3U);
}

// Stages one after another: what each stage's two lists move, through the ring, is what the runs say.
TEST(RunPlan, staging_moves_every_byte_once_through_a_stage_that_it_never_leaves) {
  for (unsigned seed = 0; seed < support::turns(300, 30); ++seed) {
    std::mt19937 random(seed);
    const std::vector<CopyRun> runs = random_runs(random);
    for (const Direction direction : {Direction::load, Direction::store}) {
      const std::size_t stage_bytes = kStageAlignment * (2 + random() % 5);
      const bool load = direction == Direction::load;
      Bytes moved;
      StageCursor cursor;
      while (true) {
        const StagePlan plan = plan_stage(runs, direction, stage_bytes, cursor);
        if (plan.pages.empty()) break;
        Bytes host_of_ring;
        std::size_t ring_end = 0;
        for (const StagedPiece& piece : plan.host) {
          ASSERT_GE(piece.ring, ring_end);
          ASSERT_EQ(piece.ring % kStageAlignment, address(piece.at) % kStageAlignment);
          ring_end = piece.ring + piece.bytes;
          ASSERT_LE(ring_end, stage_bytes);
          put(host_of_ring, piece.ring, address(piece.at), piece.bytes);
        }
        std::size_t through = 0;
        for (const StagedPiece& piece : plan.pages) {
          for (std::size_t i = 0; i < piece.bytes; ++i, ++through) {
            const std::size_t host = host_of_ring.at(piece.ring + i);
            const std::size_t page = address(piece.at) + i;
            ASSERT_TRUE(moved.emplace(load ? page : host, load ? host : page).second);
          }
        }
        ASSERT_EQ(through, host_of_ring.size());
      }
      ASSERT_EQ(cursor.run, runs.size());
      ASSERT_EQ(moved, bytes_of(runs)) << seed;
    }
  }
}

TEST(RunPlan, a_blocks_runs_are_one_stretch_of_host_memory) {
  std::vector<CopyRun> runs;
  for (std::size_t i = 0; i < 160; ++i)
    runs.push_back(run((i * 37 % 160) << 16, 0x40001000 + i * 4096, 4096));
  StageCursor cursor;
  const StagePlan plan = plan_stage(runs, Direction::load, 4 << 20, cursor);
  EXPECT_EQ(plan.host.size(), 1U);
  EXPECT_EQ(plan.pages.size(), 160U);
  EXPECT_EQ(cursor.run, 160U);
}

}  // namespace
}  // namespace kvtier
