#include "kvtier/index/eviction.h"

#include "eviction_policies.h"

namespace kvtier {

std::span<const EvictionChoice> eviction_choices() {
  static constexpr EvictionChoice kChoices[] = {
      {kDefaultEviction, /*leaf_first=*/true, internal::make_return_hazard},
      {"lru", true, internal::make_lru},
      {"fifo", false, internal::make_fifo},
      {"lfu", false, internal::make_lfu},
      {"slru", false, internal::make_slru},
      {"sieve", false, internal::make_sieve},
      {"s3-fifo", false, internal::make_s3_fifo},
      {"arc", false, internal::make_arc},
  };
  return kChoices;
}

const EvictionChoice* find_eviction(std::string_view name) {
  for (const EvictionChoice& choice : eviction_choices()) {
    if (choice.name == name) return &choice;
  }
  return nullptr;
}

}  // namespace kvtier
