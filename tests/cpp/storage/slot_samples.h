// The block of docs/formats/slot.md, "Golden images", and judging of images in memory of exactly their size,
// so that AddressSanitizer sees a read of one byte more.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "support/turns.h"

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier::slot_samples {

using Bytes = std::vector<std::byte>;

inline constexpr std::size_t kHeaderChecksumAt = 4080;

inline constexpr int kLoopDivisor = support::turns(1, 5);

// `out` = first, first + 1, ...
template <typename Array>
Array counted(unsigned first) {
  Array array{};
  for (std::size_t i = 0; i < array.size(); ++i) array[i] = static_cast<std::byte>(first + i);
  return array;
}

inline const Fingerprint kFingerprint = counted<Fingerprint>(0x00);
inline const StoreId kStore = counted<StoreId>(0x20);
inline const BlockKey kKey{counted<std::array<std::byte, 32>>(0x30)};
inline const BlockKey kParent{counted<std::array<std::byte, 32>>(0x50)};
inline const auto kMasterKey = counted<std::array<std::byte, 32>>(0x80);
inline const auto kOtherMasterKey = counted<std::array<std::byte, 32>>(0x01);
inline constexpr SlotPlace kPlace{.class_index = 2, .slot = SlotId{7}};
inline constexpr GroupId kGroup{1};
inline constexpr Generation kGeneration = make_generation(3, 9);

inline SlotHeader sample_header(std::uint64_t payload_bytes) {
  SlotHeader header;
  header.block = {
      .key = kKey, .group = kGroup, .parent = kParent, .depth = 5, .name_space = namespace_tag("tenant-a")};
  header.place = kPlace;
  header.generation = kGeneration;
  header.payload_bytes = payload_bytes;
  return header;
}

inline Bytes sample_payload(std::size_t bytes) {
  Bytes payload(bytes);
  for (std::size_t i = 0; i < bytes; ++i) payload[i] = static_cast<std::byte>((i * i + 7 * i) % 251);
  return payload;
}

inline std::shared_ptr<SlotCipher> make_cipher(std::span<const std::byte> master_key = kMasterKey,
                                               std::vector<std::span<const std::byte>> older_keys = {},
                                               std::uint64_t writes_per_subkey = std::uint64_t{1} << 32) {
  Result<std::shared_ptr<SlotCipher>> cipher = SlotCipher::make(master_key, older_keys, writes_per_subkey);
  EXPECT_TRUE(cipher.is_ok()) << cipher.status().message();
  return cipher ? *cipher : nullptr;
}

inline SlotImages plain_images() { return {kFingerprint, kStore, nullptr}; }
inline SlotImages encrypting_images(std::shared_ptr<SlotCipher> cipher = make_cipher()) {
  return {kFingerprint, kStore, std::move(cipher)};
}

// An image of header.payload_bytes of sample_payload() in a slot of `stride` bytes (0: no padding).
inline Bytes seal(const SlotImages& images, const SlotHeader& header, std::size_t stride = 0) {
  const Bytes payload = sample_payload(header.payload_bytes);
  Bytes image(std::max(stride, kSlotHeaderBytes + payload.size()), std::byte{0xee});
  Bytes plain = image;
  std::ranges::copy(payload, plain.begin() + kSlotHeaderBytes);
  if (!images.encrypts()) image = plain;
  const Status status = images.seal(image.data(), images.encrypts() ? plain.data() : image.data(), header);
  EXPECT_TRUE(status.is_ok()) << status.message();
  return image;
}

struct Expected {
  BlockKey key = kKey;
  GroupId group = kGroup;
  Generation generation = kGeneration;
};

struct Judged {
  Verdict verdict = Verdict::blank;
  SlotHeader header;
  Bytes payload;  // as left behind `plain`, as many bytes as the slot has room for
};

// Opens a copy of `image` that ends where its heap block ends.
inline Judged judge(const SlotImages& images, std::span<const std::byte> image,
                    const std::optional<Expected>& expected = Expected{}, const SlotPlace& place = kPlace) {
  const std::size_t bytes = image.size();
  const auto exact = std::make_unique<std::byte[]>(bytes);
  std::memcpy(exact.get(), image.data(), bytes);
  const auto bounce = std::make_unique<std::byte[]>(bytes);
  std::byte* plain = images.encrypts() ? bounce.get() : exact.get();
  const Expected what = expected.value_or(Expected{});
  Judged judged;
  judged.verdict = images.open(plain, exact.get(), bytes, place, expected ? &what.key : nullptr, what.group,
                               what.generation, &judged.header);
  judged.payload.assign(plain + kSlotHeaderBytes, plain + bytes);
  EXPECT_EQ(std::memcmp(exact.get(), image.data(), bytes), 0) << "open() wrote to the image";
  return judged;
}

inline Verdict judge_header(const SlotImages& images, std::span<const std::byte> image,
                            SlotHeader* header = nullptr, const SlotPlace& place = kPlace) {
  const auto exact = std::make_unique<std::byte[]>(kSlotHeaderBytes);
  std::memcpy(exact.get(), image.data(), kSlotHeaderBytes);
  return images.read_header(exact.get(), place, header);
}

// Makes the header checksum hold again.
inline void mend(Bytes& image) {
  const Checksum checksum = checksum_of(std::span(image).first(kHeaderChecksumAt));
  std::memcpy(image.data() + kHeaderChecksumAt, &checksum.low, 8);
  std::memcpy(image.data() + kHeaderChecksumAt + 8, &checksum.high, 8);
}

inline void flip_bit(Bytes& image, std::size_t bit) {
  image[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
}

inline void expect_same(const SlotHeader& a, const SlotHeader& b) {
  EXPECT_EQ(a.block.key, b.block.key);
  EXPECT_EQ(a.block.group, b.block.group);
  EXPECT_EQ(a.block.parent, b.block.parent);
  EXPECT_EQ(a.block.depth, b.block.depth);
  EXPECT_EQ(a.block.name_space, b.block.name_space);
  EXPECT_EQ(a.place, b.place);
  EXPECT_EQ(a.generation, b.generation);
  EXPECT_EQ(a.payload_bytes, b.payload_bytes);
}

inline std::filesystem::path golden_path() {
  return std::filesystem::path(__FILE__).parent_path() / "../../golden";
}

inline Bytes read_whole(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  Bytes bytes(text.size());
  std::ranges::transform(text, bytes.begin(), [](char c) { return static_cast<std::byte>(c); });
  return bytes;
}

struct Seed {
  std::string name;  // <verdict>-<what>
  Bytes image;
  bool encrypted = false;
  std::string verdict() const { return name.substr(0, name.find('-')); }
};

// tests/golden/fuzz/slot, by name.
inline std::vector<Seed> corpus() {
  constexpr std::size_t kCodecAt = 167;
  std::vector<Seed> seeds;
  for (const auto& entry : std::filesystem::directory_iterator(golden_path() / "fuzz/slot")) {
    Seed seed{.name = entry.path().stem(), .image = read_whole(entry.path())};
    seed.encrypted = seed.image.at(kCodecAt) == std::byte{1};
    seeds.push_back(std::move(seed));
  }
  std::ranges::sort(seeds, {}, &Seed::name);
  return seeds;
}

}  // namespace kvtier::slot_samples
