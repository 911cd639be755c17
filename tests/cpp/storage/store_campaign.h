// A campaign: a seeded owner writes, reads, wipes and crashes a store on a simulated drive, and keeps a book
// of what it was promised.
//
// Bytes follow from (key, version), and every write has a version of its own, so that an older image of the
// same key in the same slot is told from the newest: what the generation is for.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "storage/store_world.h"

namespace kvtier::store_world {

struct Tally {
  std::uint64_t cycles = 0, checked = 0, hits = 0, hits_expected = 0, wrong = 0, revived = 0, exempt = 0;
  std::uint64_t faults = 0, spoiled = 0;
  Tally& operator+=(const Tally& other) {
    cycles += other.cycles;
    checked += other.checked;
    hits += other.hits;
    hits_expected += other.hits_expected;
    wrong += other.wrong;
    revived += other.revived;
    exempt += other.exempt;
    faults += other.faults;
    spoiled += other.spoiled;
    return *this;
  }
};

struct CampaignPlan {
  DriveFaults faults;  // of the drive, while the owner works
  enum class End : std::uint8_t { power_loss, close } end = End::power_loss;
  // Which catalog the next opening finds: one that a crash could have left, or any older one.
  enum class Catalogs : std::uint8_t { promised, any_older } catalogs = Catalogs::promised;
  bool honest_drive = true;  // it keeps what it has synced: promises are checked
  std::uint32_t cycles = 4;
  std::uint32_t max_operations = 60;
};

// Threads: run() on one; callbacks write into the book under its mutex.
class Campaign {
 public:
  Campaign(std::uint64_t seed, const CampaignPlan& plan)
      : random_(seed), plan_(plan), home_(kSlots), book_(kSlots) {}

  Tally run() {
    for (std::uint32_t cycle = 0; cycle < plan_.cycles; ++cycle) one_cycle();
    // And once more, to see what is left.
    SimulatedDrive drive{DriveFaults{.seed = random_()}};
    open_store(drive);
    check();
    store_.reset();
    return tally_;
  }

 private:
  static constexpr std::uint32_t kSlots = 24;
  static constexpr std::uint32_t kKeys = 36;
  static constexpr std::size_t kMaxPending = 8;

  struct Page {
    std::optional<Block> latest;            // last write that was begun, unless wiped since
    std::optional<Block> promised;          // durable, and nothing was begun here since
    std::set<Block> ever;                   // written here at any time
    std::set<Block> gone;                   // must not be served from here again
    std::optional<std::uint32_t> key_here;  // that some image in the slot may have
    bool busy = false;
    std::uint64_t turn = 0;  // of the last write or wipe that was begun here
  };

  std::uint64_t below(std::uint64_t n) { return random_() % n; }

  void open_store(SimulatedDrive& drive) {
    found_.clear();
    SlotStore::Opened opened = open(home_, options_of(home_, drive), [this](const CatalogRecord& record) {
      MutexLock lock(mutex_);
      found_.push_back(record);
    });
    store_ = std::move(opened.store);
    records_ = std::move(opened.blocks);
    wait_for_slots(*store_, kSlots);
    wait_until([this] { return store_->scan_done(); });
    MutexLock lock(mutex_);
    records_.insert(records_.end(), found_.begin(), found_.end());
    crashed_ = false;
  }

  void one_cycle() {
    ++tally_.cycles;
    DriveFaults faults;
    faults.seed = random_();
    SimulatedDrive drive{faults};
    open_store(drive);
    check();
    faults = plan_.faults;
    faults.seed = random_();
    drive.set_faults(faults);
    const std::uint64_t operations = 10 + below(plan_.max_operations - 10);
    for (std::uint64_t i = 0; i < operations; ++i) one_operation();
    end_opening(drive);
    tally_.faults += drive.faults_injected();
    note_spoiled(drive);
    pending_.clear();
    for (Page& page : book_) page.busy = false;
  }

  // --- the owner ---

  void one_operation() {
    while (pending_.size() >= kMaxPending) wait_for_one();
    const std::uint64_t dice = below(100);
    if (dice < 50) {
      write();
    } else if (dice < 80) {
      read();
    } else if (dice < 88) {
      wipe();
    } else if (!pending_.empty()) {
      wait_for_one();
    }
  }

  void wait_for_one() {
    const auto wait = std::move(pending_.front());
    pending_.erase(pending_.begin());
    wait();
  }

  std::optional<std::uint32_t> idle_slot() {
    const auto slot = static_cast<std::uint32_t>(below(kSlots));
    MutexLock lock(mutex_);
    if (book_[slot].busy) return std::nullopt;
    return slot;
  }

