#include "kvtier/platform/copy.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A function that only prefetches has no effect in the eyes of gcc, which drops calls of it, unless it was
// inlined before that is found out.
#define KVTIER_HINT __attribute__((always_inline)) inline

namespace kvtier {
namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kBlock = 256;  // the unit of the loops below; all non-temporal stores are whole blocks
constexpr std::size_t kPage =
    4096;  // where the hardware prefetcher stops, whatever the size of the real pages
constexpr std::size_t kLanes = 8;
// How far ahead a lane asks: with all lanes a quarter of a second-level cache. (32 KiB runs, one core, of the
// contiguous rate: 0.92 with a page, 0.96 with this.)
constexpr std::size_t kLaneAhead = std::size_t{32} << 10;
// Longer runs are streams of their own. (Scattered sources, side by side against one by one: 1.06 to 1.01 of
// plain copies run by run with 64 KiB, 0.97 to 1.02 with 128.)
constexpr std::size_t kMaxLaneBytes = std::size_t{64} << 10;

// Asks for 256 bytes, into the second-level cache: the first level has too few outstanding misses to hide a
// walk of the page tables, and prefetches into it left scattered 4 KiB runs at half the rate.
KVTIER_HINT void prefetch_block(const std::byte* from) {
  for (std::size_t line = 0; line < kBlock; line += kLine) __builtin_prefetch(from + line, 0, 2);
}

// Copies `blocks` * kBlock bytes to a destination aligned to a line, and beside each of the first
// `ahead_blocks` <= `blocks` of them asks for a block of `ahead`. Not fenced.
using StreamBlocks = void (*)(std::byte* to, const std::byte* from, std::size_t blocks,
                              const std::byte* ahead, std::size_t ahead_blocks);

void copy_blocks(std::byte* to, const std::byte* from, std::size_t blocks, const std::byte*, std::size_t) {
  std::memcpy(to, from, blocks * kBlock);
}

#if defined(__x86_64__)

__attribute__((target("avx512f"))) inline void stream_block_avx512(std::byte* to, const std::byte* from) {
  const __m512i a = _mm512_loadu_si512(from);
  const __m512i b = _mm512_loadu_si512(from + 64);
  const __m512i c = _mm512_loadu_si512(from + 128);
  const __m512i d = _mm512_loadu_si512(from + 192);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), a);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 64), b);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 128), c);
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 192), d);
}

__attribute__((target("avx2"))) inline void stream_block_avx2(std::byte* to, const std::byte* from) {
  for (std::size_t i = 0; i < kBlock; i += kLine) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + 32), b);
  }
}

inline void stream_line_sse2(std::byte* to, const std::byte* from) {
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16));
  const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 32));
  const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 48));
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), a);
  _mm_stream_si128(reinterpret_cast<__m128i*>(to + 16), b);
  _mm_stream_si128(reinterpret_cast<__m128i*>(to + 32), c);
  _mm_stream_si128(reinterpret_cast<__m128i*>(to + 48), d);
}

__attribute__((target("avx512f"))) void stream_avx512(std::byte* to, const std::byte* from,
                                                      std::size_t blocks, const std::byte* ahead,
                                                      std::size_t ahead_blocks) {
  blocks -= ahead_blocks;
  for (; ahead_blocks != 0; --ahead_blocks, to += kBlock, from += kBlock, ahead += kBlock) {
    prefetch_block(ahead);
    stream_block_avx512(to, from);
  }
  for (; blocks != 0; --blocks, to += kBlock, from += kBlock) {
    stream_block_avx512(to, from);
  }
}

__attribute__((target("avx2"))) void stream_avx2(std::byte* to, const std::byte* from, std::size_t blocks,
                                                 const std::byte* ahead, std::size_t ahead_blocks) {
  blocks -= ahead_blocks;
  for (; ahead_blocks != 0; --ahead_blocks, to += kBlock, from += kBlock, ahead += kBlock) {
    prefetch_block(ahead);
    stream_block_avx2(to, from);
  }
  for (; blocks != 0; --blocks, to += kBlock, from += kBlock) {
    stream_block_avx2(to, from);
  }
}

void stream_sse2(std::byte* to, const std::byte* from, std::size_t blocks, const std::byte* ahead,
                 std::size_t ahead_blocks) {
  blocks -= ahead_blocks;
  for (; ahead_blocks != 0; --ahead_blocks, to += kBlock, from += kBlock, ahead += kBlock) {
    prefetch_block(ahead);
    for (std::size_t i = 0; i < kBlock; i += kLine) stream_line_sse2(to + i, from + i);
  }
  for (; blocks != 0; --blocks, to += kBlock, from += kBlock) {
    for (std::size_t i = 0; i < kBlock; i += kLine) stream_line_sse2(to + i, from + i);
  }
}

