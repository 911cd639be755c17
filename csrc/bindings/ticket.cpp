// Ticket: waiting in slices, without the GIL.
#include "boxes.h"

namespace kvtier::bindings {
namespace {

bool settled(const TicketBox& ticket, Moment moment) { return ticket.get().settled(moment); }

void wait(const TicketBox& ticket, Moment moment, std::optional<double> timeout) {
  const Ticket& native = ticket.get();
  check(wait_interruptibly(deadline_in(timeout), [&](Deadline slice) { return native.wait(moment, slice); }));
}

py::array_t<std::uint8_t> outcomes(const TicketBox& ticket) {
  const std::vector<BlockOutcome> values = ticket.get().outcomes();
  return py::array_t<std::uint8_t>(static_cast<py::ssize_t>(values.size()),
                                   reinterpret_cast<const std::uint8_t*>(values.data()));
}

void wait_stream(const TicketBox& ticket, std::uintptr_t stream) {
  const Ticket& native = ticket.get();
  check(without_gil([&] { return native.wait_stream(StreamHandle{stream}); }));
}

void wait_layer(const TicketBox& ticket, std::uint32_t layer, std::uintptr_t stream) {
  const Ticket& native = ticket.get();
  check(without_gil([&] { return native.wait_layer(layer, StreamHandle{stream}); }));
}

}  // namespace

void bind_ticket(py::module_& m) {
  py::enum_<Moment>(m, "Moment")
      .value("released", Moment::released)
      .value("ready", Moment::ready)
      .value("durable", Moment::durable);

  py::class_<TicketBox, std::shared_ptr<TicketBox>>(m, "Ticket")
      .def("settled", &settled, py::arg("moment"))
      .def("wait", &wait, py::arg("moment"), py::arg("timeout") = py::none())
      .def("failure", [](const TicketBox& ticket) { return error_object(ticket.get().failure()); })
      .def("outcomes", &outcomes)
      .def("valid_blocks", [](const TicketBox& ticket) { return ticket.get().valid_blocks(); })
      .def("durable_blocks", [](const TicketBox& ticket) { return ticket.get().durable_blocks(); })
      .def("wait_stream", &wait_stream, py::arg("stream"))
      .def("wait_layer", &wait_layer, py::arg("layer"), py::arg("stream"))
      .def("done_fd", [](const TicketBox& ticket) { return take(ticket.get().done_fd()); });
}

}  // namespace kvtier::bindings
