// Traces through the simulation (csrc/replay), and the names of the eviction policies.
#include <algorithm>
#include <variant>

#include "common.h"
#include "python_policy.h"

#include "kvtier/replay/belady.h"
#include "kvtier/replay/simulation.h"

namespace kvtier::bindings {
namespace {

using BlockArray = py::array_t<std::uint32_t, py::array::c_style>;
using BeginArray = py::array_t<std::uint64_t, py::array::c_style>;
using TimeArray = py::array_t<std::int64_t, py::array::c_style>;

replay::TraceView view_of(const BlockArray& blocks, const BeginArray& begins, const TimeArray& at_us) {
  replay::TraceView view;
  view.blocks = {blocks.data(), static_cast<std::size_t>(blocks.size())};
  view.begins = {begins.data(), static_cast<std::size_t>(begins.size())};
  view.at_us = {at_us.data(), static_cast<std::size_t>(at_us.size())};
  const bool fits = blocks.ndim() == 1 && begins.ndim() == 1 && at_us.ndim() == 1 &&
                    view.begins.size() == view.at_us.size() + 1 && view.begins.front() == 0 &&
                    view.begins.back() == view.blocks.size() &&
                    std::is_sorted(view.begins.begin(), view.begins.end()) &&
                    std::is_sorted(view.at_us.begin(), view.at_us.end());
  const auto dense = [&view](std::uint32_t block) { return block <= view.blocks.size(); };
  if (!fits || !std::all_of(view.blocks.begin(), view.blocks.end(), dense)) {
    check(
        Status::invalid_argument("trace: begins must rise from 0 to the number of blocks, one more than "
                                 "times; times must not fall; blocks are numbered densely"));
  }
  return view;
}

std::string_view eviction_named(const std::string& name) {
  const EvictionChoice* choice = find_eviction(name);
  if (choice == nullptr) throw StatusError{Status::invalid_argument("policy '" + name + "' is not known")};
  return choice->name;
}

// A policy's name, or a Python class of the user's.
using Eviction = std::variant<std::string, py::object>;

void choose(const Eviction& eviction, std::string_view& name,
            std::optional<replay::SimulationOptions::Custom>& custom) {
  if (const auto* named = std::get_if<std::string>(&eviction)) {
    name = eviction_named(*named);
    return;
  }
  const py::object& make = std::get<py::object>(eviction);
  custom = replay::SimulationOptions::Custom{
      .make =
          [&make](const EvictionOptions& options) { return std::make_unique<PythonPolicy>(make, options); },
      .leaf_first = make.attr("leaf_first").cast<bool>()};
}

template <typename T>
py::array_t<T> array_of(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict dict_of(const replay::SimulationResult& result) {
  py::dict out;
  out["references"] = result.references;
  out["hits_host"] = result.hits_host;
  out["hits_disk"] = result.hits_disk;
  out["host_of_request"] = array_of(result.host_of_request);
  out["disk_of_request"] = array_of(result.disk_of_request);
  out["evictions_host"] = result.evictions_host;
  out["evictions_disk"] = result.evictions_disk;
  out["orphans_host"] = result.orphans_host;
  out["orphans_disk"] = result.orphans_disk;
  out["promotions"] = result.promotions;
  out["reads_hidden"] = result.reads_hidden;
  out["disk_blocks_written"] = result.disk_blocks_written;
  out["declined_admission"] = result.declined_admission;
  out["declined_budget"] = result.declined_budget;
  out["declined_parent"] = result.declined_parent;
  return out;
}

// progress: called with the requests done; what it raises ends the simulation.
py::dict simulate(const BlockArray& blocks, const BeginArray& begins, const TimeArray& at_us,
                  std::uint32_t host_blocks, std::uint32_t disk_blocks, const Eviction& host_eviction,
                  const Eviction& disk_eviction, bool plain, Admission admission,
                  std::optional<std::uint64_t> write_bytes_per_day, std::uint64_t block_bytes,
                  std::uint64_t seed, std::uint32_t writes_at_once, std::uint32_t look_ahead,
                  const py::object& progress) {
  replay::SimulationOptions options;
  const replay::TraceView view = view_of(blocks, begins, at_us);
  if (plain && look_ahead > 0) check(Status::invalid_argument("look_ahead is for the engine's form"));
  if (host_blocks == 0) check(Status::invalid_argument("host_blocks is 0; allowed: at least 1"));
  options.host_blocks = host_blocks;
  options.disk_blocks = disk_blocks;
  choose(host_eviction, options.host_eviction, options.host_custom);
  choose(disk_eviction, options.disk_eviction, options.disk_custom);
  options.form = plain ? replay::Form::plain : replay::Form::engine;
  options.admission = admission;
  options.write_bytes_per_day = write_bytes_per_day;
  options.block_bytes = block_bytes;
  options.seed = seed;
  options.writes_at_once = writes_at_once;
  options.look_ahead = look_ahead;
  std::optional<py::error_already_set> raised;
  options.progress = [&](std::size_t done) {
    const py::gil_scoped_acquire held;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (!progress.is_none()) progress(done);
      return true;
    } catch (py::error_already_set& error) {
      raised.emplace(std::move(error));
      return false;
    }
  };
  const replay::SimulationResult result = without_gil([&] { return replay::simulate(view, options); });
  if (raised) throw py::error_already_set(std::move(*raised));
  return dict_of(result);
}

std::uint64_t belady_hits(const BlockArray& blocks, const BeginArray& begins, const TimeArray& at_us,
                          std::uint64_t capacity) {
  const replay::TraceView view = view_of(blocks, begins, at_us);
  return without_gil([&] { return replay::belady_hits(view, capacity); });
}

// (n, 32) uint8: under which keys blocks of a trace stand, in a simulation and in a real replay.
py::array_t<std::uint8_t> replay_keys(const BlockArray& blocks) {
  py::array_t<std::uint8_t> keys({blocks.size(), static_cast<py::ssize_t>(kKeyBytes)});
  std::uint8_t* to = keys.mutable_data();
  for (py::ssize_t i = 0; i < blocks.size(); ++i) {
    const BlockKey key = replay::key_of(blocks.data()[i]);
    std::memcpy(to + static_cast<std::size_t>(i) * kKeyBytes, key.bytes.data(), kKeyBytes);
  }
  return keys;
}

}  // namespace

void bind_replay(py::module_& m) {
  m.def(
      "eviction_policies",
      [] {
        std::vector<std::pair<std::string, bool>> names;
        for (const EvictionChoice& choice : eviction_choices())
          names.emplace_back(choice.name, choice.leaf_first);
        return names;
      },
      "Names of the eviction policies and whether they run leaf first, the default first.");
  m.def("simulate", &simulate, py::arg("blocks").noconvert(), py::arg("begins").noconvert(),
        py::arg("at_us").noconvert(), py::kw_only(), py::arg("host_blocks"), py::arg("disk_blocks"),
        py::arg("host_eviction"), py::arg("disk_eviction"), py::arg("plain"), py::arg("admission"),
        py::arg("write_bytes_per_day"), py::arg("block_bytes"), py::arg("seed"), py::arg("writes_at_once"),
        py::arg("look_ahead"), py::arg("progress"));
  m.def("belady_hits", &belady_hits, py::arg("blocks").noconvert(), py::arg("begins").noconvert(),
        py::arg("at_us").noconvert(), py::kw_only(), py::arg("capacity"));
  m.def("replay_keys", &replay_keys, py::arg("blocks").noconvert());
}

}  // namespace kvtier::bindings
