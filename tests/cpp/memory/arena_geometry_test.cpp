#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "kvtier/core/layout.h"
#include "kvtier/memory/arena.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

struct Case {
  const char* name;
  std::vector<ArenaClass> classes;
  std::uint64_t chunk_bytes;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> kCases = {
      {"one_slot", {{4096, 1}}, 128 * kMiB},
      {"slot_larger_than_chunk", {{3 * kMiB, 5}}, 1},
      {"slot_as_large_as_chunk", {{2 * kMiB, 5}}, 2 * kMiB},
      {"chunk_not_a_multiple", {{36864, 1000}}, 10 * kMiB + 17},
      {"last_chunk_is_short", {{4096, 1025}}, 4 * kMiB},
      {"three_unequal_classes", {{4096, 700}, {2 * kMiB + 4096, 9}, {12288, 1}}, 4 * kMiB},
      {"many_small_classes", {{4096, 1}, {8192, 2}, {4096, 3}, {16384, 4}}, 4096},
      {"a_class_of_a_tebibyte", {{64 * kMiB + 4096, 16384}, {4096, 1}}, 128 * kMiB},
  };
  return kCases;
}

class Geometry : public ::testing::TestWithParam<Case> {
 protected:
  const ArenaGeometry geometry_{GetParam().classes, GetParam().chunk_bytes};
};

TEST_P(Geometry, is_valid) { EXPECT_TRUE(geometry_.validate().is_ok()) << geometry_.validate().message(); }

TEST_P(Geometry, slots_are_disjoint_and_inside) {
  std::uint64_t end = 0;
  for (std::size_t i = 0; i < geometry_.classes.size(); ++i) {
    const auto [stride, num_slots] = geometry_.classes[i];
    EXPECT_EQ(geometry_.slot_offset(i, SlotId{0}) % (2 * kMiB), 0U) << "class " << i;
    EXPECT_GE(geometry_.slot_offset(i, SlotId{0}), end) << "class " << i;
    for (std::uint32_t slot = 1; slot < num_slots; ++slot) {
      ASSERT_EQ(geometry_.slot_offset(i, SlotId{slot}), geometry_.slot_offset(i, SlotId{slot - 1}) + stride);
    }
    end = geometry_.slot_offset(i, SlotId{num_slots - 1}) + stride;
  }
  EXPECT_LE(end, geometry_.total_bytes());
  EXPECT_LT(geometry_.total_bytes(), end + 2 * kMiB);
  EXPECT_EQ(geometry_.total_bytes() % (2 * kMiB), 0U);
}

TEST_P(Geometry, chunks_hold_every_slot_once_and_whole) {
  std::vector<std::uint32_t> next(geometry_.classes.size(), 0);
  std::uint64_t sum = 0;
  for (const ArenaChunk& chunk : geometry_.chunks()) {
    const std::uint64_t stride = geometry_.classes[chunk.class_index].slot_stride_bytes;
    ASSERT_EQ(chunk.first_slot, next[chunk.class_index]) << "in order within a class";
    ASSERT_LT(chunk.first_slot, chunk.end_slot);
    next[chunk.class_index] = chunk.end_slot;
    EXPECT_EQ(chunk.offset, geometry_.slot_offset(chunk.class_index, SlotId{chunk.first_slot}));
    const std::uint64_t slots_end =
        geometry_.slot_offset(chunk.class_index, SlotId{chunk.end_slot - 1}) + stride;
    EXPECT_LE(slots_end, chunk.offset + chunk.bytes);
    EXPECT_LT(chunk.offset + chunk.bytes, slots_end + 2 * kMiB) << "padding only";
    EXPECT_TRUE(chunk.end_slot - chunk.first_slot == 1 || slots_end - chunk.offset <= geometry_.chunk_bytes);
    sum += chunk.bytes;
  }
  for (std::size_t i = 0; i < next.size(); ++i) EXPECT_EQ(next[i], geometry_.classes[i].num_slots);
  EXPECT_EQ(sum, geometry_.total_bytes()) << "they neither overlap nor leave a gap";
}

TEST_P(Geometry, classes_take_turns) {
  const std::vector<ArenaChunk> chunks = geometry_.chunks();
  for (std::size_t i = 0; i < geometry_.classes.size(); ++i) {
    EXPECT_EQ(chunks[i].class_index, i);
    EXPECT_EQ(chunks[i].first_slot, 0U);
  }
}

INSTANTIATE_TEST_SUITE_P(Table, Geometry, ::testing::ValuesIn(cases()),
                         [](const auto& row) { return std::string(row.param.name); });

void expect_refused(const ArenaGeometry& geometry, const std::vector<std::string>& words) {
  const Status status = geometry.validate();
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  for (const std::string& word : words) {
    EXPECT_NE(status.message().find(word), std::string::npos)
        << "no '" << word << "' in: " << status.message();
  }
}

TEST(GeometryErrors, name_the_field_the_value_and_what_is_allowed) {
  expect_refused({{}, kMiB}, {"classes", "at least one"});
  expect_refused({{{4096, 1}}, 0}, {"chunk_bytes", "0", "at least 1"});
  expect_refused({{{4096, 1}, {0, 1}}, kMiB}, {"classes[1].slot_stride_bytes", "is 0", "4096"});
  expect_refused({{{5000, 1}}, kMiB}, {"classes[0].slot_stride_bytes", "5000", "multiple of 4096"});
  expect_refused({{{4096, 1}, {4096, 0}}, kMiB}, {"classes[1].num_slots", "is 0", "at least 1"});
}

TEST(GeometryErrors, sizes_that_overflow_are_refused_not_wrapped) {
  constexpr std::uint64_t kHuge = ~std::uint64_t{4095};
  constexpr std::uint32_t kMost = ~std::uint32_t{0};
  expect_refused({{{kHuge, 1}}, kMiB}, {"classes[0].num_slots", "exceeds"});
  expect_refused({{{kHuge, kMost}}, kMiB}, {"classes[0].num_slots", "exceeds"});
  expect_refused({{{std::uint64_t{1} << 32, kMost}}, kMiB},
                 {"classes[0].num_slots", "4294967295", "exceeds"});
  // Each fits, the sum does not; and 2^62 itself would still fit.
  constexpr std::uint64_t kHalf = std::uint64_t{1} << 61;
  EXPECT_TRUE((ArenaGeometry{{{kHalf, 1}, {kHalf, 1}}, kMiB}.validate().is_ok()));
  expect_refused({{{kHalf, 1}, {kHalf, 1}, {4096, 1}}, kMiB}, {"classes[2].num_slots", "exceeds"});
  // The product wraps to a small number.
  expect_refused({{{std::uint64_t{1} << 33, 1U << 31}}, kMiB}, {"classes[0]", "exceeds"});
}

}  // namespace
}  // namespace kvtier
