// The kernels' own address arithmetic, run on the CPU lane by lane.
#include "kvtier/platform/run_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <vector>

namespace kvtier {
namespace {

constexpr std::uint32_t kLanes = 32;

std::uint64_t address(const std::byte* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

// What a grid of `workers` warps does.
template <typename Table>
void run_grid(const Table& table, std::uint32_t workers) {
  for (std::uint32_t worker = 0; worker < workers; ++worker) {
    for (std::uint32_t lane = 0; lane < kLanes; ++lane) copy_table(table, worker, workers, lane, kLanes);
  }
}

// Every run of a list through tables of one kind; how many tables it took.
template <typename Table>
std::size_t run_all(const std::vector<MappedRun>& runs, std::uint32_t workers) {
  const auto table = std::make_unique<Table>();
  TableCursor cursor;
  std::size_t tables = 0;
  while (cursor.run < runs.size() && fill_table(*table, runs, cursor)) {
    run_grid(*table, workers);
    ++tables;
  }
  EXPECT_EQ(cursor.run, runs.size());
  return tables;
}

// Memory on both sides, the target poisoned; says what runs must make of it.
struct Memory {
  explicit Memory(std::size_t bytes) : source(bytes + 64), target(bytes + 64, std::byte{0xee}) {
    for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 131 + i / 256 + 7);
    expected = target;
  }
  // Offsets from a 64-byte boundary, so that alignment is what the caller says.
  static std::byte* aligned(std::vector<std::byte>& memory) {
    return memory.data() + (64 - address(memory.data()) % 64) % 64;
  }
  MappedRun run(std::size_t to, std::size_t from, std::size_t bytes) {
    const std::byte* begin = aligned(source) + from;
    std::byte* end = aligned(target) + to;
    std::copy_n(begin, bytes, expected.data() + (end - target.data()));
    return {address(end), address(begin), bytes};
  }
  std::vector<std::byte> source;
  std::vector<std::byte> target;
  std::vector<std::byte> expected;
};

TEST(RunTable, access_is_as_wide_as_everything_allows) {
  for (std::uint64_t to = 0; to < 32; ++to) {
    for (std::uint64_t from = 0; from < 32; ++from) {
      for (std::uint64_t bytes = 1; bytes < 48; ++bytes) {
        const std::uint32_t width = access_bytes(to, from, bytes);
        EXPECT_TRUE(to % width == 0 && from % width == 0 && bytes % width == 0);
        const std::uint64_t wider = std::uint64_t{2} * width;
        EXPECT_TRUE(width == 16 || to % wider != 0 || from % wider != 0 || bytes % wider != 0);
      }
    }
  }
}

TEST(RunTable, lanes_share_out_every_item_once_for_any_count) {
  for (const std::uint32_t lanes : {1U, 3U, 32U}) {
    for (std::uint32_t count = 0; count < 2100; count += count < 600 ? 1 : 37) {
      std::vector<std::uint16_t> from(count);
      for (std::uint32_t i = 0; i < count; ++i) from[i] = static_cast<std::uint16_t>(i + 1);
      std::vector<std::uint16_t> to(count + 1, 0xeeee);
      for (std::uint32_t lane = 0; lane < lanes; ++lane)
        copy_items(to.data(), from.data(), count, lane, lanes);
      ASSERT_TRUE(std::equal(from.begin(), from.end(), to.begin())) << count;
      ASSERT_EQ(to[count], 0xeeee) << count;
    }
  }
}

TEST(RunTable, units_of_a_compact_table_cover_every_run_once_and_nothing_beside) {
  for (const std::uint32_t unit_bytes : {kUnitBytes, kWideUnitBytes}) {
    for (const std::uint32_t run_bytes : {16U, 4080U, 4096U, 4112U, 16384U, 65536U, 65552U}) {
      auto table = std::make_unique<SmallCompactRuns>();
      std::vector<MappedRun> runs;
      for (std::uint64_t i = 0; i < 7; ++i) {
        runs.push_back(
            {(std::uint64_t{1} << 40) + i * 1000000 * 16, (std::uint64_t{1} << 33) - i * 65552, run_bytes});
      }
      TableCursor cursor;
      ASSERT_TRUE(fill_table(*table, runs, cursor));
      EXPECT_EQ(cursor.run, 7U);
      std::vector<MappedRun> units;
      for (std::uint32_t i = 0; i < table->num_units(unit_bytes); ++i) {
        const Unit unit = table->unit(i, unit_bytes);
        ASSERT_GT(unit.bytes, 0U);
        ASSERT_LE(unit.bytes, unit_bytes);
        // Joined again, the units are the runs.
        if (!units.empty() && units.back().bytes < run_bytes) {
          ASSERT_EQ(unit.destination, units.back().destination + units.back().bytes);
          ASSERT_EQ(unit.source, units.back().source + units.back().bytes);
          units.back().bytes += unit.bytes;
        } else {
          units.push_back({unit.destination, unit.source, unit.bytes});
        }
      }
      ASSERT_EQ(units.size(), runs.size());
      for (std::size_t i = 0; i < runs.size(); ++i) {
        EXPECT_EQ(units[i].destination, runs[i].destination);
        EXPECT_EQ(units[i].source, runs[i].source);
        EXPECT_EQ(units[i].bytes, runs[i].bytes);
      }
    }
  }
}

TEST(RunTable, alike_runs_are_copied_byte_for_byte_by_any_grid) {
  for (const std::size_t run_bytes : {16U, 48U, 4096U, 4112U, 12288U}) {
    for (const std::uint32_t workers : {1U, 5U, 64U}) {
      constexpr std::size_t kRuns = 130;  // more than one small table takes
      Memory memory(kRuns * (run_bytes + 16));
      std::vector<MappedRun> runs;
      for (std::size_t i = 0; i < kRuns; ++i) {
        runs.push_back(memory.run(i * 37 % kRuns * (run_bytes + 16), i * run_bytes, run_bytes));
      }
      EXPECT_EQ(run_all<SmallCompactRuns>(runs, workers), 2U);
      ASSERT_EQ(memory.target, memory.expected) << run_bytes << " by " << workers;
    }
  }
}

TEST(RunTable, runs_of_any_length_and_alignment_are_copied_byte_for_byte) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 random(seed);
    Memory memory(2000000);
    std::vector<MappedRun> runs;
    std::size_t at = 0;
    while (at + 50000 < 2000000) {
      const std::size_t bytes = random() % 3 == 0 ? random() % 40000 : random() % 300;
      runs.push_back(memory.run(at + random() % 16, random() % (2000000 - bytes), bytes));
      at += bytes + 16 + random() % 64;
    }
    const auto workers = static_cast<std::uint32_t>(1 + random() % 40);
    if (seed % 2 == 0) {
      run_all<SmallWideRuns>(runs, workers);
    } else {
      run_all<LargeWideRuns>(runs, workers);
    }
    ASSERT_EQ(memory.target, memory.expected) << seed;
  }
}

