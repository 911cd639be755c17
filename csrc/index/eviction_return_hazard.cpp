// return-hazard: evicts the block from whose return the least is to be expected for the time it would be
// held.
//
// A KV cache knows what a web cache does not. A prompt comes back whole or not at all, with the next turn of
// its conversation; how probable that is, and when, depends on how often the conversation has come back
// already and on what it grew out of, and hardly on the single block. So blocks are put into classes by
//
//   * returns: how often the block was used again, remembered through evictions (DepartedBlocks);
//   * for blocks that were never used again, what they follow on (return_classes.h);
//   * and whether they were the last block of their prompt. A partly filled one never comes back under this
//   key.
//
// ReturnHazards learns for each class how likely a return is at which time since the last use, from blocks
// that are resident and from evicted ones alike, so that what is decided does not hide what would have been.
// The block with the lowest Gittins index goes: a prompt that may come back in a minute can outlive one that
// was used just now and belongs to a class that does not. Classes and ages are kept by AgeCohorts.
//
// Time is TickClock's.
//
// Expected blocks go only when nothing else is left. A block that was fetched ahead of a request counts as
// used when it comes, and the request's own use of it is the same one.
//
// Memory: 16 bytes per record, 16 for each of as many departed blocks as the tier has blocks and 32,768 more,
// and 0.2 MiB, all allocated at the start; and the ids of one prompt's blocks. Insert and evict are O(log) of
// the age, but for rank() at most once and learn() at most every 16th time that a tick has passed.
#include <algorithm>
#include <limits>
#include <vector>

#include "eviction_policies.h"
#include "return_classes.h"

#include "kvtier/core/status.h"
#include "kvtier/index/age_cohorts.h"
#include "kvtier/index/departed_blocks.h"
#include "kvtier/index/return_hazards.h"
#include "kvtier/index/tick_clock.h"

namespace kvtier::internal {
namespace {

constexpr Tick kLearnTicks = 16;                      // value() changes slowly
constexpr std::size_t kLeastDeparted = 32'768;        // small tiers learn from more than they hold
constexpr std::size_t kLeastUsesUntilHalf = 262'144;  // of returns that are remembered in full

constexpr std::uint32_t kExpected = kNumBlockClasses;  // a queue of its own
constexpr std::uint32_t kNumQueues = kNumBlockClasses + 1;

class ReturnHazardPolicy final : public EvictionPolicy {
 public:
  explicit ReturnHazardPolicy(const EvictionOptions& options)
      : blocks_(std::max<std::size_t>(1, options.blocks)),
        seed_(options.seed),
        records_(options.records),
        cohorts_(options.records, kNumQueues),
        hazards_(kNumBlockClasses, std::max(kLeastUsesUntilHalf, 16 * blocks_)),
        departed_(departed_capacity()),
        clock_(blocks_) {}

  void insert(EntryId id, const BlockFacts& block) override {
    const bool same_prompt = continues_prompt(id, block.parent);
    if (!same_prompt) prompt_.clear();
    pass(clock_.inserted(same_prompt));
    Record& record = records_[raw(id)];
    KVTIER_CHECK(!record.tracked);
    record = Record{};
    record.tracked = true;
    record.had_child = last_parent_ == raw(id);
    record.expected = block.expected;
    come_back(record, block_digest(block.key, block.group, seed_));
    record.ahead = block.arrival == Arrival::ahead;
    join(id);
    prompt_.push_back(id);
    if (!block.parent || records_[raw(*block.parent)].tracked) follow(block.parent);
    last_inserted_ = raw(id);
    last_parent_ = block.parent ? raw(*block.parent) : kNowhere;
  }

  void touch(EntryId id) override {
    Record& record = tracked(id);
    leave(id);
    use(record);
    join(id);
  }

  void hold(EntryId id) override {
    Record& record = tracked(id);
    KVTIER_CHECK(!record.held);
    cohorts_.remove(id, record.used, queue(record));
    record.held = true;
  }

  void let_go(EntryId id) override {
    Record& record = tracked(id);
    KVTIER_CHECK(record.held);
    record.held = false;
    // A parent is next behind its last child: prompts go one by one, not all of them a little.
    cohorts_.add_first(id, record.used, queue(record));
  }

  void erase(EntryId id, const BlockName& name, Departure why) override {
    Record& record = tracked(id);
    if (!record.held) cohorts_.remove(id, record.used, queue(record));
    record.tracked = false;
    std::optional<BlockPast> forgotten = record.past();
    if (why == Departure::evicted)
      forgotten = departed_.add(block_digest(name.key, name.group, seed_), record.past());
    if (forgotten) cohorts_.count_out(forgotten->used, forgotten->block_class);
  }

  std::optional<EntryId> victim() override {
    if (!cohorts_.ranked()) rank();
    return cohorts_.first();
  }

  void advance(std::int64_t now_us) override { pass(clock_.advance(now_us)); }

  void expect(EntryId id) override { set_expected(id, true); }
  void expect_no_more(EntryId id) override { set_expected(id, false); }

  void fetch(std::span<const BlockKey> keys, GroupId group) const override {
    departed_.fetch(keys, group, seed_);
  }

  double bytes_per_record() const override {
    const double bytes = static_cast<double>(sizeof *this + records_.size() * sizeof(Record)) +
                         AgeCohorts::bytes_for(records_.size(), kNumQueues) +
                         ReturnHazards::bytes_for(kNumBlockClasses) +
                         DepartedBlocks::bytes_for(departed_capacity());
    return bytes / static_cast<double>(std::max<std::size_t>(1, records_.size()));
  }

