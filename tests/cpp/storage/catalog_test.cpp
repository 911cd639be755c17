// What every catalog promises: the one that a helper process keeps, and the one in memory.
#include "kvtier/storage/catalog.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "storage/catalog_world.h"

namespace kvtier::catalog_world {
namespace {

// --- one promise for both: the catalog of a helper and the one in memory ---

enum class Implementation : std::uint8_t { helper, history };

class AnyCatalog : public testing::TestWithParam<Implementation> {
 protected:
  void SetUp() override {
#ifndef KVTIER_TEST_CATALOG_HELPER
    if (GetParam() == Implementation::helper) GTEST_SKIP() << "built without lmdb";
#endif
  }
  std::unique_ptr<Catalog> open() {
    if (GetParam() == Implementation::history) return history_.open(history_.num_versions() - 1);
#ifdef KVTIER_TEST_CATALOG_HELPER
    Result<std::unique_ptr<Catalog>> catalog = open_catalog(directory_.path(), helper_options());
    EXPECT_TRUE(catalog.is_ok()) << catalog.status().message();
    return catalog ? std::move(catalog).value() : nullptr;
#else
    return nullptr;
#endif
  }

  TemporaryDirectory directory_;
  CatalogHistory history_;
};

TEST_P(AnyCatalog, a_new_one_is_empty) { EXPECT_EQ(content(*open()), Content{}); }

TEST_P(AnyCatalog, every_field_of_a_record_comes_back) {
  std::vector<CatalogRecord> records;
  std::vector<CatalogChange> changes;
  for (std::uint32_t i = 0; i < 50; ++i) records.push_back(record_of(i, i, i % 4));
  records[7].last_use_s = -5;
  records[8].generation = Generation{~std::uint64_t{0}};
  records[9].place = {~0U, SlotId{~0U}};
  records[10].block.group = GroupId{65535};
  for (const CatalogRecord& record : records) changes.push_back({Kind::put, record});
  ASSERT_TRUE(open()->commit(changes).is_ok());
  Result<std::vector<CatalogRecord>> read = open()->read_all();
  ASSERT_TRUE(read.is_ok()) << read.status().message();
  const std::vector<CatalogRecord> found = sorted(*read);
  const std::vector<CatalogRecord> expected = sorted(records);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(same(found[i], expected[i])) << i;
}

TEST_P(AnyCatalog, a_put_forgets_what_stood_in_the_slot) {
  auto catalog = open();
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10), put(2, 11)}).is_ok());
  ASSERT_TRUE(catalog->commit(std::vector{put(3, 10)}).is_ok());
  EXPECT_EQ(content(*catalog), (Content{"3@10:3", "2@11:2"}));
}

TEST_P(AnyCatalog, a_moved_block_leaves_nothing_in_its_old_slot) {
  auto catalog = open();
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10)}).is_ok());
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 20)}).is_ok());
  EXPECT_EQ(content(*catalog), Content{"1@20:1"});
  // What is said of the old slot does not reach the block in the new one.
  ASSERT_TRUE(catalog->commit(std::vector{touch(10, 5), forget(10)}).is_ok());
  EXPECT_EQ(content(*catalog), Content{"1@20:1"});
  ASSERT_TRUE(catalog->commit(std::vector{put(2, 10)}).is_ok());
  EXPECT_EQ(content(*catalog), (Content{"2@10:2", "1@20:1"}));
}

TEST_P(AnyCatalog, blocks_that_swap_slots_are_both_known) {
  auto catalog = open();
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10), put(2, 20)}).is_ok());
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 20), put(2, 10)}).is_ok());
  EXPECT_EQ(content(*catalog), (Content{"2@10:2", "1@20:1"}));
}

TEST_P(AnyCatalog, equal_keys_of_two_groups_are_two_blocks) {
  auto catalog = open();
  CatalogChange other = put(1, 11);
  other.record.block.group = GroupId{9};
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10), other}).is_ok());
  EXPECT_EQ(content(*catalog).size(), 2U);
}

TEST_P(AnyCatalog, touch_changes_the_last_use_only) {
  auto catalog = open();
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10), put(2, 11), touch(11, 1'700'000'777)}).is_ok());
  EXPECT_EQ(content(*catalog), (Content{"1@10:1", "2@11:777"}));
  CatalogRecord expected = record_of(2, 11);
  expected.last_use_s = 1'700'000'777;
  EXPECT_TRUE(same(sorted(catalog->read_all().value()).back(), expected));
  ASSERT_TRUE(catalog->commit(std::vector{touch(500, 1)}).is_ok()) << "an unknown slot is not an error";
}

TEST_P(AnyCatalog, changes_are_applied_in_their_order) {
  auto catalog = open();
  ASSERT_TRUE(
      catalog->commit(std::vector{put(1, 10), forget(10), put(2, 10), forget(11), put(3, 11)}).is_ok());
  EXPECT_EQ(content(*catalog), (Content{"2@10:2", "3@11:3"}));
  ASSERT_TRUE(catalog->commit({}).is_ok());
}