TEST(RunTable, a_compact_table_refuses_what_does_not_suit_it_and_changes_nothing) {
  SmallCompactRuns table{};
  const auto refuses = [&](MappedRun run) {
    TableCursor cursor;
    const std::vector<MappedRun> runs{run};
    return !fill_table(table, runs, cursor) && cursor.run == 0;
  };
  EXPECT_FALSE(refuses({32, 64, 16}));
  EXPECT_TRUE(refuses({33, 64, 16}));
  EXPECT_TRUE(refuses({32, 72, 16}));
  EXPECT_TRUE(refuses({32, 64, 24}));
  EXPECT_TRUE(refuses({32, 64, std::uint64_t{kMaxCompactRunBytes} + 16}));
}

TEST(RunTable, a_compact_table_ends_where_the_next_run_is_of_another_kind) {
  constexpr std::uint64_t kFar = std::uint64_t{16} << 32;  // 64 GiB
  SmallCompactRuns table{};
  for (const MappedRun odd : {MappedRun{1 << 20, 0, 64}, MappedRun{(1 << 20) + 8, 0, 32},
                              MappedRun{kFar, 0, 32}, MappedRun{0, 1600 + kFar, 32}}) {
    const std::vector<MappedRun> runs{{0, 1600, 32}, {64, 0, 32}, odd};
    TableCursor cursor;
    ASSERT_TRUE(fill_table(table, runs, cursor));
    EXPECT_EQ(cursor.run, 2U);
    EXPECT_EQ(table.count, 2U);
  }
  // The farthest that an offset reaches.
  const std::vector<MappedRun> runs{{kFar - 16, 0, 16}, {0, kFar - 16, 16}};
  TableCursor cursor;
  ASSERT_TRUE(fill_table(table, runs, cursor));
  EXPECT_EQ(cursor.run, 2U);
  EXPECT_EQ(table.unit(0, kUnitBytes).destination, kFar - 16);
  EXPECT_EQ(table.unit(1, kUnitBytes).source, kFar - 16);
}