  // A key that stands nowhere else, as an owner sees to: one slot a block.
  std::optional<std::uint32_t> key_for(std::uint32_t slot) {
    MutexLock lock(mutex_);
    if (book_[slot].key_here && below(2) == 0) return book_[slot].key_here;
    const auto key = static_cast<std::uint32_t>(below(kKeys));
    for (std::uint32_t other = 0; other < kSlots; ++other) {
      if (other != slot && book_[other].key_here == key) return std::nullopt;
    }
    return key;
  }

  void write() {
    const auto slot = idle_slot();
    const auto key = slot ? key_for(*slot) : std::nullopt;
    if (!key) return;
    const Block block{*key, ++versions_[*key]};
    const std::uint64_t turn = begin(*slot);
    {
      MutexLock lock(mutex_);
      Page& page = book_[*slot];
      page.latest = block;
      page.key_here = *key;
      page.ever.insert(block);
    }
    auto pending = std::make_shared<PendingWrite>();
    pending->image.fill(block);
    SlotWrite write;
    write.place = {0, SlotId{*slot}};
    write.block = identity_of(*key);
    write.payload_bytes = kPayload;
    write.image = pending->image.data();
    write.on_written = [this, pending, slot = *slot, turn](const Status& status) {
      {
        MutexLock lock(mutex_);
        book_[slot].busy = false;
        if (!status && book_[slot].turn == turn) book_[slot].latest.reset();
      }
      pending->written.tell(status);
    };
    write.on_durable = [this, slot = *slot, turn, block](const Status& status) {
      MutexLock lock(mutex_);
      if (!status || crashed_) return;
      promised_version_ = std::max(promised_version_, home_.catalogs.num_versions() - 1);
      if (book_[slot].turn == turn) book_[slot].promised = block;
    };
    store_->write(std::move(write));
    pending_.emplace_back([pending] { static_cast<void>(pending->written.wait()); });
  }

  void read() {
    const auto slot = idle_slot();
    if (!slot) return;
    std::optional<Block> latest;
    {
      MutexLock lock(mutex_);
      latest = book_[*slot].latest;
      if (latest) book_[*slot].busy = true;
    }
    if (!latest) return;
    const auto pending = start_read(*store_, *slot, *latest);
    pending_.emplace_back([this, pending, slot = *slot, latest] {
      const ReadOutcome outcome = pending->done.wait();
      {
        MutexLock lock(mutex_);
        book_[slot].busy = false;
      }
      ++tally_.checked;
      if (outcome.good() && !pending->image.holds(*latest)) ++tally_.wrong;
    });
  }

  void wipe() {
    const auto slot = idle_slot();
    if (!slot) return;
    begin(*slot);
    std::set<Block> goes;
    {
      MutexLock lock(mutex_);
      book_[*slot].latest.reset();
      goes = book_[*slot].ever;
    }
    auto done = std::make_shared<Told<Status>>();
    store_->wipe({{0, SlotId{*slot}}}, [this, done, slot = *slot, goes](const Status& status) {
      {
        MutexLock lock(mutex_);
        book_[slot].busy = false;
        if (status && !crashed_) {
          book_[slot].gone.insert(goes.begin(), goes.end());
          book_[slot].key_here.reset();
        }
      }
      done->tell(status);
    });
    pending_.emplace_back([done] { static_cast<void>(done->wait()); });
  }

  // Something is about to overwrite the slot.
  std::uint64_t begin(std::uint32_t slot) {
    MutexLock lock(mutex_);
    Page& page = book_[slot];
    page.busy = true;
    page.promised.reset();
    page.turn = ++turns_;
    return page.turn;
  }

  // --- the end, and what is left ---

  void end_opening(SimulatedDrive& drive) {
    if (plan_.end == CampaignPlan::End::power_loss) {
      MutexLock lock(mutex_);
      crashed_ = true;  // nothing that is told from now on is a promise
      choose_catalog();
      MutexLock home_lock(home_.mutex);
      home_.superblock_fails = true;
      drive.power_loss();
    } else {
      while (!pending_.empty()) wait_for_one();
      static_cast<void>(store_->flush(soon()));
    }
    store_.reset();
    while (!pending_.empty()) wait_for_one();
    if (plan_.end == CampaignPlan::End::close) choose_catalog();
    MutexLock home_lock(home_.mutex);
    home_.superblock_fails = false;
  }

  void choose_catalog() {
    const std::size_t newest = home_.catalogs.num_versions() - 1;
    const std::size_t oldest =
        plan_.catalogs == CampaignPlan::Catalogs::any_older ? 0 : std::min(promised_version_, newest);
    const bool closed = plan_.end == CampaignPlan::End::close;
    home_.catalog_version = closed ? newest : oldest + below(newest - oldest + 1);
    promised_version_ = *home_.catalog_version;
  }

