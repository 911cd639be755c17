#include "kvtier/core/layout.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

namespace kvtier {
namespace {

GroupSpec good() {
  GroupSpec spec;
  spec.name = "g";
  spec.num_layers = 32;
  spec.num_heads = 8;
  spec.head_dim = 128;
  spec.item_bytes = 2;
  spec.page_tokens = 16;
  spec.block_tokens = 16;
  return spec;
}

TEST(GroupSpec, good_specs_are_valid) {
  EXPECT_TRUE(good().validate());
  for (const char* order : {"KTHD", "KHTD", "TKHD", "HKTD", "KHDT", "DTHK"}) {
    GroupSpec spec = good();
    spec.page_order = order;
    EXPECT_TRUE(spec.validate()) << order;
  }
  GroupSpec latent = good();
  latent.num_parts = 1;
  latent.num_heads = 1;
  for (const char* order : {"TD", "KTD", "THD", "DT", "KTHD"}) {
    latent.page_order = order;
    EXPECT_TRUE(latent.validate()) << order;
  }
  GroupSpec one_head = good();
  one_head.num_heads = 1;
  one_head.page_order = "KTD";
  EXPECT_TRUE(one_head.validate());
}

TEST(GroupSpec, every_bad_value_is_named) {
  const std::string order_allowed = "\"; allowed: T and D and at most K and H, each once, outermost first";
  const std::string order_lacks = "\" lacks an axis whose extent is greater than 1";
  struct Case {
    std::function<void(GroupSpec&)> spoil;
    std::string message;
  };
  const std::vector<Case> cases{
      {[](GroupSpec& s) { s.num_layers = 0; }, "num_layers is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.num_heads = 0; }, "num_heads is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.head_dim = 0; }, "head_dim is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.item_bytes = 0; }, "item_bytes is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.page_tokens = 0; }, "page_tokens is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.block_tokens = 0; }, "block_tokens is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.num_stripes = 0; }, "num_stripes is 0; it must be at least 1"},
      {[](GroupSpec& s) { s.num_parts = 0; }, "num_parts is 0; allowed: 1 (latent) or 2 (keys and values)"},
      {[](GroupSpec& s) { s.num_parts = 3; }, "num_parts is 3; allowed: 1 (latent) or 2 (keys and values)"},
      {[](GroupSpec& s) { s.block_tokens = 24; },
       "block_tokens is 24 and page_tokens 16; one must be a multiple of the other"},
      {[](GroupSpec& s) { s.page_tokens = 24; },
       "block_tokens is 16 and page_tokens 24; one must be a multiple of the other"},
      {[](GroupSpec& s) { s.window_tokens = 0; }, "window_tokens is 0; leave it out for full attention"},
      {[](GroupSpec& s) { s.page_order = ""; }, "page_order is \"" + order_allowed},
      {[](GroupSpec& s) { s.page_order = "KTHDD"; }, "page_order is \"KTHDD" + order_allowed},
      {[](GroupSpec& s) { s.page_order = "KTHDP"; }, "page_order is \"KTHDP" + order_allowed},
      {[](GroupSpec& s) { s.page_order = "kthd"; }, "page_order is \"kthd" + order_allowed},
      {[](GroupSpec& s) { s.page_order = "KHD"; }, "page_order is \"KHD" + order_allowed},
      {[](GroupSpec& s) { s.page_order = "KTH"; }, "page_order is \"KTH" + order_allowed},
      {[](GroupSpec& s) { s.page_order = "THD"; }, "page_order \"THD" + order_lacks},
      {[](GroupSpec& s) { s.page_order = "KTD"; }, "page_order \"KTD" + order_lacks},
      {[](GroupSpec& s) { s.num_stripes = 1U << 31; }, "a block or page would have more than 1 TiB"},
      {[](GroupSpec& s) { s.page_tokens = 1U << 28; }, "a block or page would have more than 1 TiB"},
      {[](GroupSpec& s) {
         s.num_layers = s.num_heads = s.head_dim = s.item_bytes = s.num_stripes = s.page_tokens =
             s.block_tokens = std::numeric_limits<std::uint32_t>::max();
       },
       "a block or page would have more than 1 TiB"},
  };
  for (const Case& c : cases) {
    GroupSpec spec = good();
    c.spoil(spec);
    const Status status = spec.validate();
    EXPECT_EQ(status.code(), StatusCode::invalid_argument) << c.message;
    EXPECT_TRUE(status.message() == "group 'g': " + c.message) << status.message();
  }
}

