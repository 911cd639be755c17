#include "catalog_keeper.h"

#include <cerrno>
#include <cstring>
#include <string_view>

namespace kvtier {
namespace {

constexpr const char* kMarker = "rebuild";
constexpr std::string_view kMarkerText = "the catalog of this store is not complete; its slots are\n";

}  // namespace

Status CatalogKeeper::open() {
  const Result<std::vector<std::byte>> marker = directory_.read_file(kMarker);
  marked_ = marker.is_ok() || marker.status().native_code() != ENOENT;
  Result<std::unique_ptr<Catalog>> catalog = make_(/*read_follows=*/!marked_);
  if (!catalog) return catalog.status();
  catalog_ = std::move(catalog.value());
  if (marked_) return Status(StatusCode::corruption, "the catalog was given up by the last opening");
  return Status::ok();
}

Status CatalogKeeper::read(const Catalog::OnRecords& on_records) { return catalog_->read(on_records); }

Status CatalogKeeper::commit(std::span<const CatalogChange> changes) {
  if (catalog_ == nullptr) return Status::io("there is no catalog");
  return catalog_->commit(changes);
}

Status CatalogKeeper::reset_with(std::span<const CatalogRecord> records) {
  if (catalog_ == nullptr) {
    Result<std::unique_ptr<Catalog>> catalog = make_(/*read_follows=*/false);
    if (!catalog) return catalog.status();
    catalog_ = std::move(catalog.value());
  }
  KVTIER_RETURN_IF_ERROR(catalog_->reset_with(records));
  if (!marked_) return Status::ok();
  marked_ = false;  // from here on nobody knows, and mark_lost() makes it anew
  KVTIER_RETURN_IF_ERROR(directory_.remove_file(kMarker));
  return directory_.sync();
}

Status CatalogKeeper::mark_lost() {
  if (marked_) return Status::ok();
  const auto text = std::as_bytes(std::span(kMarkerText.data(), kMarkerText.size()));
  KVTIER_RETURN_IF_ERROR(directory_.replace_file(kMarker, text));
  marked_ = true;
  return Status::ok();
}

}  // namespace kvtier
