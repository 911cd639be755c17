// Integers in on-disk records: little-endian, at any address.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstring>
#include <span>

namespace kvtier {

template <std::unsigned_integral T>
void put_little_endian(std::span<std::byte> bytes, std::size_t at, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    bytes[at + i] = static_cast<std::byte>(static_cast<unsigned char>(value >> (8 * i)));
  }
}

template <std::unsigned_integral T>
T get_little_endian(std::span<const std::byte> bytes, std::size_t at) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(
        value | static_cast<T>(static_cast<T>(std::to_integer<unsigned char>(bytes[at + i])) << (8 * i)));
  }
  return value;
}

inline void put_bytes(std::span<std::byte> bytes, std::size_t at, std::span<const std::byte> value) {
  if (!value.empty()) std::memcpy(bytes.subspan(at, value.size()).data(), value.data(), value.size());
}

inline bool all_zero(std::span<const std::byte> bytes) {
  for (const std::byte byte : bytes) {
    if (byte != std::byte{0}) return false;
  }
  return true;
}

}  // namespace kvtier
