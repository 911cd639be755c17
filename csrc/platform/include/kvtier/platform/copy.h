// Memory-to-memory copies at the machine's limit, for what the `cpu` device moves.
//
// Two ways to write. *Cached* is memcpy: the destination passes through the caches, so every line of it
// is first read from memory, and what the framework's threads had there is pushed out. *Streaming* writes
// past the caches with non-temporal stores: a third less traffic (EPYC 9004, one core: 13 against 22 GB/s).
//
// Scattered runs are slower than one contiguous copy because the hardware prefetcher stops at every page
// and a page seen for the first time costs a walk of the page tables. So the streaming copy of many runs
// looks ahead in the list of runs: see copy.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "kvtier/platform/device.h"

namespace kvtier {

enum class CopyMethod : std::uint8_t { cached, streaming };

// From here on a batch streams. Measured as copy plus one pass that reads the destination at once, which is
// what caching is for: equal up to 512 KiB, streaming ahead by 14 % at 1 MiB and by 24 % at 8 MiB.
inline constexpr std::size_t kStreamingBatchBytes = std::size_t{1} << 20;
// Below this a run has too few whole cache lines for streaming, whatever the batch. (Scattered runs of 512
// bytes: 6 GB/s by memcpy, 10 to 14 streaming.)
inline constexpr std::size_t kStreamingRunBytes = 256;

// The method for each of the runs that move `batch_bytes` altogether.
constexpr CopyMethod choose_copy_method(std::size_t batch_bytes) {
  return batch_bytes >= kStreamingBatchBytes ? CopyMethod::streaming : CopyMethod::cached;
}

// All of these: any length, any alignment, exactly the bytes asked for; source and destination do not
// overlap. Threads: any. When a call has returned, its bytes are ordered before the caller's later writes,
// as with plain stores: non-temporal stores are fenced inside.

// One copy on its own, by the better method for `bytes`.
void copy_bytes(void* destination, const void* source, std::size_t bytes);

// Runs of a batch, in no particular order; each at least kStreamingRunBytes long is written by `method`.
void copy_runs(std::span<const CopyRun> runs, CopyMethod method);

// Which non-temporal stores there are; none means memcpy.
enum class StreamIsa : std::uint8_t { none, sse2, avx2, avx512 };
std::string_view to_string(StreamIsa isa);

// The widest of this machine, which everything here uses.
StreamIsa best_stream_isa();
bool has_stream_isa(StreamIsa isa);

// Always non-temporal, but for less than 256 bytes at both ends. `isa` must be one that this machine has.
void stream_copy(void* destination, const void* source, std::size_t bytes, StreamIsa isa = best_stream_isa());

}  // namespace kvtier
