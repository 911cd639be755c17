// The engine's ghost caches: one for each tier, and the log between them and the lookups.
//
// A lookup only notes the sampled hashes, without a branch; they are looked up when the next store or load,
// which costs a thousand times as much, uses the ghosts anyhow, or when the log is full. Noting takes about
// a twenty-fifth of a lookup's time, so once kAllBlocks were asked for only one lookup in kOneOf is measured,
// by chance: with n of them measured that moves a hit rate by 0.5 / sqrt(n) at most (one standard error).
// What the ghosts hold, which stores and loads say, is not thinned out.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kvtier/engine/stats.h"
#include "kvtier/index/ghost_cache.h"

namespace kvtier {

// Guarded by the engine's mutex.
class Ghosts {
 public:
  static constexpr std::uint64_t kAllBlocks = 262'144;
  static constexpr std::uint64_t kOneOf = 8;

  // Capacities in blocks; `disk_blocks` 0: no disk tier. At most `most_at_once` hashes between two begin().
  Ghosts(std::uint64_t host_blocks, std::uint64_t disk_blocks, std::size_t most_at_once);

  // Whether the next lookup is measured; asked once for each.
  bool measures_next();
  // Part of a measured lookup in the order of its prompt: begin(), note() for each block, end().
  struct Notes {
    std::uint64_t* next;
    std::uint64_t below;
    void operator()(std::uint64_t hash) {
      *next = hash;
      next += hash < below ? 1 : 0;
    }
  };
  Notes begin();
  void end(const Notes& notes, std::size_t num_blocks);

  bool sampled(std::uint64_t hash) const { return hash < below_; }
  // Sampled hashes only; see GhostCache. `use` is of either tier.
  void use(std::uint64_t hash);
  void touch(std::uint64_t hash);
  void erase(std::uint64_t hash);
  // A block that was on disk before this process.
  void restore(std::uint64_t hash);

  void add_to(EngineStats& stats);

 private:
  void drain();
  template <typename F>
  void each(std::uint64_t hash, F&& f);

  GhostCache host_;
  std::optional<GhostCache> disk_;
  std::uint64_t below_;
  std::size_t most_at_once_;
  std::vector<std::uint64_t> log_;  // lookups, each ended by kNoHash
  std::size_t noted_ = 0;
  std::uint64_t asked_ = 0;  // blocks, since the last drain()
  std::uint64_t asked_in_all_ = 0;
  std::uint64_t random_ = 0x9e3779b97f4a7c15ULL;
  std::vector<std::uint64_t> part_;
};

}  // namespace kvtier
