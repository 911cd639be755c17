// What an engine is told about its disk tier.
#include <cstring>
#include <string_view>

#include "common.h"

#include "kvtier/engine/engine.h"

namespace kvtier::bindings {

// Also for bind_storage.cpp.
std::shared_ptr<SlotCipher> cipher_of(const std::vector<py::bytes>& keys);

std::shared_ptr<SlotCipher> cipher_of(const std::vector<py::bytes>& keys) {
  std::vector<std::span<const std::byte>> views;
  for (const py::bytes& key : keys) {
    const auto view = static_cast<std::string_view>(key);
    views.emplace_back(reinterpret_cast<const std::byte*>(view.data()), view.size());
  }
  return take(SlotCipher::make(views.front(), std::span(views).subspan(1)));
}

namespace {

Fingerprint fingerprint_of(const py::bytes& bytes) {
  const auto view = static_cast<std::string_view>(bytes);
  Fingerprint fingerprint{};
  if (view.size() != fingerprint.size()) {
    check(Status::invalid_argument("fingerprint has " + std::to_string(view.size()) +
                                   " bytes; allowed: " + std::to_string(fingerprint.size())));
  }
  std::memcpy(fingerprint.data(), view.data(), fingerprint.size());
  return fingerprint;
}

DiskOptions disk_options(const std::vector<std::pair<std::string, std::uint64_t>>& disks,
                         const py::bytes& fingerprint, SecondProcess second_process, Admission admission,
                         std::string eviction, std::optional<std::uint64_t> write_bytes_per_day,
                         const std::vector<py::bytes>& keys, std::uint32_t queue_depth, double commit_seconds,
                         double answer_seconds, std::string catalog_helper) {
  DiskOptions options;
  for (const auto& [path, capacity] : disks) options.disks.push_back({path, capacity});
  options.fingerprint = fingerprint_of(fingerprint);
  options.second_process = second_process;
  options.admission = admission;
  options.eviction = std::move(eviction);
  options.write_bytes_per_day = write_bytes_per_day;
  options.queue_depth = queue_depth;
  options.commit_interval = std::chrono::milliseconds(static_cast<std::int64_t>(commit_seconds * 1e3));
  options.answer_within = std::chrono::milliseconds(static_cast<std::int64_t>(answer_seconds * 1e3));
  options.catalog_helper = std::move(catalog_helper);
  if (!keys.empty()) options.cipher = cipher_of(keys);
  return options;
}

}  // namespace

void bind_disk(py::module_& m) {
  py::enum_<SecondProcess>(m, "SecondProcess")
      .value("next_store", SecondProcess::next_store)
      .value("refuse", SecondProcess::refuse);
  py::enum_<Admission>(m, "Admission")
      .value("all", Admission::all)
      .value("second_use", Admission::second_use)
      .value("tiny_lfu", Admission::tiny_lfu)
      .value("return_hazard", Admission::return_hazard);
  py::class_<DiskOptions>(m, "DiskOptions")
      .def(py::init(&disk_options), py::kw_only(), py::arg("disks"), py::arg("fingerprint"),
           py::arg("second_process"), py::arg("admission"), py::arg("eviction"),
           py::arg("write_bytes_per_day"), py::arg("keys"), py::arg("queue_depth"), py::arg("commit_seconds"),
           py::arg("answer_seconds"), py::arg("catalog_helper"));
}

}  // namespace kvtier::bindings
