// Mutates the images of tests/golden/fuzz/slot and holds SlotImages to what must be true of any bytes at all.
// Deterministic: the same images in every run of the suite. KVTIER_FUZZ_SECONDS=600 goes on for as long, from
// KVTIER_FUZZ_SEED (default: 1). A failure prints the round, and that alone brings it back.
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <random>
#include <set>
#include <string>

#include "storage/slot_samples.h"

#include "kvtier/storage/slot_image.h"

namespace kvtier {
namespace {

using namespace slot_samples;  // NOLINT(google-build-using-namespace): test data

constexpr std::size_t kFieldsEnd = 240, kPayloadBytesAt = 168, kPayloadChecksumAt = 176;

std::uint64_t environment_number(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::stoull(text);
}

class Mutator {
 public:
  Mutator(const std::vector<Seed>& seeds, std::uint64_t round) : seeds_(seeds), random_(round) {}

  Bytes next() {
    Bytes image = any_seed();
    for (std::uint64_t i = 1 + below(6); i != 0; --i) mutate(image);
    // Without these two nearly everything would end at the first checksum.
    if (below(2) == 0) mend_payload(image);
    if (below(8) != 0) mend(image);
    return image;
  }

 private:
  std::uint64_t below(std::uint64_t end) { return random_() % end; }
  Bytes any_seed() { return seeds_[below(seeds_.size())].image; }
  // A place in the image, most often in the part of the header that has fields.
  std::size_t any_place(const Bytes& image) {
    return below(4) != 0 ? below(kFieldsEnd) : below(image.size());
  }

  void mutate(Bytes& image) {
    switch (below(7)) {
      case 0: flip_bit(image, any_place(image) * 8 + below(8)); break;
      case 1: image[any_place(image)] = static_cast<std::byte>(below(256)); break;
      case 2: put_number(image); break;
      case 3: splice(image, any_seed()); break;
      case 4: blank_out(image); break;
      case 5: image.resize(kSlotHeaderBytes + below(700), static_cast<std::byte>(below(256))); break;
      case 6: splice(image, Bytes(image.rbegin(), image.rend())); break;
      default: break;
    }
  }
  // Numbers at the edges of what a field can hold, at any 4-byte boundary.
  void put_number(Bytes& image) {
    constexpr std::array<std::uint64_t, 10> kEdges = {
        0, 1, 2, 0x7f, 0xff, 0xffff, 0xffffffff, 0x7fffffffffffffff, 0xffffffffffffffff, 0xfffffffffffff000};
    const std::uint64_t number = kEdges[below(kEdges.size())] + below(3) - 1;
    std::memcpy(image.data() + below(kFieldsEnd / 4 - 1) * 4, &number, std::array{1, 2, 4, 8}[below(4)]);
  }
  void splice(Bytes& image, const Bytes& from) {
    const std::size_t bytes = span_of(image);
    if (span_at_ + bytes <= from.size())
      std::copy_n(from.begin() + span_at_, bytes, image.begin() + span_at_);
  }
  void blank_out(Bytes& image) {
    const std::size_t bytes = span_of(image);
    std::fill_n(image.begin() + span_at_, bytes, std::byte{0});
  }
  // Chooses a stretch of at most 64 bytes: its begin is span_at_.
  std::size_t span_of(const Bytes& image) {
    span_at_ = static_cast<std::ptrdiff_t>(any_place(image));
    return std::min(image.size() - static_cast<std::size_t>(span_at_), std::size_t{1} + below(64));
  }
  // Makes the checksum of the payload hold, for the length that the header says, if there is so much.
  static void mend_payload(Bytes& image) {
    std::uint64_t bytes = 0;
    std::memcpy(&bytes, image.data() + kPayloadBytesAt, sizeof bytes);
    if (bytes > image.size() - kSlotHeaderBytes) return;
    const Checksum checksum = checksum_of(std::span(image).subspan(kSlotHeaderBytes, bytes));
    std::memcpy(image.data() + kPayloadChecksumAt, &checksum.low, 8);
    std::memcpy(image.data() + kPayloadChecksumAt + 8, &checksum.high, 8);
  }