TEST(GroupSpec, the_largest_block_is_one_tebibyte) {
  GroupSpec spec = good();  // 2 MiB
  spec.num_stripes = 1U << 19;
  EXPECT_EQ(spec.payload_bytes(), std::uint64_t{1} << 40);
  EXPECT_TRUE(spec.validate());
  spec.num_stripes += 1;
  EXPECT_FALSE(spec.validate());
}

TEST(GroupSpec, bytes_of_a_llama_block) {
  GroupSpec spec = good();
  EXPECT_EQ(spec.layer_token_bytes(), 4096U);
  EXPECT_EQ(spec.stripe_bytes(), 2U << 20);
  EXPECT_EQ(spec.payload_bytes(), 2U << 20);
  EXPECT_EQ(spec.slot_stride_bytes(), (2U << 20) + kSlotHeaderBytes);
  spec.num_stripes = 4;
  EXPECT_EQ(spec.stripe_bytes(), 2U << 20);
  EXPECT_EQ(spec.payload_bytes(), 8U << 20);
}

TEST(GroupSpec, bytes_do_not_wrap_at_32_bits) {
  GroupSpec spec = good();
  spec.num_layers = 128;
  spec.block_tokens = 8192;
  EXPECT_EQ(spec.stripe_bytes(), std::uint64_t{4096} * 128 * 8192);
}

TEST(GroupSpec, a_slot_stride_is_a_multiple_of_the_alignment) {
  GroupSpec spec = good();
  spec.num_layers = 1;
  spec.num_parts = spec.num_heads = spec.item_bytes = 1;
  spec.page_order = "TD";
  spec.page_tokens = spec.block_tokens = 1;
  for (const std::uint32_t dim : {1U, 4095U, 4096U, 4097U}) {
    spec.head_dim = dim;
    EXPECT_EQ(spec.slot_stride_bytes(), 4096U + (dim > 4096 ? 8192U : 4096U)) << dim;
  }
}

TEST(GroupSpec, pages_and_blocks_divide_each_other) {
  GroupSpec spec = good();
  EXPECT_EQ(spec.pages_per_block(), 1U);
  EXPECT_EQ(spec.blocks_per_page(), 1U);
  spec.block_tokens = 64;
  EXPECT_EQ(spec.pages_per_block(), 4U);
  EXPECT_EQ(spec.blocks_per_page(), 1U);
  spec.page_tokens = 256;
  EXPECT_EQ(spec.pages_per_block(), 1U);
  EXPECT_EQ(spec.blocks_per_page(), 4U);
}

TEST(GroupSpec, a_window_reaches_back_over_the_tokens_that_the_next_one_attends_to) {
  GroupSpec spec = good();
  EXPECT_EQ(spec.window_blocks(), std::nullopt);
  struct Case {
    std::uint32_t window, block, blocks;
  };
  for (const Case& c : {Case{1, 16, 1}, Case{2, 16, 1}, Case{16, 16, 1}, Case{17, 16, 1}, Case{18, 16, 2},
                        Case{33, 16, 2}, Case{34, 16, 3}, Case{4096, 16, 256}, Case{5, 1, 4},
                        Case{0xffffffffU, 16, 0x10000000U}, Case{0xffffffffU, 0xffffffffU, 1}}) {
    spec.window_tokens = c.window;
    spec.block_tokens = c.block;
    EXPECT_EQ(spec.window_blocks(), c.blocks) << c.window << " of " << c.block;
    // By definition: enough blocks for window - 1 tokens, and not one too many (but at least one).
    const std::uint64_t covered = std::uint64_t{*spec.window_blocks()} * c.block;
    EXPECT_GE(covered, std::uint64_t{c.window} - 1);
    if (*spec.window_blocks() > 1) {
      EXPECT_LT(covered - c.block, std::uint64_t{c.window} - 1);
    }
  }
}

TEST(GroupSpec, extents_by_letter) {
  GroupSpec spec = good();
  EXPECT_EQ(spec.extent('K'), 2U);
  EXPECT_EQ(spec.extent('T'), 16U);
  EXPECT_EQ(spec.extent('H'), 8U);
  EXPECT_EQ(spec.extent('D'), 128U);
  EXPECT_EQ(spec.extent('P'), 0U);
  spec.num_parts = spec.num_heads = 1;
  spec.page_order = "TD";
  EXPECT_EQ(spec.extent('K'), 0U);
  EXPECT_EQ(spec.extent('H'), 0U);
}

TEST(RoundUp, rounds_to_the_next_multiple) {
  static_assert(round_up(0, 4096) == 0);
  static_assert(round_up(1, 4096) == 4096);
  static_assert(round_up(4096, 4096) == 4096);
  static_assert(round_up(4097, 4096) == 8192);
}

}  // namespace
}  // namespace kvtier
