// The policies behind eviction_choices(), each in a file of its own.
#pragma once

#include <memory>

#include "kvtier/index/eviction.h"

namespace kvtier::internal {

std::unique_ptr<EvictionPolicy> make_lru(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_fifo(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_lfu(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_slru(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_sieve(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_s3_fifo(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_arc(const EvictionOptions& options);
std::unique_ptr<EvictionPolicy> make_return_hazard(const EvictionOptions& options);

}  // namespace kvtier::internal
