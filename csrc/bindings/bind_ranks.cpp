// Multi-process servers: the keeper's grants on an Engine, and a rank's RankWorker.
#include <algorithm>
#include <tuple>

#include "boxes.h"

#include "kvtier/core/types.h"
#include "kvtier/engine/rank_worker.h"

namespace kvtier::bindings {
namespace {

constexpr std::chrono::seconds kDestructorPatience{10};

using AxisTuple = std::tuple<char, std::uint64_t, std::int64_t>;
using TensorTuple = std::tuple<std::uintptr_t, std::vector<AxisTuple>>;
using ClassTuple = std::tuple<std::uint64_t, std::uint32_t>;
// (code, native_code, message): a Status on its way between processes; the code of ok is "ok".
using StatusTuple = std::tuple<std::string, int, std::string>;

Status status_of(const StatusTuple& tuple) {
  const auto& [name, native, message] = tuple;
  for (unsigned i = 0; i <= static_cast<unsigned>(StatusCode::internal); ++i) {
    const auto code = static_cast<StatusCode>(i);
    if (to_string(code) != name) continue;
    return code == StatusCode::ok ? Status::ok() : Status(code, message, native);
  }
  return {StatusCode::internal, name + ": " + message, native};
}

StatusTuple tuple_of(const Status& status) {
  return {std::string(to_string(status.code())), status.native_code(),
          status.is_ok() ? "" : status.message()};
}

template <typename Value>
py::array_t<Value> array_of(const Value* values, std::size_t count) {
  return py::array_t<Value>(static_cast<py::ssize_t>(count), values);
}

// --- the keeper ---

py::dict arena_of(const EngineBox& box) {
  const Engine& engine = box.get();
  if (engine.closed()) throw StatusError{Status::closed("the engine is closed")};
  const Arena& arena = engine.arena();
  std::vector<ClassTuple> classes;
  for (const ArenaClass& c : arena.geometry().classes) classes.emplace_back(c.slot_stride_bytes, c.num_slots);
  py::dict out;
  out["chunk_bytes"] = arena.geometry().chunk_bytes;
  out["classes"] = classes;
  out["class_of_group"] = engine.config().class_of_group();
  out["fd"] = arena.fd();
  return out;
}

py::tuple grant_tuple(const std::shared_ptr<EngineBox>& box, Grant grant) {
  const auto* slots = reinterpret_cast<const std::uint32_t*>(grant.slots.data());
  return py::make_tuple(grant.id, array_of(grant.blocks.data(), grant.blocks.size()),
                        array_of(slots, grant.slots.size()),
                        std::make_shared<TicketBox>(box, std::move(grant.ticket)));
}

py::tuple grant_store(const std::shared_ptr<EngineBox>& box, std::uint16_t group, std::uint32_t num_parts,
                      const KeyArray& keys, std::uint32_t first_block, const std::optional<py::bytes>& parent,
                      const std::string& name_space, std::optional<Priority> priority,
                      std::optional<std::int64_t> ttl_us) {
  Engine& engine = box->get();
  StoreRequest request;
  request.keys = keys_of(keys);
  request.first_block = first_block;
  if (parent) request.parent = key_of(*parent);
  request.name_space = name_space;
  request.priority = priority;
  request.ttl_us = ttl_us;
  return grant_tuple(
      box, take(without_gil([&] { return engine.grant_store(GroupId{group}, request, num_parts); })));
}

py::tuple grant_load(const std::shared_ptr<EngineBox>& box, std::uint16_t group, std::uint32_t num_parts,
                     const KeyArray& keys, std::uint32_t first_block) {
  Engine& engine = box->get();
  LoadRequest request;
  request.keys = keys_of(keys);
  request.first_block = first_block;
  return grant_tuple(
      box, take(without_gil([&] { return engine.grant_load(GroupId{group}, request, num_parts); })));
}

void finish_part(const EngineBox& box, std::uint64_t grant_id, const StatusTuple& status, bool drained) {
  Engine& engine = box.get();
  const TransferOutcome outcome{status_of(status), drained};
  check(without_gil([&] { return engine.finish_part(grant_id, outcome); }));
}

// --- the worker ---

// Tickets and pages hang on an EngineBox without an engine: it keeps the devices that they need.
struct WorkerBox {
  WorkerBox() = default;
  WorkerBox(const WorkerBox&) = delete;
  WorkerBox& operator=(const WorkerBox&) = delete;
  ~WorkerBox() {
    if (!worker) return;
    bool over = false;
    if (!anchor->origin.inherited()) {
      over = without_gil([this] {
        if (!worker->close(std::chrono::steady_clock::now() + kDestructorPatience)) return false;
        worker.reset();
        return true;
      });
    }
    if (over) return;
    leak(std::move(worker));
    leak(std::move(anchor));
    leak(std::move(owners));
  }

  RankWorker& get() const {
    anchor->origin.check();
    return *worker;
  }

