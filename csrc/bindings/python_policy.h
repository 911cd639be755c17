// PythonPolicy: an eviction policy of the user's, in Python (kvtier/eviction.py).
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "common.h"

#include "kvtier/index/eviction.h"

namespace kvtier::bindings {

// Takes the GIL for every call. A victim that may not go is a StatusError that names it; what Python raises
// goes through. Threads: none of its own.
class PythonPolicy final : public EvictionPolicy {
 public:
  // `make(blocks)` makes the object. Requires the GIL nowhere.
  PythonPolicy(const py::object& make, const EvictionOptions& options);
  ~PythonPolicy() override;

  void insert(EntryId id, const BlockFacts& block) override;
  void touch(EntryId id) override;
  void hold(EntryId id) override;
  void let_go(EntryId id) override;
  void erase(EntryId id, const BlockName& name, Departure why) override;
  std::optional<EntryId> victim() override;
  void advance(std::int64_t now_us) override;
  double bytes_per_record() const override { return 1; }

 private:
  enum class Place : std::uint8_t { nowhere, evictable, held };
  py::object policy_;
  std::vector<Place> places_;  // of each record
};

}  // namespace kvtier::bindings
