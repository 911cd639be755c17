// Database: the catalog's file in LMDB, as the helper process sees it (docs/formats/catalog.md).
//
// Durable by LMDB's default: pages are written, fdatasync, then the meta page through an O_DSYNC descriptor.
// No WRITEMAP (a stray write would reach the file), no NOSYNC (a crash could leave a meta page without its
// pages).
#pragma once

#include <lmdb.h>
#include <sys/stat.h>

#include <cstdint>
#include <span>
#include <string>

#include "../catalog_protocol.h"

namespace kvtier::catalog_helper {

namespace protocol = catalog_protocol;

struct Failure {
  protocol::Outcome outcome = protocol::Outcome::ok;
  int native_code = 0;
  std::string text;
  bool is_ok() const { return outcome == protocol::Outcome::ok; }
};

enum class OpenMode : std::uint8_t { keep, anew };

// Not thread-safe. Works in the process's current directory. After a failure the object may only be
// destroyed.
class Database {
 public:
  explicit Database(std::uint64_t max_bytes) : max_bytes_(max_bytes) {}
  ~Database();
  Database(const Database&) = delete;
  Database& operator=(const Database&) = delete;

  Failure open(OpenMode mode);
  // Fills `items` from the next record on; `count` < items.size() at the end. rewind() goes to the first and
  // says how many there are.
  Failure rewind(std::uint64_t& total);
  Failure read(std::span<protocol::Item> items, std::size_t& count);
  // In the transaction that is open, or a new one.
  Failure apply(std::span<const protocol::Item> items);
  Failure mark_complete();
  Failure commit();

 private:
  Failure refuse_strange_files(bool& exists) const;
  Failure open_databases(OpenMode mode, bool exists);
  Failure check_meta(OpenMode mode, bool fresh);
  Failure check_still_ours();
  Failure begin_writing();
  void end_reading();
  int put(const protocol::Item& item);
  int forget(std::span<const std::byte> place);
  int touch(const protocol::Item& item);
  int forget_block_at(MDB_val block, std::span<const std::byte> place);
  Failure failure(int lmdb_error, const char* what) const;

  const std::uint64_t max_bytes_;
  MDB_env* env_ = nullptr;
  MDB_txn* writing_ = nullptr;
  MDB_txn* reading_ = nullptr;
  MDB_cursor* cursor_ = nullptr;
  MDB_dbi blocks_ = 0;
  MDB_dbi slots_ = 0;
  MDB_dbi meta_ = 0;
  off_t seen_bytes_ = 0;  // the file's size when last looked at; LMDB never makes it smaller
};

}  // namespace kvtier::catalog_helper