TEST_P(AnyCatalog, reset_with_leaves_exactly_these_records) {
  auto catalog = open();
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10), put(2, 11)}).is_ok());
  ASSERT_TRUE(catalog->reset_with(std::vector{record_of(5, 11), record_of(6, 12)}).is_ok());
  EXPECT_EQ(content(*catalog), (Content{"5@11:5", "6@12:6"}));
  ASSERT_TRUE(catalog->commit(std::vector{forget(12)}).is_ok());
  catalog.reset();
  EXPECT_EQ(content(*open()), Content{"5@11:5"});
  ASSERT_TRUE(open()->reset_with({}).is_ok());
  EXPECT_EQ(content(*open()), Content{});
}

// Random changes against the other implementation would prove that two are wrong alike; this model is a plain
// list.
TEST_P(AnyCatalog, random_changes_agree_with_a_list) {
  std::mt19937 random(7);
  auto catalog = open();
  std::vector<CatalogRecord> model;  // by nothing
  for (int round = 0; round < 40; ++round) {
    std::vector<CatalogChange> changes;
    for (int i = 0; i < 20; ++i) {
      const auto slot = static_cast<std::uint32_t>(random() % 16);
      const auto in_slot = [slot](const CatalogRecord& r) { return raw(r.place.slot) == slot; };
      switch (random() % 4) {
        case 0:
          changes.push_back(forget(slot));
          std::erase_if(model, in_slot);
          break;
        case 1:
          changes.push_back(touch(slot, round));
          for (CatalogRecord& record : model) {
            if (in_slot(record)) record.last_use_s = round;
          }
          break;
        default: {
          const auto block = static_cast<std::uint32_t>(random() % 24);
          changes.push_back(put(block, slot));
          std::erase_if(model, in_slot);
          std::erase_if(model, [&](const CatalogRecord& r) { return r.block.depth == block; });
          model.push_back(changes.back().record);
        }
      }
    }
    ASSERT_TRUE(catalog->commit(changes).is_ok());
    if (round % 10 == 9) catalog = open();
    model = sorted(std::move(model));
    Result<std::vector<CatalogRecord>> read = catalog->read_all();
    ASSERT_TRUE(read.is_ok()) << read.status().message();
    const std::vector<CatalogRecord> found = sorted(*read);
    ASSERT_EQ(found.size(), model.size()) << round;
    for (std::size_t i = 0; i < model.size(); ++i) ASSERT_TRUE(same(found[i], model[i])) << round << " " << i;
  }
}

std::string name_of(const testing::TestParamInfo<Implementation>& given) {
  return given.param == Implementation::helper ? "helper" : "history";
}
INSTANTIATE_TEST_SUITE_P(Of, AnyCatalog, testing::Values(Implementation::helper, Implementation::history),
                         name_of);

// --- CatalogHistory ---

TEST(CatalogHistory, an_older_version_shows_what_a_crash_could_have_left) {
  CatalogHistory history;
  EXPECT_EQ(history.num_versions(), 1U);
  auto catalog = history.open(0);
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10)}).is_ok());
  ASSERT_TRUE(catalog->commit(std::vector{put(2, 10)}).is_ok());
  ASSERT_TRUE(catalog->reset_with(std::vector{record_of(7, 1)}).is_ok());
  ASSERT_EQ(history.num_versions(), 4U);
  EXPECT_EQ(content(*history.open(0)), Content{});
  EXPECT_EQ(content(*history.open(1)), Content{"1@10:1"});
  EXPECT_EQ(content(*history.open(2)), Content{"2@10:2"});
  EXPECT_EQ(content(*history.open(3)), Content{"7@1:7"});

  auto branch = history.open(1);
  ASSERT_TRUE(branch->commit(std::vector{put(3, 11)}).is_ok());
  EXPECT_EQ(content(*history.open(4)), (Content{"1@10:1", "3@11:3"}))
      << "goes on from the version it was opened on";
  EXPECT_EQ(content(*catalog), Content{"7@1:7"});
}

TEST(CatalogHistory, fails_as_told_until_it_is_reset) {
  CatalogHistory history;
  auto catalog = history.open(0);
  history.fail_after(1);
  ASSERT_TRUE(catalog->commit(std::vector{put(1, 10)}).is_ok());
  EXPECT_EQ(catalog->commit(std::vector{put(2, 11)}).code(), StatusCode::io);
  EXPECT_EQ(catalog->read_all().status().code(), StatusCode::io);
  ASSERT_TRUE(catalog->reset_with(std::vector{record_of(1, 10)}).is_ok());
  EXPECT_EQ(content(*catalog), Content{"1@10:1"});
  EXPECT_EQ(catalog->commit(std::vector{put(2, 11)}).code(), StatusCode::io) << "every commit";
  EXPECT_EQ(content(*history.open(history.num_versions() - 1)), Content{"1@10:1"})
      << "nothing of a failed one stays";
}

}  // namespace
}  // namespace kvtier::catalog_world
