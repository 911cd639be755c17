// Each policy against its paper, written down naively: a cache of a few blocks under random use must let go
// of the same blocks in the same order.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "support/eviction_world.h"

namespace kvtier {
namespace {

constexpr std::size_t kBlocks = 20;
using Queue = std::list<std::uint64_t>;  // keys, oldest first

bool has(const Queue& queue, std::uint64_t key) {
  return std::find(queue.begin(), queue.end(), key) != queue.end();
}

std::uint64_t pop(Queue& queue) {
  const std::uint64_t key = queue.front();
  queue.pop_front();
  return key;
}

class Model {
 public:
  virtual ~Model() = default;
  virtual void insert(std::uint64_t key) = 0;
  virtual void touch(std::uint64_t key) = 0;
  virtual std::uint64_t evict() = 0;
  virtual void drop(std::uint64_t key) = 0;
};

class FifoModel : public Model {
 public:
  void insert(std::uint64_t key) override { queue_.push_back(key); }
  void touch(std::uint64_t /*key*/) override {}
  std::uint64_t evict() override { return pop(queue_); }
  void drop(std::uint64_t key) override { queue_.remove(key); }

 protected:
  Queue queue_;
};

class LruModel final : public FifoModel {
 public:
  void touch(std::uint64_t key) override {
    queue_.remove(key);
    queue_.push_back(key);
  }
};

class LfuModel final : public Model {
 public:
  void insert(std::uint64_t key) override { blocks_[key] = {1, ++now_}; }
  void touch(std::uint64_t key) override { blocks_[key] = {std::min(blocks_[key].first + 1, 256), ++now_}; }
  std::uint64_t evict() override {
    const auto worst = std::min_element(blocks_.begin(), blocks_.end(),
                                        [](const auto& a, const auto& b) { return a.second < b.second; });
    const std::uint64_t key = worst->first;
    blocks_.erase(worst);
    return key;
  }
  void drop(std::uint64_t key) override { blocks_.erase(key); }

 private:
  std::map<std::uint64_t, std::pair<int, int>> blocks_;  // uses, last use
  int now_ = 0;
};

class SlruModel final : public Model {
 public:
  void insert(std::uint64_t key) override { probation_.push_back(key); }
  void touch(std::uint64_t key) override {
    drop(key);
    protected_.push_back(key);
    if (protected_.size() > kBlocks / 2) probation_.push_back(pop(protected_));
  }
  std::uint64_t evict() override { return pop(probation_.empty() ? protected_ : probation_); }
  void drop(std::uint64_t key) override {
    probation_.remove(key);
    protected_.remove(key);
  }

 private:
  Queue probation_;
  Queue protected_;
};

// As in the paper: one list and a hand that stays where it was.
class SieveModel final : public Model {
 public:
  void insert(std::uint64_t key) override { queue_.push_back({key, false}); }
  void touch(std::uint64_t key) override { find(key)->used = true; }
  std::uint64_t evict() override {
    auto at = hand_ ? find(*hand_) : queue_.begin();
    while (at->used) {
      at->used = false;
      if (++at == queue_.end()) at = queue_.begin();
    }
    const std::uint64_t key = at->key;
    hand_ = key;
    drop(key);
    return key;
  }
  void drop(std::uint64_t key) override {
    const auto at = find(key);
    if (hand_ == key) {
      const auto younger = std::next(at);
      hand_ = younger == queue_.end() ? std::nullopt : std::optional(younger->key);
    }
    queue_.erase(at);
  }

 private:
  struct Block {
    std::uint64_t key;
    bool used;
  };
  std::list<Block>::iterator find(std::uint64_t key) {
    return std::find_if(queue_.begin(), queue_.end(), [key](const Block& b) { return b.key == key; });
  }

  std::list<Block> queue_;
  std::optional<std::uint64_t> hand_;  // nullopt: at the oldest
};

class S3FifoModel final : public Model {
 public:
  void insert(std::uint64_t key) override {
    uses_[key] = 0;
    if (has(ghosts_, key)) {
      ghosts_.remove(key);
      main_.push_back(key);
    } else {
      small_.push_back(key);
    }
  }
  void touch(std::uint64_t key) override { uses_[key] = std::min(uses_[key] + 1, 3); }
  std::uint64_t evict() override {
    while (true) {
      if (!small_.empty() && (small_.size() >= kBlocks / 10 || main_.empty())) {
        const std::uint64_t key = pop(small_);
        if (uses_[key] == 0) {
          ghosts_.push_back(key);
          if (ghosts_.size() > kBlocks - kBlocks / 10) ghosts_.pop_front();
          return key;
        }
        uses_[key] = 0;
        main_.push_back(key);
      } else {
        const std::uint64_t key = pop(main_);
        if (uses_[key]-- == 0) return key;
        main_.push_back(key);
      }
    }
  }
  void drop(std::uint64_t key) override {
    small_.remove(key);
    main_.remove(key);
  }

