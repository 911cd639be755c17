#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "catalog_protocol.h"
#include "helper_process.h"

#include "kvtier/core/process.h"
#include "kvtier/storage/catalog.h"
#include "kvtier/storage/catalog_records.h"

namespace kvtier {
namespace {

using catalog_protocol::Item;
using catalog_protocol::ItemKind;
using catalog_protocol::kPieceItems;
using catalog_protocol::Op;
using catalog_protocol::Reply;

// In the file, keys of both databases and value; so many at most fit into it.
constexpr std::uint64_t kMinRecordBytes = 2 * 34 + 88 + 8;

Item item_of(const CatalogRecord& record, ItemKind kind) {
  const CatalogBytes bytes = encode_catalog_record(record);
  Item item;
  item.kind = kind;
  item.key = bytes.key;
  item.value = bytes.value;
  return item;
}

ItemKind kind_of(CatalogChange::Kind kind) {
  switch (kind) {
    case CatalogChange::Kind::put: return ItemKind::put;
    case CatalogChange::Kind::forget: return ItemKind::forget;
    case CatalogChange::Kind::touch: break;
  }
  return ItemKind::touch;
}

// The Catalog that a helper process keeps. A failure of any kind ends that helper: what LMDB holds after one,
// and what of a commit is in the file, is not known. reset_with() starts another.
class HelperCatalog final : public Catalog {
 public:
  explicit HelperCatalog(HelperProcess::Arguments arguments) : arguments_(std::move(arguments)) {}

  Status open(bool read_follows) {
    // All of the file will be read, in the order of random keys: page faults would fetch it bit by bit.
    const auto read_file = [this, read_follows] {
      if (!read_follows) return;
      Result<Directory> directory = Directory::open_existing(arguments_.directory_path);
      if (directory) directory->read_ahead(catalog_protocol::kFileName, arguments_.max_bytes);
    };
    Result<std::unique_ptr<HelperProcess>> process = HelperProcess::start(arguments_, read_file);
    if (!process) return process.status();
    process_ = std::move(process).value();
    static_cast<void>(call(Op::open, 0));  // what is wrong with the file, the first use says
    return Status::ok();
  }

  Status read(const OnRecords& on_records) override {
    KVTIER_RETURN_IF_ERROR(usable());
    std::vector<CatalogRecord> records;
    std::vector<Item> items;
    std::size_t expected = 0;
    std::uint64_t found = 0;
    if (Status asked = ask(Op::read_first); !asked) return asked;
    for (bool is_first = true;; is_first = false) {
      Result<Reply> reply = process_->receive();
      if (!reply) return give_up(reply.status());
      if (reply->count > kPieceItems)
        return give_up(Status::io("the catalog's helper gave more than it may"));
      // What a damaged file claims is not worth all of the memory.
      if (is_first) expected = std::min(reply->total, arguments_.max_bytes / kMinRecordBytes);
      found += reply->count;
      if (found > arguments_.max_bytes / kMinRecordBytes) {  // its pages name each other in a circle
        return give_up(Status(StatusCode::corruption, "the catalog has more records than fit into its file"));
      }
      items.resize(reply->count);
      if (Status read = process_->read_items(items); !read) return give_up(read);
      // The memfd is free again: the helper reads the next piece while this one is decoded.
      if (reply->has_more != 0) {
        if (Status asked = ask(Op::read_next); !asked) return asked;
      }
      records.clear();
      for (const Item& item : items) {
        std::optional<CatalogRecord> record = decode_catalog_record({item.key, item.value});
        if (!record) {
          return give_up(
              Status(StatusCode::corruption, "the catalog has a record that this version never writes"));
        }
        records.push_back(*record);
      }
      try {
        on_records(records, expected);
      } catch (...) {  // the answer to come would be taken for another one's
        static_cast<void>(give_up(Status::io("the catalog was not read to its end")));
        throw;
      }
      if (reply->has_more == 0) break;
    }
    process_->empty_memory();
    return Status::ok();
  }

  Status commit(std::span<const CatalogChange> changes) override {
    if (Status status = usable(); !status) {
      return status.code() == StatusCode::closed ? status
                                                 : Status::io(status.message(), status.native_code());
    }
    const auto item = [changes](std::size_t i) {
      return item_of(changes[i].record, kind_of(changes[i].kind));
    };
    const Status status = send(changes.size(), item, Op::apply_more, Op::apply_last);
    // For who commits there is one failure: the catalog is gone, whatever killed it.
    return status ? status : Status::io(status.message(), status.native_code());
  }

