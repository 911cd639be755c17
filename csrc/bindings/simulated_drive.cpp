// SimulatedDrive for Python tests: an engine's disk tier on a drive that loses what was not synced.
#include "kvtier/platform/simulated_drive.h"

#include "common.h"

#include "kvtier/engine/engine.h"
#include "kvtier/platform/io_queue.h"

namespace kvtier::bindings {
namespace {

using Drive = std::shared_ptr<SimulatedDrive>;

Drive make(std::uint64_t seed, double read_error, double write_error, double sync_error, double bit_flip,
           double misplaced, double lost_write) {
  DriveFaults faults;
  faults.seed = seed;
  faults.read_error = read_error;
  faults.write_error = write_error;
  faults.sync_error = sync_error;
  faults.bit_flip = bit_flip;
  faults.misplaced = misplaced;
  faults.lost_write = lost_write;
  return std::make_shared<SimulatedDrive>(faults);
}

// The queues of all disks of these options are the drive's; it lives as long as they do.
void simulate(DiskOptions& options, const Drive& drive) {
  options.adjust = [drive](SlotStoreOptions& store, std::size_t) {
    store.make_queue = [drive](std::uint32_t depth) -> Result<std::unique_ptr<IoQueue>> {
      return drive->make_queue(depth);
    };
  };
}

}  // namespace

void bind_simulated_drive(py::module_& m) {
  py::class_<SimulatedDrive, Drive>(m, "SimulatedDrive")
      .def(py::init(&make), py::kw_only(), py::arg("seed"), py::arg("read_error"), py::arg("write_error"),
           py::arg("sync_error"), py::arg("bit_flip"), py::arg("misplaced"), py::arg("lost_write"))
      .def(
          "simulate", [](const Drive& drive, DiskOptions& options) { simulate(options, drive); },
          py::arg("options"))
      .def("power_loss", [](const Drive& drive) { without_gil([&] { drive->power_loss(); }); })
      .def("unsynced_writes",
           [](const Drive& drive) { return without_gil([&] { return drive->unsynced_writes(); }); })
      .def("faults_injected",
           [](const Drive& drive) { return without_gil([&] { return drive->faults_injected(); }); });
}

}  // namespace kvtier::bindings
