// root_key() and chain_keys(): buffers in, one array out, no copy of either.
#include "common.h"

#include "kvtier/core/key_chain.h"

namespace kvtier::bindings {
namespace {

using TokenArray = py::array_t<std::int32_t, py::array::c_style>;
using ExtraSpan = std::tuple<std::int64_t, std::int64_t, py::bytes>;

std::span<const std::byte> content_of(const py::bytes& bytes) {
  const std::string_view view = bytes;
  return std::as_bytes(std::span(view.data(), view.size()));
}

py::bytes root(const std::vector<py::bytes>& fields) {
  std::vector<std::span<const std::byte>> views;
  views.reserve(fields.size());
  for (const py::bytes& field : fields) views.push_back(content_of(field));
  const BlockKey key = take(root_key(views));
  return {reinterpret_cast<const char*>(key.bytes.data()), kKeyBytes};
}

KeyArray chain(const py::bytes& parent, const TokenArray& tokens, std::uint32_t block_tokens,
               const std::vector<ExtraSpan>& extras) {
  if (tokens.ndim() != 1) throw StatusError{Status::invalid_argument("token_ids: not a 1-d array")};
  const BlockKey first = key_of(parent);
  const std::span<const std::int32_t> view(tokens.data(), static_cast<std::size_t>(tokens.shape(0)));
  std::vector<KeyExtra> spans;
  spans.reserve(extras.size());
  for (const auto& [begin, end, content] : extras) spans.push_back({begin, end, content_of(content)});

  auto keys = std::make_unique<std::vector<BlockKey>>(
      take(without_gil([&] { return chain_keys(first, view, block_tokens, spans); })));
  const auto count = static_cast<py::ssize_t>(keys->size());
  const auto* data = reinterpret_cast<const std::uint8_t*>(keys->data());
  const py::capsule owner(keys.get(), [](void* p) { delete static_cast<std::vector<BlockKey>*>(p); });
  static_cast<void>(keys.release());
  return KeyArray({count, static_cast<py::ssize_t>(kKeyBytes)}, data, owner);
}

}  // namespace

void bind_keys(py::module_& m) {
  m.def("root_key", &root, py::arg("fields"), "Key that stands for namespace, model and layout.");
  m.def("chain_keys", &chain, py::arg("parent"), py::arg("tokens").noconvert(), py::arg("block_tokens"),
        py::arg("extras"), "Keys [n, 32] of the whole blocks of int32 tokens. Releases the GIL.");
}

}  // namespace kvtier::bindings
