// What the tools around the disk tier see: kvtier.stores has the Python face.
#include <cstring>
#include <string_view>

#include "common.h"

#include "kvtier/platform/io_queue.h"
#include "kvtier/storage/verify.h"

namespace kvtier::bindings {

// In disk.cpp.
std::shared_ptr<SlotCipher> cipher_of(const std::vector<py::bytes>& keys);

namespace {

using namespace py::literals;  // NOLINT: "name"_a

template <typename Bytes>
py::bytes bytes_of(const Bytes& bytes) {
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

py::dict dict_of(const StoreSurvey& store) {
  py::list strides;
  for (const std::uint64_t stride : store.superblock.class_strides) strides.append(stride);
  const SlotCounts& s = store.slots;
  return py::dict("name"_a = store.name, "in_use"_a = store.in_use, "not_read"_a = store.not_read,
                  "readable"_a = store.readable, "clean"_a = store.superblock.clean,
                  "open_counter"_a = store.superblock.open_counter, "class_strides"_a = strides,
                  "granted_bytes"_a = store.granted_bytes, "allocated_bytes"_a = store.allocated_bytes,
                  "last_open_s"_a = store.last_open_s, "read_bytes"_a = store.read_bytes, "good"_a = s.good,
                  "corrupt"_a = s.corrupt, "foreign"_a = s.foreign, "free"_a = s.free,
                  "unreadable"_a = s.unreadable, "newer"_a = s.newer, "failed"_a = s.failed);
}

// on_block(store name, namespace tag, depth, group, payload bytes); go_on(done, total), both optional.
py::dict survey(const std::string& path, SurveyDepth depth, StoresInUse in_use,
                const std::vector<py::bytes>& keys, const py::object& on_block, const py::object& go_on) {
  SurveyOptions options;
  options.depth = depth;
  options.in_use = in_use;
  if (!keys.empty()) options.cipher = cipher_of(keys);
  // An exception of Python must not pass through the layer below: it is kept, and the survey ended.
  std::optional<py::error_already_set> raised;
  const auto guarded = [&raised](auto&& call) {
    const py::gil_scoped_acquire gil;
    try {
      if (!raised) call();
      if (!raised && PyErr_CheckSignals() != 0) throw py::error_already_set();
    } catch (py::error_already_set& error) {
      raised.emplace(error);
    }
    return !raised;
  };
  if (!on_block.is_none()) {
    options.on_block = [&](const StoreSurvey& store, const SlotHeader& header) {
      guarded([&] {
        on_block(store.name, bytes_of(header.block.name_space), header.block.depth, raw(header.block.group),
                 header.payload_bytes);
      });
    };
  }
  options.go_on = [&](std::uint64_t done, std::uint64_t total) {
    return guarded([&] {
      if (!go_on.is_none()) go_on(done, total);
    });
  };
  Result<DirectorySurvey> found = without_gil([&] { return survey_stores(path, options); });
  if (raised) throw py::error_already_set(*raised);
  check(found.status());
  py::list stores;
  for (const StoreSurvey& store : found->stores) stores.append(dict_of(store));
  return py::dict("capacity_bytes"_a = found->capacity_bytes, "allocated_bytes"_a = found->allocated_bytes,
                  "stores"_a = stores);
}

// [(namespace tag, depth, group, payload bytes, last use)]
py::list catalog_blocks(const std::string& directory_path, const std::string& helper_path) {
  const auto records = take(without_gil([&] { return read_catalog(directory_path, helper_path); }));
  py::list blocks;
  for (const CatalogRecord& record : records) {
    blocks.append(py::make_tuple(bytes_of(record.block.name_space), record.block.depth,
                                 raw(record.block.group), record.payload_bytes, record.last_use_s));
  }
  return blocks;
}

// [{name, in_use, not_purged, dropped, newer}]
py::list purge(const std::string& path, const std::optional<std::string>& name_space) {
  std::optional<NamespaceTag> tag;
  if (name_space) tag = namespace_tag(*name_space);
  const auto stores = take(without_gil([&] { return purge_stores(path, tag); }));
  py::list purged;
  for (const PurgedStore& store : stores) {
    purged.append(py::dict("name"_a = store.name, "in_use"_a = store.in_use,
                           "not_purged"_a = store.not_purged, "dropped"_a = store.dropped,
                           "newer"_a = store.newer));
  }
  return purged;
}

// How requests would reach a drive here: (description, why not io_uring, why no registered buffers).
py::tuple probe_queue(std::uint32_t depth) {
  constexpr std::uint64_t kBytes = std::uint64_t{16} << 20;
  std::string why_not;
  IoQueueOptions options;
  options.depth = depth;
  const auto queue = take(without_gil([&] { return make_io_queue(options, &why_not); }));
  const std::unique_ptr<std::byte, decltype(&std::free)> memory(
      static_cast<std::byte*>(std::aligned_alloc(kSlotAlignment, kBytes)), &std::free);
  Status registered = Status::resource("no memory to try it with");
  if (memory) registered = without_gil([&] { return queue->register_buffer({memory.get(), kBytes}); });
  return py::make_tuple(queue->description(), why_not, registered.message());
}

// (direct I/O, alignment) of a file in a directory; the file is made and removed.
py::tuple probe_file(const std::string& directory_path) {
  const Directory directory = take(Directory::open_or_create(directory_path));
  constexpr const char* kName = ".kvtier-probe";
  const auto file = take(BlockFile::open(directory, kName));
  const bool direct = file->is_direct();
  const std::uint32_t alignment = file->alignment();
  check(directory.remove_file(kName));
  return py::make_tuple(direct, alignment);
}

}  // namespace

void bind_storage(py::module_& m) {
  py::enum_<SurveyDepth>(m, "SurveyDepth")
      .value("superblocks", SurveyDepth::superblocks)
      .value("headers", SurveyDepth::headers)
      .value("payloads", SurveyDepth::payloads);
  py::enum_<StoresInUse>(m, "StoresInUse").value("skip", StoresInUse::skip).value("read", StoresInUse::read);
  m.def("survey_stores", &survey, py::kw_only(), py::arg("path"), py::arg("depth"), py::arg("in_use"),
        py::arg("keys"), py::arg("on_block"), py::arg("go_on"));
  m.def("catalog_blocks", &catalog_blocks, py::kw_only(), py::arg("directory_path"), py::arg("helper_path"));
  m.def("purge_stores", &purge, py::kw_only(), py::arg("path"), py::arg("name_space"));
  m.def(
      "namespace_tag", [](const std::string& name) { return bytes_of(namespace_tag(name)); },
      py::arg("name"));
  m.def("probe_queue", &probe_queue, py::arg("depth"));
  m.def("probe_file", &probe_file, py::arg("directory_path"));
}

}  // namespace kvtier::bindings
