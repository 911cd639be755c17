// HugeVector: a std::vector whose large arrays ask the kernel for transparent huge pages.
//
// A table of many MiB that is read at random misses the TLB with every access. With 4 KiB pages the walk of
// the page tables misses the caches too and costs as much as the data; with 2 MiB pages it does not. Most
// machines give huge pages only to who asks (`transparent_hugepage/enabled` is `madvise`).
#pragma once

#include <cstddef>
#include <limits>
#include <new>
#include <vector>

namespace kvtier {

namespace internal {
// From here on an array has pages of its own.
inline constexpr std::size_t kHugeArrayBytes = std::size_t{2} << 20;

// `bytes` >= kHugeArrayBytes, zeroed, at a multiple of 2 MiB. Huge pages are advice: refused, nothing is
// lost but speed. Throws std::bad_alloc.
void* map_huge(std::size_t bytes);
void unmap_huge(void* begin, std::size_t bytes) noexcept;
}  // namespace internal

// Threads: as std::allocator.
template <typename T>
struct HugePageAllocator {
  using value_type = T;

  HugePageAllocator() = default;
  template <typename U>
  HugePageAllocator(const HugePageAllocator<U>&) noexcept {}  // NOLINT: allocators convert

  T* allocate(std::size_t n) {
    if (n > std::numeric_limits<std::size_t>::max() / 2 / sizeof(T)) throw std::bad_alloc();
    const std::size_t bytes = n * sizeof(T);
    if (bytes >= internal::kHugeArrayBytes) return static_cast<T*>(internal::map_huge(bytes));
    return static_cast<T*>(::operator new(bytes, std::align_val_t{alignof(T)}));
  }
  void deallocate(T* begin, std::size_t n) noexcept {
    const std::size_t bytes = n * sizeof(T);
    if (bytes >= internal::kHugeArrayBytes) return internal::unmap_huge(begin, bytes);
    ::operator delete(begin, std::align_val_t{alignof(T)});
  }
  friend bool operator==(const HugePageAllocator&, const HugePageAllocator&) { return true; }
};

template <typename T>
using HugeVector = std::vector<T, HugePageAllocator<T>>;

}  // namespace kvtier
