// Status -> the exception tree of kvtier.errors; deadlines; views of arrays.
#include <new>
#include <stdexcept>
#include <system_error>

#include "common.h"

namespace kvtier::bindings {
namespace {

constexpr double kForeverSeconds = 1e8;

void raise_status(const Status& status) {
  try {
    const py::object error = error_object(status);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  } catch (py::error_already_set& inner) {
    inner.restore();
  }
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const StatusError& error) {
    raise_status(error.status);
  } catch (const std::bad_alloc&) {
    raise_status(Status::resource("out of memory"));
  } catch (const std::system_error& error) {
    raise_status(Status::resource(error.what(), error.code().value()));
  } catch (const std::logic_error& error) {
    raise_status(Status::internal(error.what()));
  }
}

}  // namespace

py::object error_object(const Status& status) {
  if (status) return py::none();
  return py::module_::import("kvtier.errors")
      .attr("error_from_status")(std::string(to_string(status.code())), status.native_code(),
                                 status.message());
}

Deadline deadline_in(std::optional<double> seconds) {
  if (!seconds || !(*seconds < kForeverSeconds)) return std::nullopt;
  return std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                                                std::chrono::duration<double>(*seconds));
}

std::span<const BlockKey> keys_of(const KeyArray& array) {
  if (array.ndim() != 2 || array.shape(1) != static_cast<py::ssize_t>(kKeyBytes)) {
    throw StatusError{Status::invalid_argument("keys: not an array of shape [n, 32]")};
  }
  return {reinterpret_cast<const BlockKey*>(array.data()), static_cast<std::size_t>(array.shape(0))};
}

BlockKey key_of(const py::bytes& bytes) {
  const std::string_view view = bytes;
  if (view.size() != kKeyBytes) throw StatusError{Status::invalid_argument("a key has exactly 32 bytes")};
  BlockKey key{};
  std::memcpy(key.bytes.data(), view.data(), kKeyBytes);
  return key;
}

std::span<const PageId> pages_of(const PageArray& array) {
  if (array.ndim() != 1) throw StatusError{Status::invalid_argument("page_ids: not a 1-d array")};
  static_assert(sizeof(PageId) == sizeof(std::uint32_t));
  return {reinterpret_cast<const PageId*>(array.data()), static_cast<std::size_t>(array.shape(0))};
}

void bind_errors(py::module_&) { py::register_local_exception_translator(translate); }

}  // namespace kvtier::bindings