void fence() { _mm_sfence(); }

StreamBlocks stream_blocks_of(StreamIsa isa) {
  switch (isa) {
    case StreamIsa::avx512: return stream_avx512;
    case StreamIsa::avx2: return stream_avx2;
    case StreamIsa::sse2: return stream_sse2;
    case StreamIsa::none: break;
  }
  return copy_blocks;
}

// What is left behind the blocks of a run: whole lines past the caches, the rest through them.
void copy_rest(std::byte* to, const std::byte* from, std::size_t bytes) {
  for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) stream_line_sse2(to, from);
  if (bytes != 0) std::memcpy(to, from, bytes);
}

#else

void fence() {}
StreamBlocks stream_blocks_of(StreamIsa) { return copy_blocks; }
void copy_rest(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

#endif

void copy_cached(const CopyRun& run) {
  if (run.bytes != 0) std::memcpy(run.destination, run.source, run.bytes);
}

// Fetches one line of a page that will be written soon, for the sake of its address translation, and of the
// bytes around a run that does not begin or end with a line.
KVTIER_HINT void touch(const std::byte* page) { __builtin_prefetch(page, 0, 3); }

const std::byte* source_of(const CopyRun& run) { return static_cast<const std::byte*>(run.source); }
std::byte* destination_of(const CopyRun& run) { return static_cast<std::byte*>(run.destination); }

// Bytes of the run before the first whole line of its destination.
std::size_t head_of(const CopyRun& run) {
  const std::size_t before = -reinterpret_cast<std::uintptr_t>(run.destination) % kLine;
  return std::min(run.bytes, before);
}

// Touches a page's worth of a run's destination: where it begins and, if lines are shared, where it ends.
KVTIER_HINT void touch_destination(const CopyRun& run, std::size_t offset) {
  touch(destination_of(run) + offset);
  if (head_of(run) != 0) touch(destination_of(run) + std::min(run.bytes, offset + kPage) - 1);
}

// Walks the pages of a list of runs, two pages ahead of a copy that begins with the first.
class Lookahead {
 public:
  explicit Lookahead(std::span<const CopyRun> runs) : run_(runs.data()), end_(run_ + runs.size()) {
    step();
    step();
  }
  // Touches the next page's destination; returns its source, or null behind the last run.
  const std::byte* advance() {
    if (run_ == end_) return nullptr;
    const std::byte* source = source_of(*run_) + offset_;
    touch_destination(*run_, offset_);
    step();
    return source;
  }

 private:
  void step() {
    if (run_ == end_) return;
    offset_ += kPage;
    if (offset_ < run_->bytes) return;
    ++run_;
    offset_ = 0;
  }

  const CopyRun* run_;
  const CopyRun* end_;
  std::size_t offset_ = 0;
};

// The first of `runs`, looking ahead into the others. Run after run is best for one long run, and for short
// ones whose source is contiguous from run to run, as a slot image is. Asking for the first KiB of the page
// after next is enough: it sets the hardware prefetcher to work there.
void stream_first(StreamBlocks stream_blocks, std::span<const CopyRun> runs) {
  constexpr std::size_t kWarmBlocks = 1024 / kBlock;
  Lookahead ahead(runs);
  std::byte* to = destination_of(runs[0]);
  const std::byte* from = source_of(runs[0]);
  std::size_t left = runs[0].bytes;

  if (const std::size_t head = head_of(runs[0]); head != 0) {
    std::memcpy(to, from, head);
    to += head;
    from += head;
    left -= head;
  }
  while (left >= kBlock) {
    const std::size_t blocks = std::min(left, kPage) / kBlock;
    const std::byte* next = ahead.advance();
    stream_blocks(to, from, blocks, next, next == nullptr ? 0 : std::min(blocks, kWarmBlocks));
    to += blocks * kBlock;
    from += blocks * kBlock;
    left -= blocks * kBlock;
  }
  copy_rest(to, from, left);
}

// Whether `runs` begins with kLanes runs for stream_lanes(): alike, and better off so than one by one, which
// those are whose sources follow each other: one stream serves them all.
bool fits_lanes(std::span<const CopyRun> runs) {
  if (runs.size() < kLanes) return false;
  const std::size_t bytes = runs[0].bytes;
  const std::size_t head = head_of(runs[0]);
  if (bytes < kStreamingRunBytes || bytes < head + kBlock || bytes > kMaxLaneBytes) return false;
  if (source_of(runs[1]) == source_of(runs[0]) + bytes) return false;
  return std::ranges::all_of(runs.first(kLanes), [bytes, head](const CopyRun& run) {
    return run.bytes == bytes && head_of(run) == head;
  });
}

// Eight runs side by side: best where sources are scattered, since it keeps eight streams of the hardware
// prefetcher and all walkers of the page tables busy (4 KiB runs: 9 GB/s one by one, 18 like this). Each lane
// asks for what comes kLaneAhead bytes later, in its own run or in the one of `next` that it takes
// afterwards; null where the list ends. Asking is only a hint: those runs need not be of the same kind.
void stream_lanes(StreamBlocks stream_blocks, const CopyRun* runs, const CopyRun* next) {
  const std::size_t head = head_of(runs[0]);
  const std::size_t body = (runs[0].bytes - head) / kBlock * kBlock;
  const std::size_t distance = std::min(kLaneAhead, body);
  for (std::size_t lane = 0; head != 0 && lane < kLanes; ++lane) {
    std::memcpy(runs[lane].destination, runs[lane].source, head);
  }
  for (std::size_t offset = 0; offset < body; offset += kBlock) {
    const bool crosses = offset + distance >= body;
    const CopyRun* soon = crosses ? next : runs;
    const std::size_t soon_offset = offset + distance - (crosses ? body : 0);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const std::byte* ahead = nullptr;
      if (soon != nullptr) {
        ahead = source_of(soon[lane]) + soon_offset;
        if (soon_offset % kPage == 0) touch_destination(soon[lane], soon_offset);
      }
      stream_blocks(destination_of(runs[lane]) + head + offset, source_of(runs[lane]) + head + offset, 1,
                    ahead, ahead == nullptr ? 0 : 1);
    }
  }
  if (head + body == runs[0].bytes) return;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    copy_rest(destination_of(runs[lane]) + head + body, source_of(runs[lane]) + head + body,
              runs[lane].bytes - head - body);
  }
}

