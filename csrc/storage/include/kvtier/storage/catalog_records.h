// A catalog record as the bytes that stand in LMDB: docs/formats/catalog.md, version 1. Pure.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <span>

#include "kvtier/storage/catalog.h"

namespace kvtier {

struct CatalogBytes {
  std::array<std::byte, 34> key{};    // in the database `blocks`
  std::array<std::byte, 88> value{};  // its first 8 bytes are the key in the database `slots`
  friend bool operator==(const CatalogBytes&, const CatalogBytes&) = default;
};

CatalogBytes encode_catalog_record(const CatalogRecord& record);
// nullopt for what encode_catalog_record() never writes: every record has one encoding.
std::optional<CatalogRecord> decode_catalog_record(const CatalogBytes& bytes);

}  // namespace kvtier
