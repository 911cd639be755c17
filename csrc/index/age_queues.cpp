#include "kvtier/index/age_queues.h"

#include <algorithm>

namespace kvtier {
namespace {

// std::*_heap keep the greatest in front; we want the oldest.
constexpr auto kYoungerFirst = [](const auto& a, const auto& b) { return a.age > b.age; };

constexpr std::size_t kStaleAllowed = 64;  // beside as many as are not: compacting stays rare

}  // namespace

AgeQueues::AgeQueues(std::size_t records, std::uint32_t num_queues)
    : num_queues_(num_queues), heaps_(num_queues), sizes_(num_queues, 0) {
  KVTIER_CHECK(num_queues > 0 && num_queues <= kMostQueues);
  nodes_.reserve(records + num_queues);
  nodes_.resize(num_queues);
  for (std::uint32_t queue = 0; queue < num_queues; ++queue)
    nodes_[queue].older = nodes_[queue].younger = queue;
}

void AgeQueues::let_go_out_of_order(EntryId id, Node& n) {
  Heap& heap = heaps_[n.queue];
  if (heap.waiting.size() > 2 * heap.inside + kStaleAllowed) compact(heap);
  heap.waiting.push_back({n.age, id});
  std::push_heap(heap.waiting.begin(), heap.waiting.end(), kYoungerFirst);
  place(n, Where::heap);
  ++heap.inside;
}

// An age is given once, so it also tells the queue.
bool AgeQueues::is_stale(const Waiting& waiting) {
  const Node& n = node(waiting.id);
  return where(n) != Where::heap || n.age != waiting.age;
}

// Where nothing is ever evicted nobody pops the heap, and it would grow with every entry let go. An entry
// that was held and let go again without a move stands in it twice.
void AgeQueues::compact(Heap& heap) {
  std::vector<Waiting>& waiting = heap.waiting;
  std::erase_if(waiting, [this](const Waiting& each) { return is_stale(each); });
  std::sort(waiting.begin(), waiting.end(),
            [](const Waiting& a, const Waiting& b) { return a.age < b.age; });  // which is a heap
  const auto same = [](const Waiting& a, const Waiting& b) { return a.age == b.age; };
  waiting.erase(std::unique(waiting.begin(), waiting.end(), same), waiting.end());
}

void AgeQueues::drop_stale(Heap& heap) {
  while (!heap.waiting.empty() && is_stale(heap.waiting.front())) {
    std::pop_heap(heap.waiting.begin(), heap.waiting.end(), kYoungerFirst);
    heap.waiting.pop_back();
  }
}

}  // namespace kvtier
