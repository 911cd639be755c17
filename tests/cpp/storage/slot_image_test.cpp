#include "kvtier/storage/slot_image.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <random>
#include <set>

#include "storage/slot_samples.h"

#include "kvtier/core/ordering.h"

namespace kvtier {
namespace {

using namespace slot_samples;  // NOLINT(google-build-using-namespace): test data

TEST(SlotImage, sealing_gives_the_golden_image_byte_for_byte) {
  EXPECT_EQ(seal(plain_images(), sample_header(1000)), read_whole(golden_path() / "slot/plain_v1.bin"));
}

TEST(SlotImage, golden_images_open_with_what_their_page_says) {
  for (const auto& [name, images] :
       {std::pair{"plain_v1.bin", plain_images()}, std::pair{"encrypted_v1.bin", encrypting_images()}}) {
    SCOPED_TRACE(name);
    const Judged judged = judge(images, read_whole(golden_path() / "slot" / name));
    ASSERT_EQ(judged.verdict, Verdict::good);
    expect_same(judged.header, sample_header(1000));
    EXPECT_EQ(judged.payload, sample_payload(1000));
  }
}

TEST(SlotImage, a_newer_golden_image_is_newer_and_not_damaged) {
  const Bytes image = read_whole(golden_path() / "slot/newer_v2.bin");
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::newer_version);
  EXPECT_EQ(judge(encrypting_images(), image).verdict, Verdict::newer_version);
  EXPECT_EQ(judge_header(plain_images(), image), Verdict::newer_version);
}

TEST(SlotImage, every_seed_gets_the_verdict_in_its_name_and_every_verdict_has_one) {
  std::set<std::string> seen;
  for (const Seed& seed : corpus()) {
    SCOPED_TRACE(seed.name);
    const SlotImages images = seed.encrypted ? encrypting_images() : plain_images();
    EXPECT_EQ(to_string(judge(images, seed.image).verdict), seed.verdict());
    seen.insert(seed.verdict());
  }
  EXPECT_EQ(seen, (std::set<std::string>{"good", "blank", "foreign", "newer_version", "corrupt_header",
                                         "corrupt_payload", "stale", "unknown_key"}));
}

TEST(SlotImage, what_was_sealed_opens_at_every_payload_length) {
  for (const SlotImages& images : {plain_images(), encrypting_images()}) {
    for (const std::size_t bytes : {0UL, 1UL, 15UL, 16UL, 17UL, 240UL, 241UL, 4096UL, 100'001UL}) {
      SCOPED_TRACE(bytes);
      SlotHeader header = sample_header(bytes);
      header.block.parent.reset();
      header.place.slot = SlotId{0xffffffff};
      header.generation = make_generation(0xffffff, (std::uint64_t{1} << kSequenceBits) - 1);
      const Bytes image = seal(images, header);
      const Judged judged = judge(images, image, Expected{.generation = header.generation}, header.place);
      ASSERT_EQ(judged.verdict, Verdict::good);
      expect_same(judged.header, header);
      EXPECT_EQ(judged.payload, sample_payload(bytes));
      SlotHeader read;
      EXPECT_EQ(judge_header(images, image, &read, header.place), Verdict::good);
      expect_same(read, header);
    }
  }
}

TEST(SlotImage, without_an_expectation_any_block_of_the_place_is_good) {
  SlotHeader header = sample_header(64);
  header.block.key.bytes[0] = std::byte{0xab};
  const Bytes image = seal(plain_images(), header);
  EXPECT_EQ(judge(plain_images(), image, std::nullopt).verdict, Verdict::good);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::stale);
}

TEST(SlotImage, another_key_group_or_generation_is_stale_I3) {
  const Bytes image = seal(plain_images(), sample_header(64));
  Expected other_key;
  other_key.key.bytes[31] ^= std::byte{1};
  EXPECT_EQ(judge(plain_images(), image, other_key).verdict, Verdict::stale);
  EXPECT_EQ(judge(plain_images(), image, Expected{.group = GroupId{0}}).verdict, Verdict::stale);
  for (const Generation other : {make_generation(3, 8), make_generation(3, 10), make_generation(2, 9)}) {
    EXPECT_EQ(judge(plain_images(), image, Expected{.generation = other}).verdict, Verdict::stale);
  }
}

TEST(SlotImage, another_store_fingerprint_or_place_is_foreign) {
  const Bytes image = seal(plain_images(), sample_header(64));
  Fingerprint fingerprint = kFingerprint;
  fingerprint[31] ^= std::byte{1};
  StoreId store = kStore;
  store[15] ^= std::byte{1};
  EXPECT_EQ(judge(SlotImages(fingerprint, kStore, nullptr), image).verdict, Verdict::foreign);
  EXPECT_EQ(judge(SlotImages(kFingerprint, store, nullptr), image).verdict, Verdict::foreign);
  const SlotPlace other_slot{.class_index = 2, .slot = SlotId{6}};
  const SlotPlace other_class{.class_index = 1, .slot = SlotId{7}};
  EXPECT_EQ(judge(plain_images(), image, std::nullopt, other_slot).verdict, Verdict::foreign);
  EXPECT_EQ(judge(plain_images(), image, std::nullopt, other_class).verdict, Verdict::foreign);
}

TEST(SlotImage, is_blank_only_when_the_whole_header_is_zero) {
  Bytes image(kSlotHeaderBytes + 64, std::byte{0});
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::blank);
  image.back() = std::byte{1};  // payload of what stood there before a wipe
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::blank);
  for (std::size_t i = 0; i < kSlotHeaderBytes; ++i) {
    image[i] = std::byte{0x40};
    ASSERT_EQ(judge(plain_images(), image).verdict, Verdict::foreign) << i;
    image[i] = std::byte{0};
  }
}

