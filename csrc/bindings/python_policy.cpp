#include "python_policy.h"

#include <string>

namespace kvtier::bindings {

PythonPolicy::PythonPolicy(const py::object& make, const EvictionOptions& options)
    : places_(options.records, Place::nowhere) {
  const py::gil_scoped_acquire held;
  policy_ = make(options.blocks);
}

PythonPolicy::~PythonPolicy() {
  const py::gil_scoped_acquire held;
  policy_ = py::object();
}

void PythonPolicy::insert(EntryId id, const BlockFacts& block) {
  const py::gil_scoped_acquire held;
  const py::bytes key(reinterpret_cast<const char*>(block.key.bytes.data()), kKeyBytes);
  const py::object parent = block.parent ? py::object(py::int_(raw(*block.parent))) : py::none();
  places_[raw(id)] = Place::evictable;
  policy_.attr("insert")(raw(id), key, block.depth, parent);
}

void PythonPolicy::touch(EntryId id) {
  const py::gil_scoped_acquire held;
  policy_.attr("touch")(raw(id));
}

void PythonPolicy::hold(EntryId id) {
  const py::gil_scoped_acquire held;
  places_[raw(id)] = Place::held;
  policy_.attr("hold")(raw(id));
}

void PythonPolicy::let_go(EntryId id) {
  const py::gil_scoped_acquire held;
  places_[raw(id)] = Place::evictable;
  policy_.attr("let_go")(raw(id));
}

void PythonPolicy::erase(EntryId id, const BlockName& /*name*/, Departure why) {
  const py::gil_scoped_acquire held;
  places_[raw(id)] = Place::nowhere;
  policy_.attr("erase")(raw(id), why == Departure::evicted);
}

std::optional<EntryId> PythonPolicy::victim() {
  const py::gil_scoped_acquire held;
  const py::object named = policy_.attr("victim")();
  if (named.is_none()) return std::nullopt;
  if (py::isinstance<py::int_>(named)) {
    const auto number = named.cast<long long>();
    if (number >= 0 && static_cast<std::size_t>(number) < places_.size() &&
        places_[static_cast<std::size_t>(number)] == Place::evictable) {
      return EntryId{static_cast<std::uint32_t>(number)};
    }
  }
  throw StatusError{Status::invalid_argument("the policy's victim() is " +
                                             static_cast<std::string>(py::repr(named)) +
                                             "; allowed: None or a block that is evictable")};
}

void PythonPolicy::advance(std::int64_t now_us) {
  const py::gil_scoped_acquire held;
  policy_.attr("advance")(now_us);
}

}  // namespace kvtier::bindings
