// CatalogKeeper: a store's catalog and the marker that says it must not be believed.
//
// A catalog that failed is made anew with all that the store knows. Where that fails too, the file `rebuild`
// is made, durably, in the store's directory, before any block is reported durable that the catalog does not
// have: the next opening then ignores the catalog and reads the slots' headers. So blocks become durable
// without a catalog as well; only the next opening takes longer.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtier/platform/block_file.h"
#include "kvtier/storage/catalog.h"

namespace kvtier {

// Threads: one at a time. Blocks: every method.
class CatalogKeeper {
 public:
  using Make = std::function<Result<std::unique_ptr<Catalog>>(bool read_follows)>;
  CatalogKeeper(Make make, const Directory& directory) : make_(std::move(make)), directory_(directory) {}

  // Errors: what the catalog says; corruption when the marker stands.
  Status open();
  Status read(const Catalog::OnRecords& on_records);  // of one that open() has opened
  Status commit(std::span<const CatalogChange> changes);
  // Starts the catalog anew, and removes the marker.
  Status reset_with(std::span<const CatalogRecord> records);
  // Makes the marker, unless it stands.
  Status mark_lost();
  void close() { catalog_.reset(); }

 private:
  const Make make_;
  const Directory& directory_;
  std::unique_ptr<Catalog> catalog_;
  bool marked_ = false;
};

}  // namespace kvtier
