// Catalog: which block stands in which slot, so that a store is ready at once after a restart.
//
// A hint, never an authority (I8): what is served is what the slot's own header proves. So a lost, old, torn
// or lying catalog costs hits or time, never right bytes. LMDB keeps it; docs/formats/catalog.md says the
// records.
//
// LMDB maps its file, and a mapped file that is truncated from outside kills whoever reads it (SIGBUS). So no
// server ever maps it: a helper process (kvtier-catalog, beside the Python module) does, and speaks with the
// client here over a socket pair and a memfd. It dies with its parent (end of file on the socket); its own
// death costs the catalog until reset_with() made a new one, and nothing else.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/storage/slot_image.h"

namespace kvtier {

struct CatalogRecord {
  BlockIdentity block;
  SlotPlace place;
  Generation generation{0};
  std::uint64_t payload_bytes = 0;
  std::int64_t last_use_s = 0;  // Unix time
};

// One change. Changes of one commit are applied in order, as one transaction.
struct CatalogChange {
  enum class Kind : std::uint8_t { put, forget, touch };
  Kind kind = Kind::put;
  CatalogRecord record;  // put: all of it (whatever stood in that slot is forgotten). forget: place. touch:
                         // place, last_use_s
};

// Threads: none of its own; one caller at a time. Blocks: every method, for as long as the helper needs.
class Catalog {
 public:
  virtual ~Catalog() = default;
  // Everything in it, in no order, some thousand records at a time; of one that lies, two may claim a place.
  // on_records(records, expected) runs while the next ones are being read; there will be about `expected` in
  // all. Errors: corruption when it cannot be read, io when the helper is gone: then forget what came before.
  using OnRecords = std::function<void(std::span<const CatalogRecord> records, std::size_t expected)>;
  virtual Status read(const OnRecords& on_records) = 0;
  Result<std::vector<CatalogRecord>> read_all();
  // Applies and syncs; when it returns ok the changes survive a power loss. Errors: io: gone or failed,
  // nothing is known of the changes; the next call must be reset_with().
  virtual Status commit(std::span<const CatalogChange> changes) = 0;
  // Starts anew with exactly these records (in a new helper if need be). Errors: io.
  virtual Status reset_with(std::span<const CatalogRecord> records) = 0;
};

struct CatalogOptions {
  std::string
      helper_path;  // of kvtier-catalog; empty: beside this library (dladdr), or $KVTIER_CATALOG_HELPER
  std::uint64_t max_bytes = 0;                      // bound of its file, at least kMinCatalogBytes
  bool read_follows = true;                         // at once: so the file is read while the helper starts
  std::chrono::milliseconds answer_within{30'000};  // else the helper hangs: it is killed, the answer is io
};

inline constexpr std::uint64_t kMinCatalogBytes = std::uint64_t{1} << 20;
// A bound that a catalog of so many slots does not meet: a megabyte, and 1536 bytes a slot. A record takes
// about 250; copy-on-write keeps the pages of the two transactions before, and when each of them rewrote
// every block the file grew to 1150 a slot.
std::uint64_t catalog_bound_bytes(std::uint64_t num_slots);

// Opens or makes `directory_path`/catalog.mdb. A file that cannot be used is not an error here: read()
// says corruption, and reset_with() makes a new one. Errors: invalid_argument (max_bytes), unsupported (the
// helper cannot be started), resource.
Result<std::unique_ptr<Catalog>> open_catalog(const std::string& directory_path,
                                              const CatalogOptions& options);

// In memory, with a history, for tests: every commit makes a version, and read() of a catalog opened on
// an older version shows what a crash could have left.
class CatalogHistory {
 public:
  CatalogHistory();
  ~CatalogHistory();
  std::size_t num_versions() const;
  // A catalog that starts from a version (num_versions() - 1 is the newest, 0 the empty one) and goes on from
  // there.
  std::unique_ptr<Catalog> open(std::size_t version);
  void fail_after(std::size_t commits);  // then every commit fails with io; reset_with() works

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace kvtier
