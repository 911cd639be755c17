// The order in which catalog records are wanted, for hundreds of thousands of them while an engine opens.
// Numbers are sorted (by radix, least digit first), not records; then each record is moved, in place.
#pragma once

#include <vector>

#include "kvtier/storage/catalog.h"

namespace kvtier {

// Least recently used first, then the heads of sequences, then the older writing; but every parent before its
// children. Parents in a circle, which only a lie can make, stand in some order.
void sort_by_use(std::vector<CatalogRecord>& records);

}  // namespace kvtier
