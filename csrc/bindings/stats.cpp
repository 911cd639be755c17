// EngineStats as a dict; kvtier.metrics has the same names, and a test compares them.
#include "kvtier/engine/stats.h"

#include "common.h"

namespace kvtier::bindings {

py::dict stats_dict(const EngineStats& stats);
py::dict hops_dict(const Hops& hops);

py::dict hops_dict(const Hops& hops) {
  using namespace py::literals;  // NOLINT: "name"_a
  const auto hop = [](const HopStats& h) {
    return py::dict("transfers"_a = h.transfers, "bytes"_a = h.bytes, "seconds"_a = h.seconds,
                    "running_bytes"_a = h.running_bytes, "latency_seconds"_a = h.latency_seconds,
                    "bytes_per_second"_a = h.bytes_per_second);
  };
  return py::dict("to_device"_a = hop(hops.to_device), "from_disk"_a = hop(hops.from_disk));
}

py::dict stats_dict(const EngineStats& s) {
  using namespace py::literals;  // NOLINT: "name"_a
  const auto classes = [](const std::vector<SlotClassStats>& all) {
    py::list list;
    for (const SlotClassStats& c : all) {
      list.append(py::dict("slot_bytes"_a = c.slot_bytes, "capacity"_a = c.capacity, "usable"_a = c.usable,
                           "free"_a = c.free, "filling"_a = c.filling, "ready"_a = c.ready,
                           "leaving"_a = c.leaving));
    }
    return list;
  };
  py::list disks;
  for (const DiskStats& disk : s.disks) {
    py::dict of_disk;
    of_disk["classes"] = classes(disk.classes);
#define KVTIER_FIELD(name) of_disk[#name] = disk.name
    KVTIER_FIELD(path);
    KVTIER_FIELD(store);
    KVTIER_FIELD(capacity_bytes);
    KVTIER_FIELD(allocated_bytes);
    KVTIER_FIELD(bytes_read);
    KVTIER_FIELD(bytes_written);
    KVTIER_FIELD(bytes_prewritten);
    KVTIER_FIELD(reads);
    KVTIER_FIELD(reads_good);
    KVTIER_FIELD(reads_failed);
    KVTIER_FIELD(bad_blank);
    KVTIER_FIELD(bad_foreign);
    KVTIER_FIELD(bad_newer_version);
    KVTIER_FIELD(bad_corrupt_header);
    KVTIER_FIELD(bad_corrupt_payload);
    KVTIER_FIELD(bad_stale);
    KVTIER_FIELD(bad_unknown_key);
    KVTIER_FIELD(writes);
    KVTIER_FIELD(writes_failed);
    KVTIER_FIELD(syncs);
    KVTIER_FIELD(commits);
    KVTIER_FIELD(catalog_resets);
    KVTIER_FIELD(unanswered);
    KVTIER_FIELD(opened_from);
    KVTIER_FIELD(queue);
    KVTIER_FIELD(queue_problem);
    KVTIER_FIELD(buffers_problem);
    KVTIER_FIELD(key_problem);
    KVTIER_FIELD(growth);
    KVTIER_FIELD(health);
    KVTIER_FIELD(catalog_health);
#undef KVTIER_FIELD
    disks.append(std::move(of_disk));
  }
  const auto ghost = [](const GhostStats& g) -> py::object {
    if (g.points.empty()) return py::none();
    py::list points;
    for (const GhostPoint& p : g.points) {
      points.append(py::dict("factor"_a = p.factor, "capacity_blocks"_a = p.capacity_blocks,
                             "hit_rate"_a = p.hit_rate));
    }
    return py::dict("sample_rate"_a = g.sample_rate, "asked_blocks"_a = g.asked_blocks,
                    "sampled_blocks"_a = g.sampled_blocks, "memory_bytes"_a = g.memory_bytes,
                    "points"_a = std::move(points));
  };
  py::dict d;
  d["hops"] = hops_dict(s.hops);
  d["ghost_host"] = ghost(s.ghost_host);
  d["ghost_disk"] = ghost(s.ghost_disk);
  d["host"] = classes(s.host);
  d["disks"] = std::move(disks);
#define KVTIER_FIELD(name) d[#name] = s.name
  KVTIER_FIELD(host_bytes);
  KVTIER_FIELD(host_prefaulted_bytes);
  KVTIER_FIELD(registered_chunks);
  KVTIER_FIELD(refused_chunks);
  KVTIER_FIELD(host_numa_node);
  KVTIER_FIELD(index_bytes_per_block);
  KVTIER_FIELD(pins);
  KVTIER_FIELD(pinned_blocks);
  KVTIER_FIELD(quarantined_blocks);
  KVTIER_FIELD(leases);
  KVTIER_FIELD(transfers_running);
  KVTIER_FIELD(lookup_blocks);
  KVTIER_FIELD(lookup_hits_host);
  KVTIER_FIELD(lookup_hits_disk);
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
  KVTIER_FIELD(promote_good);
  KVTIER_FIELD(promote_bad);
  KVTIER_FIELD(promote_failed);
  KVTIER_FIELD(promote_cancelled);
  KVTIER_FIELD(promote_declined);
  KVTIER_FIELD(disk_durable);
  KVTIER_FIELD(disk_declined_admission);
  KVTIER_FIELD(disk_declined_budget);
  KVTIER_FIELD(disk_declined_busy);
  KVTIER_FIELD(disk_declined_full);
  KVTIER_FIELD(disk_declined_parent);
  KVTIER_FIELD(disk_declined_ttl);
  KVTIER_FIELD(disk_gone);
  KVTIER_FIELD(disk_failed);
  KVTIER_FIELD(disk_evictions);
  KVTIER_FIELD(disk_orphans);
  KVTIER_FIELD(disk_waiting);
  KVTIER_FIELD(promotions_running);
  KVTIER_FIELD(write_budget_left_bytes);
  KVTIER_FIELD(bytes_stored);
  KVTIER_FIELD(bytes_loaded);
  KVTIER_FIELD(evictions);
  KVTIER_FIELD(orphans);
  KVTIER_FIELD(expirations);
  KVTIER_FIELD(drops);
  KVTIER_FIELD(health);
  KVTIER_FIELD(arena_problem);
#undef KVTIER_FIELD
  return d;
}

}  // namespace kvtier::bindings
