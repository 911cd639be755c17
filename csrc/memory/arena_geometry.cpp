// The arithmetic of ArenaGeometry. Sums saturate, so that validate() can judge whatever it is given.
#include <algorithm>
#include <limits>
#include <string>

#include "kvtier/core/layout.h"
#include "kvtier/memory/arena.h"

namespace kvtier {
namespace {

constexpr std::uint64_t kClassAlignment = std::uint64_t{2} << 20;  // a huge page
constexpr std::uint64_t kMaxArenaBytes = std::uint64_t{1} << 62;   // a file's size is signed

constexpr std::uint64_t kTooMany = std::numeric_limits<std::uint64_t>::max();

// Where the class that begins at `begin` ends, padding included; kTooMany if that cannot be counted.
std::uint64_t class_end(std::uint64_t begin, const ArenaClass& size_class) {
  std::uint64_t end = 0;
  if (__builtin_mul_overflow(size_class.slot_stride_bytes, std::uint64_t{size_class.num_slots}, &end))
    return kTooMany;
  if (__builtin_add_overflow(begin, end, &end)) return kTooMany;
  return end > kMaxArenaBytes ? kTooMany : round_up(end, kClassAlignment);
}

std::uint64_t class_begin(const std::vector<ArenaClass>& classes, std::size_t class_index) {
  std::uint64_t begin = 0;
  for (std::size_t i = 0; i < class_index; ++i) begin = class_end(begin, classes[i]);
  return begin;
}

// "ArenaGeometry.classes[2].num_slots is 0; it must be at least 1"
Status refuse(const std::string& field, std::uint64_t value, const std::string& allowed) {
  return Status::invalid_argument("ArenaGeometry." + field + " is " + std::to_string(value) +
                                  "; it must be " + allowed);
}

}  // namespace

Status ArenaGeometry::validate() const {
  if (chunk_bytes == 0) return refuse("chunk_bytes", chunk_bytes, "at least 1");
  if (classes.empty())
    return Status::invalid_argument("ArenaGeometry.classes is empty; at least one is needed");
  for (std::size_t i = 0; i < classes.size(); ++i) {
    const std::string name = "classes[" + std::to_string(i) + "].";
    const std::uint64_t stride = classes[i].slot_stride_bytes;
    if (stride == 0 || stride % kSlotAlignment != 0) {
      return refuse(name + "slot_stride_bytes", stride,
                    "a positive multiple of " + std::to_string(kSlotAlignment));
    }
    if (classes[i].num_slots == 0) return refuse(name + "num_slots", 0, "at least 1");
    if (class_begin(classes, i + 1) == kTooMany) {
      return refuse(name + "num_slots", classes[i].num_slots,
                    "fewer: with slots of " + std::to_string(stride) + " bytes the arena exceeds " +
                        std::to_string(kMaxArenaBytes) + " bytes");
    }
  }
  return Status::ok();
}

std::uint64_t ArenaGeometry::total_bytes() const { return class_begin(classes, classes.size()); }

std::uint64_t ArenaGeometry::slot_offset(std::size_t class_index, SlotId slot) const {
  KVTIER_CHECK(class_index < classes.size());
  KVTIER_CHECK(raw(slot) < classes[class_index].num_slots);
  return class_begin(classes, class_index) + classes[class_index].slot_stride_bytes * raw(slot);
}

std::vector<ArenaChunk> ArenaGeometry::chunks() const {
  std::vector<ArenaChunk> chunks;
  std::vector<std::uint32_t> next(classes.size(), 0);  // first slot of each class that has no chunk yet
  std::size_t before = 0;
  do {
    before = chunks.size();
    std::uint64_t begin = 0;
    for (std::size_t i = 0; i < classes.size(); ++i) {
      const auto [stride, num_slots] = classes[i];
      const std::uint64_t end = class_end(begin, classes[i]);
      if (const std::uint32_t first = next[i]; first < num_slots) {
        const std::uint64_t fit = std::max<std::uint64_t>(1, chunk_bytes / stride);
        next[i] = first + static_cast<std::uint32_t>(std::min<std::uint64_t>(fit, num_slots - first));
        const std::uint64_t offset = begin + stride * first;
        // The padding belongs to the last chunk: then the prefaulted bytes add up to the total.
        const std::uint64_t chunk_end = next[i] == num_slots ? end : begin + stride * next[i];
        chunks.push_back({i, first, next[i], offset, chunk_end - offset});
      }
      begin = end;
    }
  } while (chunks.size() != before);
  return chunks;
}

}  // namespace kvtier
