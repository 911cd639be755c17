#include "kvtier/platform/host_memory.h"

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <string>
#include <system_error>

#include "kvtier/core/layout.h"
#include "kvtier/platform/memory_limit.h"

// Newer than the C library that our wheels are built against.
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace kvtier {
namespace {

constexpr std::uint64_t kTransparentPageBytes = std::uint64_t{2} << 20;
constexpr std::size_t kMaxNodes = 1024;  // as many as any kernel knows
constexpr std::size_t kBitsPerWord = sizeof(unsigned long) * CHAR_BIT;

// errno is an argument, so that it is read before anything else can change it.
Status failure(int error, const std::string& what, std::uint64_t bytes) {
  return Status::resource("cannot " + what + " " + std::to_string(bytes) +
                              " bytes of shared memory: " + std::generic_category().message(error) +
                              " (errno " + std::to_string(error) + ")",
                          error);
}

std::uint64_t page_bytes() {
  static const auto kBytes = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return kBytes;
}

int create_memfd(unsigned flags) {
  flags |= MFD_CLOEXEC | MFD_ALLOW_SEALING;
  // Since 6.3 the kernel can be told to refuse a memfd that may be executed; before, it does not know the
  // flag.
  const int fd = ::memfd_create("kvtier-arena", flags | MFD_NOEXEC_SEAL);
  return fd < 0 && errno == EINVAL ? ::memfd_create("kvtier-arena", flags) : fd;
}

// Sets the size for good: a peer that could truncate the file would kill us with SIGBUS, one that could
// seal it against writing would keep later workers out. Returns 0 or errno; closes nothing.
int fix_size(int fd, std::uint64_t bytes) {
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0) return errno;
  if (::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) return errno;
  return 0;
}

// A file of reserved huge pages, or -1 when the kernel does not grant as many.
int create_huge(std::uint64_t bytes) {
  const int fd = create_memfd(MFD_HUGETLB | MFD_HUGE_2MB);
  if (fd < 0) return -1;
  if (fix_size(fd, bytes) == 0) {
    // Mapping is what takes the pages out of the pool, and the file keeps them after the unmapping. So a
    // pool that somebody else has emptied meanwhile is noticed here, where ordinary pages can still be had.
    // A cgroup that allows no huge pages refuses only their use (Kubernetes gives such a limit to whoever
    // asks for none): a kernel that cannot say so would end the process with SIGBUS.
    void* trial = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (trial != MAP_FAILED) {
      const bool usable = ::madvise(trial, kHugePageBytes, MADV_POPULATE_WRITE) == 0;
      ::munmap(trial, bytes);
      if (usable) return fd;
    }
  }
  ::close(fd);
  return -1;
}

class LinuxHostMemory final : public HostMemory {
 public:
  Result<std::uint64_t> available_bytes() override { return available_memory_bytes(); }

  Result<int> create_shared(std::uint64_t bytes) override {
    if (bytes % kHugePageBytes == 0 && bytes <= free_huge_page_bytes()) {
      if (const int fd = create_huge(bytes); fd >= 0) return fd;
    }
    const int fd = create_memfd(0);
    if (fd < 0) return failure(errno, "create", bytes);
    if (const int error = fix_size(fd, bytes); error != 0) {
      ::close(fd);
      return failure(error, "size", bytes);
    }
    return fd;
  }

  Result<std::byte*> map_shared(int fd, std::uint64_t bytes) override {
    // A huge page is mapped by one entry only at an address that is a multiple of its size. The kernel
    // chooses such an address for some files and versions; a reservation with room to move always does.
    const std::uint64_t room = bytes + kHugePageBytes;
    void* reserved = ::mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return failure(errno, "reserve addresses for", bytes);
    auto* const first = static_cast<std::byte*>(reserved);
    const auto address = reinterpret_cast<std::uintptr_t>(reserved);
    std::byte* const begin = first + (round_up(address, kHugePageBytes) - address);
    std::byte* const end = begin + round_up(bytes, page_bytes());
    if (::mmap(begin, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
      const int error = errno;
      ::munmap(reserved, room);
      return failure(error, "map", bytes);
    }
    if (begin != first) ::munmap(first, static_cast<std::size_t>(begin - first));
    if (end != first + room) ::munmap(end, static_cast<std::size_t>(first + room - end));

    if (::madvise(begin, bytes, MADV_DONTFORK) != 0) {
      const int error = errno;
      unmap(begin, bytes);
      return failure(error, "keep from forked children", bytes);
    }
    // Advice only: refused where the pages are huge already and where the kernel has no transparent ones.
    static_cast<void>(::madvise(begin, bytes, MADV_HUGEPAGE));
    return begin;
  }

  Status prefer_node(std::byte* begin, std::uint64_t bytes, int node) override {
    std::array<unsigned long, kMaxNodes / kBitsPerWord> mask{};
    if (node < 0 || static_cast<std::size_t>(node) >= kMaxNodes) {
      return Status::invalid_argument("NUMA node is " + std::to_string(node) + "; allowed: 0 to " +
                                      std::to_string(kMaxNodes - 1));
    }
    const auto bit = static_cast<std::size_t>(node);
    mask[bit / kBitsPerWord] = 1UL << (bit % kBitsPerWord);
    // The kernel counts one bit more than it reads. libnuma would only wrap this call.
    if (::syscall(SYS_mbind, begin, bytes, MPOL_PREFERRED, mask.data(), kMaxNodes + 1, 0) != 0) {
      return failure(errno, "take from NUMA node " + std::to_string(node), bytes);
    }
    return Status::ok();
  }

  // Shared memory gets transparent huge pages only where shmem_enabled allows it, and nearly every
  // distribution has it at `never`. MADV_COLLAPSE (Linux 6.1) asks for them whatever that says: copies out
  // of the arena ran 1.3 times faster with it. A refusal costs nothing but that.
  static void collapse(std::byte* begin, std::uint64_t bytes) {
    const std::uint64_t address = reinterpret_cast<std::uintptr_t>(begin);
    const std::uint64_t skipped = round_up(address, kTransparentPageBytes) - address;
    if (skipped >= bytes) return;
    const std::uint64_t whole = (bytes - skipped) / kTransparentPageBytes * kTransparentPageBytes;
    if (whole > 0) static_cast<void>(::madvise(begin + skipped, whole, MADV_COLLAPSE));
  }

  void unmap(std::byte* begin, std::uint64_t bytes) override { ::munmap(begin, bytes); }

  // Piece by piece: while the kernel populates, every mmap() and munmap() of the process waits, of malloc()
  // too. 128 MiB at once took each of them to 17 ms, pieces of 2 MiB to 2 ms, in the same time all together.
  Status populate(std::byte* begin, std::uint64_t bytes) override {
    // Slots are aligned to 4 KiB, pages may be larger.
    const std::uint64_t before = reinterpret_cast<std::uintptr_t>(begin) % page_bytes();
    std::byte* const end = begin + bytes;
    for (std::byte* piece = begin - before; piece < end;) {
      const auto address = reinterpret_cast<std::uintptr_t>(piece);
      const std::uint64_t to_boundary = round_up(address + 1, kTransparentPageBytes) - address;
      const std::uint64_t length = std::min(to_boundary, static_cast<std::uint64_t>(end - piece));
      // A huge page made around one small page is cleared once; around 512 of them it is a copy, and the
      // whole takes seven times as long.
      const std::uint64_t first = length == kTransparentPageBytes ? page_bytes() : length;
      if (::madvise(piece, first, MADV_POPULATE_WRITE) != 0) {
        if (errno != EINVAL) return failure(errno, "populate", bytes);
        internal::touch_pages(begin, bytes);  // Linux before 5.14
        collapse(begin, bytes);
        return Status::ok();
      }
      if (first < length) {
        collapse(piece, length);
        if (::madvise(piece, length, MADV_POPULATE_WRITE) != 0) return failure(errno, "populate", bytes);
      }
      piece += length;
    }
    return Status::ok();
  }
};

}  // namespace

namespace internal {

void touch_pages(std::byte* begin, std::uint64_t bytes) {
  // Or-ing zero is a write that changes nothing, also beside a peer that writes the same byte.
  const std::uint64_t step = page_bytes();
  for (std::uint64_t offset = 0; offset < bytes; offset += step) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(begin + offset), static_cast<unsigned char>(0),
                      __ATOMIC_RELAXED);
  }
  if (bytes > 0) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(begin + bytes - 1), static_cast<unsigned char>(0),
                      __ATOMIC_RELAXED);
  }
}

}  // namespace internal

HostMemory& linux_host_memory() {
  static LinuxHostMemory memory;  // holds nothing, so its destruction at exit harms nobody
  return memory;
}

}  // namespace kvtier
