// Device and HostMemory as opaque handles, their faulty decorators, the manual clock, ordering points.
#include "common.h"

#include "kvtier/core/clock.h"
#include "kvtier/core/ordering.h"
#include "kvtier/platform/cpu_device.h"
#include "kvtier/platform/faulty_device.h"
#include "kvtier/platform/host_memory.h"

namespace kvtier::bindings {
namespace {

template <typename Enum, typename Name>
Enum enum_named(const std::string& wanted, Name name) {
  std::string allowed;
  for (unsigned i = 0; i < static_cast<unsigned>(Enum::count_); ++i) {
    const std::string_view candidate = name(static_cast<Enum>(i));
    if (candidate == wanted) return static_cast<Enum>(i);
    allowed += (i > 0 ? ", " : "") + std::string(candidate);
  }
  throw StatusError{Status::invalid_argument("'" + wanted + "' is not known; allowed: " + allowed)};
}

FaultCall fault_call(const std::string& name) {
  return enum_named<FaultCall>(name, [](FaultCall call) { return to_string(call); });
}

StatusCode status_code(const std::string& name) {
  for (unsigned i = 1; i <= static_cast<unsigned>(StatusCode::internal); ++i) {
    if (to_string(static_cast<StatusCode>(i)) == name) return static_cast<StatusCode>(i);
  }
  throw StatusError{Status::invalid_argument("'" + name + "' is not the name of a StatusCode")};
}

void plan_fault(FaultPlan& plan, const std::optional<std::string>& call, std::uint64_t n,
                const std::string& code, int native_code, bool from_then_on) {
  if (n == 0) throw StatusError{Status::invalid_argument("n is 0; the first call is number 1")};
  Status status(status_code(code), "a planned fault", native_code);
  const FaultSpan span = from_then_on ? FaultSpan::from_then_on : FaultSpan::once;
  if (call) {
    plan.fail(fault_call(*call), n, std::move(status), span);
  } else {
    plan.fail(n, std::move(status), span);
  }
}

// The decorators borrow; Python shares. So the decorated and the plan are kept beside the decorator.
template <typename Seam, typename Decorator>
std::shared_ptr<Seam> decorate(std::shared_ptr<Seam> inner, std::shared_ptr<FaultPlan> plan) {
  struct Kept {
    Kept(std::shared_ptr<Seam> i, std::shared_ptr<FaultPlan> p)
        : inner(std::move(i)), plan(std::move(p)), decorator(*inner, *plan) {}
    std::shared_ptr<Seam> inner;
    std::shared_ptr<FaultPlan> plan;
    Decorator decorator;
  };
  auto kept = std::make_shared<Kept>(std::move(inner), std::move(plan));
  return {kept, &kept->decorator};
}

// A context manager; entering twice is refused, so that an exit never enables what another disabled.
struct Disabled {
  OrderingPoint point;
  std::optional<DisableOrdering> active;
};

void bind_ordering(py::module_& m) {
  m.def("ordering_points", [] {
    std::vector<std::string> names;
    for (const OrderingPoint point : all_ordering_points()) names.emplace_back(to_string(point));
    return names;
  });
  py::class_<Disabled, std::shared_ptr<Disabled>>(m, "DisableOrdering")
      .def(py::init([](const std::string& name) {
             auto disabled = std::make_shared<Disabled>();
             disabled->point = enum_named<OrderingPoint>(name, [](OrderingPoint p) { return to_string(p); });
             return disabled;
           }),
           py::arg("name"))
      .def("__enter__",
           [](Disabled& self) {
             if (self.active)
               throw StatusError{Status::invalid_argument("this ordering point is disabled already")};
             self.active.emplace(self.point);
           })
      .def("__exit__", [](Disabled& self, const py::args&) { self.active.reset(); });
}

}  // namespace

void bind_devices(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device")
      .def_property_readonly("name", &Device::name)
      .def("health",
           [](const Device& device) { return error_object(without_gil([&] { return device.health(); })); });
  py::class_<HostMemory, std::shared_ptr<HostMemory>>(m, "HostMemory");

  m.def(
      "cpu_device",
      [](unsigned copy_threads) {
        CpuDeviceOptions options;
        if (copy_threads > 0) options.copy_threads = copy_threads;
        std::shared_ptr<Device> device = make_cpu_device(options);
        check(device->health());
        return device;
      },
      py::arg("copy_threads"), "A CPU device; copy_threads 0 is the default number.");
  m.def("host_memory", [] { return std::shared_ptr<HostMemory>(&linux_host_memory(), [](HostMemory*) {}); });

  py::class_<FaultPlan, std::shared_ptr<FaultPlan>>(m, "FaultPlan")
      .def(py::init<>())
      .def("fail", &plan_fault, py::arg("call"), py::arg("n"), py::arg("code"), py::arg("native_code"),
           py::arg("from_then_on"))
      .def("reset", &FaultPlan::reset)
      .def(
          "seen",
          [](const FaultPlan& plan, const std::optional<std::string>& call) {
            return call ? plan.seen(fault_call(*call)) : plan.seen();
          },
          py::arg("call"))
      .def("injected", &FaultPlan::injected);
  m.def("fault_calls", [] {
    std::vector<std::string> names;
    names.reserve(static_cast<std::size_t>(FaultCall::count_));
    for (unsigned i = 0; i < static_cast<unsigned>(FaultCall::count_); ++i) {
      names.emplace_back(to_string(static_cast<FaultCall>(i)));
    }
    return names;
  });
  m.def("faulty_device", &decorate<Device, FaultyDevice>, py::arg("inner"), py::arg("plan"));
  m.def("faulty_memory", &decorate<HostMemory, FaultyHostMemory>, py::arg("inner"), py::arg("plan"));

  py::class_<Clock, std::shared_ptr<Clock>>(m, "Clock").def("now_us", &Clock::now_us);
  py::class_<ManualClock, Clock, std::shared_ptr<ManualClock>>(m, "ManualClock")
      .def(py::init<>())
      .def("advance_us", &ManualClock::advance_us, py::arg("us"));
  bind_ordering(m);
}

}  // namespace kvtier::bindings
