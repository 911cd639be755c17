// What becomes of the catalog when its helper or its file is killed, cut, removed or filled with junk. It may
// then be lost; the server must not notice more than that.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "storage/catalog_world.h"
#include "support/turns.h"

#include "kvtier/storage/catalog.h"

namespace kvtier::catalog_world {
#ifdef KVTIER_TEST_CATALOG_HELPER
namespace {

// --- the helper and its file come to harm ---

TEST_F(HelperCatalogTest, a_killed_helper_costs_the_catalog_and_leaves_no_zombie) {
  auto catalog = open_with(100);
  const std::vector<pid_t> before = helpers();
  ASSERT_EQ(before.size(), 1U);
  ::kill(before[0], SIGKILL);
  expect_lost_and_made_anew(*catalog);
  catalog.reset();
  EXPECT_EQ(helpers(), std::vector<pid_t>{}) << "neither running nor waiting to be collected";
}

TEST_F(HelperCatalogTest, what_was_committed_survives_the_helper_and_the_client) {
  auto catalog = open_with(100);
  ::kill(helpers().at(0), SIGKILL);
  EXPECT_EQ(content(*open()).size(), 100U);
}

TEST_F(HelperCatalogTest, a_helper_that_hangs_is_given_up_at_the_deadline) {
  CatalogOptions options = helper_options();
  options.answer_within = std::chrono::milliseconds(100);
  auto catalog = open(options);
  ::kill(helpers().at(0), SIGSTOP);
  const Status status = catalog->commit(std::vector{put(1, 1)});
  EXPECT_EQ(status.code(), StatusCode::io);
  EXPECT_EQ(status.native_code(), ETIMEDOUT) << status.message();
  EXPECT_EQ(helpers(), std::vector<pid_t>{}) << "a stopped process is killed and collected, too";
}

TEST_F(HelperCatalogTest, a_file_that_is_cut_under_it_costs_the_catalog) {
  for (const std::uintmax_t size : {0U, 4096U, 8192U, 12288U, 100'000U}) {
    TemporaryDirectory another;
    auto catalog = open_with(2000);
    ASSERT_GT(fs::file_size(directory_.file()), size);
    ASSERT_EQ(::truncate(directory_.file().c_str(), static_cast<off_t>(size)), 0);
    expect_lost_and_made_anew(*catalog);
  }
}

TEST_F(HelperCatalogTest, a_file_that_is_removed_or_replaced_costs_the_catalog) {
  auto catalog = open_with(100);
  ASSERT_TRUE(fs::remove(directory_.file()));
  expect_lost_and_made_anew(*catalog);
  fs::copy_file(directory_.file(), directory_.file() + ".copy");
  fs::rename(directory_.file() + ".copy", directory_.file());
  expect_lost_and_made_anew(*catalog);
}

TEST_F(HelperCatalogTest, junk_in_the_file_is_corruption_or_worse_but_never_ours) {
  std::mt19937 random(11);
  for (int round = 0; round < 12; ++round) {
    open_with(500).reset();
    const auto size = static_cast<std::streamoff>(fs::file_size(directory_.file()));
    {
      std::fstream file(directory_.file(), std::ios::in | std::ios::out | std::ios::binary);
      const std::streamoff begin =
          round == 0 ? 0 : 4096 * static_cast<std::streamoff>(random() % (size / 4096));
      const std::streamoff end =
          round == 0 ? size : std::min(size, begin + 4096 * static_cast<std::streamoff>(1 + random() % 8));
      file.seekp(begin);
      for (std::streamoff i = begin; i < end; ++i) file.put(static_cast<char>(random()));
    }
    // A page that nobody needs any more may be the one that was hit: then all is as it was.
    auto catalog = open();
    ASSERT_NE(catalog, nullptr);
    const Result<std::vector<CatalogRecord>> read = catalog->read_all();
    if (!read) {
      EXPECT_TRUE(read.status().code() == StatusCode::io || read.status().code() == StatusCode::corruption);
    }
    if (round == 0) {
      EXPECT_EQ(read.status().code(), StatusCode::corruption) << read.status().message();
    }
    static_cast<void>(catalog->commit(std::vector{put(1, 9), put(2, 8)}));
    ASSERT_TRUE(catalog->reset_with(std::vector{record_of(4, 4)}).is_ok());
    EXPECT_EQ(content(*catalog), Content{"4@4:4"});
    ASSERT_TRUE(catalog->reset_with({}).is_ok());
  }
}

TEST_F(HelperCatalogTest, a_text_file_a_link_and_a_fifo_are_not_catalogs) {
  std::ofstream(directory_.file()) << "this is not a database, and it is longer than nothing\n";
  auto catalog = open();
  EXPECT_EQ(catalog->read_all().status().code(), StatusCode::corruption);
  expect_lost_and_made_anew(*catalog);
  catalog.reset();

  const std::string elsewhere = directory_.path() + "/elsewhere";
  fs::rename(directory_.file(), elsewhere);
  fs::create_symlink(elsewhere, directory_.file());
  catalog = open();
  EXPECT_EQ(catalog->read_all().status().code(), StatusCode::corruption) << "a symbolic link is not followed";
  const auto size = fs::file_size(elsewhere);
  expect_lost_and_made_anew(*catalog);
  EXPECT_EQ(fs::file_size(elsewhere), size);
  EXPECT_FALSE(fs::is_symlink(directory_.file()));
  catalog.reset();

  fs::remove(directory_.file());
  ASSERT_EQ(::mkfifo(directory_.file().c_str(), 0600), 0);
  catalog = open();
  expect_lost_and_made_anew(*catalog);
}

TEST_F(HelperCatalogTest, a_reset_that_was_interrupted_is_not_believed) {
  // The catalog is incomplete until its last piece: a helper that is killed between them leaves no half
  // truth.
  auto catalog = open();
  std::vector<CatalogRecord> records;
  for (std::uint32_t i = 0; i < support::turns(100'000, 30'000); ++i) records.push_back(record_of(i, i));
  std::thread killer([&, first = helpers().at(0)] {
    for (;;) {  // until the new helper has committed its first piece
      const std::vector<pid_t> now = helpers();
      std::error_code none;
      if (!now.empty() && now[0] != first && fs::file_size(directory_.file(), none) > 1'000'000 && !none) {
        ::kill(now[0], SIGKILL);
        return;
      }
    }
  });
  const Status status = catalog->reset_with(records);
  killer.join();
  if (status.is_ok()) GTEST_SKIP() << "the killer came too late";
  EXPECT_EQ(status.code(), StatusCode::io);
  const Result<std::vector<CatalogRecord>> read = open()->read_all();
  EXPECT_FALSE(read.is_ok());
  ASSERT_TRUE(catalog->reset_with(records).is_ok());
  EXPECT_EQ(content(*catalog).size(), records.size());
}

TEST_F(HelperCatalogTest, its_size_is_bounded) {
  CatalogOptions options = helper_options();
  options.max_bytes = kMinCatalogBytes;
  auto catalog = open(options);
  Status status;
  std::uint32_t next = 0;
  while (status.is_ok() && next < 100'000) {
    std::vector<CatalogChange> changes;
    for (int i = 0; i < 500; ++i, ++next) changes.push_back(put(next, next));
    status = catalog->commit(changes);
  }
  EXPECT_EQ(status.code(), StatusCode::io);
  EXPECT_EQ(status.native_code(), ENOSPC);
  EXPECT_NE(status.message().find(std::to_string(options.max_bytes)), std::string::npos) << status.message();
  EXPECT_LE(fs::file_size(directory_.file()), options.max_bytes);
  expect_lost_and_made_anew(*catalog);
  catalog.reset();

  open_with(20'000).reset();
  catalog = open(options);
  EXPECT_EQ(catalog->read_all().status().code(), StatusCode::corruption)
      << "larger than the bound it is opened with";
  EXPECT_EQ(open_catalog(directory_.path(), {KVTIER_TEST_CATALOG_HELPER, 4096}).status().code(),
            StatusCode::invalid_argument);
}

TEST_F(HelperCatalogTest, the_proposed_bound_is_never_met) {
  constexpr std::uint32_t kSlots = 2000;
  CatalogOptions options = helper_options();
  options.max_bytes = catalog_bound_bytes(kSlots);
  auto catalog = open(options);
  std::mt19937 random(3);
  for (std::uint64_t round = 0; round < support::turns(60, 18); ++round) {
    std::vector<CatalogChange> changes;
    for (std::uint32_t i = 0; i < kSlots; ++i) {
      changes.push_back(round % 3 == 2 ? touch(i, static_cast<std::int64_t>(round))
                                       : put(static_cast<std::uint32_t>(random()),
                                             static_cast<std::uint32_t>(random() % kSlots)));
    }
    ASSERT_TRUE(catalog->commit(changes).is_ok()) << round;
  }
  EXPECT_LT(fs::file_size(directory_.file()), options.max_bytes * 3 / 4) << "a quarter of it is margin";
}

TEST_F(HelperCatalogTest, a_helper_that_cannot_run_is_unsupported) {
  for (const std::string path : {"/nonexistent/kvtier-catalog", "/bin/true", "/dev/null"}) {
    CatalogOptions options = helper_options();
    options.helper_path = path;
    const auto catalog = open_catalog(directory_.path(), options);
    EXPECT_EQ(catalog.status().code(), StatusCode::unsupported) << catalog.status().message();
    EXPECT_NE(catalog.status().message().find(path), std::string::npos);
  }
  const auto nowhere = open_catalog(directory_.path() + "/missing", helper_options());
  EXPECT_EQ(nowhere.status().code(), StatusCode::io) << nowhere.status().message();
}

}  // namespace
#endif  // KVTIER_TEST_CATALOG_HELPER
}  // namespace kvtier::catalog_world
