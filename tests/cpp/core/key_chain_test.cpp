#include "kvtier/core/key_chain.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>
#include <string>

namespace kvtier {
namespace {

using Bytes = std::vector<std::byte>;

Bytes from_hex(const std::string& hex) {
  Bytes bytes;
  if (hex == "-") return bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    bytes.push_back(static_cast<std::byte>(std::stoi(hex.substr(i, 2), nullptr, 16)));
  }
  return bytes;
}

std::string to_hex(const BlockKey& key) {
  std::string hex;
  for (const std::byte b : key.bytes) {
    hex += "0123456789abcdef"[static_cast<unsigned>(b) >> 4];
    hex += "0123456789abcdef"[static_cast<unsigned>(b) & 15];
  }
  return hex;
}

Bytes bytes_of(std::string_view text) {
  Bytes bytes;
  for (const char c : text) bytes.push_back(static_cast<std::byte>(c));
  return bytes;
}

BlockKey root_of(const std::vector<Bytes>& fields) {
  const std::vector<std::span<const std::byte>> spans(fields.begin(), fields.end());
  return root_key(spans).value();
}

const BlockKey kRoot = root_of({bytes_of("model"), bytes_of("tenant")});

std::vector<std::int32_t> count_from(std::int32_t first, std::size_t n) {
  std::vector<std::int32_t> tokens(n);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::vector<BlockKey> keys_of(std::span<const std::int32_t> tokens, std::uint32_t block_tokens,
                              const std::vector<KeyExtra>& extras = {}, const BlockKey& parent = kRoot) {
  Result<std::vector<BlockKey>> keys = chain_keys(parent, tokens, block_tokens, extras);
  EXPECT_TRUE(keys.is_ok()) << keys.status().message();
  return keys ? *keys : std::vector<BlockKey>{};
}

TEST(KeyChain, agrees_with_chains_computed_by_python) {
  struct Case {
    std::string name;
    std::vector<Bytes> fields;
    std::string root;
    std::uint32_t block_tokens = 0;
    std::vector<std::int32_t> tokens;
    struct Extra {
      std::int64_t begin, end;
      Bytes content;
    };
    std::vector<Extra> extras;
    std::vector<std::string> keys;
  };
  std::ifstream file(std::filesystem::path(__FILE__).parent_path() / "../../golden/keys.txt");
  ASSERT_TRUE(file);
  Case current;
  int cases = 0;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string word, hex;
    words >> word;
    if (word == "case") {
      current = {};
      words >> current.name;
    } else if (word == "field") {
      words >> hex;
      current.fields.push_back(from_hex(hex));
    } else if (word == "root") {
      words >> current.root;
    } else if (word == "block_tokens") {
      words >> current.block_tokens;
    } else if (word == "token") {
      words >> current.tokens.emplace_back();
    } else if (word == "extra") {
      Case::Extra& extra = current.extras.emplace_back();
      words >> extra.begin >> extra.end >> hex;
      extra.content = from_hex(hex);
    } else if (word == "key") {
      words >> current.keys.emplace_back();
    } else if (word == "end") {
      SCOPED_TRACE(current.name);
      ++cases;
      const BlockKey root = root_of(current.fields);
      EXPECT_EQ(to_hex(root), current.root);
      std::vector<KeyExtra> extras;
      for (const Case::Extra& extra : current.extras)
        extras.push_back({extra.begin, extra.end, extra.content});
      std::vector<std::string> keys;
      for (const BlockKey& key : keys_of(current.tokens, current.block_tokens, extras, root)) {
        keys.push_back(to_hex(key));
      }
      EXPECT_EQ(keys, current.keys);
    } else {
      EXPECT_TRUE(word == "#") << line;
    }
  }
  EXPECT_GE(cases, 14);
}

TEST(KeyChain, lists_of_fields_never_collide) {
  const std::vector<std::vector<Bytes>> lists{
      {},
      {bytes_of("")},
      {bytes_of(""), bytes_of("")},
      {bytes_of("ab")},
      {bytes_of("a"), bytes_of("b")},
      {bytes_of("ab"), bytes_of("")},
      {bytes_of(""), bytes_of("ab")},
      {bytes_of("b"), bytes_of("a")},
      {Bytes(8)},
      {Bytes(16)},
  };
  std::set<std::string> roots;
  for (const std::vector<Bytes>& fields : lists) EXPECT_TRUE(roots.insert(to_hex(root_of(fields))).second);
}

TEST(KeyChain, namespaces_share_no_key) {
  const std::vector<std::int32_t> tokens = count_from(0, 64);
  std::set<std::string> seen;
  for (const char* tenant : {"", "a", "b", "ab"}) {
    const BlockKey root = root_of({bytes_of("model"), bytes_of(tenant)});
    for (const BlockKey& key : keys_of(tokens, 16, {}, root)) EXPECT_TRUE(seen.insert(to_hex(key)).second);
  }
}

TEST(KeyChain, equal_tokens_in_another_context_have_another_key) {
  std::vector<std::int32_t> tokens(48, 7);
  const std::vector<BlockKey> same = keys_of(tokens, 16);
  EXPECT_FALSE(same[0] == same[1]);
  EXPECT_FALSE(same[1] == same[2]);
  tokens[0] = 8;
  const std::vector<BlockKey> other = keys_of(tokens, 16);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_FALSE(same[i] == other[i]);
}

TEST(KeyChain, a_partial_block_has_no_key_and_changes_none) {
  const std::vector<std::int32_t> tokens = count_from(0, 47);
  EXPECT_EQ(keys_of(tokens, 16).size(), 2U);
  EXPECT_EQ(keys_of(tokens, 16), keys_of(std::span(tokens).first(32), 16));
  EXPECT_TRUE(keys_of({}, 16).empty());
  EXPECT_TRUE(keys_of(std::span(tokens).first(15), 16).empty());
  EXPECT_EQ(keys_of(tokens, 16, {{40, 41, {}}}), keys_of(tokens, 16));
}

TEST(KeyChain, in_pieces_it_is_the_same_chain) {
  constexpr std::size_t kTokens = 96;
  constexpr std::uint32_t kBlock = 8;
  const std::vector<std::int32_t> tokens = count_from(-10, kTokens);
  const Bytes content = bytes_of("image");
  const Bytes other = bytes_of("other");
  const std::vector<KeyExtra> extras{{3, 50, content}, {3, 5, other}, {20, 90, other}, {64, 72, content}};
  const std::vector<BlockKey> whole = keys_of(tokens, kBlock, extras);
  for (std::size_t cut = 0; cut <= kTokens; cut += kBlock) {
    const auto at = static_cast<std::int64_t>(cut);
    std::vector<KeyExtra> before, after;
    for (const KeyExtra& extra : extras) {
      if (extra.begin_token < at)
        before.push_back({extra.begin_token, std::min(extra.end_token, at), extra.content});
      if (extra.end_token > at)
        after.push_back({extra.begin_token - at, extra.end_token - at, extra.content});
    }
    std::vector<BlockKey> keys = keys_of(std::span(tokens).first(cut), kBlock, before);
    const BlockKey parent = keys.empty() ? kRoot : keys.back();
    const std::vector<BlockKey> rest = keys_of(std::span(tokens).subspan(cut), kBlock, after, parent);
    keys.insert(keys.end(), rest.begin(), rest.end());
    EXPECT_EQ(keys, whole) << "cut at " << cut;
  }
}

TEST(KeyChain, an_extra_changes_the_first_block_it_overlaps_and_all_behind) {
  const std::vector<std::int32_t> tokens = count_from(0, 64);
  const Bytes content = bytes_of("image");
  const std::vector<BlockKey> without = keys_of(tokens, 16);
  const std::vector<BlockKey> with = keys_of(tokens, 16, {{31, 33, content}});
  EXPECT_TRUE(with[0] == without[0]);
  for (std::size_t i = 1; i < 4; ++i) EXPECT_FALSE(with[i] == without[i]);
}

TEST(KeyChain, extras_are_told_apart_by_place_extent_content_and_number) {
  const std::vector<std::int32_t> tokens = count_from(0, 16);
  const Bytes a = bytes_of("a"), b = bytes_of("b"), ab = bytes_of("ab"), none;
  const std::vector<std::vector<KeyExtra>> variants{
      {},
      {{0, 4, a}},
      {{1, 4, a}},
      {{0, 5, a}},
      {{-1, 4, a}},
      {{-8, 4, a}},
      {{std::numeric_limits<std::int64_t>::min(), 4, a}},
      {{0, 4, b}},
      {{0, 4, ab}},
      {{0, 4, none}},
      {{0, 4, a}, {0, 4, b}},
      {{0, 4, b}, {0, 4, a}},
      {{0, 4, a}, {0, 4, a}},
      {{0, 4, a}, {4, 8, a}},
      {{0, 8, a}},
      {{0, 16, a}},
  };
  std::set<std::string> seen;
  for (std::size_t i = 0; i < variants.size(); ++i) {
    EXPECT_TRUE(seen.insert(to_hex(keys_of(tokens, 16, variants[i])[0])).second) << "variant " << i;
  }
}

TEST(KeyChain, an_extra_that_began_at_the_beginning_of_time_is_legal) {
  const std::vector<std::int32_t> tokens = count_from(0, 64);
  EXPECT_EQ(keys_of(tokens, 16, {{std::numeric_limits<std::int64_t>::min(), 64, {}}}).size(), 4U);
}

TEST(KeyChain, bad_input_is_refused_by_name) {
  const std::vector<std::int32_t> tokens = count_from(0, 32);
  const auto message = [&](std::uint32_t block_tokens, const std::vector<KeyExtra>& extras) {
    const Status status = chain_keys(kRoot, tokens, block_tokens, extras).status();
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    return status.message();
  };
  EXPECT_EQ(message(0, {}), "block_tokens is 0; it must be at least 1");
  const std::string allowed = "; allowed: a non-empty range that ends within [1, 32]";
  EXPECT_EQ(message(16, {{4, 4, {}}}), "extra 0 covers tokens [4, 4)" + allowed);
  EXPECT_EQ(message(16, {{5, 4, {}}}), "extra 0 covers tokens [5, 4)" + allowed);
  EXPECT_EQ(message(16, {{-4, 0, {}}}), "extra 0 covers tokens [-4, 0)" + allowed);
  EXPECT_EQ(message(16, {{0, 1, {}}, {0, 33, {}}}), "extra 1 covers tokens [0, 33)" + allowed);
  EXPECT_EQ(message(16, {{3, 4, {}}, {2, 5, {}}}), "extra 1 begins before the one in front of it");
}

TEST(KeyChain, a_million_tokens_have_distinct_keys) {
  const std::vector<std::int32_t> tokens(std::size_t{1} << 20, 5);
  const std::vector<BlockKey> keys = keys_of(tokens, 16);
  ASSERT_EQ(keys.size(), tokens.size() / 16);
  std::set<std::string> seen;
  for (const BlockKey& key : keys) seen.insert(to_hex(key));
  EXPECT_EQ(seen.size(), keys.size());
}

}  // namespace
}  // namespace kvtier
