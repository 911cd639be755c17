// EvictionPolicy: decides which block goes when a slot is needed. It decides and never acts.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace kvtier {

// A record of the Index. Reused after erase(); see Entry::generation.
enum class EntryId : std::uint32_t {};
constexpr std::uint32_t raw(EntryId id) { return static_cast<std::uint32_t>(id); }

// Threads: none of its own; guarded by its owner. Memory: bounded by the highest EntryId seen.
class EvictionPolicy {
 public:
  // Whether a candidate may go: not pinned, and no child would outlive it.
  using MayEvict = std::function<bool(EntryId)>;

  virtual ~EvictionPolicy() = default;

  // A block became ready. Requires that it is not in here.
  virtual void insert(EntryId id) = 0;
  // It was used. Requires that it is in here.
  virtual void touch(EntryId id) = 0;
  // It left, for whatever reason. Requires that it is in here.
  virtual void erase(EntryId id) = 0;
  // The block to evict next; it stays until erase(). nullopt when no candidate may go, or none was found
  // within a bounded search (a later call goes on from there).
  virtual std::optional<EntryId> victim(const MayEvict& may_evict) = 0;
};

// Least recently used. A candidate that may not go (it is in use, or a child hangs on it) is moved to the
// young end, so that the next search does not meet it again. A prompt whose head is older than its tail
// therefore gets younger when it is searched: who inserts and touches tail first (Engine does) has neither
// that nor the search.
class LruPolicy final : public EvictionPolicy {
 public:
  // Links for `capacity` records are reserved now, so that insert() never allocates.
  explicit LruPolicy(std::size_t capacity);
  void insert(EntryId id) override;
  void touch(EntryId id) override;
  void erase(EntryId id) override;
  std::optional<EntryId> victim(const MayEvict& may_evict) override;

  // Candidates looked at by one call of victim(): about 100 us under the engine mutex.
  static constexpr std::uint32_t kMaxSearch = 8192;
  // Links per block: what index_bytes_per_block counts for this policy.
  static constexpr std::size_t kBytesPerEntry = 8;

 private:
  static constexpr std::uint32_t kNowhere = 0xffffffffU;  // in both links of a block that is not in the list

  struct Node {
    std::uint32_t older;
    std::uint32_t younger;
  };
  void link_youngest(std::uint32_t at);
  void unlink(std::uint32_t at);
  bool contains(EntryId id) const {
    return position(id) < nodes_.size() && nodes_[position(id)].older != kNowhere;
  }
  std::uint32_t position(EntryId id) const { return raw(id) + 1; }  // node 0 is the sentinel

  std::vector<Node> nodes_;  // sentinel.younger is the oldest, sentinel.older the youngest
  std::uint32_t size_ = 0;
};

}  // namespace kvtier
