#include "kvtier/core/huge_vector.h"

#include <sys/mman.h>

#include <cstdint>

#include "kvtier/core/layout.h"

namespace kvtier::internal {
namespace {

constexpr std::size_t kPageBytes = std::size_t{2} << 20;

// What belongs to an array of `bytes`: whole huge pages, so that the last of it has one too.
std::size_t mapped_bytes(std::size_t bytes) { return round_up(bytes, kPageBytes); }

}  // namespace

void* map_huge(std::size_t bytes) {
  const std::size_t size = mapped_bytes(bytes);
  const std::size_t room = size + kPageBytes;  // to move within to a multiple
  void* reserved = ::mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (reserved == MAP_FAILED) throw std::bad_alloc();
  auto* const first = static_cast<std::byte*>(reserved);
  const auto address = reinterpret_cast<std::uintptr_t>(reserved);
  const std::size_t before = round_up(address, kPageBytes) - address;
  if (before > 0) ::munmap(first, before);
  ::munmap(first + before + size, room - before - size);
  static_cast<void>(::madvise(first + before, size, MADV_HUGEPAGE));
  return first + before;
}

void unmap_huge(void* begin, std::size_t bytes) noexcept { ::munmap(begin, mapped_bytes(bytes)); }

}  // namespace kvtier::internal
