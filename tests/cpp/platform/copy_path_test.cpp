#include "kvtier/platform/copy_path.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

const CalibrationKey kKey{"H100 sm_90", "32.0 GT/s x16", "0", "13000", "4096", "0.1.0"};

PathScore score(Direction direction, std::uint64_t run_bytes, CopyPath path, double rate,
                double slowdown = 0) {
  return {direction, run_bytes, path, rate, slowdown};
}

TEST(CopyPath, names_are_distinct_and_found_again) {
  for (unsigned i = 0; i < static_cast<unsigned>(CopyPath::count_); ++i) {
    const auto path = static_cast<CopyPath>(i);
    const Result<CopyPath> found = copy_path_named(to_string(path));
    ASSERT_TRUE(found) << to_string(path);
    EXPECT_EQ(found.value(), path);
  }
  const Status refused = copy_path_named("fast").status();
  EXPECT_EQ(refused.code(), StatusCode::invalid_argument);
  EXPECT_NE(refused.message().find("staged"), std::string::npos) << refused.message();
}

TEST(CopyPath, plain_is_always_available) {
  CopyPaths paths;
  EXPECT_TRUE(paths.has(CopyPath::plain));
  paths.remove(CopyPath::plain);
  EXPECT_TRUE(paths.has(CopyPath::plain));
  paths.add(CopyPath::bulk);
  paths.remove(CopyPath::bulk);
  EXPECT_EQ(paths, CopyPaths());
}

TEST(CopyPath, worth_weighs_rate_against_slowdown) {
  EXPECT_GT(worth(score(Direction::load, 4096, CopyPath::staged, 50e9, 0.05)),
            worth(score(Direction::load, 4096, CopyPath::kernel, 52e9, 0.5)));
}

TEST(CopyPath, the_choice_is_of_most_worth_at_the_nearest_length) {
  const Calibration calibration{{score(Direction::load, 4096, CopyPath::staged, 50e9),
                                 score(Direction::load, 4096, CopyPath::batched, 20e9),
                                 score(Direction::load, 1 << 20, CopyPath::staged, 50e9),
                                 score(Direction::load, 1 << 20, CopyPath::batched, 54e9),
                                 score(Direction::store, 4096, CopyPath::bulk, 60e9)}};
  const CopyPaths all{CopyPath::batched, CopyPath::staged, CopyPath::bulk};
  EXPECT_EQ(choose_path(calibration, all, Direction::load, 1), CopyPath::staged);
  EXPECT_EQ(choose_path(calibration, all, Direction::load, 4096), CopyPath::staged);
  // 4 KiB and 1 MiB are equally far, by ratio, from 64 KiB; just beyond, the longer decides.
  EXPECT_EQ(choose_path(calibration, all, Direction::load, (64 << 10) - 1), CopyPath::staged);
  EXPECT_EQ(choose_path(calibration, all, Direction::load, (64 << 10) + 1), CopyPath::batched);
  EXPECT_EQ(choose_path(calibration, all, Direction::load, std::uint64_t{1} << 40), CopyPath::batched);
  EXPECT_EQ(choose_path(calibration, all, Direction::store, 1 << 20), CopyPath::bulk);
}

TEST(CopyPath, what_is_not_available_is_never_chosen) {
  const Calibration calibration{{score(Direction::load, 4096, CopyPath::bulk, 60e9),
                                 score(Direction::load, 4096, CopyPath::kernel, 10e9)}};
  EXPECT_EQ(choose_path(calibration, {CopyPath::kernel}, Direction::load, 4096), CopyPath::kernel);
  for (unsigned bits = 0; bits < 64; ++bits) {
    CopyPaths available;
    for (unsigned i = 0; i < 6; ++i) {
      if ((bits >> i & 1U) != 0) available.add(static_cast<CopyPath>(i));
    }
    for (std::uint64_t bytes = 1; bytes < (std::uint64_t{1} << 32); bytes *= 3) {
      EXPECT_TRUE(available.has(default_path(available, bytes)));
      EXPECT_TRUE(available.has(choose_path(calibration, available, Direction::load, bytes)));
    }
  }
}

TEST(CopyPath, without_a_calibration_engines_take_long_runs_and_the_ring_short_ones) {
  const CopyPaths all{CopyPath::merged, CopyPath::batched, CopyPath::kernel, CopyPath::staged,
                      CopyPath::bulk};
  EXPECT_EQ(choose_path({}, all, Direction::load, 4 << 10), CopyPath::staged);
  EXPECT_EQ(choose_path({}, all, Direction::load, 128 << 10), CopyPath::batched);
  EXPECT_EQ(choose_path({}, all, Direction::load, 2 << 20), CopyPath::merged);
  EXPECT_EQ(default_path({}, 4096), CopyPath::plain);
  EXPECT_EQ(default_path({CopyPath::merged, CopyPath::kernel}, 4096), CopyPath::kernel);
}

