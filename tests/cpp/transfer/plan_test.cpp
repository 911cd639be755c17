#include "kvtier/transfer/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace kvtier {
namespace {

enum class Layers { apart, one_tensor, views };  // views: a tensor per layer, of one allocation

struct Layout {
  std::string memory;  // axes as they stand in memory, outermost first; without L: an allocation per layer
  std::string page_order;  // as they stand in a slot
  Layers layers = Layers::apart;
  bool parts_apart = false;  // K in `memory`: key and value are views, else allocations of their own
  std::map<char, std::int64_t> pads = {};  // bytes added to the stride of an axis
};

const std::vector<Layout> kLayouts{
    {"PKTHD", "KTHD"},  // NHD
    {"PKHTD", "KHTD"},  // HND
    {"KPTHD", "KTHD"},  // K outermost of the tensor
    {"KPHTD", "KHTD"},
    {"PTKHD", "TKHD"},
    {"PKHDT", "KHDT"},  // token innermost
    {"PKHTD", "KTHD"},  // memory in another order than the slot
    {"PKTHD", "KHTD"},
    {"PTHD", "KTHD", Layers::apart, true},  // key and value in allocations of their own
    {"PHTD", "KHTD", Layers::apart, true},
    {"PKTHD", "KTHD", Layers::apart, true},  // views of one allocation
    {"KPHTD", "KHTD", Layers::apart, true},
    {"LPKTHD", "KTHD", Layers::one_tensor},
    {"PLKTHD", "KTHD", Layers::one_tensor},
    {"LKPHTD", "KHTD", Layers::one_tensor},
    {"KPLTHD", "KTHD", Layers::one_tensor},
    {"PKLTHD", "KTHD", Layers::one_tensor, true},
    {"LPTHD", "KTHD", Layers::one_tensor, true},
    {"PLKTHD", "KTHD", Layers::views},
    {"PLKHTD", "KHTD", Layers::views},
    {"PLKTHD", "KTHD", Layers::views, true},
    {"PTD", "TD"},  // latent
    {"PLTD", "TD", Layers::one_tensor},
    {"PLTD", "TD", Layers::views},
    {"PKTHD", "KTHD", Layers::apart, false, {{'P', 24}}},  // padded
    {"PKTHD", "KTHD", Layers::apart, false, {{'T', 6}}},
    {"PKHTD", "KHTD", Layers::apart, false, {{'H', 2}}},
    {"PKTHD", "KTHD", Layers::apart, false, {{'K', 10}, {'H', 4}}},
    {"LPKTHD", "KTHD", Layers::one_tensor, false, {{'L', 8}, {'P', 2}}},
    {"PTHD", "KTHD", Layers::apart, true, {{'T', 2}}},
    {"PTD", "TD", Layers::apart, false, {{'T', 4}}},
};

std::string name_of(const Layout& layout) {
  std::string name = layout.memory + " as " + layout.page_order;
  if (layout.layers == Layers::one_tensor) name += ", one tensor";
  if (layout.layers == Layers::views) name += ", layer views";
  if (layout.parts_apart) name += ", parts apart";
  for (const auto& [axis, pad] : layout.pads) name += std::string(", pad ") + axis;
  return name;
}

// A framework's memory in a layout, and where each of its bytes is, computed element by element.
class Framework {
 public:
  Framework(const Layout& layout, std::uint32_t page_tokens, std::uint32_t block_tokens) : layout_(layout) {
    spec_.name = "g";
    spec_.num_layers = 3;
    spec_.num_parts = layout.page_order.find('K') == std::string::npos ? 1 : 2;
    spec_.num_heads = layout.page_order.find('H') == std::string::npos ? 1 : 2;
    spec_.head_dim = 3;
    spec_.item_bytes = 2;
    spec_.page_tokens = page_tokens;
    spec_.block_tokens = block_tokens;
    spec_.page_order = layout.page_order;
    spec_.num_stripes = 2;
    extents_ = {{'P', kPages},      {'L', spec_.num_layers}, {'K', spec_.num_parts},
                {'T', page_tokens}, {'H', spec_.num_heads},  {'D', spec_.head_dim}};
    std::int64_t stride = spec_.item_bytes;
    for (auto axis = layout.memory.rbegin(); axis != layout.memory.rend(); ++axis) {
      const auto pad = layout.pads.find(*axis);
      if (pad != layout.pads.end()) stride += pad->second;
      strides_[*axis] = stride;
      stride *= static_cast<std::int64_t>(extents_[*axis]);
    }
    bytes_ = static_cast<std::uint64_t>(stride);
    memory_.resize((bytes_ + kGap) * 8);
    make_tensors();
  }

