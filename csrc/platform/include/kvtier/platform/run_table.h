// Run tables: how a copy kernel is told what to copy, and which of its warps copies which bytes.
//
// A table is a kernel's parameter (up to 32,764 bytes since CUDA 12.1): it travels with the launch, so there
// is no descriptor memory to allocate, to reuse too early or to wait for. Most batches are thousands of runs
// of one length; those take 8 bytes a run. Everything else takes 24.
//
//   table --unit(i)--> units of at most kUnitBytes --i mod workers--> worker (a warp) --> 16 bytes a lane
//
// All of it runs on the host as well: the tests execute the kernels' address arithmetic on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "kvtier/platform/host_device.h"

namespace kvtier {

// A run by the addresses that the GPU uses.
struct MappedRun {
  std::uint64_t destination;
  std::uint64_t source;
  std::uint64_t bytes;
};

// What one worker copies at a time.
struct Unit {
  std::uint64_t destination;
  std::uint64_t source;
  std::uint32_t bytes;
};

inline constexpr std::uint32_t kUnitBytes = 4096;       // of a warp: 8 accesses of 16 bytes for each lane
inline constexpr std::uint32_t kWideUnitBytes = 16384;  // an entry of a WideRuns, and of the bulk kernel
inline constexpr std::uint32_t kMaxCompactRunBytes = 1U << 30;
inline constexpr std::size_t kMaxTableBytes = 32764;

// Runs of one length. Addresses and the length are multiples of 16. Each side spans at most 64 GiB, or 1 TiB
// where its addresses lie a multiple of 256 apart, as those of pages do.
template <std::uint32_t kCapacity>
struct CompactRuns {
  struct Offsets {
    std::uint32_t destination;  // in steps from the base
    std::uint32_t source;
  };
  std::uint64_t destination_base;
  std::uint64_t source_base;
  std::uint32_t count;
  std::uint32_t run_bytes;
  std::uint32_t step_bytes;
  Offsets at[kCapacity];

  KVTIER_HOST_DEVICE std::uint32_t num_units(std::uint32_t unit_bytes) const {
    return count * ((run_bytes + unit_bytes - 1) / unit_bytes);
  }
  KVTIER_HOST_DEVICE Unit unit(std::uint32_t index, std::uint32_t unit_bytes) const {
    const std::uint32_t per_run = (run_bytes + unit_bytes - 1) / unit_bytes;
    const Offsets& run = at[index / per_run];
    const std::uint32_t begin = index % per_run * unit_bytes;
    const std::uint32_t left = run_bytes - begin;
    return {destination_base + std::uint64_t{run.destination} * step_bytes + begin,
            source_base + std::uint64_t{run.source} * step_bytes + begin,
            left < unit_bytes ? left : unit_bytes};
  }
};

// Pieces of at most kWideUnitBytes at any addresses; each is one unit, whatever unit size is asked for.
template <std::uint32_t kCapacity>
struct WideRuns {
  struct Entry {
    std::uint64_t destination;
    std::uint64_t source;
    std::uint32_t bytes;
    std::uint32_t unused;
  };
  std::uint64_t count;
  Entry at[kCapacity];

  KVTIER_HOST_DEVICE std::uint32_t num_units(std::uint32_t) const {
    return static_cast<std::uint32_t>(count);
  }
  KVTIER_HOST_DEVICE Unit unit(std::uint32_t index, std::uint32_t) const {
    return {at[index].destination, at[index].source, at[index].bytes};
  }
};

// Two sizes each: a launch carries its whole table, however few runs are in it.
using SmallCompactRuns = CompactRuns<120>;
using LargeCompactRuns = CompactRuns<4080>;
using SmallWideRuns = WideRuns<40>;
using LargeWideRuns = WideRuns<1360>;
static_assert(sizeof(LargeCompactRuns) <= kMaxTableBytes && sizeof(LargeWideRuns) <= kMaxTableBytes);

// The widest access, 16, 8, 4, 2 or 1 bytes, that suits both addresses and the length.
KVTIER_HOST_DEVICE inline std::uint32_t access_bytes(std::uint64_t destination, std::uint64_t source,
                                                     std::uint64_t bytes) {
  const std::uint64_t any = destination | source | bytes | 16;
  return static_cast<std::uint32_t>(any & (~any + 1));
}

struct alignas(16) Vector16 {
  std::uint32_t words[4];
};

// Streaming accesses on the GPU: what is copied once shall not displace what the decode kernels keep in L2.
template <typename V>
KVTIER_HOST_DEVICE inline V load_streaming(const V* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 16) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
    return V{{raw.x, raw.y, raw.z, raw.w}};
  } else {
    return __ldcs(from);
  }
