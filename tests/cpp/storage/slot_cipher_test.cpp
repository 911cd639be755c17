#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <set>
#include <string>
#include <thread>
#include <tuple>

#include "storage/slot_samples.h"

#include "kvtier/storage/slot_image.h"

namespace kvtier {
namespace {

using namespace slot_samples;  // NOLINT(google-build-using-namespace): test data

constexpr std::size_t kPayloadChecksumAt = 176, kKeyIdAt = 192, kSaltAt = 200, kWriteCounterAt = 216,
                      kTagAt = 224, kTagEnd = 240;

std::string part(const Bytes& image, std::size_t begin, std::size_t end) {
  return {reinterpret_cast<const char*>(image.data()) + begin, end - begin};
}
std::string key_id(const Bytes& image) { return part(image, kKeyIdAt, kSaltAt); }
std::string salt(const Bytes& image) { return part(image, kSaltAt, kWriteCounterAt); }
std::uint64_t write_counter(const Bytes& image) {
  std::uint64_t counter = 0;
  std::memcpy(&counter, image.data() + kWriteCounterAt, sizeof counter);
  return counter;
}

TEST(SlotCipher, takes_only_keys_of_32_bytes_and_names_what_is_allowed) {
  for (const std::size_t bytes : {0UL, 16UL, 31UL, 33UL}) {
    const Bytes key(bytes, std::byte{0x5a});
    const Status status = SlotCipher::make(key, {}).status();
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.message(), "a master key has " + std::to_string(bytes) + " bytes; allowed: exactly 32");
    const std::array<std::span<const std::byte>, 1> older = {key};
    EXPECT_EQ(SlotCipher::make(kMasterKey, older).status().code(), StatusCode::invalid_argument);
  }
}

TEST(SlotCipher, never_writes_more_than_2_to_the_32_under_one_subkey) {
  const std::uint64_t most = std::uint64_t{1} << 32;
  EXPECT_TRUE(SlotCipher::make(kMasterKey, {}, most).is_ok());
  EXPECT_EQ(SlotCipher::make(kMasterKey, {}, most + 1).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(SlotCipher::make(kMasterKey, {}, 0).status().code(), StatusCode::invalid_argument);
}

TEST(SlotCipher, counts_writes_and_draws_a_new_salt_when_a_subkey_is_used_up) {
  const SlotImages images = encrypting_images(make_cipher(kMasterKey, {}, 3));
  std::vector<Bytes> written;
  std::set<std::string> salts;
  for (int i = 0; i < 7; ++i) {
    written.push_back(seal(images, sample_header(100)));
    EXPECT_EQ(write_counter(written.back()), i % 3);
    salts.insert(salt(written.back()));
  }
  EXPECT_EQ(salts.size(), 3U);
  for (const Bytes& image : written) EXPECT_EQ(judge(images, image).verdict, Verdict::good);
}

TEST(SlotCipher, every_opening_has_its_own_salt_and_reads_those_of_the_others) {
  const Bytes one = seal(encrypting_images(), sample_header(100));
  const Bytes two = seal(encrypting_images(), sample_header(100));
  EXPECT_NE(salt(one), salt(two));
  EXPECT_EQ(key_id(one), key_id(two));
  EXPECT_EQ(judge(encrypting_images(), one).payload, sample_payload(100));
  EXPECT_EQ(judge(encrypting_images(), two).payload, sample_payload(100));
}

TEST(SlotCipher, reads_images_of_more_salts_than_it_keeps_subkeys) {
  const SlotImages writer = encrypting_images(make_cipher(kMasterKey, {}, 1));
  std::vector<Bytes> written;
  for (int i = 0; i < 150; ++i) written.push_back(seal(writer, sample_header(100)));
  const SlotImages reader = encrypting_images();
  for (int round = 0; round < 2; ++round) {
    for (const Bytes& image : written) ASSERT_EQ(judge(reader, image).payload, sample_payload(100));
  }
}

TEST(SlotCipher, no_nonce_comes_twice_from_many_threads) {
  constexpr int kThreads = 4, kWrites = 200;
  const SlotImages images = encrypting_images(make_cipher(kMasterKey, {}, 64));
  std::array<std::vector<Bytes>, kThreads> written;
  std::vector<std::thread> threads;
  for (auto& mine : written) {
    threads.emplace_back([&images, &mine] {
      for (int i = 0; i < kWrites; ++i) {
        mine.push_back(seal(images, sample_header(64)));
        EXPECT_EQ(judge(images, mine.back()).verdict, Verdict::good);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<std::pair<std::string, std::uint64_t>> nonces;
  for (const auto& mine : written) {
    for (const Bytes& image : mine) nonces.emplace(salt(image), write_counter(image));
  }
  EXPECT_EQ(nonces.size(), std::size_t{kThreads} * kWrites);
}

TEST(SlotCipher, a_forked_child_does_not_write_under_its_parents_salt) {
  const SlotImages images = encrypting_images();
  const Bytes before = seal(images, sample_header(64));
  std::array<int, 2> ends{};
  ASSERT_EQ(pipe(ends.data()), 0);
  const pid_t child = fork();
  if (child == 0) {
    const Bytes image = seal(images, sample_header(64));
    const bool sent = write(ends[1], image.data(), image.size()) == static_cast<ssize_t>(image.size());
    _exit(sent ? 0 : 1);
  }
  close(ends[1]);
  Bytes theirs(before.size());
  EXPECT_EQ(read(ends[0], theirs.data(), theirs.size()), static_cast<ssize_t>(theirs.size()));
  close(ends[0]);
  int status = -1;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  const Bytes after = seal(images, sample_header(64));
  EXPECT_EQ(salt(after), salt(before));
  EXPECT_NE(salt(theirs), salt(before));
  EXPECT_EQ(judge(images, theirs).verdict, Verdict::good);
}

TEST(SlotCipher, the_same_payload_never_gives_the_same_bytes_nor_a_checksum_of_itself) {
  const SlotImages images = encrypting_images();
  const Bytes one = seal(images, sample_header(1000)), two = seal(images, sample_header(1000));
  const Bytes payload = sample_payload(1000);
  EXPECT_NE(part(one, kSlotHeaderBytes, one.size()), part(two, kSlotHeaderBytes, two.size()));
  EXPECT_NE(part(one, kSlotHeaderBytes, one.size()), part(payload, 0, payload.size()));
  EXPECT_EQ(part(one, kPayloadChecksumAt, kKeyIdAt), std::string(16, '\0'));
}

TEST(SlotCipher, older_keys_read_and_the_first_key_writes) {
  const Bytes old_image = seal(encrypting_images(make_cipher(kOtherMasterKey)), sample_header(100));
  const SlotImages rotated = encrypting_images(make_cipher(kMasterKey, {kOtherMasterKey}));
  EXPECT_EQ(judge(rotated, old_image).payload, sample_payload(100));
  const Bytes new_image = seal(rotated, sample_header(100));
  EXPECT_NE(key_id(new_image), key_id(old_image));
  EXPECT_EQ(judge(encrypting_images(), new_image).verdict, Verdict::good);
}

TEST(SlotCipher, without_the_master_key_an_image_is_unknown_key_and_no_byte_comes_out) {
  const Bytes image = seal(encrypting_images(make_cipher(kOtherMasterKey)), sample_header(100));
  const Judged judged = judge(encrypting_images(), image);
  EXPECT_EQ(judged.verdict, Verdict::unknown_key);
  EXPECT_EQ(judged.payload, Bytes(100, std::byte{0})) << "the bounce buffer was written to";
  EXPECT_EQ(judge_header(encrypting_images(), image), Verdict::unknown_key);
  EXPECT_EQ(judge(plain_images(), image).verdict, Verdict::unknown_key);
  EXPECT_EQ(judge_header(plain_images(), image), Verdict::unknown_key);
}

// XXH3 is no secret: a plain image is what an attacker at the drive would write.
TEST(SlotCipher, a_plain_image_in_a_store_that_encrypts_is_foreign) {
  const Bytes image = seal(plain_images(), sample_header(100));
  EXPECT_EQ(judge(encrypting_images(), image).verdict, Verdict::foreign);
  EXPECT_EQ(judge_header(encrypting_images(), image), Verdict::foreign);
}

TEST(SlotCipher, a_wrong_tag_is_corrupt_payload_and_leaves_no_plaintext) {
  const SlotImages images = encrypting_images();
  for (const std::size_t bytes : {1UL, 1000UL, 300'000UL}) {
    const Bytes sound = seal(images, sample_header(bytes));
    for (const std::size_t at : {kSlotHeaderBytes, kSlotHeaderBytes + bytes - 1, kTagAt, kTagEnd - 1}) {
      Bytes image = sound;
      image[at] ^= std::byte{0x80};
      mend(image);
      const Judged judged = judge(images, image);
      EXPECT_EQ(judged.verdict, Verdict::corrupt_payload);
      EXPECT_EQ(judged.payload, Bytes(bytes, std::byte{0}));
    }
  }
}

// Whoever can write to the drive can also make the header checksum hold; the tag must cover every field.
TEST(SlotCipher, the_tag_proves_every_byte_of_the_header) {
  const SlotImages images = encrypting_images();
  const Bytes sound = seal(images, sample_header(100));
  std::size_t decided_by_the_tag = 0;
  for (std::size_t at = 0; at < kHeaderChecksumAt; ++at) {
    Bytes image = sound;
    image[at] ^= std::byte{1};
    mend(image);
    const Verdict verdict = judge(images, image, std::nullopt).verdict;
    ASSERT_NE(verdict, Verdict::good) << "byte " << at;
    if (verdict == Verdict::corrupt_payload) ++decided_by_the_tag;
  }
  // generation, key, parent, namespace, depth, group, has_parent (1 to 0 leaves a parent: the header's
  // fault), payload length (100 ^ 1 = 101 is too long), salt, counter and tag.
  EXPECT_EQ(decided_by_the_tag, 8U + 32 + 32 + 16 + 4 + 2 + 16 + 8 + 16);
}

TEST(SlotCipher, a_ciphertext_moved_to_another_slot_is_not_believed_there) {
  const SlotImages images = encrypting_images();
  constexpr std::size_t kSlotAt = 68;
  Bytes image = seal(images, sample_header(100));
  image[kSlotAt] = std::byte{8};
  mend(image);
  const SlotPlace there{.class_index = 2, .slot = SlotId{8}};
  EXPECT_EQ(judge_header(images, image, nullptr, there), Verdict::good);  // a hint: headers alone prove less
  EXPECT_EQ(judge(images, image, Expected{}, there).verdict, Verdict::corrupt_payload);
}

TEST(SlotCipher, encrypts_payloads_longer_than_one_call_of_the_library) {
  const std::size_t bytes = (std::size_t{16} << 20) + 5;  // pieces of 16 MiB
  const SlotImages images = encrypting_images();
  Bytes image = seal(images, sample_header(bytes));
  EXPECT_TRUE(judge(images, image).payload == sample_payload(bytes));
  image.back() ^= std::byte{1};
  EXPECT_EQ(judge(images, image).verdict, Verdict::corrupt_payload);
}

}  // namespace
}  // namespace kvtier