  static constexpr std::uint32_t kPages = 7;
  static constexpr std::uint64_t kGap = 16;

  const GroupSpec& spec() const { return spec_; }
  const std::vector<TensorView>& tensors() const { return tensors_; }

  // Address of every byte of a block's stripe, in the order of the stripe.
  std::vector<const std::byte*> block(std::span<const PageId> pages, const BlockMove& move) {
    std::vector<const std::byte*> addresses;
    const std::uint64_t tokens = std::min(spec_.page_tokens, spec_.block_tokens);
    for (std::uint64_t layer = 0; layer < spec_.num_layers; ++layer) {
      for (std::uint32_t page = 0; page < spec_.pages_per_block(); ++page) {
        std::map<char, std::uint64_t> at{{'L', layer}, {'P', raw(pages[move.first_page + page])}};
        each_element(0, at, tokens, move.sub_block * tokens, addresses);
      }
    }
    return addresses;
  }

 private:
  void each_element(std::size_t depth, std::map<char, std::uint64_t>& at, std::uint64_t tokens,
                    std::uint64_t first_token, std::vector<const std::byte*>& addresses) {
    if (depth == spec_.page_order.size()) {
      const std::byte* element = address(at);
      for (std::uint32_t i = 0; i < spec_.item_bytes; ++i) addresses.push_back(element + i);
      return;
    }
    const char axis = spec_.page_order[depth];
    const std::uint64_t first = axis == 'T' ? first_token : 0;
    const std::uint64_t count = axis == 'T' ? tokens : extents_[axis];
    for (std::uint64_t i = 0; i < count; ++i) {
      at[axis] = first + i;
      each_element(depth + 1, at, tokens, first_token, addresses);
    }
  }

  bool has(char axis) const { return layout_.memory.find(axis) != std::string::npos; }

  // Allocations stand apart, one for each layer or part that has no axis in memory.
  std::byte* address(const std::map<char, std::uint64_t>& at) {
    std::uint64_t allocation = 0;
    std::int64_t offset = 0;
    for (const auto& [axis, index] : at) {
      if (has(axis)) {
        offset += static_cast<std::int64_t>(index) * strides_[axis];
      } else if (axis == 'L') {
        allocation += index * 2;
      } else if (axis == 'K') {
        allocation += index;
      }
    }
    return memory_.data() + allocation * (bytes_ + kGap) + offset;
  }

  void make_tensors() {
    const std::uint64_t layers = layout_.layers == Layers::one_tensor ? 1 : spec_.num_layers;
    const std::uint64_t parts = layout_.parts_apart ? 2 : 1;
    for (std::uint64_t layer = 0; layer < layers; ++layer) {
      for (std::uint64_t part = 0; part < parts; ++part) {
        TensorView tensor{address({{'L', layer}, {'K', part}}), {}};
        for (const char axis : layout_.memory) {
          if (axis == 'L' && layout_.layers != Layers::one_tensor) continue;
          if (axis == 'K' && layout_.parts_apart) continue;
          tensor.axes.push_back({axis, extents_[axis], strides_[axis]});
        }
        std::rotate(tensor.axes.begin(), tensor.axes.begin() + 1,
                    tensor.axes.end());  // no order is asked for
        tensors_.push_back(tensor);
      }
    }
  }