#else
  return *from;
#endif
}

template <typename V>
KVTIER_HOST_DEVICE inline void store_streaming(V* to, const V& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(V) == 16) {
    __stcs(reinterpret_cast<uint4*>(to),
           make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]));
  } else {
    __stcs(to, value);
  }
#else
  *to = value;
#endif
}

// One lane's share of `count` items: every `lanes`-th, with eight loads in flight before the first store.
template <typename V>
KVTIER_HOST_DEVICE inline void copy_items(V* to, const V* from, std::uint32_t count, std::uint32_t lane,
                                          std::uint32_t lanes) {
  constexpr std::uint32_t kInFlight = 8;
  std::uint32_t i = lane;
  for (; i + (kInFlight - 1) * lanes < count; i += kInFlight * lanes) {
    V values[kInFlight];
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (std::uint32_t k = 0; k < kInFlight; ++k) values[k] = load_streaming(from + i + k * lanes);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (std::uint32_t k = 0; k < kInFlight; ++k) store_streaming(to + i + k * lanes, values[k]);
  }
  for (; i < count; i += lanes) store_streaming(to + i, load_streaming(from + i));
}

// One lane's share of a unit.
KVTIER_HOST_DEVICE inline void copy_unit(const Unit& unit, std::uint32_t lane, std::uint32_t lanes) {
  const auto copy_as = [&](auto item) {
    using V = decltype(item);
    // NOLINTNEXTLINE(performance-no-int-to-ptr): tables hold addresses as the GPU uses them
    copy_items(reinterpret_cast<V*>(unit.destination), reinterpret_cast<const V*>(unit.source),
               unit.bytes / static_cast<std::uint32_t>(sizeof(V)), lane, lanes);
  };
  switch (access_bytes(unit.destination, unit.source, unit.bytes)) {
    case 16: return copy_as(Vector16{});
    case 8: return copy_as(std::uint64_t{});
    case 4: return copy_as(std::uint32_t{});
    case 2: return copy_as(std::uint16_t{});
    default: return copy_as(std::uint8_t{});
  }
}

// One lane's share of a table: the body of the copy kernel. Workers are the warps of a persistent grid.
template <typename Table>
KVTIER_HOST_DEVICE inline void copy_table(const Table& table, std::uint32_t worker, std::uint32_t workers,
                                          std::uint32_t lane, std::uint32_t lanes) {
  const std::uint32_t units = table.num_units(kUnitBytes);
  for (std::uint32_t i = worker; i < units; i += workers) copy_unit(table.unit(i, kUnitBytes), lane, lanes);
}

// The bulk kernel's pipeline: one thread feeds a ring of stages in shared memory. Unit k of a worker uses
// stage k mod kBulkStages; kBulkAhead loads are in flight, and a stage is loaded again only when the store
// out of it has read it: when at most kBulkStages - kBulkAhead newer stores are unfinished.
inline constexpr std::uint32_t kBulkStages = 8;
inline constexpr std::uint32_t kBulkAhead = 4;
KVTIER_HOST_DEVICE constexpr std::uint32_t bulk_stage(std::uint32_t k) { return k % kBulkStages; }
KVTIER_HOST_DEVICE constexpr std::uint32_t bulk_parity(std::uint32_t k) { return k / kBulkStages & 1U; }

