// EngineStats as a dict; kvtier.metrics has the same names, and a test compares them.
#include "kvtier/engine/stats.h"

#include "common.h"

namespace kvtier::bindings {

py::dict stats_dict(const EngineStats& stats);

py::dict stats_dict(const EngineStats& s) {
  using namespace py::literals;  // NOLINT: "name"_a
  py::list host;
  for (const SlotClassStats& c : s.host) {
    host.append(py::dict("slot_bytes"_a = c.slot_bytes, "capacity"_a = c.capacity, "usable"_a = c.usable,
                         "free"_a = c.free, "filling"_a = c.filling, "ready"_a = c.ready,
                         "leaving"_a = c.leaving));
  }
  py::dict d;
  d["host"] = std::move(host);
#define KVTIER_FIELD(name) d[#name] = s.name
  KVTIER_FIELD(host_bytes);
  KVTIER_FIELD(host_prefaulted_bytes);
  KVTIER_FIELD(registered_chunks);
  KVTIER_FIELD(refused_chunks);
  KVTIER_FIELD(index_bytes_per_block);
  KVTIER_FIELD(pins);
  KVTIER_FIELD(pinned_blocks);
  KVTIER_FIELD(quarantined_blocks);
  KVTIER_FIELD(leases);
  KVTIER_FIELD(transfers_running);
  KVTIER_FIELD(lookup_blocks);
  KVTIER_FIELD(lookup_hits_host);
  KVTIER_FIELD(lookup_misses_absent);
  KVTIER_FIELD(lookup_misses_pending);
  KVTIER_FIELD(lookup_misses_failed);
  KVTIER_FIELD(store_stored);
  KVTIER_FIELD(store_present);
  KVTIER_FIELD(store_pending);
  KVTIER_FIELD(store_declined);
  KVTIER_FIELD(store_failed);
  KVTIER_FIELD(store_dropped);
  KVTIER_FIELD(load_loaded);
  KVTIER_FIELD(load_missed);
  KVTIER_FIELD(load_pending);
  KVTIER_FIELD(load_failed);
  KVTIER_FIELD(bytes_stored);
  KVTIER_FIELD(bytes_loaded);
  KVTIER_FIELD(evictions);
  KVTIER_FIELD(drops);
  KVTIER_FIELD(health);
  KVTIER_FIELD(arena_problem);
#undef KVTIER_FIELD
  return d;
}

}  // namespace kvtier::bindings
