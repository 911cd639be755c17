#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "kvtier/core/mutex.h"
#include "kvtier/storage/catalog.h"

namespace kvtier {
namespace {

using PlaceKey = std::pair<std::uint32_t, std::uint32_t>;
using KeyAndGroup = std::pair<std::array<std::byte, kKeyBytes>, std::uint16_t>;

PlaceKey place_key(const SlotPlace& place) { return {place.class_index, raw(place.slot)}; }
KeyAndGroup block_name(const BlockIdentity& block) { return {block.key.bytes, raw(block.group)}; }

// The catalog's content: what docs/formats/catalog.md calls `blocks` and `slots`.
struct Content {
  std::map<PlaceKey, CatalogRecord> by_place;
  std::map<KeyAndGroup, PlaceKey> place_of;

  void forget(PlaceKey place) {
    const auto found = by_place.find(place);
    if (found == by_place.end()) return;
    place_of.erase(block_name(found->second.block));
    by_place.erase(found);
  }

  void put(const CatalogRecord& record) {
    const PlaceKey place = place_key(record.place);
    forget(place);
    const auto elsewhere = place_of.find(block_name(record.block));
    if (elsewhere != place_of.end()) forget(elsewhere->second);
    by_place.emplace(place, record);
    place_of.emplace(block_name(record.block), place);
  }

  void apply(const CatalogChange& change) {
    switch (change.kind) {
      case CatalogChange::Kind::put: put(change.record); break;
      case CatalogChange::Kind::forget: forget(place_key(change.record.place)); break;
      case CatalogChange::Kind::touch: {
        const auto found = by_place.find(place_key(change.record.place));
        if (found != by_place.end()) found->second.last_use_s = change.record.last_use_s;
        break;
      }
    }
  }
};

}  // namespace

struct CatalogHistory::State {
  // What made a version of another one.
  struct Step {
    enum class Kind : std::uint8_t { commit, reset };
    std::size_t from = 0;
    Kind kind = Kind::commit;
    std::vector<CatalogChange> changes;
  };

  class Member;

  Mutex mutex;
  std::vector<Step> steps KVTIER_GUARDED_BY(mutex);  // version i + 1 is steps[i] applied to its `from`
  std::size_t commits_until_failure KVTIER_GUARDED_BY(mutex) = std::numeric_limits<std::size_t>::max();

  Content content_of(std::size_t version, const MutexLock&) const KVTIER_REQUIRES(mutex) {
    std::vector<const Step*> path;
    while (version > 0) {
      path.push_back(&steps[version - 1]);
      if (path.back()->kind == Step::Kind::reset) break;
      version = path.back()->from;
    }
    Content content;
    std::for_each(path.rbegin(), path.rend(), [&content](const Step* step) {
      for (const CatalogChange& change : step->changes) content.apply(change);
    });
    return content;
  }
};

class CatalogHistory::State::Member final : public Catalog {
 public:
  Member(std::shared_ptr<State> state, std::size_t version, Content content)
      : state_(std::move(state)), version_(version), content_(std::move(content)) {}

  Status read(const OnRecords& on_records) override {
    if (failed_) return broken();
    std::vector<CatalogRecord> records;
    records.reserve(content_.by_place.size());
    for (const auto& [place, record] : content_.by_place) records.push_back(record);
    on_records(records, records.size());
    return Status::ok();
  }

  Status commit(std::span<const CatalogChange> changes) override {
    if (failed_) return broken();
    MutexLock lock(state_->mutex);
    if (state_->commits_until_failure == 0) {
      failed_ = true;
      return broken();
    }
    if (state_->commits_until_failure != std::numeric_limits<std::size_t>::max()) {
      --state_->commits_until_failure;
    }
    advance(Step::Kind::commit, {changes.begin(), changes.end()}, lock);
    return Status::ok();
  }

  Status reset_with(std::span<const CatalogRecord> records) override {
    std::vector<CatalogChange> changes;
    changes.reserve(records.size());
    for (const CatalogRecord& record : records) changes.push_back({CatalogChange::Kind::put, record});
    MutexLock lock(state_->mutex);
    content_ = {};
    failed_ = false;
    advance(Step::Kind::reset, std::move(changes), lock);
    return Status::ok();
  }

 private:
  static Status broken() {
    return Status::io("the catalog in memory was told to fail its commits; reset_with() starts it anew");
  }

  void advance(Step::Kind kind, std::vector<CatalogChange> changes, const MutexLock&)
      KVTIER_REQUIRES(state_->mutex) {
    for (const CatalogChange& change : changes) content_.apply(change);
    state_->steps.push_back({version_, kind, std::move(changes)});
    version_ = state_->steps.size();
  }

  const std::shared_ptr<State> state_;
  std::size_t version_;
  Content content_;
  bool failed_ = false;
};

CatalogHistory::CatalogHistory() : state_(std::make_shared<State>()) {}
CatalogHistory::~CatalogHistory() = default;

std::size_t CatalogHistory::num_versions() const {
  MutexLock lock(state_->mutex);
  return state_->steps.size() + 1;
}

std::unique_ptr<Catalog> CatalogHistory::open(std::size_t version) {
  MutexLock lock(state_->mutex);
  KVTIER_CHECK(version <= state_->steps.size());
  return std::make_unique<State::Member>(state_, version, state_->content_of(version, lock));
}

void CatalogHistory::fail_after(std::size_t commits) {
  MutexLock lock(state_->mutex);
  state_->commits_until_failure = commits;
}

}  // namespace kvtier
