#include "kvtier/index/return_book.h"

#include <algorithm>

#include "return_classes.h"

#include "kvtier/index/eviction.h"

namespace kvtier {
namespace {

using internal::class_of;

constexpr Tick kLearnTicks = 16;             // hazards change slowly
constexpr std::size_t kLeastKnown = 32'768;  // a small tier learns from more than it holds
constexpr std::size_t kLeastUses = 262'144;  // that are remembered in full
constexpr std::uint8_t kUnknownClass = 2 * internal::kNew;

}  // namespace

ReturnBook::ReturnBook(std::size_t blocks, std::uint64_t seed)
    : seed_(seed),
      cohorts_(0, internal::kNumBlockClasses),
      hazards_(internal::kNumBlockClasses, std::max(kLeastUses, 16 * blocks)),
      known_(blocks + kLeastKnown),
      clock_(blocks) {}

void ReturnBook::appears(const BlockKey& key, GroupId group, const BlockKey* parent, Arrival arrival) {
  const std::uint64_t digest = block_digest(key, group, seed_);
  std::uint8_t chain = internal::kNew;
  bool same_prompt = false;
  if (parent != nullptr) {
    const std::uint64_t parent_digest = block_digest(*parent, group, seed_);
    same_prompt = parent_digest == last_;
    const std::optional<BlockPast> above = known_.find(parent_digest);
    chain = chain_behind(above);
    if (above) give_child(parent_digest, *above);
  }
  pass(clock_.inserted(same_prompt));
  if (!began_) began_ = now();
  last_ = digest;
  if (arrival == Arrival::ahead ? known_.find(digest).has_value() : use(digest)) return;
  BlockPast past{.used = now(), .chain = chain};
  past.block_class = class_of(past, /*had_child=*/false);
  remember(digest, past);
}

void ReturnBook::used(const BlockKey& key, GroupId group) { use(block_digest(key, group, seed_)); }

// False when the block is not known.
bool ReturnBook::use(std::uint64_t digest) {
  const std::optional<BlockPast> known = known_.find(digest);
  if (!known) return false;
  if (now() - known->used < internal::kSameUseTicks) return true;
  BlockPast past = *known;
  known_.take(digest);
  cohorts_.count_out(past.used, past.block_class);
  count_return(past);
  remember(digest, past);
  return true;
}

void ReturnBook::count_return(BlockPast& past) {
  hazards_.returned(past.block_class, now() - past.used);
  past.returns = internal::one_more(past.returns);
  past.used = now();
  past.block_class = class_of(past, /*had_child=*/true);
}

void ReturnBook::remember(std::uint64_t digest, const BlockPast& past) {
  cohorts_.count_in(past.used, past.block_class);
  if (const std::optional<BlockPast> forgotten = known_.add(digest, past)) {
    cohorts_.count_out(forgotten->used, forgotten->block_class);
  }
}

// What a new block hangs on. The touch of a block that was there is still to come.
std::uint8_t ReturnBook::chain_behind(const std::optional<BlockPast>& above) const {
  if (!above) return internal::kFirstReturn;  // known no more
  const bool returns_now = now() - above->used >= internal::kSameUseTicks;
  const std::uint32_t returns = above->returns + (returns_now ? 1U : 0U);
  return returns == 0 ? above->chain : internal::chain_after(returns);
}

void ReturnBook::give_child(std::uint64_t digest, const BlockPast& past) {
  const std::uint8_t now_of = class_of(past, /*had_child=*/true);
  if (now_of == past.block_class) return;
  cohorts_.count_out(past.used, past.block_class);
  cohorts_.count_in(past.used, now_of);
  known_.set_class(digest, now_of);
}

void ReturnBook::pass(Tick ticks) {
  if (ticks == 0) return;
  cohorts_.pass(ticks, [this](Tick age, std::span<const std::uint32_t> blocks, Tick step) {
    hazards_.waited(age, blocks, step);
  });
  hazards_.passed(ticks);
}

double ReturnBook::returning(const BlockKey& key, GroupId group, Tick unused, Tick ticks) {
  if (now() - learned_at_ >= kLearnTicks) {
    hazards_.learn_returns();
    learned_at_ = now();
  }
  const std::optional<BlockPast> past = known_.find(block_digest(key, group, seed_));
  if (!past) {
    const Tick unseen = now() - began_.value_or(now());
    return hazards_.returning(kUnknownClass, std::max(unused, unseen), ticks);
  }
  return hazards_.returning(past->block_class, std::max(unused, now() - past->used), ticks);
}

}  // namespace kvtier
