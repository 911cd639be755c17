#include "common.h"

namespace kvtier::bindings {

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native core of kvtier. Private: use the package kvtier.";
  m.attr("__version__") = KVTIER_VERSION;
  bind_errors(m);
  bind_keys(m);
  bind_devices(m);
  bind_simulated(m);
  bind_ticket(m);
  bind_disk(m);
  bind_storage(m);
  bind_engine(m);
  bind_ranks(m);
  bind_replay(m);
  bind_simulated_drive(m);
  bind_bench(m);
  bind_bench_disk(m);
  bind_cuda(m);
}

}  // namespace kvtier::bindings
