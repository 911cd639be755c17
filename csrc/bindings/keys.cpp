// root_key() and chain_keys(): buffers in, one array out, no copy of either.
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "common.h"

#include "kvtier/core/huge_vector.h"
#include "kvtier/core/key_chain.h"
#include "kvtier/core/layout.h"

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

// Memory of one request's keys, rounded up to whole huge pages. Under the GIL.
class KeyMemory {
 public:
  explicit KeyMemory(std::size_t bytes) : bytes_(round_up(bytes, internal::kHugeArrayBytes)) {
    if (spare_begin_ != nullptr && spare_bytes_ >= bytes_) {
      begin_ = std::exchange(spare_begin_, nullptr);
      bytes_ = spare_bytes_;
    } else {
      begin_ = internal::map_huge(bytes_);
    }
  }
  // What one request leaves is kept for the next: fresh pages for 65,536 keys cost a tenth of their lookup.
  ~KeyMemory() {
    const bool keeps = bytes_ <= kMostKeptBytes && (spare_begin_ == nullptr || spare_bytes_ < bytes_);
    if (keeps) {
      std::swap(begin_, spare_begin_);
      std::swap(bytes_, spare_bytes_);
    }
    if (begin_ != nullptr) internal::unmap_huge(begin_, bytes_);
  }
  KeyMemory(const KeyMemory&) = delete;
  KeyMemory& operator=(const KeyMemory&) = delete;

  void* begin() const { return begin_; }

 private:
  static constexpr std::size_t kMostKeptBytes = std::size_t{16} << 20;
  static inline void* spare_begin_ = nullptr;
  static inline std::size_t spare_bytes_ = 0;

  void* begin_ = nullptr;
  std::size_t bytes_;
};

KeyArray empty_keys(std::size_t count) {
  const auto rows = static_cast<py::ssize_t>(count);
  const auto columns = static_cast<py::ssize_t>(kKeyBytes);
  if (count > std::size_t{1} << 32) throw StatusError{Status::invalid_argument("count: more than 2^32")};
  if (count * kKeyBytes < internal::kHugeArrayBytes / 4) return KeyArray({rows, columns});
  auto memory = std::make_unique<KeyMemory>(count * kKeyBytes);
  const auto* data = static_cast<const std::uint8_t*>(memory->begin());
  const py::capsule owner(memory.get(), [](void* p) { delete static_cast<KeyMemory*>(p); });
  static_cast<void>(memory.release());
  return KeyArray({rows, columns}, data, owner);
}

// Row i of `keys` is hashes[first + i * step], filled up with zeros, exclusive or `root`. Reads the objects
// where they are: a list of 64K of them, joined and combined by Python, took longer than their lookup.
void mix_hashes(const py::object& hashes, std::size_t first, std::size_t step, const py::bytes& root,
                KeyArray keys) {
  const BlockKey mask = key_of(root);
  if (keys.ndim() != 2 || keys.shape(1) != static_cast<py::ssize_t>(kKeyBytes)) {
    throw StatusError{Status::invalid_argument("keys: not an array [n, 32]")};
  }
  const auto count = static_cast<std::size_t>(keys.shape(0));
  std::uint8_t* row = keys.mutable_data();
  const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(hashes.ptr(), "hashes: no sequence"));
  if (!items) throw py::error_already_set();
  PyObject** const item = PySequence_Fast_ITEMS(items.ptr());
  const auto size = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr()));
  if (count > 0 && (step == 0 || first >= size || (count - 1) > (size - 1 - first) / step)) {
    throw StatusError{Status::invalid_argument("hashes: fewer than there are keys")};
  }
  constexpr std::size_t kAhead = 16;
  py::ssize_t length = -1;
  for (std::size_t i = 0; i < count; ++i, row += kKeyBytes) {
    PyObject* const hash = item[first + i * step];
    if (i + kAhead < count) __builtin_prefetch(item[first + (i + kAhead) * step]);
    if (PyBytes_Check(hash) == 0) {
      throw StatusError{Status::invalid_argument("a block hash is not of type bytes; allowed: bytes")};
    }
    const py::ssize_t bytes = PyBytes_GET_SIZE(hash);
    if (length < 0) length = bytes;
    if (bytes != length || bytes > static_cast<py::ssize_t>(kKeyBytes)) {
      throw StatusError{Status::invalid_argument("a block hash has " + std::to_string(bytes) +
                                                 " bytes; allowed: at most 32, all of one length")};
    }
    std::uint64_t words[4] = {};
    std::memcpy(words, PyBytes_AS_STRING(hash), static_cast<std::size_t>(bytes));
    std::uint64_t masks[4];
    std::memcpy(masks, mask.bytes.data(), sizeof masks);
    for (std::size_t w = 0; w < 4; ++w) words[w] ^= masks[w];
    std::memcpy(row, words, sizeof words);
  }
}

}  // namespace

void bind_keys(py::module_& m) {
  m.def("root_key", &root, py::arg("fields"), "Key that stands for namespace, model and layout.");
  m.def("chain_keys", &chain, py::arg("parent"), py::arg("tokens").noconvert(), py::arg("block_tokens"),
        py::arg("extras"), "Keys [n, 32] of the whole blocks of int32 tokens. Releases the GIL.");
  m.def("empty_keys", &empty_keys, py::arg("count"), "Keys [count, 32] of which each holds anything.");
  m.def("mix_hashes", &mix_hashes, py::arg("hashes"), py::arg("first"), py::arg("step"), py::arg("root"),
        py::arg("keys").noconvert(),
        "Fills keys [n, 32] with hashes[first::step], each exclusive or the root. Keeps the GIL.");
}

}  // namespace kvtier::bindings