  Status reset_with(std::span<const CatalogRecord> records) override {
    if (process_generation() != process_generation_) return forked();
    if (process_) process_->kill();
    process_.reset();
    failure_ = Status::io("the catalog was not made anew");
    Result<std::unique_ptr<HelperProcess>> process = HelperProcess::start(arguments_);
    if (!process) return Status::io(process.status().message(), process.status().native_code());
    process_ = std::move(process).value();
    failure_ = Status::ok();
    if (Result<Reply> made = call(Op::make_anew, 0); !made) {
      return Status::io(made.status().message(), made.status().native_code());
    }
    // Piece by piece, each a transaction of its own: the file is not believed before it is complete.
    const auto item = [records](std::size_t i) { return item_of(records[i], ItemKind::put); };
    const Status status = send(records.size(), item, Op::apply_last, Op::apply_complete);
    return status ? status : Status::io(status.message(), status.native_code());
  }

 private:
  static Status forked() { return Status::closed("the catalog belongs to the parent process"); }

  Status usable() const {
    if (process_generation() != process_generation_) return forked();
    return failure_;
  }

  Status give_up(Status why) {
    failure_ = std::move(why);
    process_->kill();
    return failure_;
  }

  Status ask(Op op) {
    catalog_protocol::Request request;
    request.op = op;
    const Status asked = process_->send(request);
    return asked ? asked : give_up(asked);
  }

  Result<Reply> call(Op op, std::uint64_t count) {
    catalog_protocol::Request request;
    request.op = op;
    request.count = count;
    Result<Reply> reply = process_->call(request);
    if (!reply) return give_up(reply.status());
    return reply;
  }

  template <typename ItemAt>
  Status send(std::size_t total, const ItemAt& item_at, Op op, Op last_op) {
    std::vector<Item> items;
    std::size_t next = 0;
    do {
      const std::size_t count = std::min(total - next, kPieceItems);
      items.clear();
      for (std::size_t i = 0; i < count; ++i) items.push_back(item_at(next + i));
      next += count;
      if (Status written = process_->write_items(items); !written) return give_up(written);
      if (Result<Reply> reply = call(next == total ? last_op : op, count); !reply) return reply.status();
    } while (next < total);
    process_->empty_memory();
    return Status::ok();
  }

  const HelperProcess::Arguments arguments_;
  const std::uint64_t process_generation_ = process_generation();
  std::unique_ptr<HelperProcess> process_;
  Status failure_;
};

}  // namespace

Result<std::vector<CatalogRecord>> Catalog::read_all() {
  std::vector<CatalogRecord> all;
  KVTIER_RETURN_IF_ERROR(read([&all](std::span<const CatalogRecord> records, std::size_t expected) {
    all.reserve(expected);
    all.insert(all.end(), records.begin(), records.end());
  }));
  return all;
}

std::uint64_t catalog_bound_bytes(std::uint64_t num_slots) { return kMinCatalogBytes + 1536 * num_slots; }

Result<std::unique_ptr<Catalog>> open_catalog(const std::string& directory_path,
                                              const CatalogOptions& options) {
  if (options.max_bytes < kMinCatalogBytes) {
    return Status::invalid_argument("CatalogOptions::max_bytes is " + std::to_string(options.max_bytes) +
                                    "; at least " + std::to_string(kMinCatalogBytes) + " is allowed");
  }
  HelperProcess::Arguments arguments;
  arguments.helper_path = options.helper_path;
  if (arguments.helper_path.empty()) {
    Result<std::string> found = find_catalog_helper();
    if (!found) return found.status();
    arguments.helper_path = std::move(found).value();
  }
  arguments.directory_path = directory_path;
  arguments.max_bytes = options.max_bytes;
  arguments.deadline = options.answer_within;
  auto catalog = std::make_unique<HelperCatalog>(std::move(arguments));
  KVTIER_RETURN_IF_ERROR(catalog->open(options.read_follows));
  return std::unique_ptr<Catalog>(std::move(catalog));
}

}  // namespace kvtier