  Layout layout_;
  GroupSpec spec_;
  std::map<char, std::uint64_t> extents_;
  std::map<char, std::int64_t> strides_;
  std::uint64_t bytes_;
  std::vector<std::byte> memory_;
  std::vector<TensorView> tensors_;
};

// Where each byte of [begin, begin + bytes) in a slot comes from or goes to, by the runs; null where none.
std::vector<const std::byte*> expand(std::span<const CopyRun> runs, Direction direction,
                                     const std::byte* begin, std::size_t bytes) {
  std::vector<const std::byte*> other(bytes, nullptr);
  for (const CopyRun& run : runs) {
    EXPECT_GT(run.bytes, 0U);
    const auto* to = static_cast<const std::byte*>(run.destination);
    const auto* from = static_cast<const std::byte*>(run.source);
    const std::byte* slot = direction == Direction::store ? to : from;
    const std::byte* page = direction == Direction::store ? from : to;
    for (std::size_t i = 0; i < run.bytes; ++i) {
      const std::ptrdiff_t at = slot + i - begin;
      if (at < 0 || at >= static_cast<std::ptrdiff_t>(bytes)) {
        ADD_FAILURE() << "a run leaves the stripes";
        return other;
      }
      EXPECT_EQ(other[static_cast<std::size_t>(at)], nullptr) << "byte " << at << " is moved twice";
      other[static_cast<std::size_t>(at)] = page + i;
    }
  }
  return other;
}

struct Tokens {
  std::uint32_t page, block;
};

void check_layout(const Layout& layout, Tokens tokens) {
  SCOPED_TRACE(name_of(layout) + ", page " + std::to_string(tokens.page) + ", block " +
               std::to_string(tokens.block));
  Framework framework(layout, tokens.page, tokens.block);
  const GroupSpec& spec = framework.spec();
  Result<PageMap> map = PageMap::make(spec, framework.tensors());
  ASSERT_TRUE(map) << map.status().message();
  EXPECT_EQ(map->num_pages(), Framework::kPages);

  // Pages in any order; blocks of one page may be in any order too.
  std::vector<PageId> pages;
  for (const std::uint32_t id : {5U, 0U, 6U, 2U, 3U, 1U}) pages.push_back(PageId{id});
  std::vector<BlockMove> moves;
  for (std::uint32_t p = 0; p + spec.pages_per_block() <= pages.size(); p += spec.pages_per_block()) {
    for (std::uint32_t sub = spec.blocks_per_page(); sub-- > 0;) moves.push_back({nullptr, p, sub});
  }
  const std::uint64_t pitch = kSlotHeaderBytes + spec.payload_bytes();  // as dense as slots can stand
  std::vector<std::byte> slots(pitch * moves.size());
  for (std::size_t i = 0; i < moves.size(); ++i) {
    moves[i].stripe =
        slots.data() + i * pitch + kSlotHeaderBytes + (i % spec.num_stripes) * spec.stripe_bytes();
  }
  for (const Direction direction : {Direction::store, Direction::load}) {
    ASSERT_TRUE(check_pages(*map, moves, pages, direction));
    std::vector<CopyRun> runs;
    plan(*map, moves, pages, direction, 0, spec.num_layers, runs);
    const std::vector<const std::byte*> found = expand(runs, direction, slots.data(), slots.size());
    std::vector<const std::byte*> expected(slots.size(), nullptr);
    std::size_t maximal_runs = 0;
    for (const BlockMove& move : moves) {
      const std::vector<const std::byte*> block = framework.block(pages, move);
      ASSERT_EQ(block.size(), spec.stripe_bytes());
      std::copy(block.begin(), block.end(), expected.begin() + (move.stripe - slots.data()));
      for (std::size_t i = 0; i < block.size(); ++i)
        maximal_runs += i == 0 || block[i] != block[i - 1] + 1 ? 1 : 0;
    }
    EXPECT_TRUE(found == expected);
    EXPECT_EQ(runs.size(), maximal_runs) << "runs that continue each other are not joined";

    // In batches of layers, appended to what is there: the same bytes.
    for (std::uint32_t step = 1; step <= spec.num_layers; ++step) {
      std::vector<CopyRun> pieces;
      for (std::uint32_t layer = 0; layer < spec.num_layers; layer += step) {
        const std::size_t before = pieces.size();
        plan(*map, moves, pages, direction, layer, std::min(layer + step, spec.num_layers), pieces);
        EXPECT_GT(pieces.size(), before);
      }
      EXPECT_TRUE(expand(pieces, direction, slots.data(), slots.size()) == expected) << "steps of " << step;
    }
  }
}

TEST(Plan, every_byte_of_every_layout_has_its_place_both_ways) {
  for (const Layout& layout : kLayouts) {
    for (const Tokens tokens :
         {Tokens{4, 4}, Tokens{2, 4}, Tokens{1, 3}, Tokens{4, 2}, Tokens{6, 1}, Tokens{1, 1}}) {
      check_layout(layout, tokens);
      if (testing::Test::HasFailure()) return;
    }
  }
}

GroupSpec small_spec() {
  GroupSpec spec;
  spec.name = "g";
  spec.num_layers = 2;
  spec.num_heads = 2;
  spec.head_dim = 4;
  spec.item_bytes = 2;
  spec.page_tokens = spec.block_tokens = 4;
  return spec;
}

// One tensor per layer, NHD, contiguous.
TensorView nhd(std::byte* base, std::uint64_t pages = 8) {
  return {base, {{'P', pages, 128}, {'K', 2, 64}, {'T', 4, 16}, {'H', 2, 8}, {'D', 4, 2}}};
}

TEST(Plan, an_empty_range_of_layers_or_no_move_is_nothing) {
  std::vector<std::byte> memory(4096);
  const PageMap map =
      PageMap::make(small_spec(), std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  const PageId page{0};
  const BlockMove move{memory.data(), 0, 0};
  std::vector<CopyRun> runs;
  plan(map, {}, {&page, 1}, Direction::load, 0, 2, runs);
  plan(map, {&move, 1}, {&page, 1}, Direction::load, 1, 1, runs);
  plan(map, {&move, 1}, {&page, 1}, Direction::load, 2, 9, runs);
  EXPECT_TRUE(runs.empty());
}

// A device refuses a run that straddles two allocations, even when they happen to touch.
TEST(Plan, allocations_that_only_touch_are_never_joined) {
  std::vector<std::byte> memory(256), slot(256);
  const PageMap map =
      PageMap::make(small_spec(), std::vector{nhd(memory.data(), 1), nhd(memory.data() + 128, 1)}).value();
  const PageId page{0};
  const BlockMove move{slot.data(), 0, 0};
  std::vector<CopyRun> runs;
  plan(map, {&move, 1}, {&page, 1}, Direction::store, 0, 2, runs);
  EXPECT_EQ(runs.size(), 2U);
}

TEST(PageMap, pieces_are_sorted_by_layer_and_place) {
  for (const Layout& layout : kLayouts) {
    Framework framework(layout, 2, 4);
    const PageMap map = PageMap::make(framework.spec(), framework.tensors()).value();
    std::uint64_t place = 0;
    std::uint32_t layer = 0;
    for (const Piece& piece : map.pieces()) {
      EXPECT_GE(piece.layer, layer);
      EXPECT_EQ(piece.stripe_offset, place) << "pieces are dense in the stripe";
      layer = piece.layer;
      place = piece.stripe_offset + piece.bytes;
    }
    EXPECT_EQ(place, framework.spec().stripe_bytes());
  }
}

TEST(PageMap, a_contiguous_page_is_one_piece_per_layer) {
  std::vector<std::byte> memory(4096);
  const PageMap map =
      PageMap::make(small_spec(), std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  EXPECT_EQ(map.pieces().size(), 2U);
  EXPECT_EQ(map.pieces_of_layers(1, 2).size(), 1U);
  EXPECT_EQ(map.pieces_of_layers(1, 2)[0].base, memory.data() + 2048);
}

TEST(PageMap, axes_of_extent_one_may_be_left_out) {
  std::vector<std::byte> memory(4096);
  GroupSpec spec = small_spec();
  spec.num_layers = 1;
  spec.num_heads = 1;
  spec.page_tokens = spec.block_tokens = 1;
  const TensorView bare{memory.data(), {{'P', 8, 16}, {'K', 2, 8}, {'D', 4, 2}}};
  const TensorView full{memory.data(),
                        {{'P', 8, 16}, {'L', 1, 7}, {'K', 2, 8}, {'T', 1, 999}, {'H', 1, 0}, {'D', 4, 2}}};
  for (const TensorView& tensor : {bare, full}) {
    Result<PageMap> map = PageMap::make(spec, {&tensor, 1});
    ASSERT_TRUE(map) << map.status().message();
    EXPECT_EQ(map->pieces().size(), 1U);
  }
}

TEST(PageMap, every_bad_tensor_is_named) {
  std::vector<std::byte> memory(8192);
  std::byte* base = memory.data();
  using Tensors = std::vector<TensorView>;
  struct Case {
    std::function<void(GroupSpec&, Tensors&)> spoil;
    std::string message;
  };
  const auto apart = [base](GroupSpec&, Tensors& t) {  // a correct form with key and value apart
    t.clear();
    for (int i = 0; i < 4; ++i) {
      t.push_back({base + 1024 * i, {{'P', 8, 64}, {'T', 4, 16}, {'H', 2, 8}, {'D', 4, 2}}});
    }
  };
  const auto whole = [base](GroupSpec&, Tensors& t) {  // and with an L axis
    t = {nhd(base)};
    t[0].axes.push_back({'L', 2, 1024});
  };
  const std::vector<Case> cases{
      {[](GroupSpec& s, Tensors&) { s.num_layers = 0; }, "group 'g': num_layers is 0; it must be at least 1"},
      {[](GroupSpec&, Tensors& t) { t.clear(); },
       "group 'g': 0 tensors given; allowed: 4 for 2 layers with axes of one layer, keys and values apart"},
      {[](GroupSpec&, Tensors& t) { t.pop_back(); },
       "group 'g': 1 tensors given; allowed: 2 for 2 layers with axes of one layer"},
      {[&](GroupSpec& s, Tensors& t) { whole(s, t), t.push_back(t[0]); },
       "group 'g': 2 tensors given; allowed: 1 for 2 layers with axes that hold all layers"},
      {[](GroupSpec&, Tensors& t) { t[0].axes.erase(t[0].axes.begin()); },
       "group 'g', tensor 0: its page axis P has extent 0; allowed: 1 to 2147483648"},
      {[](GroupSpec&, Tensors& t) { t[0].axes[0].extent = 0; },
       "group 'g', tensor 0: its page axis P has extent 0; allowed: 1 to 2147483648"},
      {[](GroupSpec&, Tensors& t) { t[0].axes[0].extent = 1ULL << 32; },
       "group 'g', tensor 0: its page axis P has extent 4294967296; allowed: 1 to 2147483648"},
      {[](GroupSpec&, Tensors& t) { t[1].base = nullptr; }, "group 'g', tensor 1: its data pointer is null"},
      {[](GroupSpec&, Tensors& t) { t[1].axes[0].extent = 9; },
       "group 'g', tensor 1: axis P has extent 9; the layout says 8"},
      {[](GroupSpec&, Tensors& t) { t[1].axes[2].extent = 5; },
       "group 'g', tensor 1: axis T has extent 5; the layout says 4"},
      {[](GroupSpec&, Tensors& t) { t[1].axes.push_back({'T', 4, 16}); },
       "group 'g', tensor 1: axis T is named twice"},
      {[](GroupSpec&, Tensors& t) { t[1].axes.push_back({'X', 4, 16}); },
       "group 'g', tensor 1: axis X is not one of P, L and page_order \"KTHD\""},
      {[](GroupSpec&, Tensors& t) { t[1].axes[3].stride_bytes = -8; },
       "group 'g', tensor 1: axis H has the negative stride -8 bytes; allowed: 0 or more"},
      {[](GroupSpec&, Tensors& t) { t[1].axes.erase(t[1].axes.begin() + 3); },
       "group 'g', tensor 1: axis H is missing from its axes \"PKTD\""},
      {[](GroupSpec&, Tensors& t) { t[1].axes.erase(t[1].axes.begin() + 1); },
       "group 'g', tensor 1: axis K is missing from its axes \"PTHD\""},
      {[](GroupSpec&, Tensors& t) { t[1].axes.erase(t[1].axes.begin()); },
       "group 'g', tensor 1: axis P is missing from its axes \"KTHD\""},
      {[](GroupSpec&, Tensors& t) { t[0].axes[0].stride_bytes = 127; },
       "group 'g', tensor 0: axis P has a stride of 127 bytes, so its elements overlap; allowed: at least "
       "128"},
      {[](GroupSpec&, Tensors& t) { t[0].axes[4].stride_bytes = 1; },
       "group 'g', tensor 0: axis D has a stride of 1 bytes, so its elements overlap; allowed: at least 2"},
      {[](GroupSpec&, Tensors& t) { t[0].axes[0].stride_bytes = 0; },
       "group 'g', tensor 0: axis P has a stride of 0 bytes, so its elements overlap; allowed: at least 2"},
      {[](GroupSpec&, Tensors& t) { t[0].axes[0].stride_bytes = std::int64_t{1} << 60; },
       "group 'g', tensor 0: spans more than 64 TiB"},
      {[](GroupSpec&, Tensors& t) {
         for (TensorAxis& a : t[1].axes) a.stride_bytes *= 2;
       },
       "group 'g', tensor 1: axis D has a stride of 4 bytes; allowed for the innermost axis: item_bytes, 2"},
      // Tensors that do not agree with the first about what a tensor holds.
      {[&](GroupSpec& s, Tensors& t) {
         apart(s, t);
         t[1].axes.push_back({'K', 2, 2048});
       },
       "group 'g', tensor 1: axis K has extent 2; the layout says 1"},
      {[&](GroupSpec& s, Tensors& t) {
         apart(s, t), t.resize(2);
         t[0].axes.push_back({'L', 2, 1024});
       },
       "group 'g', tensor 1: axis L is missing from its axes \"PTHD\""},
      {[](GroupSpec&, Tensors& t) { t[1].axes.push_back({'L', 2, 2048}); },
       "group 'g', tensor 1: axis L has extent 2; the layout says 1"},
      {[&](GroupSpec& s, Tensors& t) { apart(s, t), s.page_order = "TKHD"; },
       "group 'g': keys and values are in tensors of their own, but page_order is \"TKHD\"; allowed then: K "
       "outermost"},
  };
  for (const Case& c : cases) {
    GroupSpec spec = small_spec();
    Tensors tensors{nhd(base), nhd(base + 2048)};
    c.spoil(spec, tensors);
    const Status status = PageMap::make(spec, tensors).status();
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << c.message;
    EXPECT_EQ(status.message(), c.message);
  }
  GroupSpec spec = small_spec();
  Tensors tensors;
  apart(spec, tensors);
  EXPECT_TRUE(PageMap::make(spec, tensors));
  whole(spec, tensors);
  EXPECT_TRUE(PageMap::make(spec, tensors));
}

TEST(PageMap, a_page_of_more_than_two_gibibytes_in_one_piece_is_refused) {
  GroupSpec spec = small_spec();
  spec.num_layers = spec.num_heads = 1;
  spec.page_order = "KTD";
  spec.head_dim = 1U << 30;
  spec.page_tokens = spec.block_tokens = 2;
  std::byte* base = reinterpret_cast<std::byte*>(std::uintptr_t{4096});  // never touched
  const TensorView tensor{
      base,
      {{'P', 1, 1}, {'K', 2, std::int64_t{4} << 30}, {'T', 2, std::int64_t{2} << 30}, {'D', 1U << 30, 2}}};
  EXPECT_EQ(PageMap::make(spec, {&tensor, 1}).status().message(),
            "group 'g', tensor 0: a page has 8589934592 contiguous bytes; allowed: at most 2147483648");
}

TEST(CheckPages, page_ids_out_of_range_are_named) {
  std::vector<std::byte> memory(4096);
  const PageMap map =
      PageMap::make(small_spec(), std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  const std::vector<BlockMove> moves{{nullptr, 0, 0}, {nullptr, 1, 0}};
  const std::vector<PageId> pages{PageId{7}, PageId{8}};
  for (const Direction direction : {Direction::store, Direction::load}) {
    const Status status = check_pages(map, moves, pages, direction);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_EQ(status.message(), "page_ids[1] is 8; allowed: 0 to 7");
  }
}

TEST(CheckPages, a_load_names_each_place_once_a_store_need_not) {
  std::vector<std::byte> memory(4096);
  const PageMap map =
      PageMap::make(small_spec(), std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  const std::vector<BlockMove> moves{{nullptr, 0, 0}, {nullptr, 1, 0}, {nullptr, 2, 0}};
  const std::vector<PageId> pages{PageId{7}, PageId{3}, PageId{7}};
  EXPECT_TRUE(check_pages(map, moves, pages, Direction::store));
  const Status status = check_pages(map, moves, pages, Direction::load);
  EXPECT_EQ(status.code(), StatusCode::invalid_argument);
  EXPECT_EQ(status.message(), "page id 7 is named twice in page_ids of one load; allowed: each place once");
}

TEST(CheckPages, two_blocks_of_one_page_are_two_places) {
  std::vector<std::byte> memory(4096);
  GroupSpec spec = small_spec();
  spec.block_tokens = 2;
  const PageMap map = PageMap::make(spec, std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  const PageId page{5};
  std::vector<BlockMove> moves{{nullptr, 0, 0}, {nullptr, 0, 1}};
  EXPECT_TRUE(check_pages(map, moves, {&page, 1}, Direction::load));
  moves[0].sub_block = 1;
  EXPECT_EQ(check_pages(map, moves, {&page, 1}, Direction::load).message(),
            "page id 5 is named twice in page_ids of one load; allowed: each place once");
}

TEST(CheckPages, every_page_of_a_large_block_counts) {
  std::vector<std::byte> memory(4096);
  GroupSpec spec = small_spec();
  spec.block_tokens = 8;
  const PageMap map = PageMap::make(spec, std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  const std::vector<BlockMove> moves{{nullptr, 0, 0}, {nullptr, 2, 0}};
  EXPECT_TRUE(
      check_pages(map, moves, std::vector{PageId{0}, PageId{1}, PageId{2}, PageId{3}}, Direction::load));
  EXPECT_FALSE(
      check_pages(map, moves, std::vector{PageId{0}, PageId{1}, PageId{2}, PageId{1}}, Direction::load));
}

#if !defined(NDEBUG) && !defined(__SANITIZE_THREAD__)
TEST(CheckPagesDeathTest, moves_that_name_what_is_not_there_are_bugs) {
  std::vector<std::byte> memory(4096);
  const PageMap map =
      PageMap::make(small_spec(), std::vector{nhd(memory.data()), nhd(memory.data() + 2048)}).value();
  const PageId page{5};
  const BlockMove beyond{nullptr, 1, 0}, no_such_block{nullptr, 0, 1};
  EXPECT_DEATH(static_cast<void>(check_pages(map, {&beyond, 1}, {&page, 1}, Direction::store)),
               "broken invariant");
  EXPECT_DEATH(static_cast<void>(check_pages(map, {&no_such_block, 1}, {&page, 1}, Direction::load)),
               "broken invariant");
}
#endif

}  // namespace
}  // namespace kvtier