  // Slots on which the drive has lied owe nothing; all others do.
  void note_spoiled(const SimulatedDrive& drive) {
    spoiled_.clear();
    for (const SpoiledRange& range : drive.spoiled()) {
      for (std::uint64_t slot = range.offset / kStride; slot * kStride < range.offset + range.bytes; ++slot) {
        spoiled_.insert(static_cast<std::uint32_t>(slot));
      }
    }
    tally_.spoiled += spoiled_.size();
  }

  // Which of the slot's blocks stands in the image.
  std::optional<Block> block_in(const Image& image, std::uint32_t slot) const {
    for (const Block& block : book_[slot].ever) {
      if (image.holds(block)) return block;
    }
    return std::nullopt;
  }

  void check() {
    std::map<std::uint32_t, CatalogRecord> by_slot;
    std::set<std::vector<std::byte>> keys;
    for (const CatalogRecord& record : records_) {
      EXPECT_TRUE(by_slot.emplace(raw(record.place.slot), record).second) << "two blocks in a slot";
      EXPECT_TRUE(keys.insert({record.block.key.bytes.begin(), record.block.key.bytes.end()}).second)
          << "a block in two slots";
    }
    for (std::uint32_t slot = 0; slot < kSlots; ++slot) check_slot(slot, by_slot);
  }

  void check_slot(std::uint32_t slot, const std::map<std::uint32_t, CatalogRecord>& by_slot) {
    Page& page = book_[slot];
    const auto record = by_slot.find(slot);
    std::optional<Block> served;
    if (record != by_slot.end()) {
      ++tally_.checked;
      served = served_from(slot, record->second);
      if (!served) wipe_slot(slot);
    }
    if (page.promised) {
      // A catalog that is older than the promises may name another block for the slot, or another slot for
      // the block: such a lie costs a hit (catalog.h).
      const bool lied_to = plan_.catalogs == CampaignPlan::Catalogs::any_older && served != page.promised &&
                           is_named(by_slot, slot, page.promised->number);
      if (lied_to || spoiled_.contains(slot)) {
        ++tally_.exempt;
      } else {
        ++tally_.hits_expected;
        if (served == page.promised) ++tally_.hits;
      }
    }
    page.latest = served;
    page.promised = served == page.promised ? page.promised : std::nullopt;
    page.key_here.reset();
    if (served) page.key_here = served->number;
  }

  static bool is_named(const std::map<std::uint32_t, CatalogRecord>& by_slot, std::uint32_t slot,
                       std::uint32_t number) {
    return std::any_of(by_slot.begin(), by_slot.end(), [&](const auto& named) {
      return named.first == slot || named.second.block.key == key_of(number);
    });
  }

  std::optional<Block> served_from(std::uint32_t slot, const CatalogRecord& record) {
    const Image image;
    Told<ReadOutcome> done;
    SlotRead read;
    read.place = record.place;
    read.key = record.block.key;
    read.group = record.block.group;
    read.image = image.data();
    read.on_done = [&done](const ReadOutcome& outcome) { done.tell(outcome); };
    store_->read(std::move(read));
    if (!done.wait().good()) return std::nullopt;
    const std::optional<Block> block = block_in(image, slot);
    if (!block || key_of(block->number) != record.block.key) {
      ++tally_.wrong;
      return std::nullopt;
    }
    const Page& page = book_[slot];
    if (plan_.honest_drive && page.gone.contains(*block)) ++tally_.revived;
    const bool overtaken =
        page.promised && page.promised->number == block->number && *page.promised != *block;
    if (plan_.honest_drive && overtaken) ++tally_.wrong;
    return block;
  }

  // As an owner does with a slot that holds nothing to be served.
  void wipe_slot(std::uint32_t slot) {
    Told<Status> done;
    store_->wipe({{0, SlotId{slot}}}, [&done](const Status& status) { done.tell(status); });
    EXPECT_TRUE(done.wait());
  }

  std::mt19937_64 random_;
  const CampaignPlan plan_;
  Home home_;
  Tally tally_;
  std::unique_ptr<SlotStore> store_;
  std::vector<CatalogRecord> records_;
  std::map<std::uint32_t, std::uint32_t> versions_;
  std::vector<std::function<void()>> pending_;
  std::uint64_t turns_ = 0;
  std::set<std::uint32_t> spoiled_;  // slots, by the drive of the last cycle

  Mutex mutex_;  // what callbacks touch; the rest of a page is the owner's alone while the slot is not busy
  std::vector<Page> book_;
  std::vector<CatalogRecord> found_;
  std::size_t promised_version_ = 0;
  bool crashed_ = false;
};

}  // namespace kvtier::store_world