 private:
  Queue small_;
  Queue main_;
  Queue ghosts_;
  std::map<std::uint64_t, int> uses_;
};

class ArcModel final : public Model {
 public:
  void insert(std::uint64_t key) override {
    if (has(b1_, key)) {
      p_ = std::min(kBlocks, p_ + std::max<std::size_t>(1, b2_.size() / b1_.size()));
      b1_.remove(key);
      t2_.push_back(key);
    } else if (has(b2_, key)) {
      p_ -= std::min(p_, std::max<std::size_t>(1, b1_.size() / b2_.size()));
      b2_.remove(key);
      t2_.push_back(key);
    } else {
      t1_.push_back(key);
    }
    while (!b1_.empty() && t1_.size() + b1_.size() > kBlocks) b1_.pop_front();
    while (b1_.size() + b2_.size() > kBlocks) (b2_.empty() ? b1_ : b2_).pop_front();
  }
  void touch(std::uint64_t key) override {
    drop(key);
    t2_.push_back(key);
  }
  std::uint64_t evict() override {
    const bool first = !t1_.empty() && (t1_.size() > p_ || t2_.empty());
    const std::uint64_t key = pop(first ? t1_ : t2_);
    (first ? b1_ : b2_).push_back(key);
    return key;
  }
  void drop(std::uint64_t key) override {
    t1_.remove(key);
    t2_.remove(key);
  }

 private:
  Queue t1_, t2_, b1_, b2_;
  std::size_t p_ = 0;
};

struct Pair {
  std::string name;
  std::function<std::unique_ptr<Model>()> make;
};

template <typename T>
Pair pair_of(const char* name) {
  return {name, [] { return std::make_unique<T>(); }};
}

class PolicyModels : public ::testing::TestWithParam<Pair> {};

TEST_P(PolicyModels, the_same_blocks_go_in_the_same_order) {
  for (unsigned seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    NumberedPolicy policy(GetParam().name, kBlocks);
    const std::unique_ptr<Model> model = GetParam().make();
    std::map<std::uint64_t, std::uint32_t> id_of;  // of what is resident
    std::map<std::uint32_t, std::uint64_t> key_of;
    for (int step = 0; step < 4000; ++step) {
      // A few keys are wanted often, and which these are drifts.
      const std::uint64_t key =
          random() % 3 == 0 ? random() % 12 : (random() % 60) + static_cast<unsigned>(step) / 40;
      const auto there = id_of.find(key);
      if (there != id_of.end() && random() % 30 == 0) {
        policy.drop(there->second);
        model->drop(key);
        key_of.erase(there->second);
        id_of.erase(there);
        continue;
      }
      if (there != id_of.end()) {
        policy.touch(there->second);
        model->touch(key);
        continue;
      }
      if (id_of.size() == kBlocks) {
        const std::optional<std::uint32_t> gone = policy.evict();
        ASSERT_TRUE(gone);
        const std::uint64_t expected = model->evict();
        ASSERT_EQ(key_of[*gone], expected) << "step " << step;
        id_of.erase(expected);
        key_of.erase(*gone);
      }
      std::uint32_t id = 0;
      while (key_of.contains(id)) ++id;
      policy.insert(id, key);
      model->insert(key);
      id_of[key] = id;
      key_of[id] = key;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, PolicyModels,
                         ::testing::Values(pair_of<LruModel>("lru"), pair_of<FifoModel>("fifo"),
                                           pair_of<LfuModel>("lfu"), pair_of<SlruModel>("slru"),
                                           pair_of<SieveModel>("sieve"), pair_of<S3FifoModel>("s3-fifo"),
                                           pair_of<ArcModel>("arc")),
                         [](const auto& each) {
                           std::string said = each.param.name;
                           std::replace(said.begin(), said.end(), '-', '_');
                           return said;
                         });

}  // namespace
}  // namespace kvtier