// The layers of a cache that fills such a GPU lie far apart; a table for each few of them would be a launch
// for each few runs.
TEST(RunTable, pages_all_over_a_large_gpu_go_into_one_compact_table) {
  constexpr std::uint64_t kPages = (std::uint64_t{7} << 40) + 512;
  constexpr std::uint64_t kSlots = (std::uint64_t{5} << 40) + 4096 + 48;
  std::vector<MappedRun> runs;
  for (std::uint64_t layer = 0; layer < 100; ++layer) {
    runs.push_back({kPages + layer * (std::uint64_t{10} << 30), kSlots + layer * 4096, 4096});
  }
  SmallCompactRuns table{};
  TableCursor cursor;
  ASSERT_TRUE(fill_table(table, runs, cursor));
  ASSERT_EQ(cursor.run, runs.size());
  for (std::uint32_t i = 0; i < table.num_units(kUnitBytes); ++i) {
    EXPECT_EQ(table.unit(i, kUnitBytes).destination, runs[i].destination);
    EXPECT_EQ(table.unit(i, kUnitBytes).source, runs[i].source);
  }
  // One whose place is not a multiple of 256 from the others' has to wait for a table of its own.
  runs[90].source += 16;
  cursor = {};
  ASSERT_TRUE(fill_table(table, runs, cursor));
  EXPECT_EQ(cursor.run, 90U);
  ASSERT_TRUE(fill_table(table, runs, cursor));
  EXPECT_EQ(cursor.run, 97U);  // 64 GiB on
  EXPECT_EQ(table.unit(0, kUnitBytes).source, runs[90].source);
  EXPECT_EQ(table.unit(6, kUnitBytes).destination, runs[96].destination);
}

TEST(RunTable, the_prefix_that_decides_between_tables_is_what_a_compact_one_would_take) {
  std::vector<MappedRun> runs(100, {0, 1 << 20, 4096});
  EXPECT_EQ(compact_prefix(runs, {}), 100U);
  runs[70].bytes = 8192;
  EXPECT_EQ(compact_prefix(runs, {}), 70U);
  EXPECT_EQ(compact_prefix(runs, {70, 0}), 1U);
  EXPECT_EQ(compact_prefix(runs, {0, 16}), 0U);  // in the middle of a run
  runs[0].source = 3;
  EXPECT_EQ(compact_prefix(runs, {}), 0U);
}

// The bulk kernel's pipeline, step by step, as its one thread runs it. The engines are slow in the worst way:
// a load is over only when it is waited for, a store has read its stage only when that was waited for.
TEST(RunTable, the_bulk_pipeline_never_loads_into_a_stage_that_is_still_read) {
  for (std::uint32_t units = 0; units < 5 * kBulkStages + 3; ++units) {
    std::vector<int> loaded(kBulkStages, -1);  // which unit a stage holds
    std::vector<unsigned> completions(kBulkStages, 0);
    std::vector<std::uint32_t> unread;  // stores that may still read, oldest first
    const auto load = [&](std::uint32_t k) {
      for (const std::uint32_t store : unread) ASSERT_NE(bulk_stage(store), bulk_stage(k));
      loaded[bulk_stage(k)] = static_cast<int>(k);
      ++completions[bulk_stage(k)];
    };
    for (std::uint32_t k = 0; k < kBulkAhead && k < units; ++k) load(k);
    for (std::uint32_t k = 0; k < units; ++k) {
      // The barrier's phase that is waited for is that of this very load: none newer was begun on it.
      ASSERT_EQ(completions[bulk_stage(k)], k / kBulkStages + 1);
      ASSERT_EQ(bulk_parity(k), (completions[bulk_stage(k)] - 1) % 2);
      ASSERT_EQ(loaded[bulk_stage(k)], static_cast<int>(k));
      unread.push_back(k);
      if (k + kBulkAhead < units) {
        while (unread.size() > kBulkStages - kBulkAhead) unread.erase(unread.begin());
        load(k + kBulkAhead);
      }
    }
  }
}

}  // namespace
}  // namespace kvtier