 private:
  static constexpr std::uint32_t kNowhere = 0xffffffffU;
  struct Record {
    Tick used = 0;  // these as BlockPast's
    std::uint8_t returns = 0;
    std::uint8_t chain = 0;
    std::uint8_t block_class = 0;
    bool tracked : 1 = false;
    bool held : 1 = false;
    bool had_child : 1 = false;
    bool comes_back : 1 = false;  // its chain is from before
    bool expected : 1 = false;    // in the queue of the expected
    bool ahead : 1 = false;       // the use that it came for is counted already, and still to come

    BlockPast past() const { return {used, returns, chain, block_class}; }
  };
  static_assert(sizeof(Record) == 8);

  std::size_t departed_capacity() const { return blocks_ + kLeastDeparted; }

  Record& tracked(EntryId id) {
    Record& record = records_[raw(id)];
    KVTIER_CHECK(record.tracked);
    return record;
  }

  static std::uint32_t queue(const Record& record) {
    return record.expected ? kExpected : record.block_class;
  }

  // Into count and queue of its class, as last used when it says.
  void join(EntryId id) {
    Record& record = records_[raw(id)];
    record.block_class = class_of(record.past(), record.had_child);
    cohorts_.count_in(record.used, record.block_class);
    if (!record.held) cohorts_.add_last(id, record.used, queue(record));
  }

  void leave(EntryId id) {
    const Record& record = records_[raw(id)];
    cohorts_.count_out(record.used, record.block_class);
    if (!record.held) cohorts_.remove(id, record.used, queue(record));
  }

  // A use now.
  void use(Record& record) {
    const bool counted = record.ahead;
    record.ahead = false;
    if (cohorts_.now() - record.used < kSameUseTicks) return;
    if (!counted) count_return(record);
    record.used = cohorts_.now();
  }

  void count_return(Record& record) {
    hazards_.returned(record.block_class, cohorts_.now() - record.used);
    record.returns = one_more(record.returns);
  }

  // A prompt becomes ready head first or tail first, and block by block.
  bool continues_prompt(EntryId id, std::optional<EntryId> parent) const {
    return !prompt_.empty() && ((parent && raw(*parent) == last_inserted_) || last_parent_ == raw(id));
  }

  // The new blocks of the prompt hang on `parent`, and their chain is known.
  void follow(std::optional<EntryId> parent) {
    const std::uint8_t chain = parent ? chain_behind(*parent) : kNew;
    for (const EntryId id : prompt_) {
      const Record& record = records_[raw(id)];
      if (record.tracked && record.chain != chain && !record.comes_back) change(id, chain, record.had_child);
    }
    prompt_.clear();
    if (parent && !records_[raw(*parent)].had_child) change(*parent, records_[raw(*parent)].chain, true);
  }

  std::uint8_t chain_behind(EntryId parent) const {
    const Record& record = records_[raw(parent)];
    const bool returns_now = record.used != cohorts_.now() && !record.ahead;  // its touch is still to come
    const std::uint32_t returns = record.returns + (returns_now ? 1U : 0U);
    return returns == 0 ? record.chain : chain_after(returns);
  }

  void change(EntryId id, std::uint8_t chain, bool had_child) {
    leave(id);
    records_[raw(id)].chain = chain;
    records_[raw(id)].had_child = had_child;
    join(id);
  }

  // A block that was evicted not long ago goes on where it left.
  void come_back(Record& record, std::uint64_t digest) {
    if (const std::optional<BlockPast> past = departed_.take(digest)) {
      cohorts_.count_out(past->used, past->block_class);
      record.used = past->used;
      record.returns = past->returns;
      record.chain = past->chain;
      record.block_class = past->block_class;
      record.comes_back = true;
      use(record);
    }
    record.used = cohorts_.now();
  }

  void pass(Tick ticks) {
    if (ticks == 0) return;
    cohorts_.pass(ticks, [this](Tick age, std::span<const std::uint32_t> blocks, Tick step) {
      hazards_.waited(age, blocks.first(kNumBlockClasses), step);
    });
    hazards_.passed(ticks);
  }

  void rank() {
    if (cohorts_.now() - learned_at_ >= kLearnTicks) {
      hazards_.learn();
      learned_at_ = cohorts_.now();
    }
    cohorts_.rank([this](Tick age, std::span<float> into) {
      const std::span<const float> values = hazards_.values(age);
      std::copy(values.begin(), values.end(), into.begin());
      into[kExpected] = std::numeric_limits<float>::infinity();
    });
  }

  void set_expected(EntryId id, bool expected) {
    Record& record = tracked(id);
    if (!record.held) cohorts_.remove(id, record.used, queue(record));
    record.expected = expected;
    if (!record.held) cohorts_.add_last(id, record.used, queue(record));
  }

  std::size_t blocks_;
  std::uint64_t seed_;
  HugeVector<Record> records_;
  AgeCohorts cohorts_;
  ReturnHazards hazards_;
  DepartedBlocks departed_;
  Tick learned_at_ = 0;
  TickClock clock_;
  std::vector<EntryId> prompt_;  // blocks inserted in a row whose chain is not known yet
  std::uint32_t last_inserted_ = kNowhere;
  std::uint32_t last_parent_ = kNowhere;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_return_hazard(const EvictionOptions& options) {
  return std::make_unique<ReturnHazardPolicy>(options);
}

}  // namespace kvtier::internal