void stream_runs(std::span<const CopyRun> runs) {
  const StreamBlocks stream_blocks = stream_blocks_of(best_stream_isa());
  while (!runs.empty()) {
    while (fits_lanes(runs)) {
      stream_lanes(stream_blocks, runs.data(), runs.size() >= 2 * kLanes ? &runs[kLanes] : nullptr);
      runs = runs.subspan(kLanes);
    }
    for (; !runs.empty() && !fits_lanes(runs); runs = runs.subspan(1)) {
      if (runs[0].bytes >= kStreamingRunBytes) {
        stream_first(stream_blocks, runs);
      } else {
        copy_cached(runs[0]);
      }
    }
  }
  fence();
}

}  // namespace

void copy_bytes(void* destination, const void* source, std::size_t bytes) {
  const CopyRun run{destination, source, bytes};
  copy_runs({&run, 1}, choose_copy_method(bytes));
}

void copy_runs(std::span<const CopyRun> runs, CopyMethod method) {
  if (method == CopyMethod::streaming) return stream_runs(runs);
  for (const CopyRun& run : runs) copy_cached(run);
}

std::string_view to_string(StreamIsa isa) {
  switch (isa) {
    case StreamIsa::none: return "none";
    case StreamIsa::sse2: return "sse2";
    case StreamIsa::avx2: return "avx2";
    case StreamIsa::avx512: return "avx512";
  }
  return "unknown";
}

bool has_stream_isa(StreamIsa isa) {
#if defined(__x86_64__)
  switch (isa) {  // the builtin also asks whether the kernel saves the registers
    case StreamIsa::avx512: return __builtin_cpu_supports("avx512f");
    case StreamIsa::avx2: return __builtin_cpu_supports("avx2");
    case StreamIsa::sse2: return true;
    case StreamIsa::none: break;
  }
#endif
  return isa == StreamIsa::none;
}

StreamIsa best_stream_isa() {
  static const StreamIsa best = [] {
    for (const StreamIsa isa : {StreamIsa::avx512, StreamIsa::avx2, StreamIsa::sse2}) {
      if (has_stream_isa(isa)) return isa;
    }
    return StreamIsa::none;
  }();
  return best;
}

void stream_copy(void* destination, const void* source, std::size_t bytes, StreamIsa isa) {
  KVTIER_CHECK(has_stream_isa(isa));
  const CopyRun run{destination, source, bytes};
  stream_first(stream_blocks_of(isa), {&run, 1});
  fence();
}

}  // namespace kvtier