// Whether the bulk copy engine takes a run: it knows only multiples of 16.
inline bool suits_bulk(const MappedRun& run) {
  return access_bytes(run.destination, run.source, run.bytes) == 16;
}

// Where filling a table stands in a list of runs: the next run, and how much of it is done.
struct TableCursor {
  std::size_t run = 0;
  std::uint64_t done_bytes = 0;
};

// Puts as many runs as fit, from the cursor on, into the table, and moves the cursor. False: the run at the
// cursor does not suit this kind of table, and nothing was done.
template <std::uint32_t kCapacity>
bool fill_table(CompactRuns<kCapacity>& table, std::span<const MappedRun> runs, TableCursor& cursor) {
  const auto step_of = [](std::uint64_t differing_bits) { return (differing_bits & 255) == 0 ? 256U : 16U; };
  if (cursor.done_bytes != 0 || cursor.run >= runs.size()) return false;
  const MappedRun& first = runs[cursor.run];
  if (first.bytes > kMaxCompactRunBytes) return false;
  struct Side {
    std::uint64_t low;
    std::uint64_t high;
    bool admits(std::uint64_t address, std::uint64_t span) const {
      const std::uint64_t new_low = address < low ? address : low;
      const std::uint64_t new_high = address > high ? address : high;
      return new_high - new_low < span;
    }
    void add(std::uint64_t address) {
      if (address < low) low = address;
      if (address > high) high = address;
    }
  };
  Side to{first.destination, first.destination};
  Side from{first.source, first.source};
  std::uint64_t differing_bits = 0;
  std::size_t end = cursor.run;
  while (end < runs.size() && end - cursor.run < kCapacity) {
    const MappedRun& run = runs[end];
    if (run.bytes != first.bytes || !suits_bulk(run)) break;
    const std::uint64_t bits =
        differing_bits | (run.destination ^ first.destination) | (run.source ^ first.source);
    const std::uint64_t span = std::uint64_t{step_of(bits)} << 32;
    if (!to.admits(run.destination, span) || !from.admits(run.source, span)) break;
    differing_bits = bits;
    to.add(run.destination);
    from.add(run.source);
    ++end;
  }
  if (end == cursor.run) return false;
  table.destination_base = to.low;
  table.source_base = from.low;
  table.count = static_cast<std::uint32_t>(end - cursor.run);
  table.run_bytes = static_cast<std::uint32_t>(first.bytes);
  const std::uint32_t step = step_of(differing_bits);
  table.step_bytes = step;
  for (std::size_t i = cursor.run; i < end; ++i) {
    table.at[i - cursor.run] = {static_cast<std::uint32_t>((runs[i].destination - to.low) / step),
                                static_cast<std::uint32_t>((runs[i].source - from.low) / step)};
  }
  cursor.run = end;
  return true;
}

template <std::uint32_t kCapacity>
bool fill_table(WideRuns<kCapacity>& table, std::span<const MappedRun> runs, TableCursor& cursor) {
  std::uint32_t count = 0;
  while (cursor.run < runs.size() && count < kCapacity) {
    const MappedRun& run = runs[cursor.run];
    const std::uint64_t left = run.bytes - cursor.done_bytes;
    if (left > 0) {
      const std::uint64_t piece = left < kWideUnitBytes ? left : kWideUnitBytes;
      table.at[count++] = {run.destination + cursor.done_bytes, run.source + cursor.done_bytes,
                           static_cast<std::uint32_t>(piece), 0};
      cursor.done_bytes += piece;
    }
    if (cursor.done_bytes == run.bytes) cursor = {cursor.run + 1, 0};
  }
  table.count = count;
  return count > 0;
}

// How many runs from the cursor on would go into one compact table: what decides between the kinds.
std::size_t compact_prefix(std::span<const MappedRun> runs, const TableCursor& cursor);

}  // namespace kvtier
