// Campaigns: seeded crashes and faults, with their hits and their wrong bytes, and the mutants that they must
// catch (core/ordering.h, disk_*).
#include <gtest/gtest.h>

#include "storage/store_campaign.h"

#include "kvtier/core/ordering.h"
#include "kvtier/storage/slot_store.h"

namespace kvtier {
namespace {

using namespace store_world;

std::uint64_t environment(const char* name, std::uint64_t otherwise) {
  const char* set = std::getenv(name);
  return set == nullptr ? otherwise : std::strtoull(set, nullptr, 10);
}

// For longer campaigns (make torture): so many times the seeds, from this one on.
std::uint64_t factor() { return std::max<std::uint64_t>(1, environment("KVTIER_CAMPAIGN_FACTOR", 1)); }
std::uint64_t first_seed() { return environment("KVTIER_CAMPAIGN_SEED", 1); }

Tally campaign(const CampaignPlan& plan, std::uint64_t seeds) {
  Tally tally;
  for (std::uint64_t seed = first_seed(); seed < first_seed() + seeds; ++seed) {
    tally += Campaign(seed, plan).run();
    if (testing::Test::HasFailure()) {
      ADD_FAILURE() << "KVTIER_CAMPAIGN_SEED=" << seed;
      break;
    }
  }
  return tally;
}

void expect_kept(const Tally& tally) {
  EXPECT_EQ(tally.wrong, 0U);
  EXPECT_EQ(tally.revived, 0U);
  EXPECT_EQ(tally.hits, tally.hits_expected);
  // scripts/torture.py adds these up.
  std::printf(
      R"({"cycles": %zu, "blocks_checked": %zu, "hits": %zu, "hits_expected": %zu, "wrong_bytes": %zu, )"
      R"("revived": %zu, "exempt": %zu, "faults": %zu})"
      "\n",
      std::size_t{tally.cycles}, std::size_t{tally.checked}, std::size_t{tally.hits},
      std::size_t{tally.hits_expected}, std::size_t{tally.wrong}, std::size_t{tally.revived},
      std::size_t{tally.exempt}, std::size_t{tally.faults});
}

class SlotStoreCampaign : public testing::Test {
 protected:
  void SetUp() override { testing::internal::CaptureStderr(); }  // a line for every drive that ends
  void TearDown() override { static_cast<void>(testing::internal::GetCapturedStderr()); }
};

CampaignPlan lying_drive() {
  CampaignPlan plan;
  plan.honest_drive = false;
  plan.end = CampaignPlan::End::close;
  plan.max_operations = 250;
  plan.faults.bit_flip = 0.05;
  plan.faults.misplaced = 0.05;
  plan.faults.lost_write = 0.1;
  plan.faults.short_transfer = 0.1;
  return plan;
}

TEST_F(SlotStoreCampaign, after_power_loss_what_was_durable_is_served_and_what_was_wiped_is_not) {
  const Tally tally = campaign({}, 30 * factor());
  expect_kept(tally);
  EXPECT_GE(tally.hits_expected, 500U) << "or it proves nothing";
  EXPECT_GE(tally.cycles, 120U);
}

TEST_F(SlotStoreCampaign, an_older_or_lost_catalog_costs_what_it_lies_about_and_nothing_else) {
  CampaignPlan plan;
  plan.catalogs = CampaignPlan::Catalogs::any_older;
  const Tally tally = campaign(plan, 30 * factor());
  expect_kept(tally);
  EXPECT_GE(tally.hits_expected, 200U);
}

TEST_F(SlotStoreCampaign, power_loss_on_a_drive_that_fails_now_and_then_keeps_its_promises) {
  CampaignPlan plan;
  plan.faults.read_error = 0.02;
  plan.faults.write_error = 0.01;
  plan.faults.sync_error = 0.05;
  plan.faults.no_space = 0.01;
  plan.faults.delay = 0.1;
  plan.faults.short_transfer = 0.1;
  const Tally tally = campaign(plan, 20 * factor());
  expect_kept(tally);
  EXPECT_GE(tally.hits_expected, 50U);
  EXPECT_GE(tally.faults, 50U);
}

TEST_F(SlotStoreCampaign, a_drive_that_flips_bits_loses_and_misplaces_writes_never_makes_wrong_bytes) {
  const Tally tally = campaign(lying_drive(), 20 * factor());
  expect_kept(tally);
  EXPECT_GE(tally.faults, 500U);
  EXPECT_GE(tally.checked, 1000U);
  EXPECT_GE(tally.hits_expected, 100U) << "of slots on which it did not lie";
  EXPECT_GE(tally.spoiled, 500U);
}

// Each mutant skips one proof; a campaign that does not notice proves nothing of the others.
TEST_F(SlotStoreCampaign, a_store_that_does_not_verify_checksums_is_caught) {
  const DisableOrdering mutant(OrderingPoint::disk_verify_checksum);
  EXPECT_GT(campaign(lying_drive(), 10).wrong, 0U);
}

TEST_F(SlotStoreCampaign, a_store_that_does_not_verify_generations_is_caught) {
  const DisableOrdering mutant(OrderingPoint::disk_verify_generation);
  EXPECT_GT(campaign(lying_drive(), 10).wrong, 0U);
}

TEST_F(SlotStoreCampaign, a_store_that_does_not_sync_before_it_commits_is_caught) {
  const DisableOrdering mutant(OrderingPoint::disk_sync_before_commit);
  const Tally tally = campaign({}, 10);
  EXPECT_LT(tally.hits, tally.hits_expected);
}

}  // namespace
}  // namespace kvtier
