#include "kvtier/transfer/page_map.h"

#include <algorithm>
#include <optional>
#include <tuple>

namespace kvtier {
namespace {

constexpr std::uint64_t kMaxPages = std::uint64_t{1} << 31;
constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{1} << 31;

std::string tensor_name(const GroupSpec& spec, std::size_t index) {
  return "group '" + spec.name + "', tensor " + std::to_string(index);
}

const TensorAxis* axis(const TensorView& tensor, char letter) {
  for (const TensorAxis& a : tensor.axes) {
    if (a.letter == letter) return &a;
  }
  return nullptr;
}

// How the tensors of a list share out layers and parts.
struct Sharing {
  std::uint32_t layers_per_tensor;
  bool parts_apart;  // key and value in tensors of their own
};

Result<Sharing> sharing_of(const GroupSpec& spec, std::span<const TensorView> tensors) {
  const bool has_layers = !tensors.empty() && axis(tensors[0], 'L') != nullptr;
  const bool has_parts = spec.num_parts == 1 || (!tensors.empty() && axis(tensors[0], 'K') != nullptr);
  const std::size_t wanted = std::size_t{has_layers ? 1 : spec.num_layers} * (has_parts ? 1 : spec.num_parts);
  if (tensors.size() != wanted) {
    return Status::invalid_argument("group '" + spec.name + "': " + std::to_string(tensors.size()) +
                                    " tensors given; allowed: " + std::to_string(wanted) + " for " +
                                    std::to_string(spec.num_layers) + " layers with axes " +
                                    (has_layers ? "that hold all layers" : "of one layer") +
                                    (has_parts ? "" : ", keys and values apart"));
  }
  return Sharing{has_layers ? spec.num_layers : 1, !has_parts};
}

Status check_axes(const GroupSpec& spec, std::size_t index, const TensorView& tensor, const Sharing& sharing,
                  std::uint64_t num_pages) {
  const std::string name = tensor_name(spec, index);
  if (tensor.base == nullptr) return Status::invalid_argument(name + ": its data pointer is null");
  std::string seen;
  for (const TensorAxis& a : tensor.axes) {
    if (seen.find(a.letter) != std::string::npos) {
      return Status::invalid_argument(name + ": axis " + a.letter + " is named twice");
    }
    seen += a.letter;
    std::uint64_t wanted = 0;
    if (a.letter == 'P') {
      wanted = num_pages;
    } else if (a.letter == 'L') {
      wanted = sharing.layers_per_tensor;
    } else {
      // Where keys and values are apart a tensor holds one part only.
      wanted = a.letter == 'K' && sharing.parts_apart ? 1 : spec.extent(a.letter);
    }
    if (wanted == 0) {
      return Status::invalid_argument(name + ": axis " + std::string(1, a.letter) +
                                      " is not one of P, L and page_order \"" + spec.page_order + "\"");
    }
    if (a.extent != wanted) {
      return Status::invalid_argument(name + ": axis " + std::string(1, a.letter) + " has extent " +
                                      std::to_string(a.extent) + "; the layout says " +
                                      std::to_string(wanted));
    }
    if (a.stride_bytes < 0) {
      return Status::invalid_argument(name + ": axis " + std::string(1, a.letter) +
                                      " has the negative stride " + std::to_string(a.stride_bytes) +
                                      " bytes; allowed: 0 or more");
    }
  }
  for (const char letter : "PL" + spec.page_order) {
    if (letter == 'K' && sharing.parts_apart) continue;
    const std::uint64_t extent = letter == 'P'   ? num_pages
                                 : letter == 'L' ? sharing.layers_per_tensor
                                                 : spec.extent(letter);
    if (extent == 1) continue;
    if (seen.find(letter) == std::string::npos) {
      return Status::invalid_argument(name + ": axis " + std::string(1, letter) +
                                      " is missing from its axes \"" + seen + "\"");
    }
  }
  return Status::ok();
}

// No two elements may share a byte: sorted by stride, each axis must step over all that lies inside it.
Status check_no_overlap(const GroupSpec& spec, std::size_t index, const TensorView& tensor) {
  std::vector<TensorAxis> axes = tensor.axes;
  std::erase_if(axes, [](const TensorAxis& a) { return a.extent == 1; });
  std::sort(axes.begin(), axes.end(),
            [](const TensorAxis& a, const TensorAxis& b) { return a.stride_bytes < b.stride_bytes; });
  std::uint64_t inside = spec.item_bytes;
  for (const TensorAxis& a : axes) {
    const auto stride = static_cast<std::uint64_t>(a.stride_bytes);
    if (stride < inside) {
      return Status::invalid_argument(tensor_name(spec, index) + ": axis " + std::string(1, a.letter) +
                                      " has a stride of " + std::to_string(stride) +
                                      " bytes, so its elements overlap; allowed: at least " +
                                      std::to_string(inside));
    }
    if (a.extent - 1 > (std::uint64_t{1} << 46) / stride) {
      return Status::invalid_argument(tensor_name(spec, index) + ": spans more than 64 TiB");
    }
    inside += stride * (a.extent - 1);
  }
  return Status::ok();
}

// One tensor given for two layers, or views that are shifted by whole pages, would make a load overwrite what
// it has just written: two pieces at the same place of their page, fewer pages apart than there are.
Status check_pieces_apart(const GroupSpec& spec, std::span<const Piece> pieces, std::uint32_t num_pages) {
  struct Place {
    std::uint64_t page_stride;
    std::uint64_t in_page;
    std::uint64_t page;
    std::uint32_t layer;
  };
  std::vector<Place> places;
  for (const Piece& piece : pieces) {
    if (piece.page_in_block > 0) continue;
    const std::uint64_t address = reinterpret_cast<std::uintptr_t>(piece.base);
    const std::uint64_t stride = std::max<std::uint64_t>(1, piece.page_stride);
    // A single page has no stride: then only equal addresses are told.
    places.push_back(
        {stride, stride == 1 ? address : address % stride, stride == 1 ? 0 : address / stride, piece.layer});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) {
    return std::tie(a.page_stride, a.in_page, a.page) < std::tie(b.page_stride, b.in_page, b.page);
  });
  for (std::size_t i = 1; i < places.size(); ++i) {
    const Place& a = places[i - 1];
    const Place& b = places[i];
    if (a.page_stride == b.page_stride && a.in_page == b.in_page && b.page - a.page < num_pages) {
      return Status::invalid_argument("group '" + spec.name + "': layers " + std::to_string(a.layer) +
                                      " and " + std::to_string(b.layer) +
                                      " share memory; allowed: every layer and part in memory of its own");
    }
  }
  return Status::ok();
}

// Which tensors are known to share an allocation: those whose address ranges overlap, as the views of one
// tensor do. Ranges that only touch may be two allocations, which no run of bytes may straddle.
std::vector<std::uint32_t> allocations_of(const GroupSpec& spec, std::span<const TensorView> tensors) {
  struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;
    std::size_t tensor;
  };
  std::vector<Range> ranges;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    std::uintptr_t bytes = spec.item_bytes;
    for (const TensorAxis& a : tensors[t].axes)
      bytes += (a.extent - 1) * static_cast<std::uintptr_t>(a.stride_bytes);
    const auto begin = reinterpret_cast<std::uintptr_t>(tensors[t].base);
    ranges.push_back({begin, begin + bytes, t});
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  std::vector<std::uint32_t> allocations(tensors.size());
  std::uint32_t current = 0;
  std::uintptr_t end = 0;
  for (const Range& range : ranges) {
    if (range.begin >= end) ++current;
    end = std::max(end, range.end);
    allocations[range.tensor] = current;
  }
  return allocations;
}

}  // namespace

