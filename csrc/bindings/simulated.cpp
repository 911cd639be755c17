// SimulatedDevice for Python tests. Its kernels are Python callables.
#include "common.h"

#include "kvtier/platform/simulated_device.h"

namespace kvtier::bindings {
namespace {

using Simulated = std::shared_ptr<SimulatedDevice>;

bool interpreter_is_going() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// The destructor joins a thread that may be inside a Python kernel: it must not hold the GIL.
struct DeleteWithoutGil {
  void operator()(SimulatedDevice* device) const {
    if (PyGILState_Check() != 0) {
      const py::gil_scoped_release release;
      delete device;
    } else {
      delete device;
    }
  }
};

// A Python callable that other threads run and destroy. One that raises reports through sys.unraisablehook.
class PythonKernel {
 public:
  explicit PythonKernel(py::function function) : function_(std::move(function)) {}
  PythonKernel(const PythonKernel&) = delete;
  PythonKernel& operator=(const PythonKernel&) = delete;
  ~PythonKernel() {
    if (origin_.inherited() || interpreter_is_going()) {
      static_cast<void>(function_.release());
      return;
    }
    const py::gil_scoped_acquire acquire;
    function_.release().dec_ref();
  }

  void run() const {
    if (origin_.inherited() || interpreter_is_going()) return;
    const py::gil_scoped_acquire acquire;
    try {
      function_();
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("a kernel of the simulated device");
    }
  }

 private:
  py::function function_;
  Origin origin_;
};

void launch(const Simulated& device, std::uintptr_t stream, py::function function) {
  auto kernel = std::make_shared<PythonKernel>(std::move(function));
  without_gil([&] { device->launch(StreamHandle{stream}, [k = std::move(kernel)] { k->run(); }); });
}

Simulated make(std::uint64_t seed, int ordinal, std::uint32_t max_delay_us, std::uint32_t patience_us,
               bool relaxed_capture) {
  SimulatedOptions options;
  options.seed = seed;
  options.ordinal = ordinal;
  options.max_delay_us = max_delay_us;
  options.patience_us = patience_us;
  options.capture_mode = relaxed_capture ? CaptureMode::relaxed : CaptureMode::global;
  return {new SimulatedDevice(options), DeleteWithoutGil{}};
}

}  // namespace

void bind_simulated(py::module_& m) {
  const auto stream = py::arg("stream");
  py::class_<SimulatedDevice, Device, Simulated>(m, "SimulatedDevice")
      .def(py::init(&make), py::arg("seed"), py::arg("ordinal"), py::arg("max_delay_us"),
           py::arg("patience_us"), py::arg("relaxed_capture"))
      .def(
          "allocate",
          [](const Simulated& device, std::size_t bytes) {
            return reinterpret_cast<std::uintptr_t>(without_gil([&] { return device->allocate(bytes); }));
          },
          py::arg("bytes"))
      .def(
          "free",
          [](const Simulated& device, std::uintptr_t begin) {
            without_gil([&] { device->free(reinterpret_cast<std::byte*>(begin)); });
          },
          py::arg("begin"))
      .def("create_framework_stream",
           [](const Simulated& device) {
             return static_cast<std::uintptr_t>(
                 without_gil([&] { return device->create_framework_stream(); }));
           })
      .def("launch", &launch, stream, py::arg("function"))
      .def(
          "host_synchronize",
          [](const Simulated& device, std::uintptr_t s) {
            check(without_gil([&] { return device->host_synchronize(StreamHandle{s}); }));
          },
          stream)
      .def(
          "begin_capture",
          [](const Simulated& device, std::uintptr_t s) {
            check(without_gil([&] { return device->begin_capture(StreamHandle{s}); }));
          },
          stream)
      .def("end_capture",
           [](const Simulated& device) { check(without_gil([&] { return device->end_capture(); })); })
      .def(
          "hold",
          [](const Simulated& device, std::optional<std::uintptr_t> s) {
            without_gil([&] { s ? device->hold(StreamHandle{*s}) : device->hold(); });
          },
          stream)
      .def(
          "release",
          [](const Simulated& device, std::optional<std::uintptr_t> s) {
            without_gil([&] { s ? device->release(StreamHandle{*s}) : device->release(); });
          },
          stream)
      .def(
          "step",
          [](const Simulated& device, std::optional<std::uintptr_t> s) {
            return without_gil([&] { return s ? device->step(StreamHandle{*s}) : device->step(); });
          },
          stream)
      .def("run_until_idle",
           [](const Simulated& device) { return without_gil([&] { return device->run_until_idle(); }); })
      .def("pending", [](const Simulated& device) { return without_gil([&] { return device->pending(); }); })
      .def(
          "fail_sticky",
          [](const Simulated& device, int code) { without_gil([&] { device->fail_sticky(code); }); },
          py::arg("code"))
      .def(
          "fail_sticky_at_copy",
          [](const Simulated& device, std::uint64_t n, int code) {
            without_gil([&] { device->fail_sticky_at_copy(n, code); });
          },
          py::arg("n"), py::arg("code"))
      .def("violations",
           [](const Simulated& device) { return without_gil([&] { return device->violations(); }); });
}

}  // namespace kvtier::bindings
