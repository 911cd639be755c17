// What the tests of the catalog share: records, changes, and the helper's process.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "kvtier/storage/catalog.h"

namespace kvtier::catalog_world {

namespace fs = std::filesystem;
using Kind = CatalogChange::Kind;

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::string name = (fs::temp_directory_path() / "kvtier-catalog-XXXXXX").string();
    path_ = ::mkdtemp(name.data()) == nullptr ? std::string() : name;
  }
  ~TemporaryDirectory() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  std::string file() const { return path_ + "/catalog.mdb"; }

 private:
  std::string path_;
};

inline BlockKey key_of(std::uint32_t number) {
  std::mt19937_64 random(number);
  BlockKey key{};
  for (std::byte& byte : key.bytes) byte = static_cast<std::byte>(random());
  return key;
}

inline CatalogRecord record_of(std::uint32_t block, std::uint32_t slot, std::uint32_t class_index = 0) {
  CatalogRecord record;
  record.block.key = key_of(block);
  record.block.group = GroupId{static_cast<std::uint16_t>(block % 3)};
  if (block % 2 == 1) record.block.parent = key_of(block - 1);
  record.block.depth = block;
  record.block.name_space.fill(static_cast<std::byte>(block));
  record.place = {class_index, SlotId{slot}};
  record.generation = make_generation(3, block + 1);
  record.payload_bytes = 4096 + block;
  record.last_use_s = 1'700'000'000 + block;
  return record;
}

inline CatalogChange put(std::uint32_t block, std::uint32_t slot) {
  return {Kind::put, record_of(block, slot)};
}
inline CatalogChange forget(std::uint32_t slot) {
  CatalogChange change{Kind::forget, {}};
  change.record.place.slot = SlotId{slot};
  return change;
}
inline CatalogChange touch(std::uint32_t slot, std::int64_t last_use_s) {
  CatalogChange change{Kind::touch, {}};
  change.record.place.slot = SlotId{slot};
  change.record.last_use_s = last_use_s;
  return change;
}

inline bool same(const CatalogRecord& a, const CatalogRecord& b) {
  return a.block.key == b.block.key && a.block.group == b.block.group && a.block.parent == b.block.parent &&
         a.block.depth == b.block.depth && a.block.name_space == b.block.name_space && a.place == b.place &&
         a.generation == b.generation && a.payload_bytes == b.payload_bytes && a.last_use_s == b.last_use_s;
}

// By place.
inline std::vector<CatalogRecord> sorted(std::vector<CatalogRecord> records) {
  std::ranges::sort(records, {}, [](const CatalogRecord& record) {
    return std::pair(record.place.class_index, raw(record.place.slot));
  });
  return records;
}

// "block@slot:last use", by place.
inline std::vector<std::string> content(Catalog& catalog) {
  Result<std::vector<CatalogRecord>> records = catalog.read_all();
  if (!records) return {"failed: " + records.status().message()};
  std::vector<std::string> result;
  for (const CatalogRecord& record : sorted(*records)) {
    result.push_back(std::to_string(record.block.depth) + "@" + std::to_string(raw(record.place.slot)) + ":" +
                     std::to_string(record.last_use_s - 1'700'000'000));
  }
  return result;
}
using Content = std::vector<std::string>;

#ifdef KVTIER_TEST_CATALOG_HELPER
inline CatalogOptions helper_options() {
  CatalogOptions options;
  options.helper_path = KVTIER_TEST_CATALOG_HELPER;
  options.max_bytes = catalog_bound_bytes(200'000);
  return options;
}

// Processes whose parent is this one, named as the helper is.
inline std::vector<pid_t> helpers() {
  std::vector<pid_t> found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const int pid = std::atoi(entry.path().filename().c_str());
    if (pid <= 0) continue;
    std::ifstream file(entry.path() / "stat");
    std::string line;
    std::getline(file, line);
    const std::size_t end = line.rfind(')');
    if (end == std::string::npos || line.find("(kvtier-catalog)") == std::string::npos) continue;
    if (std::atoi(line.c_str() + end + 4) == ::getpid()) found.push_back(pid);
  }
  return found;
}

class HelperCatalogTest : public testing::Test {
 protected:
  std::unique_ptr<Catalog> open() { return open(helper_options()); }
  std::unique_ptr<Catalog> open(const CatalogOptions& options) {
    Result<std::unique_ptr<Catalog>> catalog = open_catalog(directory_.path(), options);
    EXPECT_TRUE(catalog.is_ok()) << catalog.status().message();
    return catalog ? std::move(catalog).value() : nullptr;
  }
  std::unique_ptr<Catalog> open_with(std::uint32_t count) {
    auto catalog = open();
    std::vector<CatalogChange> changes;
    for (std::uint32_t i = 0; i < count; ++i) changes.push_back(put(i, i));
    EXPECT_TRUE(catalog->commit(changes).is_ok());
    return catalog;
  }
  // The catalog is lost, says so in time, and a new one works.
  void expect_lost_and_made_anew(Catalog& catalog) {
    const auto begin = std::chrono::steady_clock::now();
    const Result<std::vector<CatalogRecord>> read = catalog.read_all();
    const Status committed = catalog.commit(std::vector{put(1, 1)});
    EXPECT_FALSE(read.is_ok());
    EXPECT_TRUE(read.status().code() == StatusCode::io || read.status().code() == StatusCode::corruption);
    EXPECT_FALSE(read.status().message().empty());
    EXPECT_EQ(committed.code(), StatusCode::io);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10))
        << "seen at once, not by a deadline";
    ASSERT_TRUE(catalog.reset_with(std::vector{record_of(4, 4)}).is_ok());
    EXPECT_EQ(content(catalog), Content{"4@4:4"});
    ASSERT_TRUE(catalog.commit(std::vector{put(5, 5)}).is_ok());
    EXPECT_EQ(content(*open()), (Content{"4@4:4", "5@5:5"}));
  }

  TemporaryDirectory directory_;
};

#endif  // KVTIER_TEST_CATALOG_HELPER

}  // namespace kvtier::catalog_world
