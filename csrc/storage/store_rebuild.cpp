// Without a usable catalog: every header is read, before the store is open. 4 KiB a slot, as deep as the
// drive's queue; through a queue of its own, since a queue belongs to one thread.
#include <cerrno>
#include <new>
#include <set>
#include <system_error>

#include "store_core.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kProgressEvery = 4096;  // slots

struct Reading {
  SlotPlace place;
  AlignedBuffer buffer;
};

// What a queue fills. Where it has not ended all of it, since it is broken or memory ran out, the drive may
// go on: then it is kept for ever.
struct Readings {
  explicit Readings(IoQueue& of) : queue(of), list(of.depth()) {}
  ~Readings() {
    if (queue.in_flight() > 0) static_cast<void>(new (std::nothrow) std::vector<Reading>(std::move(list)));
  }
  Readings(const Readings&) = delete;
  Readings& operator=(const Readings&) = delete;

  IoQueue& queue;
  std::vector<Reading> list;
};

}  // namespace

Status StoreCore::rebuild(SlotStore::Opened& opened) {
  OpenReport& report = opened.report;
  HeaderScan scan;
  for (std::uint32_t c = 0; c < files_.size(); ++c) {
    for (std::uint32_t slot = 0; slot < file_slots_[c]; ++slot) scan.add({c, SlotId{slot}});
  }
  Result<std::unique_ptr<IoQueue>> queue = make_queue(nullptr);
  if (!queue) return queue.status();
  KVTIER_RETURN_IF_ERROR(read_headers(*queue.value(), scan));
  HeaderScan::Outcome outcome = scan.finish([](const BlockName&) { return false; });
  report.discarded += outcome.discarded;
  open_counter_ = std::max(open_counter_, outcome.highest_open_counter);
  for (const SlotPlace& place : outcome.untouchable) table_.set_content(place, SlotContent::untouchable);
  opened.unusable = outcome.untouchable;
  for (const CatalogRecord& record : outcome.found) {
    if (is_sound(record)) {
      table_.set_record(record, SlotContent::durable);
    } else {
      outcome.to_wipe.push_back(record.place);
      ++report.discarded;
    }
  }
  return wipe_headers(*queue.value(), outcome.to_wipe);
}

Status StoreCore::read_headers(IoQueue& queue, HeaderScan& scan) {
  Readings all(queue);
  std::vector<Reading>& readings = all.list;
  std::vector<std::uint64_t> free_tags;
  for (std::uint64_t tag = 0; tag < readings.size(); ++tag) {
    readings[tag].buffer = make_aligned_buffer(kSlotHeaderBytes);
    if (readings[tag].buffer == nullptr) return Status::resource("no memory to read headers into");
    free_tags.push_back(tag);
  }
  std::vector<IoCompletion> completions;
  std::uint64_t told = 0;
  for (bool more = true; more || queue.in_flight() > 0;) {
    std::vector<IoRequest> requests;
    while (more && !free_tags.empty()) {
      const std::optional<SlotPlace> place = scan.next();
      more = place.has_value();
      if (!more) break;
      Reading& reading = readings[free_tags.back()];
      reading.place = *place;
      requests.push_back({IoOp::read, files_[place->class_index]->fd(), offset_of(*place),
                          reading.buffer.get(), kSlotHeaderBytes, free_tags.back()});
      free_tags.pop_back();
    }
    queue.submit(requests);
    if (queue.in_flight() == 0) break;
    completions.clear();
    KVTIER_RETURN_IF_ERROR(queue.wait(completions, std::nullopt));
    for (const IoCompletion& completion : completions) {
      const Reading& reading = readings[completion.tag];
      free_tags.push_back(completion.tag);
      SlotHeader header;
      if (completion.error == 0) {
        const Verdict verdict = read_header(reading.buffer.get(), reading.place, &header);
        scan.judge(reading.place, verdict, header);
        note_verdict(verdict);
      } else if (completion.error == ENODATA) {
        scan.judge(reading.place, Verdict::blank, header);
      } else {
        scan.unreadable();
        table_.set_content(reading.place, SlotContent::doubtful);
      }
    }
    if (options_.on_progress && (scan.judged() - told >= kProgressEvery || scan.all_judged())) {
      told = scan.judged();
      options_.on_progress(told, scan.total());
    }
  }
  return Status::ok();
}

// Synced too, so that what the rebuild has decided is decided for good, and what it has found is durable: the
// last opening's writes may not have been.
Status StoreCore::wipe_headers(IoQueue& queue, const std::vector<SlotPlace>& places) {
  std::vector<IoCompletion> completions;
  const auto drain = [&](std::uint32_t until) -> Status {
    while (queue.in_flight() > until) {
      completions.clear();
      KVTIER_RETURN_IF_ERROR(queue.wait(completions, std::nullopt));
      for (const IoCompletion& completion : completions) {
        if (completion.error == 0) continue;
        if (completion.tag == places.size()) {
          return Status::io("syncing the slots of " + name_ +
                                " failed: " + std::generic_category().message(completion.error),
                            completion.error);
        }
        table_.set_content(places[completion.tag], SlotContent::doubtful);
      }
    }
    return Status::ok();
  };
  for (std::uint64_t i = 0; i < places.size(); ++i) {
    KVTIER_RETURN_IF_ERROR(drain(queue.depth() - 1));
    const IoRequest zeros{IoOp::write,          files_[places[i].class_index]->fd(),
                          offset_of(places[i]), zeros_.get(),
                          kSlotHeaderBytes,     i};
    queue.submit({&zeros, 1});
  }
  KVTIER_RETURN_IF_ERROR(drain(0));
  for (const auto& file : files_) {
    const IoRequest sync{IoOp::sync, file->fd(), 0, nullptr, 0, places.size()};
    queue.submit({&sync, 1});
    KVTIER_RETURN_IF_ERROR(drain(0));
  }
  return Status::ok();
}

}  // namespace kvtier