  std::shared_ptr<EngineBox> anchor = std::make_shared<EngineBox>();
  std::shared_ptr<RankWorker> worker;
  std::unordered_map<const Pages*, py::object> owners;
};

std::shared_ptr<WorkerBox> make_worker(std::vector<GroupSpec> groups, std::uint32_t rank) {
  auto box = std::make_shared<WorkerBox>();
  box->worker = take(RankWorker::create(std::move(groups), rank));
  return box;
}

std::shared_ptr<PagesBox> attach(WorkerBox& box, std::shared_ptr<Device> device, std::uint16_t group,
                                 const std::vector<TensorTuple>& tensors, py::object owner) {
  RankWorker& worker = box.get();
  std::vector<TensorView> views;
  for (const auto& [address, axes] : tensors) {
    TensorView view;
    view.base = reinterpret_cast<std::byte*>(address);
    for (const auto& [letter, extent, stride] : axes) view.axes.push_back({letter, extent, stride});
    views.push_back(std::move(view));
  }
  auto pages = take(without_gil([&] { return worker.attach(device, GroupId{group}, views); }));
  box.owners.emplace(pages.get(), std::move(owner));
  auto& devices = box.anchor->devices;
  if (std::find(devices.begin(), devices.end(), device) == devices.end())
    devices.push_back(std::move(device));
  return std::make_shared<PagesBox>(box.anchor, std::move(pages));
}

void detach(WorkerBox& box, const PagesBox& pages, std::optional<double> timeout) {
  RankWorker& worker = box.get();
  Pages& native = pages.get();
  check(
      wait_interruptibly(deadline_in(timeout), [&](Deadline slice) { return worker.detach(native, slice); }));
  box.owners.erase(&native);
}

void join(const WorkerBox& box, std::uint64_t chunk_bytes, const std::vector<ClassTuple>& classes,
          const std::vector<std::size_t>& class_of_group, int fd) {
  RankWorker& worker = box.get();
  ArenaGeometry geometry;
  geometry.chunk_bytes = chunk_bytes;
  for (const auto& [stride, slots] : classes) geometry.classes.push_back({stride, slots});
  check(without_gil([&] { return worker.join(geometry, class_of_group, fd); }));
}

void leave(const WorkerBox& box, std::optional<double> timeout) {
  RankWorker& worker = box.get();
  check(wait_interruptibly(deadline_in(timeout), [&](Deadline slice) { return worker.leave(slice); }));
}

void close(WorkerBox& box, std::optional<double> timeout) {
  RankWorker& worker = box.get();
  check(wait_interruptibly(deadline_in(timeout), [&](Deadline slice) { return worker.close(slice); }));
  auto owners = std::exchange(box.owners, {});  // dropping a tensor may run any Python code
  owners.clear();
}

std::shared_ptr<TicketBox> run(const WorkerBox& box, const PagesBox& pages, std::uint64_t id, bool is_store,
                               const py::array_t<std::uint8_t, py::array::c_style>& outcomes,
                               const PageArray& slots, const PageArray& page_ids, std::uintptr_t stream,
                               std::uint32_t first_block, std::uint32_t layers_per_batch) {
  RankWorker& worker = box.get();
  Pages& native = pages.get();
  const std::span<const PageId> slot_numbers = pages_of(slots);
  RankOrder order;
  order.id = id;
  order.direction = is_store ? Direction::store : Direction::load;
  order.outcomes = {reinterpret_cast<const BlockOutcome*>(outcomes.data()),
                    static_cast<std::size_t>(outcomes.size())};
  order.slots = {reinterpret_cast<const SlotId*>(slot_numbers.data()), slot_numbers.size()};
  order.pages = pages_of(page_ids);
  order.stream = StreamHandle{stream};
  order.first_block = first_block;
  order.layers_per_batch = layers_per_batch;
  return std::make_shared<TicketBox>(box.anchor,
                                     take(without_gil([&] { return worker.run(native, order); })));
}

// [(id, status, drained)]
std::vector<std::tuple<std::uint64_t, StatusTuple, bool>> take_ended(const WorkerBox& box) {
  RankWorker& worker = box.get();
  std::vector<std::tuple<std::uint64_t, StatusTuple, bool>> out;
  for (const EndedOrder& ended : without_gil([&] { return worker.take_ended(); })) {
    out.emplace_back(ended.id, tuple_of(ended.outcome.status), ended.outcome.drained);
  }
  return out;
}

}  // namespace

void bind_ranks(py::module_& m) {
  m.def("arena_of", &arena_of, py::arg("engine"));
  m.def("grant_store", &grant_store, py::arg("engine"), py::arg("group"), py::arg("num_parts"),
        py::arg("keys").noconvert(), py::arg("first_block"), py::arg("parent"), py::arg("name_space"),
        py::arg("priority"), py::arg("ttl_us"));
  m.def("grant_load", &grant_load, py::arg("engine"), py::arg("group"), py::arg("num_parts"),
        py::arg("keys").noconvert(), py::arg("first_block"));
  m.def("finish_part", &finish_part, py::arg("engine"), py::arg("grant_id"), py::arg("status"),
        py::arg("drained"));

  py::class_<WorkerBox, std::shared_ptr<WorkerBox>>(m, "RankWorker")
      .def(py::init(&make_worker), py::kw_only(), py::arg("groups"), py::arg("rank"))
      .def("attach", &attach, py::arg("device").none(false), py::arg("group"), py::arg("tensors"),
           py::arg("owner"))
      .def("detach", &detach, py::arg("pages"), py::arg("timeout"))
      .def("join", &join, py::kw_only(), py::arg("chunk_bytes"), py::arg("classes"),
           py::arg("class_of_group"), py::arg("fd"))
      .def("leave", &leave, py::arg("timeout"))
      .def("run", &run, py::arg("pages"), py::kw_only(), py::arg("id"), py::arg("is_store"),
           py::arg("outcomes").noconvert(), py::arg("slots").noconvert(), py::arg("page_ids").noconvert(),
           py::arg("stream"), py::arg("first_block"), py::arg("layers_per_batch"))
      .def("ended_fd", [](const WorkerBox& box) { return box.get().ended_fd(); })
      .def("take_ended", &take_ended)
      .def("close", &close, py::arg("timeout"));
}

}  // namespace kvtier::bindings