Result<PageMap> PageMap::make(const GroupSpec& spec, std::span<const TensorView> tensors) {
  KVTIER_RETURN_IF_ERROR(spec.validate());
  Result<Sharing> sharing = sharing_of(spec, tensors);
  if (!sharing) return sharing.status();
  const TensorAxis* pages = axis(tensors[0], 'P');
  if (pages == nullptr || pages->extent == 0 || pages->extent > kMaxPages) {
    return Status::invalid_argument(tensor_name(spec, 0) + ": its page axis P has extent " +
                                    std::to_string(pages ? pages->extent : 0) + "; allowed: 1 to " +
                                    std::to_string(kMaxPages));
  }

  if (sharing->parts_apart && spec.page_order.front() != 'K') {
    return Status::invalid_argument("group '" + spec.name +
                                    "': keys and values are in tensors of their own, but "
                                    "page_order is \"" +
                                    spec.page_order + "\"; allowed then: K outermost");
  }

  PageMap map;
  map.spec_ = spec;
  map.num_pages_ = static_cast<std::uint32_t>(pages->extent);
  const std::uint32_t tokens = std::min(spec.block_tokens, spec.page_tokens);
  const std::uint64_t page_part_bytes =
      spec.layer_token_bytes() * tokens / (sharing->parts_apart ? spec.num_parts : 1);

  for (std::size_t t = 0; t < tensors.size(); ++t) {
    KVTIER_RETURN_IF_ERROR(check_axes(spec, t, tensors[t], *sharing, pages->extent));
    KVTIER_RETURN_IF_ERROR(check_no_overlap(spec, t, tensors[t]));
  }
  const std::vector<std::uint32_t> allocations = allocations_of(spec, tensors);
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const TensorView& tensor = tensors[t];
    // The longest tail of page_order that is contiguous in memory is one stretch; what is left outside
    // of it is enumerated.
    std::vector<TensorAxis> order;
    for (const char letter : spec.page_order) {
      const TensorAxis* a = axis(tensor, letter);
      if (a == nullptr) continue;
      order.push_back(*a);
      if (letter == 'T') order.back().extent = tokens;
    }
    std::uint64_t stretch = spec.item_bytes;
    while (!order.empty() &&
           (order.back().extent == 1 || static_cast<std::uint64_t>(order.back().stride_bytes) == stretch)) {
      stretch *= order.back().extent;
      order.pop_back();
    }
    if (!order.empty() && stretch == spec.item_bytes && order.back().letter == spec.page_order.back()) {
      return Status::invalid_argument(tensor_name(spec, t) + ": axis " + std::string(1, order.back().letter) +
                                      " has a stride of " + std::to_string(order.back().stride_bytes) +
                                      " bytes; allowed for the innermost axis: item_bytes, " +
                                      std::to_string(spec.item_bytes));
    }
    if (stretch > kMaxPieceBytes) {
      return Status::invalid_argument(tensor_name(spec, t) + ": a page has " + std::to_string(stretch) +
                                      " contiguous bytes; allowed: at most " +
                                      std::to_string(kMaxPieceBytes));
    }
    std::vector<std::uint64_t> stretches{0};  // where they begin, from the page's first byte
    for (const TensorAxis& a : order) {
      std::vector<std::uint64_t> finer;
      for (const std::uint64_t offset : stretches) {
        for (std::uint64_t i = 0; i < a.extent; ++i) {
          finer.push_back(offset + i * static_cast<std::uint64_t>(a.stride_bytes));
        }
      }
      stretches = std::move(finer);
    }

    const TensorAxis* layer_axis = axis(tensor, 'L');
    const TensorAxis* token_axis = axis(tensor, 'T');
    const TensorAxis* page_axis = axis(tensor, 'P');
    const std::uint32_t parts = sharing->parts_apart ? spec.num_parts : 1;
    for (std::uint32_t l = 0; l < sharing->layers_per_tensor; ++l) {
      const std::uint32_t layer = sharing->layers_per_tensor > 1 ? l : static_cast<std::uint32_t>(t / parts);
      const auto part = static_cast<std::uint32_t>(t % parts);
      std::byte* base =
          tensor.base + (layer_axis ? l * static_cast<std::uint64_t>(layer_axis->stride_bytes) : 0);
      for (std::uint32_t page = 0; page < spec.pages_per_block(); ++page) {
        std::uint64_t at =
            ((std::uint64_t{layer} * spec.pages_per_block() + page) * parts + part) * page_part_bytes;
        for (const std::uint64_t offset : stretches) {
          Piece piece{};
          piece.base = base + offset;
          piece.page_stride = page_axis ? static_cast<std::uint64_t>(page_axis->stride_bytes) : 0;
          piece.stripe_offset = at;
          piece.sub_stride = spec.blocks_per_page() > 1 && token_axis
                                 ? static_cast<std::uint64_t>(token_axis->stride_bytes) * spec.block_tokens
                                 : 0;
          piece.bytes = static_cast<std::uint32_t>(stretch);
          piece.layer = layer;
          piece.page_in_block = page;
          piece.allocation = allocations[t];
          map.pieces_.push_back(piece);
          at += stretch;
        }
      }
    }
  }
  KVTIER_RETURN_IF_ERROR(check_pieces_apart(spec, map.pieces_, map.num_pages_));
  std::sort(map.pieces_.begin(), map.pieces_.end(),
            [](const Piece& a, const Piece& b) { return a.stripe_offset < b.stripe_offset; });
  return map;
}

std::span<const Piece> PageMap::pieces_of_layers(std::uint32_t begin, std::uint32_t end) const {
  const auto below = [](const Piece& piece, std::uint32_t layer) { return piece.layer < layer; };
  const auto first = std::lower_bound(pieces_.begin(), pieces_.end(), begin, below);
  const auto last = std::lower_bound(first, pieces_.end(), end, below);
  return {first, last};
}

}  // namespace kvtier