// What a wiped, torn or overwritten header still proves of the slot: nothing.
TEST(SlotImage, a_header_torn_at_any_sector_is_corrupt) {
  const Bytes older = seal(plain_images(), sample_header(1000));
  SlotHeader header = sample_header(1000);
  header.generation = make_generation(4, 1);
  header.block.key.bytes[0] ^= std::byte{0xff};
  const Bytes newer = seal(plain_images(), header);
  for (std::size_t torn = 512; torn < kSlotHeaderBytes; torn += 512) {
    Bytes image = newer;
    std::copy_n(older.begin(), torn, image.begin());
    EXPECT_EQ(judge(plain_images(), image, std::nullopt).verdict, Verdict::corrupt_header) << torn;
  }
  Bytes image = newer;  // the whole header, and another write's payload
  image.back() ^= std::byte{1};
  EXPECT_EQ(judge(plain_images(), image, std::nullopt).verdict, Verdict::corrupt_payload);
}

// The order of the checks: a header that is wrong in several ways gets the first verdict of the page's list.
TEST(SlotImage, the_first_check_that_fails_decides) {
  constexpr std::size_t kVersionAt = 8, kStoreAt = 48, kKeyAt = 80, kReservedAt = 240;
  Bytes image = seal(plain_images(), sample_header(64));
  image.back() ^= std::byte{1};
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::corrupt_payload);
  image[kKeyAt] ^= std::byte{1};
  mend(image);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::stale);
  EXPECT_EQ(judge(plain_images(), std::span(image).first(kSlotHeaderBytes + 63)).verdict,
            Verdict::corrupt_header);
  image[kStoreAt] ^= std::byte{1};
  mend(image);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::foreign);
  image[kReservedAt] ^= std::byte{1};
  mend(image);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::corrupt_header);
  image[kVersionAt] = std::byte{2};
  mend(image);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::newer_version);
  image[kReservedAt] ^= std::byte{2};
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::corrupt_header);
  image[0] ^= std::byte{1};
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::foreign);
}

TEST(SlotImage, every_single_bit_of_header_and_payload_is_proved) {
  const SlotImages images = plain_images();
  Bytes image = seal(images, sample_header(1000), 8192);
  for (std::size_t bit = 0; bit < (kSlotHeaderBytes + 1000) * 8; bit += kLoopDivisor) {
    flip_bit(image, bit);
    const Verdict verdict = judge(images, image).verdict;
    const Verdict expected = bit < 64                     ? Verdict::foreign
                             : bit < kSlotHeaderBytes * 8 ? Verdict::corrupt_header
                                                          : Verdict::corrupt_payload;
    ASSERT_EQ(verdict, expected) << "bit " << bit;
    flip_bit(image, bit);
  }
  ASSERT_EQ(judge(images, image).verdict, Verdict::good);
}

// `flips` random changes of 1 to 8 bits each, over header and payload; returns how often each verdict came.
std::map<Verdict, int> verdicts_of_flips(const SlotImages& images, std::size_t payload_bytes, int flips) {
  Bytes image = seal(images, sample_header(payload_bytes), kSlotHeaderBytes + round_up(payload_bytes, 4096));
  std::mt19937_64 random(20261121);
  std::map<Verdict, int> verdicts;
  for (int i = 0; i < flips; ++i) {
    std::set<std::size_t> bits;
    const std::size_t count = i % 2 == 0 ? 1 : 2 + random() % 7;
    while (bits.size() < count) {
      // Half of the changes begin in the header, which is the smaller part.
      const std::size_t bytes = random() % 2 == 0 ? kSlotHeaderBytes : kSlotHeaderBytes + payload_bytes;
      bits.insert(random() % (bytes * 8));
    }
    for (const std::size_t bit : bits) flip_bit(image, bit);
    verdicts[judge(images, image).verdict] += 1;
    for (const std::size_t bit : bits) flip_bit(image, bit);
  }
  EXPECT_EQ(judge(images, image).verdict, Verdict::good);
  return verdicts;
}

