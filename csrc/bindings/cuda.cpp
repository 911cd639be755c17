// The cuda device: what there is, how it is opened, and what `kvtier bench device` measures with.
#include <algorithm>
#include <variant>

#include "common.h"

#include "kvtier/platform/cuda_device.h"

namespace kvtier::bindings {
namespace {

using Bench = std::shared_ptr<CudaBench>;
// [n, 3]: destination, source, bytes.
using RunArray = py::array_t<std::uint64_t, py::array::c_style>;

py::dict facts_dict() {
  const CudaFacts facts = take(without_gil([] { return cuda_facts(); }));
  py::list gpus;
  for (const GpuFacts& gpu : facts.gpus) {
    py::dict each;
    each["ordinal"] = gpu.ordinal;
    each["name"] = gpu.name;
    each["compute_capability"] = gpu.compute_capability;
    each["num_sms"] = gpu.num_sms;
    each["memory_bytes"] = gpu.memory_bytes;
    each["pci_bus"] = gpu.pci_bus;
    each["link"] = gpu.link;
    each["numa_node"] = gpu.numa_node;
    gpus.append(std::move(each));
  }
  py::dict all;
  all["driver_version"] = facts.driver_version;
  all["runtime_version"] = facts.runtime_version;
  all["gpus"] = std::move(gpus);
  return all;
}

std::optional<CopyPath> path_of(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return take(copy_path_named(*name));
}

// As Python gives it: an int is bytes per second, a float a share of decoding.
using Limit = std::optional<std::variant<std::uint64_t, double>>;

std::optional<CopyLimit> limit_of(const Limit& limit) {
  if (!limit) return std::nullopt;
  if (const auto* rate = std::get_if<std::uint64_t>(&*limit)) return CopyLimit(*rate);
  return CopyLimit(DecodeShare{std::get<double>(*limit)});
}

CudaOptions options_of(int ordinal, const std::optional<std::string>& path, unsigned max_sms,
                       const Limit& store_limit, const Limit& load_limit, const std::string& calibration) {
  CudaOptions options;
  options.ordinal = ordinal;
  options.path = path_of(path);
  options.max_sms = max_sms;
  options.store_limit = limit_of(store_limit);
  options.load_limit = limit_of(load_limit);
  if (calibration != "cached" && calibration != "fresh" && calibration != "none") {
    throw StatusError{
        Status::invalid_argument("calibration '" + calibration + "': must be cached, fresh or none")};
  }
  options.calibration = calibration == "cached"  ? CalibrationUse::cached
                        : calibration == "fresh" ? CalibrationUse::fresh
                                                 : CalibrationUse::none;
  return options;
}

std::vector<CopyRun> runs_of(const RunArray& array) {
  if (array.ndim() != 2 || array.shape(1) != 3) {
    throw StatusError{Status::invalid_argument("runs: must be uint64 [n, 3]: destination, source, bytes")};
  }
  std::vector<CopyRun> runs;
  const auto view = array.unchecked<2>();
  runs.reserve(static_cast<std::size_t>(view.shape(0)));
  for (py::ssize_t i = 0; i < view.shape(0); ++i) {
    runs.push_back({reinterpret_cast<void*>(view(i, 0)), reinterpret_cast<const void*>(view(i, 1)),
                    static_cast<std::size_t>(view(i, 2))});
  }
  return runs;
}

Direction direction_of(const std::string& name) {
  if (name != "store" && name != "load") {
    throw StatusError{Status::invalid_argument("direction '" + name + "': must be store or load")};
  }
  return name == "store" ? Direction::store : Direction::load;
}

// (copy, submit, decode) in seconds
py::tuple time(const Bench& bench, const RunArray& stores, const RunArray& loads, std::size_t runs_per_batch,
               const std::optional<std::string>& path, const std::string& beside) {
  if (beside != "nothing" && beside != "decode") {
    throw StatusError{Status::invalid_argument("beside '" + beside + "': must be nothing or decode")};
  }
  const std::vector<CopyRun> out = runs_of(stores);
  const std::vector<CopyRun> in = runs_of(loads);
  const std::optional<CopyPath> by = path_of(path);
  const auto with = beside == "decode" ? CudaBench::Beside::decode : CudaBench::Beside::nothing;
  const CudaBench::Timing timing =
      take(without_gil([&] { return bench->time(out, in, runs_per_batch, by, with); }));
  return py::make_tuple(timing.copy_seconds, timing.submit_seconds, timing.decode_seconds);
}

// Registered host memory as uint8 [bytes]; it keeps the bench alive.
py::array_t<std::uint8_t> host_memory(const Bench& bench, std::size_t bytes) {
  std::byte* memory = take(without_gil([&] { return bench->host_memory(bytes); }));
  const py::capsule owner(new Bench(bench), [](void* kept) { delete static_cast<Bench*>(kept); });
  return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(bytes), reinterpret_cast<std::uint8_t*>(memory),
                                   owner);
}

std::vector<std::string> path_names(CopyPaths paths) {
  std::vector<std::string> names;
  for (unsigned i = 0; i < static_cast<unsigned>(CopyPath::count_); ++i) {
    if (const auto path = static_cast<CopyPath>(i); paths.has(path)) names.emplace_back(to_string(path));
  }
  return names;
}

void bind_cuda_bench(py::module_& m) {
  py::class_<CudaBench, Bench>(m, "CudaBench")
      .def(py::init([](int ordinal, const std::optional<std::string>& path, unsigned max_sms,
                       const Limit& store_limit, const Limit& load_limit, const std::string& calibration) {
             const CudaOptions options =
                 options_of(ordinal, path, max_sms, store_limit, load_limit, calibration);
             return Bench(take(without_gil([&] { return CudaBench::create(options); })));
           }),
           py::kw_only(), py::arg("ordinal"), py::arg("path"), py::arg("max_sms"), py::arg("store_limit"),
           py::arg("load_limit"), py::arg("calibration"))
      .def(
          "device_memory",
          [](const Bench& bench, std::size_t bytes) {
            return reinterpret_cast<std::uintptr_t>(
                take(without_gil([&] { return bench->device_memory(bytes); })));
          },
          py::arg("bytes"))
      .def("host_memory", &host_memory, py::arg("bytes"))
      .def(
          "fill_device",
          [](const Bench& bench, std::uintptr_t begin, std::uint8_t value, std::size_t bytes) {
            check(without_gil([&] {
              return bench->fill_device(reinterpret_cast<std::byte*>(begin), std::byte{value}, bytes);
            }));
          },
          py::arg("begin"), py::arg("value"), py::arg("bytes"))
      .def(
          "read_device",
          [](const Bench& bench, std::uintptr_t begin, std::size_t bytes) {
            py::array_t<std::uint8_t> result(static_cast<py::ssize_t>(bytes));
            auto* to = reinterpret_cast<std::byte*>(result.mutable_data());
            check(without_gil(
                [&] { return bench->read_device(to, reinterpret_cast<const std::byte*>(begin), bytes); }));
            return result;
          },
          py::arg("begin"), py::arg("bytes"))
      .def("time", &time, py::kw_only(), py::arg("stores"), py::arg("loads"), py::arg("runs_per_batch"),
           py::arg("path"), py::arg("beside"))
      .def("decode_alone",
           [](const Bench& bench) { return take(without_gil([&] { return bench->decode_alone(); })); })
      .def("paths", [](const Bench& bench) { return path_names(bench->paths()); })
      .def(
          "chosen",
          [](const Bench& bench, const std::string& direction, std::uint64_t run_bytes) {
            return std::string(to_string(bench->chosen(direction_of(direction), run_bytes)));
          },
          py::arg("direction"), py::arg("run_bytes"));
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_facts", &facts_dict, "What GPUs there are; UnsupportedError says why there is none.");
  m.def(
      "cuda_ordinal_of",
      [](std::uintptr_t memory) { return take(cuda_ordinal_of(reinterpret_cast<const void*>(memory))); },
      py::arg("memory"));
  m.def("copy_paths", [] {
    CopyPaths all;
    for (unsigned i = 0; i < static_cast<unsigned>(CopyPath::count_); ++i) all.add(static_cast<CopyPath>(i));
    return path_names(all);
  });
  m.def(
      "cuda_device",
      [](int ordinal, const std::optional<std::string>& path, unsigned max_sms, const Limit& store_limit,
         const Limit& load_limit, const std::string& calibration) {
        const CudaOptions options = options_of(ordinal, path, max_sms, store_limit, load_limit, calibration);
        return std::shared_ptr<Device>(take(without_gil([&] { return make_cuda_device(options); })));
      },
      py::kw_only(), py::arg("ordinal"), py::arg("path"), py::arg("max_sms"), py::arg("store_limit"),
      py::arg("load_limit"), py::arg("calibration"));
  bind_cuda_bench(m);
}

}  // namespace kvtier::bindings