// Copying all the time, the kernel makes decoding 40 % longer; copying an eighth of the time, 5 %.
TEST(CopyPath, a_share_of_decoding_is_a_share_of_the_time) {
  const PathScore kernel = score(Direction::load, 4096, CopyPath::kernel, 48e9, 0.4);
  EXPECT_DOUBLE_EQ(rate_within(kernel, {0.05}), 6e9);
  EXPECT_DOUBLE_EQ(rate_within(kernel, {0.4}), 48e9);
  EXPECT_DOUBLE_EQ(rate_within(kernel, {1.0}), 48e9);
}

TEST(CopyPath, within_a_share_the_choice_is_what_moves_most) {
  const Calibration calibration{{score(Direction::load, 4096, CopyPath::kernel, 50e9, 0.4),
                                 score(Direction::load, 4096, CopyPath::staged, 30e9, 0.06)}};
  const CopyPaths all{CopyPath::kernel, CopyPath::staged};
  EXPECT_EQ(choose_path(calibration, all, Direction::load, 4096), CopyPath::kernel);
  EXPECT_EQ(choose_path(calibration, all, Direction::load, 4096, DecodeShare{0.05}), CopyPath::staged);
  EXPECT_EQ(choose_path(calibration, all, Direction::load, 4096, DecodeShare{0.4}), CopyPath::kernel);
  EXPECT_EQ(choose_path(calibration, {CopyPath::kernel}, Direction::load, 4096, DecodeShare{0.05}),
            CopyPath::kernel);
}

TEST(CopyPath, a_paths_rate_within_a_share_is_of_its_own_nearest_measurement) {
  const Calibration calibration{{score(Direction::load, 4096, CopyPath::kernel, 48e9, 0.4),
                                 score(Direction::load, 1 << 20, CopyPath::kernel, 50e9, 0.8),
                                 score(Direction::load, 4096, CopyPath::staged, 30e9, 0.02),
                                 score(Direction::store, 4096, CopyPath::kernel, 1e9, 0.5)}};
  const DecodeShare limit{0.05};
  const auto rate = [&](CopyPath path, std::uint64_t run_bytes) {
    return rate_within(calibration, path, Direction::load, run_bytes, limit);
  };
  EXPECT_EQ(rate(CopyPath::kernel, 4096), 6'000'000'000U);
  EXPECT_EQ(rate(CopyPath::kernel, 2 << 20), 3'125'000'000U);
  EXPECT_EQ(rate(CopyPath::staged, 4096), std::nullopt);  // as fast as it can
  // Not measured: as the slowest at that length, and never without a limit.
  EXPECT_EQ(rate(CopyPath::plain, 4096), 6'000'000'000U);
  EXPECT_EQ(rate_within(calibration, CopyPath::plain, Direction::store, 4096, {1.0}), 1'000'000'000U);
  EXPECT_EQ(rate_within({{score(Direction::load, 4096, CopyPath::kernel, 1e-3, 1.0)}}, CopyPath::kernel,
                        Direction::load, 4096, {0.001}),
            1U);
}

TEST(Calibration, says_which_direction_was_measured) {
  const Calibration calibration{{score(Direction::load, 4096, CopyPath::kernel, 48e9)}};
  EXPECT_TRUE(calibration.measured(Direction::load));
  EXPECT_FALSE(calibration.measured(Direction::store));
}

TEST(Calibration, what_was_written_is_read_again) {
  const Calibration calibration{{score(Direction::load, 4096, CopyPath::staged, 50.123456789e9, 0.1),
                                 score(Direction::store, 1 << 20, CopyPath::batched, 1.0 / 3, 0)}};
  const Result<Calibration> read = Calibration::parse(calibration.format(kKey), kKey);
  ASSERT_TRUE(read) << read.status().message();
  EXPECT_EQ(read.value().scores, calibration.scores);
}

TEST(Calibration, another_machines_is_refused_whatever_differs) {
  const std::string text = Calibration{}.format(kKey);
  ASSERT_TRUE(Calibration::parse(text, kKey));
  for (std::string CalibrationKey::* field :
       {&CalibrationKey::gpu, &CalibrationKey::link, &CalibrationKey::numa, &CalibrationKey::driver,
        &CalibrationKey::pages, &CalibrationKey::version}) {
    CalibrationKey other = kKey;
    other.*field += "x";
    EXPECT_EQ(Calibration::parse(text, other).status().code(), StatusCode::corruption);
  }
}

TEST(Calibration, a_text_that_is_cut_off_or_spoiled_is_refused) {
  const std::string text =
      Calibration{{score(Direction::load, 4096, CopyPath::staged, 5e10, 0.1)}}.format(kKey);
  for (std::size_t length = 0; length + 1 < text.size(); ++length) {
    const Result<Calibration> read = Calibration::parse(text.substr(0, length), kKey);
    EXPECT_FALSE(read) << length;
  }
  for (const char* line : {"load 4096 staged -1 0", "load 4096 staged nan 0", "load 0 staged 1 0",
                           "sideways 4096 staged 1 0", "load 4096 magic 1 0", "load 4096 staged 1 0 7", ""}) {
    const std::string spoiled = Calibration{}.format(kKey).substr(0, text.find("load")) + line + "\nend\n";
    EXPECT_FALSE(Calibration::parse(spoiled, kKey)) << line;
  }
}

}  // namespace
}  // namespace kvtier