TEST(SlotImage, of_100000_random_flips_every_one_is_detected) {
  constexpr int kFlips = 100'000 / kLoopDivisor;
  std::map<Verdict, int> verdicts = verdicts_of_flips(plain_images(), 8000, kFlips);
  EXPECT_EQ(verdicts[Verdict::good], 0);
  EXPECT_EQ(
      verdicts[Verdict::corrupt_header] + verdicts[Verdict::corrupt_payload] + verdicts[Verdict::foreign],
      kFlips);
  EXPECT_GT(verdicts[Verdict::corrupt_payload], kFlips / 10);
}

TEST(SlotImage, of_20000_random_flips_of_an_encrypted_image_every_one_is_detected) {
  constexpr int kFlips = 20'000 / kLoopDivisor;
  std::map<Verdict, int> verdicts = verdicts_of_flips(encrypting_images(), 3000, kFlips);
  EXPECT_EQ(verdicts[Verdict::good], 0);
  EXPECT_EQ(
      verdicts[Verdict::corrupt_header] + verdicts[Verdict::corrupt_payload] + verdicts[Verdict::foreign],
      kFlips);
  EXPECT_GT(verdicts[Verdict::corrupt_payload], kFlips / 10);
}

TEST(SlotImage, padding_proves_nothing_and_spoils_nothing) {
  Bytes image = seal(plain_images(), sample_header(1000), 8192);
  EXPECT_EQ(image[kSlotHeaderBytes + 1000], std::byte{0xee}) << "seal() wrote to the padding";
  EXPECT_EQ(image.back(), std::byte{0xee});
  std::fill(image.begin() + kSlotHeaderBytes + 1000, image.end(), std::byte{0x11});
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::good);
}

TEST(SlotImage, a_slot_of_exactly_header_and_payload_opens_and_one_byte_less_does_not) {
  const Bytes image = seal(plain_images(), sample_header(1000));
  ASSERT_EQ(image.size(), kSlotHeaderBytes + 1000);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::good);
  for (const std::size_t bytes : {999UL, 500UL, 0UL}) {
    const auto shorter = std::span(image).first(kSlotHeaderBytes + bytes);
    EXPECT_EQ(judge(plain_images(), shorter).verdict, Verdict::corrupt_header) << bytes;
  }
}

TEST(SlotImage, the_header_of_a_caller_is_written_only_when_good) {
  const SlotImages images = plain_images();
  Bytes image = seal(images, sample_header(64));
  image.back() ^= std::byte{1};
  expect_same(judge(images, image).header, SlotHeader{});
  flip_bit(image, 1000);
  SlotHeader header;
  EXPECT_EQ(judge_header(images, image, &header), Verdict::corrupt_header);
  expect_same(header, SlotHeader{});
}

// The disk campaigns disable these two and must be told of wrong bytes; so each must really be a check here.
TEST(SlotImage, disabled_ordering_points_disable_their_check_and_no_other) {
  const SlotImages images = plain_images();
  Bytes damaged = seal(images, sample_header(64));
  damaged.back() ^= std::byte{1};
  const Bytes sound = seal(images, sample_header(64));
  const Expected newer{.generation = make_generation(3, 10)};
  {
    const DisableOrdering disabled(OrderingPoint::disk_verify_checksum);
    EXPECT_EQ(judge(images, damaged).verdict, Verdict::good);
    EXPECT_EQ(judge(images, sound, newer).verdict, Verdict::stale);
  }
  {
    const DisableOrdering disabled(OrderingPoint::disk_verify_generation);
    EXPECT_EQ(judge(images, sound, newer).verdict, Verdict::good);
    EXPECT_EQ(judge(images, damaged).verdict, Verdict::corrupt_payload);
  }
  EXPECT_EQ(judge(images, damaged).verdict, Verdict::corrupt_payload);
  EXPECT_EQ(judge(images, sound, newer).verdict, Verdict::stale);
}

TEST(SlotImage, a_seal_without_a_generation_is_a_bug) {
  SlotHeader header = sample_header(64);
  header.generation = Generation{0};
  const auto seal_it = [&] {
    Bytes image(kSlotHeaderBytes + 64);
    try {
      const Status status = plain_images().seal(image.data(), image.data(), header);
    } catch (const std::logic_error&) {
      std::abort();  // what report_bug() does in a debug build
    }
  };
  EXPECT_DEATH(seal_it(), "");
}

TEST(NamespaceTag, is_the_beginning_of_sha256_of_the_name) {
  // SHA-256("abc") of FIPS 180-4
  const NamespaceTag expected = {std::byte{0xba}, std::byte{0x78}, std::byte{0x16}, std::byte{0xbf},
                                 std::byte{0x8f}, std::byte{0x01}, std::byte{0xcf}, std::byte{0xea},
                                 std::byte{0x41}, std::byte{0x41}, std::byte{0x40}, std::byte{0xde},
                                 std::byte{0x5d}, std::byte{0xae}, std::byte{0x22}, std::byte{0x23}};
  EXPECT_EQ(namespace_tag("abc"), expected);
  EXPECT_NE(namespace_tag(""), NamespaceTag{});
}

}  // namespace
}  // namespace kvtier