  const std::vector<Seed>& seeds_;
  std::mt19937_64 random_;
  std::ptrdiff_t span_at_ = 0;
};

bool begins_with(std::span<const std::byte> image, std::span<const std::byte> beginning) {
  return image.size() >= beginning.size() && std::ranges::equal(image.first(beginning.size()), beginning);
}

class SlotFuzz : public testing::Test {
 protected:
  const std::vector<Seed> seeds_ = corpus();
  const SlotImages plain_ = plain_images();
  const SlotImages encrypting_ = encrypting_images();
  std::set<Verdict> seen_;

  void check(const Bytes& image) {
    check_alike(plain_, image);
    check_alike(encrypting_, image);
    check_plain(image);
    check_encrypted(image);
  }

  // What a header alone says must be what the whole image says, but for what it cannot know.
  void check_alike(const SlotImages& images, const Bytes& image) {
    SlotHeader header;
    const Verdict of_header = judge_header(images, image, &header);
    const Judged whole = judge(images, image, std::nullopt);
    seen_.insert(whole.verdict);
    if (of_header != Verdict::good) {
      ASSERT_EQ(whole.verdict, of_header);
    } else if (header.payload_bytes > image.size() - kSlotHeaderBytes) {
      ASSERT_EQ(whole.verdict, Verdict::corrupt_header);
    } else {
      ASSERT_TRUE(whole.verdict == Verdict::good || whole.verdict == Verdict::corrupt_payload);
    }
    const Verdict expecting = judge(images, image).verdict;
    seen_.insert(expecting);
    if (whole.verdict == Verdict::good) {
      const Expected expected;
      const bool same = header.block.key == expected.key && header.block.group == expected.group &&
                        header.generation == expected.generation;
      ASSERT_EQ(expecting, same ? Verdict::good : Verdict::stale);
    } else if (expecting != Verdict::stale) {  // which comes before the proof of the payload
      ASSERT_EQ(expecting, whole.verdict);
    }
  }

  // A plain image is good only if it is, bit for bit, what sealing its own words would give.
  void check_plain(const Bytes& image) {
    const Judged judged = judge(plain_, image, std::nullopt);
    if (judged.verdict != Verdict::good) return;
    ASSERT_EQ(judged.header.place, kPlace);
    Bytes again = image;
    std::fill_n(again.begin(), kSlotHeaderBytes, std::byte{0xcc});
    ASSERT_TRUE(plain_.seal(again.data(), again.data(), judged.header).is_ok());
    ASSERT_EQ(again, image);
  }

  // An encrypted image cannot be made without the key: a good one is one of the seeds, with other padding.
  void check_encrypted(const Bytes& image) {
    const Judged judged = judge(encrypting_, image, std::nullopt);
    if (judged.verdict == Verdict::good) {
      ASSERT_TRUE(std::ranges::any_of(seeds_, [&](const Seed& seed) {
        return seed.encrypted &&
               begins_with(image,
                           std::span(seed.image).first(kSlotHeaderBytes + judged.header.payload_bytes));
      }));
      ASSERT_TRUE(begins_with(judged.payload, sample_payload(judged.header.payload_bytes)));
    } else {
      ASSERT_EQ(judged.payload, Bytes(judged.payload.size(), std::byte{0})) << "plaintext was left behind";
    }
  }
};

TEST_F(SlotFuzz, no_image_is_believed_that_was_not_sealed_I3) {
  const std::uint64_t seconds = environment_number("KVTIER_FUZZ_SECONDS", 0);
  const std::uint64_t first = environment_number("KVTIER_FUZZ_SEED", 1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  std::uint64_t rounds = 0;
  for (; rounds < 20'000 / kLoopDivisor || std::chrono::steady_clock::now() < end; ++rounds) {
    check(Mutator(seeds_, first + rounds).next());
    if (HasFatalFailure()) FAIL() << "KVTIER_FUZZ_SEED=" << first + rounds << " begins with this image";
  }
  if (seconds != 0) std::printf("%llu images\n", static_cast<unsigned long long>(rounds));
  EXPECT_EQ(seen_.size(), 8U) << "the mutations no longer reach every verdict";
}

}  // namespace
}  // namespace kvtier
