#include "kvtier/index/admission.h"

#include <gtest/gtest.h>

#include <cstring>

namespace kvtier {
namespace {

// Spread over all 32 bytes, as digests are.
BlockKey key_of(std::uint64_t n) {
  BlockKey key{};
  for (std::size_t i = 0; i < 4; ++i) {
    std::uint64_t word = (n * 4 + i + 1) * 0x9e3779b97f4a7c15ULL;
    word ^= word >> 29;
    std::memcpy(key.bytes.data() + 8 * i, &word, sizeof word);
  }
  return key;
}

// The keys must outlive the offer: until the end of the statement, for what is made in it.
Offer offer(const BlockKey& key) { return {.block = {key}, .victim = std::nullopt}; }

Offer offer(const BlockKey& key, const BlockKey& victim) {
  return {.block = {key}, .victim = BlockName{victim}};
}

AdmissionPolicy policy_of(Admission kind) {
  return {kind, {.host_blocks = 10, .disk_blocks = 100}, /*seed=*/1};
}

TEST(FrequencySketch, an_estimate_is_never_too_low_and_seldom_too_high) {
  FrequencySketch sketch(4096, 3);
  for (std::uint64_t n = 0; n < 2000; ++n) {
    for (std::uint64_t use = 0; use <= n % 4; ++use) sketch.add(key_of(n));
  }
  std::uint32_t exact = 0;
  for (std::uint64_t n = 0; n < 2000; ++n) {
    EXPECT_GE(sketch.estimate(key_of(n)), n % 4 + 1);
    exact += sketch.estimate(key_of(n)) == n % 4 + 1 ? 1 : 0;
  }
  EXPECT_GT(exact, 1900U);
  std::uint32_t unseen = 0;
  for (std::uint64_t n = 10'000; n < 12'000; ++n) unseen += sketch.estimate(key_of(n)) > 0 ? 1 : 0;
  EXPECT_LT(unseen, 100U);
}

TEST(FrequencySketch, counts_are_halved_as_it_ages) {
  FrequencySketch sketch(16, 1);
  for (int use = 0; use < 8; ++use) sketch.add(key_of(1));
  const std::uint32_t before = sketch.estimate(key_of(1));
  for (std::uint64_t n = 100; n < 100 + 160 - 8; ++n) sketch.add(key_of(n % 3 + 200));
  EXPECT_LE(sketch.estimate(key_of(1)), before / 2 + 1);
}

TEST(AdmissionPolicy, while_there_is_room_every_block_is_welcome) {
  for (const Admission kind :
       {Admission::all, Admission::second_use, Admission::tiny_lfu, Admission::return_hazard}) {
    AdmissionPolicy policy = policy_of(kind);
    for (std::uint64_t n = 0; n < 50; ++n) EXPECT_TRUE(policy.admit(offer(key_of(n))));
  }
}

TEST(AdmissionPolicy, second_use_admits_what_was_offered_before) {
  AdmissionPolicy policy = policy_of(Admission::second_use);
  const BlockKey victim = key_of(1000);
  EXPECT_FALSE(policy.admit(offer(key_of(1), victim)));
  EXPECT_TRUE(policy.admit(offer(key_of(1), victim)));
  EXPECT_TRUE(policy.admit(offer(key_of(2))));
  EXPECT_TRUE(policy.admit(offer(key_of(2), victim)));  // offered while there was room
}

TEST(AdmissionPolicy, tiny_lfu_admits_only_what_is_used_more_than_its_victim) {
  AdmissionPolicy policy = policy_of(Admission::tiny_lfu);
  const BlockKey victim = key_of(1000);
  for (int use = 0; use < 3; ++use) EXPECT_TRUE(policy.admit(offer(victim)));
  for (int use = 0; use < 3; ++use) EXPECT_FALSE(policy.admit(offer(key_of(1), victim)));
  EXPECT_TRUE(policy.admit(offer(key_of(1), victim)));
}

TEST(AdmissionPolicy, a_block_that_was_refused_for_another_reason_counts_as_offered) {
  AdmissionPolicy policy = policy_of(Admission::second_use);
  policy.note(offer(key_of(1)));
  EXPECT_TRUE(policy.admit(offer(key_of(1), key_of(1000))));
}

TEST(AdmissionPolicy, only_what_learns_from_uses_wants_to_be_told_of_them) {
  for (const Admission kind : {Admission::all, Admission::second_use, Admission::tiny_lfu}) {
    EXPECT_EQ(policy_of(kind).observer(), nullptr);
  }
  EXPECT_NE(policy_of(Admission::return_hazard).observer(), nullptr);
}

}  // namespace
}  // namespace kvtier
