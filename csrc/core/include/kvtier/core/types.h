// The words of the house as types (docs/vocabulary.md). Values only; nothing here allocates.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvtier {

inline constexpr std::size_t kKeyBytes = 32;

// Names a block's content and identity. Opaque: made by KeyChain, compared and hashed whole.
struct BlockKey {
  std::array<std::byte, kKeyBytes> bytes;

  friend bool operator==(const BlockKey& a, const BlockKey& b) {
    return std::memcmp(a.bytes.data(), b.bytes.data(), kKeyBytes) == 0;
  }
};
static_assert(sizeof(BlockKey) == kKeyBytes);

// A place in the framework's paged device memory.
enum class PageId : std::uint32_t {};
// A place for exactly one block in an arena; unique within its size class.
enum class SlotId : std::uint32_t {};
// A cache group (full attention, sliding window, latent ...): an index into EngineConfig::groups.
enum class GroupId : std::uint16_t {};
// An interned namespace (tenant).
enum class NamespaceId : std::uint32_t {};

constexpr std::uint32_t raw(PageId id) { return static_cast<std::uint32_t>(id); }
constexpr std::uint32_t raw(SlotId id) { return static_cast<std::uint32_t>(id); }
constexpr std::uint16_t raw(GroupId id) { return static_cast<std::uint16_t>(id); }
constexpr std::uint32_t raw(NamespaceId id) { return static_cast<std::uint32_t>(id); }

enum class Tier : std::uint8_t { device, host, disk };

// Which way bytes move. `store` is device -> below, `load` is below -> device.
enum class Direction : std::uint8_t { store, load };

}  // namespace kvtier
