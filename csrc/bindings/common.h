// What every file of the bindings shares: how a Status becomes a Python exception, how the GIL is let go,
// and how a wait stays interruptible. The bindings convert and hold references; they decide nothing.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvtier/core/process.h"
#include "kvtier/core/status.h"
#include "kvtier/core/types.h"
#include "kvtier/engine/ticket.h"

namespace kvtier::bindings {

namespace py = pybind11;

// Carries a Status to the translator in errors.cpp, which raises the class of kvtier.errors.
struct StatusError {
  Status status;
};

inline void check(const Status& status) {
  if (!status) throw StatusError{status};
}

template <typename T>
T take(Result<T> result) {
  check(result.status());
  return std::move(result).value();
}

template <typename Function>
auto without_gil(Function&& function) {
  const py::gil_scoped_release release;
  return std::forward<Function>(function)();
}

// The exception object for a status, None for ok. Requires the GIL.
py::object error_object(const Status& status);

// Seconds from now; nullopt stays nullopt, and so does what is longer than anybody waits.
Deadline deadline_in(std::optional<double> seconds);

// Calls `wait(slice deadline)` in slices of 100 ms, so that Ctrl-C ends the wait (never the operation).
template <typename Wait>
Status wait_interruptibly(Deadline deadline, Wait&& wait) {
  for (;;) {
    const auto slice = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    const bool last = deadline && *deadline <= slice;
    Status status = without_gil([&] { return wait(last ? deadline : Deadline(slice)); });
    if (last || status.code() != StatusCode::timeout) return status;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
}

// True in a child of fork() of the process that made an object: nothing there can be waited for or freed.
class Origin {
 public:
  bool inherited() const { return generation_ != process_generation(); }
  void check() const {
    if (inherited()) throw StatusError{Status::closed("made by the parent of this forked process")};
  }

 private:
  std::uint64_t generation_ = process_generation();
};

// Gives up an object for good: what may still be used by a device, or belongs to a parent process.
template <typename T>
void leak(T&& object) {
  static_cast<void>(new std::remove_reference_t<T>(std::forward<T>(object)));  // NOLINT: on purpose
}

using KeyArray = py::array_t<std::uint8_t, py::array::c_style>;
using PageArray = py::array_t<std::uint32_t, py::array::c_style>;

// Views without a copy; valid while the array lives. Errors: invalid_argument for a wrong shape.
std::span<const BlockKey> keys_of(const KeyArray& array);
BlockKey key_of(const py::bytes& bytes);
std::span<const PageId> pages_of(const PageArray& array);

void bind_errors(py::module_& m);
void bind_keys(py::module_& m);
void bind_ticket(py::module_& m);
void bind_disk(py::module_& m);
void bind_storage(py::module_& m);
void bind_devices(py::module_& m);
void bind_simulated(py::module_& m);
void bind_engine(py::module_& m);
void bind_ranks(py::module_& m);
void bind_replay(py::module_& m);
void bind_simulated_drive(py::module_& m);
void bind_bench(py::module_& m);
void bind_bench_disk(py::module_& m);
void bind_cuda(py::module_& m);

}  // namespace kvtier::bindings
