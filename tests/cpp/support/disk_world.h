// A World (engine_world.h) with a disk tier on a simulated drive.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>

#include "support/engine_world.h"
#include "support/temp_directory.h"

#include "kvtier/platform/simulated_drive.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier::support {

inline constexpr std::uint64_t kCapacity = std::uint64_t{32} << 20;

// A directory, a simulated drive and the catalog's history, which outlive the engines opened on them.
struct Drive {
  explicit Drive(const DriveFaults& faults = {}) : drive(faults) {}

  DiskOptions options() {
    DiskOptions disk;
    disk.disks = {{directory.path() + "/disk", kCapacity}};
    disk.commit_interval = std::chrono::milliseconds(1);
    disk.write_bytes_per_day = 0;
    disk.admission = Admission::all;
    disk.adjust = [this](SlotStoreOptions& options, std::size_t) {
      options.use_direct_io = false;
      options.make_queue = [this](std::uint32_t depth) -> Result<std::unique_ptr<IoQueue>> {
        return drive.make_queue(depth);
      };
      options.make_catalog = [this](const Directory&) -> Result<std::unique_ptr<Catalog>> {
        return catalogs.open(catalogs.num_versions() - 1);
      };
      if (slots > 0) options.classes[0].num_slots = slots;
    };
    return disk;
  }

  TempDirectory directory;
  SimulatedDrive drive;
  CatalogHistory catalogs;
  std::uint32_t slots = 0;           // of the first class; 0: as the capacity says
  std::optional<std::size_t> known;  // the catalog's version at some moment
};

inline WorldOptions world_on(Drive& drive, std::uint32_t blocks = 8) {
  WorldOptions options;
  options.blocks = blocks;
  options.disk = drive.options();
  return options;
}

inline FlushResult flush(World& world) { return world.engine->flush(in_seconds(30)).value(); }

// Fills the host tier with others, so that what it held is on disk alone.
inline void push_out(World& world, std::uint32_t blocks = 8) {
  done(world.store(0, range(1000, 1000 + blocks), range(0, blocks)));
  flush(world);
}

}  // namespace kvtier::support
