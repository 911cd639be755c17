// Engine, Pages, Lease. Every call that takes the mutex, copies or waits lets go of the GIL.
#include "kvtier/engine/engine.h"

#include <algorithm>
#include <tuple>

#include "boxes.h"

#include "kvtier/platform/cpu_device.h"

namespace kvtier::bindings {

// The stats as a dict; in stats.cpp.
py::dict stats_dict(const EngineStats& stats);
py::dict hops_dict(const Hops& hops);

namespace {

constexpr std::chrono::seconds kDestructorPatience{10};

using Box = std::shared_ptr<EngineBox>;
using AxisTuple = std::tuple<char, std::uint64_t, std::int64_t>;
using TensorTuple = std::tuple<std::uintptr_t, std::vector<AxisTuple>>;

Box open_engine(std::vector<GroupSpec> groups, std::uint64_t host_bytes, std::uint64_t chunk_bytes,
                unsigned copy_threads, std::shared_ptr<HostMemory> memory, std::shared_ptr<const Clock> clock,
                std::optional<std::uint64_t> hash_seed, std::string eviction, std::optional<DiskOptions> disk,
                bool ghosts, std::optional<int> numa_node, bool numa_required, std::size_t events) {
  auto box = std::make_shared<EngineBox>();
  EngineConfig config;
  config.groups = std::move(groups);
  config.host_bytes = host_bytes;
  config.chunk_bytes = chunk_bytes;
  config.memory = memory.get();
  config.clock = std::move(clock);
  config.hash_seed = hash_seed;
  config.eviction = std::move(eviction);
  if (numa_node) config.placement = NumaPlacement{.node = *numa_node, .required = numa_required};
  if (disk) config.disk = std::move(*disk);
  config.ghosts = ghosts;
  config.events = events;
  box->memory = std::move(memory);
  box->copy_threads = copy_threads;
  box->engine = take(without_gil([&] { return Engine::open(std::move(config)); }));
  return box;
}

std::shared_ptr<Device> cpu_device(EngineBox& box) {
  if (!box.cpu) {
    CpuDeviceOptions options;
    if (box.copy_threads > 0) options.copy_threads = box.copy_threads;
    auto device = without_gil([&] { return make_cpu_device(options); });
    check(device->health());
    if (!box.cpu) box.cpu = std::move(device);
  }
  return box.cpu;
}

std::shared_ptr<PagesBox> attach(const Box& box, std::optional<std::shared_ptr<Device>> given,
                                 std::uint16_t group, const std::vector<TensorTuple>& tensors,
                                 py::object owner) {
  Engine& engine = box->get();
  std::shared_ptr<Device> device = given ? std::move(*given) : cpu_device(*box);
  std::vector<TensorView> views;
  for (const auto& [address, axes] : tensors) {
    TensorView view;
    view.base = reinterpret_cast<std::byte*>(address);
    for (const auto& [letter, extent, stride] : axes) view.axes.push_back({letter, extent, stride});
    views.push_back(std::move(view));
  }
  auto pages = take(without_gil([&] { return engine.attach(device, GroupId{group}, views); }));
  box->owners.emplace(pages.get(), std::move(owner));
  if (std::find(box->devices.begin(), box->devices.end(), device) == box->devices.end()) {
    box->devices.push_back(std::move(device));
  }
  return std::make_shared<PagesBox>(box, std::move(pages));
}

void detach(const Box& box, const PagesBox& pages, std::optional<double> timeout) {
  Engine& engine = box->get();
  Pages& native = pages.get();
  check(
      wait_interruptibly(deadline_in(timeout), [&](Deadline slice) { return engine.detach(native, slice); }));
  box->owners.erase(&native);
}

void close(const Box& box, std::optional<double> timeout) {
  Engine& engine = box->get();
  check(wait_interruptibly(deadline_in(timeout), [&](Deadline slice) { return engine.close(slice); }));
  auto owners = std::exchange(box->owners, {});  // dropping a tensor may run any Python code
  owners.clear();
}

// One array of BlockState per group, over the bytes of the match.
py::list states_of(const std::shared_ptr<Match>& match) {
  py::list states;
  for (const std::vector<BlockState>& of_group : match->states) {
    const auto* data = reinterpret_cast<const std::uint8_t*>(of_group.data());
    states.append(
        py::array_t<std::uint8_t>(static_cast<py::ssize_t>(of_group.size()), data, py::cast(match)));
  }
  return states;
}

std::shared_ptr<Match> lookup(const Box& box, const KeyArray& keys) {
  Engine& engine = box->get();
  const std::span<const BlockKey> view = keys_of(keys);
  return std::make_shared<Match>(take(without_gil([&] { return engine.lookup(view); })));
}

std::shared_ptr<LeaseBox> pin(const Box& box, const KeyArray& keys, const std::shared_ptr<Match>& match,
                              std::optional<std::int64_t> ttl_us) {
  Engine& engine = box->get();
  const std::span<const BlockKey> view = keys_of(keys);
  return std::make_shared<LeaseBox>(
      box, take(without_gil([&] { return engine.pin(view, match->ready_blocks, ttl_us, match.get()); })));
}

std::shared_ptr<TicketBox> store(const Box& box, const PagesBox& pages, const KeyArray& keys,
                                 const PageArray& page_ids, std::uintptr_t stream, std::uint32_t first_block,
                                 const std::optional<py::bytes>& parent, const std::string& name_space,
                                 std::optional<Priority> priority, std::optional<std::int64_t> ttl_us) {
  Engine& engine = box->get();
  StoreRequest request;
  request.keys = keys_of(keys);
  request.pages = pages_of(page_ids);
  request.stream = StreamHandle{stream};
  request.first_block = first_block;
  if (parent) request.parent = key_of(*parent);
  request.name_space = name_space;
  request.priority = priority;
  request.ttl_us = ttl_us;
  Pages& native = pages.get();
  return std::make_shared<TicketBox>(box, take(without_gil([&] { return engine.store(native, request); })));
}

std::shared_ptr<TicketBox> load(const Box& box, const PagesBox& pages, const KeyArray& keys,
                                const PageArray& page_ids, std::uintptr_t stream, std::uint32_t first_block,
                                std::uint32_t layers_per_batch) {
  Engine& engine = box->get();
  LoadRequest request;
  request.keys = keys_of(keys);
  request.pages = pages_of(page_ids);
  request.stream = StreamHandle{stream};
  request.first_block = first_block;
  request.layers_per_batch = layers_per_batch;
  Pages& native = pages.get();
  return std::make_shared<TicketBox>(box, take(without_gil([&] { return engine.load(native, request); })));
}

template <Result<std::uint64_t> (Engine::*Method)(std::span<const BlockKey>)>
std::uint64_t over_keys(const Box& box, const KeyArray& keys) {
  Engine& engine = box->get();
  const std::span<const BlockKey> view = keys_of(keys);
  return take(without_gil([&] { return (engine.*Method)(view); }));
}

// (settled, durable, dropped)
std::tuple<std::uint64_t, std::uint64_t, std::uint64_t> flush(const Box& box, std::optional<double> timeout) {
  Engine& engine = box->get();
  const Deadline deadline = deadline_in(timeout);
  const FlushPoint point = take(without_gil([&] { return engine.flush_point(); }));
  FlushResult flushed;
  check(wait_interruptibly(deadline, [&](Deadline slice) {
    const Result<FlushResult> result = engine.flush(point, slice);
    if (result) flushed = result.value();
    return result.status();
  }));
  return {flushed.settled, flushed.durable, flushed.dropped};
}

std::shared_ptr<TicketBox> prefetch(const Box& box, const KeyArray& keys, std::optional<double> timeout) {
  Engine& engine = box->get();
  const std::span<const BlockKey> view = keys_of(keys);
  const Deadline deadline = deadline_in(timeout);
  return std::make_shared<TicketBox>(box, take(without_gil([&] { return engine.prefetch(view, deadline); })));
}

std::shared_ptr<ExpectationBox> expect(const Box& box, const KeyArray& keys) {
  Engine& engine = box->get();
  const std::span<const BlockKey> view = keys_of(keys);
  return std::make_shared<ExpectationBox>(box, take(without_gil([&] { return engine.expect(view); })));
}

std::uint64_t cancel_prefetch(const Box& box, const TicketBox& ticket) {
  Engine& engine = box->get();
  const std::shared_ptr<Ticket> native = ticket.shared();
  return take(without_gil([&] { return engine.cancel_prefetch(native); }));
}

// (keys [n, 32], groups [n], tiers [n], kinds [n], lost)
py::tuple take_events(const Box& box, std::size_t most) {
  Engine& engine = box->get();
  const BlockEvents taken = take(without_gil([&] { return engine.take_events(most); }));
  const auto n = static_cast<py::ssize_t>(taken.events.size());
  py::array_t<std::uint8_t> keys({n, static_cast<py::ssize_t>(kKeyBytes)});
  py::array_t<std::uint16_t> groups(n);
  py::array_t<std::uint8_t> tiers(n);
  py::array_t<std::uint8_t> kinds(n);
  for (py::ssize_t i = 0; i < n; ++i) {
    const BlockEvent& event = taken.events[static_cast<std::size_t>(i)];
    std::memcpy(keys.mutable_data(i, 0), event.key.bytes.data(), kKeyBytes);
    *groups.mutable_data(i) = raw(event.group);
    *tiers.mutable_data(i) = static_cast<std::uint8_t>(event.tier);
    *kinds.mutable_data(i) = static_cast<std::uint8_t>(event.kind);
  }
  return py::make_tuple(std::move(keys), std::move(groups), std::move(tiers), std::move(kinds), taken.lost);
}

void bind_group_spec(py::module_& m) {
  py::class_<GroupSpec>(m, "GroupSpec")
      .def(py::init([](std::string name, std::uint32_t num_layers, std::uint32_t num_parts,
                       std::uint32_t num_heads, std::uint32_t head_dim, std::uint32_t item_bytes,
                       std::uint32_t page_tokens, std::uint32_t block_tokens, std::string page_order,
                       std::optional<std::uint32_t> window_tokens, std::uint32_t num_stripes) {
             GroupSpec spec;
             spec.name = std::move(name);
             spec.num_layers = num_layers;
             spec.num_parts = num_parts;
             spec.num_heads = num_heads;
             spec.head_dim = head_dim;
             spec.item_bytes = item_bytes;
             spec.page_tokens = page_tokens;
             spec.block_tokens = block_tokens;
             spec.page_order = std::move(page_order);
             spec.window_tokens = window_tokens;
             spec.num_stripes = num_stripes;
             check(spec.validate());
             return spec;
           }),
           py::kw_only(), py::arg("name"), py::arg("num_layers"), py::arg("num_parts"), py::arg("num_heads"),
           py::arg("head_dim"), py::arg("item_bytes"), py::arg("page_tokens"), py::arg("block_tokens"),
           py::arg("page_order"), py::arg("window_tokens"), py::arg("num_stripes"))
      .def_property_readonly("stripe_bytes", &GroupSpec::stripe_bytes)
      .def_property_readonly("slot_stride_bytes", &GroupSpec::slot_stride_bytes);
}

}  // namespace

EngineBox::~EngineBox() {
  if (!engine) return;
  bool over = false;
  if (!origin.inherited()) {
    over = without_gil([this] {
      if (!engine->close(std::chrono::steady_clock::now() + kDestructorPatience)) return false;
      engine.reset();
      return true;
    });
  }
  if (over) return;
  // A copy may still run, or the threads belong to the parent: nothing of it is ever freed.
  leak(std::move(engine));
  leak(std::move(owners));
  leak(std::move(devices));
  leak(std::move(cpu));
  leak(std::move(memory));
}

void bind_engine(py::module_& m) {
  py::enum_<Priority>(m, "Priority")
      .value("low", Priority::low)
      .value("normal", Priority::normal)
      .value("high", Priority::high);
  bind_group_spec(m);

  py::class_<PagesBox, std::shared_ptr<PagesBox>>(m, "Pages")
      .def_property_readonly("num_pages", [](const PagesBox& pages) { return pages.get().map().num_pages(); })
      .def_property_readonly("num_pieces",
                             [](const PagesBox& pages) { return pages.get().map().pieces().size(); })
      .def_property_readonly("attached", [](const PagesBox& pages) { return pages.get().attached(); });

  py::class_<LeaseBox, std::shared_ptr<LeaseBox>>(m, "Lease")
      .def_property_readonly("num_blocks", [](const LeaseBox& lease) { return lease.get().num_blocks(); })
      .def_property_readonly("active",
                             [](const LeaseBox& lease) {
                               const Lease& native = lease.get();
                               return without_gil([&] { return native.active(); });
                             })
      .def("release", [](const LeaseBox& lease) {
        Lease& native = lease.get();
        without_gil([&] { native.release(); });
      });

  py::class_<ExpectationBox, std::shared_ptr<ExpectationBox>>(m, "Expectation")
      .def("end", [](const ExpectationBox& expectation) {
        Expectation& native = expectation.get();
        without_gil([&] { native.end(); });
      });

  m.def(
      "bytes_for_blocks",
      [](std::vector<GroupSpec> groups, std::uint64_t blocks) {
        EngineConfig config;
        config.groups = std::move(groups);
        return std::pair(config.host_bytes_for(blocks), config.disk_bytes_for(blocks));
      },
      py::arg("groups"), py::arg("blocks"),
      "Bytes that the host tier and a disk need for so many blocks of every group.");

  py::class_<Match, std::shared_ptr<Match>>(m, "Match")
      .def_readonly("ready_blocks", &Match::ready_blocks)
      .def_property_readonly("states", &states_of);

  py::class_<EngineBox, Box>(m, "Engine")
      .def_static("open", &open_engine, py::kw_only(), py::arg("groups"), py::arg("host_bytes"),
                  py::arg("chunk_bytes"), py::arg("copy_threads"), py::arg("memory"), py::arg("clock"),
                  py::arg("hash_seed"), py::arg("eviction"), py::arg("disk"), py::arg("ghosts"),
                  py::arg("numa_node"), py::arg("numa_required"), py::arg("events"))
      .def("attach", &attach, py::arg("device"), py::arg("group"), py::arg("tensors"), py::arg("owner"))
      .def("detach", &detach, py::arg("pages"), py::arg("timeout"))
      .def("lookup", &lookup, py::arg("keys").noconvert())
      .def("pin", &pin, py::arg("keys").noconvert(), py::arg("match"), py::arg("ttl_us"))
      .def("store", &store, py::arg("pages"), py::arg("keys").noconvert(), py::arg("page_ids").noconvert(),
           py::arg("stream"), py::arg("first_block"), py::arg("parent"), py::arg("name_space"),
           py::arg("priority"), py::arg("ttl_us"))
      .def("load", &load, py::arg("pages"), py::arg("keys").noconvert(), py::arg("page_ids").noconvert(),
           py::arg("stream"), py::arg("first_block"), py::arg("layers_per_batch"))
      .def("touch", &over_keys<&Engine::touch>, py::arg("keys").noconvert())
      .def("drop", &over_keys<&Engine::drop>, py::arg("keys").noconvert())
      .def(
          "drop_namespace",
          [](const Box& box, const std::string& name_space) {
            Engine& engine = box->get();
            return take(without_gil([&] { return engine.drop_namespace(name_space); }));
          },
          py::arg("name_space"))
      .def(
          "set_epoch",
          [](const Box& box, const py::bytes& bytes) {
            const auto view = static_cast<std::string_view>(bytes);
            Epoch epoch{};
            if (view.size() != epoch.size()) {
              check(Status::invalid_argument("epoch has " + std::to_string(view.size()) +
                                             " bytes; allowed: 32"));
            }
            std::memcpy(epoch.data(), view.data(), epoch.size());
            check(box->get().set_epoch(epoch));
          },
          py::arg("epoch"))
      .def("poll",
           [](const Box& box) {
             Engine& engine = box->get();
             return take(without_gil([&] { return engine.poll(); }));
           })
      .def("prefetch", &prefetch, py::arg("keys").noconvert(), py::arg("timeout"))
      .def("expect", &expect, py::arg("keys").noconvert())
      .def("cancel_prefetch", &cancel_prefetch, py::arg("ticket"))
      .def("take_events", &take_events, py::arg("most"))
      .def("flush", &flush, py::arg("timeout"))
      .def("wait_until_whole",
           [](const Box& box) {
             Engine& engine = box->get();
             check(without_gil([&] { return engine.wait_until_whole(); }));
           })
      .def("pause_ghosts", [](const Box& box) { check(box->get().pause_ghosts()); })
      .def("resume_ghosts", [](const Box& box) { check(box->get().resume_ghosts()); })
      .def("hops",
           [](const Box& box) {
             Engine& engine = box->get();
             return hops_dict(take(without_gil([&] { return engine.hops(); })));
           })
      .def("stats",
           [](const Box& box) {
             Engine& engine = box->get();
             return stats_dict(take(without_gil([&] { return engine.stats(); })));
           })
      .def("close", &close, py::arg("timeout"))
      .def_property_readonly("closed",
                             [](const Box& box) { return box->origin.inherited() || box->engine->closed(); });
}

}  // namespace kvtier::bindings
