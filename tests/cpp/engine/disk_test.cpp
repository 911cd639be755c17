// The disk tier through the engine: write-back, promotion, restart, dropping, and drives that fail.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <ctime>
#include <filesystem>
#include <fstream>

#include "support/disk_world.h"
#include "support/engine_world.h"
#include "support/temp_directory.h"
#include "support/turns.h"

#include "kvtier/platform/simulated_drive.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier::support {
namespace {

// Of a store that still writes: a file that is replaced meanwhile ends a copy.
void copy_files(const std::string& from, const std::string& to) {
  constexpr auto kHow =
      std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing;
  std::error_code error;
  do {
    std::filesystem::copy(from, to, kHow, error);
  } while (error == std::errc::no_such_file_or_directory);
  ASSERT_FALSE(error) << error.message();
}

TEST(Disk, flushed_blocks_are_found_by_the_next_engine_with_the_same_bytes) {
  Drive drive;
  {
    World world(world_on(drive));
    const auto ticket = world.store(0, range(0, 6), range(0, 6));
    done(ticket);
    EXPECT_EQ(flush(world).durable, 6U);
    EXPECT_EQ(ticket->durable_blocks(), 6U);
    EXPECT_TRUE(world.engine->close(in_seconds(30)));
  }
  World world(world_on(drive));
  EXPECT_EQ(world.states(range(0, 7)),
            (std::vector{BlockState::on_disk, BlockState::on_disk, BlockState::on_disk, BlockState::on_disk,
                         BlockState::on_disk, BlockState::on_disk, BlockState::miss}));
  world.scribble(0);
  const auto ticket = world.load(0, range(0, 7), range(0, 7));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 7), range(0, 7)));
  EXPECT_EQ(ticket->valid_blocks(), 6U);
  world.quiesce();
  EXPECT_EQ(world.states({3})[0], BlockState::ready);
  expect_at_rest(world.stats());
  EXPECT_EQ(world.stats().promote_good, 6U);
}

TEST(Disk, close_makes_durable_what_was_stored) {
  Drive drive;
  {
    World world(world_on(drive));
    world.store(0, range(0, 8), range(0, 8));
    EXPECT_TRUE(world.engine->close(in_seconds(30)));
  }
  World world(world_on(drive));
  EXPECT_EQ(world.lookup(range(0, 8)).ready_blocks, 8U);
}

TEST(Disk, a_load_takes_some_blocks_from_host_and_some_from_disk) {
  for (std::uint64_t seed = 0; seed < turns(20, 5); ++seed) {
    DriveFaults faults;
    faults.seed = seed;
    Drive drive(faults);
    WorldOptions options = world_on(drive, 12);
    options.seed = seed;
    World world(options);
    done(world.store(0, range(0, 8), range(0, 8)));
    flush(world);
    push_out(world, 12);
    done(world.load(0, {2, 3, 6}, {2, 3, 6}));
    world.scribble(0);
    const auto ticket = world.load(0, range(0, 8), range(8, 16));
    EXPECT_TRUE(world.right(0, *ticket, range(0, 8), range(8, 16)));
    EXPECT_EQ(ticket->outcomes(), all(8, BlockOutcome::loaded)) << "seed " << seed;
    world.quiesce();
    expect_at_rest(world.stats());
  }
}

TEST(Disk, loads_that_want_the_same_blocks_share_their_reads) {
  Drive drive;
  WorldOptions options = world_on(drive);
  World world(options);
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  const std::uint64_t before = world.stats().disks[0].reads;
  DriveFaults slow;
  slow.delay = 1;
  slow.never_completes = true;
  drive.drive.set_faults(slow);
  const auto first = world.load(0, range(0, 4), range(0, 4));
  const auto second = world.load(0, range(0, 4), range(4, 8));
  EXPECT_FALSE(first->done());
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  EXPECT_TRUE(world.right(0, *first, range(0, 4), range(0, 4)));
  EXPECT_TRUE(world.right(0, *second, range(0, 4), range(4, 8)));
  EXPECT_EQ(first->valid_blocks(), 4U);
  EXPECT_EQ(second->valid_blocks(), 4U);
  EXPECT_EQ(world.stats().disks[0].reads - before, 4U);
}

TEST(Disk, a_prefetch_brings_blocks_to_the_host_tier) {
  Drive drive;
  World world(world_on(drive));
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  const auto ticket = world.engine->prefetch(keys(range(0, 5)), std::nullopt).value();
  EXPECT_TRUE(ticket->wait(Moment::ready, in_seconds(30)));
  EXPECT_EQ(ticket->valid_blocks(), 4U);
  EXPECT_EQ(world.states(range(0, 4)), (std::vector<BlockState>(4, BlockState::ready)));
  world.quiesce();
  expect_at_rest(world.stats());
}

// A read that a load joins may end before the load is through with its own beginning.
TEST(Disk, a_load_that_joins_a_running_prefetch_gets_its_bytes) {
  for (std::uint64_t seed = 0; seed < turns(40, 8); ++seed) {
    DriveFaults faults;
    faults.seed = seed;
    Drive drive(faults);
    WorldOptions options = world_on(drive);
    options.seed = seed;
    World world(options);
    done(world.store(0, range(0, 4), range(0, 4)));
    flush(world);
    push_out(world);
    world.scribble(0);
    const auto prefetch = world.engine->prefetch(keys(range(0, 4)), std::nullopt).value();
    const auto ticket = world.load(0, range(0, 4), range(8, 12));
    EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(8, 12))) << "seed " << seed;
    EXPECT_EQ(ticket->outcomes(), all(4, BlockOutcome::loaded))
        << ticket->failure().message() << " prefetched " << prefetch->valid_blocks() << " durable "
        << world.stats().disk_durable << " hits " << world.stats().promote_good << " missed "
        << world.stats().load_missed << " declined " << world.stats().promote_declined;
    EXPECT_TRUE(prefetch->wait(Moment::ready, in_seconds(30)));
  }
}

TEST(Disk, a_late_prefetch_gives_up_what_no_drive_has_begun) {
  Drive drive;
  WorldOptions options = world_on(drive, 64);
  options.pages = 64;
  options.disk.queue_depth = 2;
  World world(options);
  done(world.store(0, range(0, 40), range(0, 40)));
  flush(world);
  push_out(world, 64);
  DriveFaults stuck;
  stuck.delay = 1;
  stuck.never_completes = true;
  drive.drive.set_faults(stuck);
  const auto ticket = world.engine->prefetch(keys(range(0, 40)), in_seconds(0)).value();
  static_cast<void>(world.engine->poll());
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  EXPECT_TRUE(ticket->wait(Moment::ready, in_seconds(30)));
  world.quiesce();
  const EngineStats stats = world.stats();
  EXPECT_GE(stats.promote_cancelled, 30U);
  EXPECT_EQ(stats.promote_cancelled + stats.promote_good, 40U);
  expect_at_rest(stats);
}

TEST(Disk, what_a_cancel_came_too_late_for_may_be_waited_for) {
  Drive drive;
  World world(world_on(drive));
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  DriveFaults stuck;
  stuck.delay = 1;
  stuck.never_completes = true;
  drive.drive.set_faults(stuck);
  const std::uint64_t before = drive.drive.requests();
  const auto prefetch = world.engine->prefetch(keys(range(0, 4)), std::nullopt).value();
  while (drive.drive.requests() < before + 4) std::this_thread::yield();  // the drive has begun all of them
  EXPECT_EQ(world.engine->cancel_prefetch(prefetch).value(), 0U);
  const auto ticket = world.load(0, range(0, 4), range(8, 12));
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(8, 12)));
  EXPECT_EQ(ticket->outcomes(), all(4, BlockOutcome::loaded));
}

TEST(Disk, a_flush_in_slices_hurries_every_drive_and_outlives_a_close) {
  Drive stuck;
  Drive other;
  WorldOptions options = world_on(stuck, 32);
  options.disk.commit_interval = std::chrono::minutes(1);
  options.disk.disks.push_back({other.directory.path() + "/disk", kCapacity});
  options.disk.adjust = [of_stuck = options.disk.adjust, of_other = other.options().adjust](
                            SlotStoreOptions& store, std::size_t disk) {
    (disk == 0 ? of_stuck : of_other)(store, disk);
  };
  World world(options);
  const auto written = [&](std::size_t disk) { return world.stats().disks[disk].classes[0].ready; };
  while (world.stats().disks[0].classes[0].usable == 0 || world.stats().disks[1].classes[0].usable == 0) {
    std::this_thread::yield();  // until both files are there; a drive that is not ready is passed over
  }
  done(world.store(0, range(0, 32), range(0, 32)));
  while (written(0) + written(1) < 32) std::this_thread::yield();
  ASSERT_GE(written(0), 1U);
  ASSERT_GE(written(1), 1U);
  DriveFaults silent;
  silent.delay = 1;
  silent.never_completes = true;
  stuck.drive.set_faults(silent);
  const FlushPoint point = world.engine->flush_point().value();
  Status status = Status::timeout("");
  for (int slice = 0; slice < 2000 && world.stats().disk_durable < written(1); ++slice) {
    status =
        world.engine->flush(point, std::chrono::steady_clock::now() + std::chrono::milliseconds(5)).status();
    ASSERT_EQ(status.code(), StatusCode::timeout);
  }
  EXPECT_EQ(world.stats().disk_durable, written(1));
  stuck.drive.set_faults({});
  stuck.drive.release_delayed();
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
  EXPECT_EQ(world.engine->flush(point, in_seconds(30)).value().durable, 32U);
}

TEST(Disk, dropped_blocks_stay_away_after_a_restart_whatever_the_catalog_says) {
  for (const bool rebuild : {false, true}) {
    Drive drive;
    {
      World world(world_on(drive));
      done(world.store(0, range(0, 4), range(0, 4)));
      done(world.store(0, range(10, 14), range(4, 8), 0, {}, "tenant"));
      flush(world);
      EXPECT_EQ(world.engine->drop(keys({1, 2})).value(), 2U);
      EXPECT_EQ(world.engine->drop_namespace("tenant").value(), 4U);
      drive.drive.power_loss();
      static_cast<void>(world.engine->close(in_seconds(30)));
    }
    Drive after;
    std::filesystem::remove_all(after.directory.path() + "/disk");
    copy_files(drive.directory.path(), after.directory.path());
    WorldOptions options = world_on(after);
    auto adjust = options.disk.adjust;
    options.disk.adjust = [&drive, adjust, rebuild](SlotStoreOptions& store, std::size_t disk) {
      adjust(store, disk);
      store.make_catalog = [&drive, rebuild](const Directory&) -> Result<std::unique_ptr<Catalog>> {
        return drive.catalogs.open(rebuild ? 0 : drive.catalogs.num_versions() - 1);
      };
    };
    World world(options);
    EXPECT_EQ(world.states({0, 1, 2, 3}),
              (std::vector{BlockState::on_disk, BlockState::miss, BlockState::miss, BlockState::on_disk}));
    EXPECT_EQ(world.states(range(10, 14)), std::vector<BlockState>(4, BlockState::miss));
  }
}

TEST(Disk, a_drop_also_meets_blocks_that_the_catalog_did_not_know_after_an_unclean_end) {
  Drive drive;
  Drive after;  // what a machine that stops at that moment finds
  {
    World world(world_on(drive));
    done(world.store(0, range(0, 2), range(0, 2)));
    flush(world);
    after.known = drive.catalogs.num_versions() - 1;
    done(world.store(0, range(2, 6), range(2, 6), 2, 1));
    flush(world);
    copy_files(drive.directory.path(), after.directory.path());
  }
  WorldOptions options = world_on(after);
  auto adjust = options.disk.adjust;
  options.disk.adjust = [&](SlotStoreOptions& store, std::size_t disk) {
    adjust(store, disk);
    store.make_catalog = [&](const Directory&) -> Result<std::unique_ptr<Catalog>> {
      return drive.catalogs.open(*after.known);
    };
  };
  World world(options);
  EXPECT_EQ(world.engine->drop(keys({3})).value(), 1U);  // it waits for the scan
  EXPECT_EQ(world.states(range(0, 6)),
            (std::vector{BlockState::on_disk, BlockState::on_disk, BlockState::on_disk, BlockState::miss,
                         BlockState::on_disk, BlockState::on_disk}));
}

// It may have been in the drive's cache alone when the last process ended.
TEST(Disk, what_a_scan_has_found_is_durable_only_once_it_was_synced_again) {
  for (const double sync_error : {0.0, 1.0}) {
    Drive drive;
    Drive after;
    {
      World world(world_on(drive));
      done(world.store(0, {500}, {0}));
      flush(world);
      after.known = drive.catalogs.num_versions() - 1;
      done(world.store(0, range(0, 4), range(0, 4)));
      flush(world);
      copy_files(drive.directory.path(), after.directory.path());
    }
    WorldOptions options = world_on(after);
    options.disk.commit_interval = std::chrono::hours(1);
    const auto adjust = options.disk.adjust;
    options.disk.adjust = [&](SlotStoreOptions& store, std::size_t disk) {
      adjust(store, disk);
      store.make_catalog = [&](const Directory&) -> Result<std::unique_ptr<Catalog>> {
        return drive.catalogs.open(*after.known);
      };
    };
    World world(options);
    const auto give_up = in_seconds(30);
    while (world.states(range(0, 4)) != std::vector<BlockState>(4, BlockState::on_disk)) {
      ASSERT_LT(std::chrono::steady_clock::now(), give_up);
      std::this_thread::yield();
    }
    after.drive.set_faults({.sync_error = sync_error});
    const auto ticket = world.store(0, range(0, 4), range(0, 4));
    done(ticket);
    EXPECT_EQ(ticket->durable_blocks(), 0U) << "nobody has synced them yet";
    EXPECT_EQ(flush(world).durable, sync_error > 0 ? 0U : 4U);
    EXPECT_EQ(ticket->durable_blocks(), sync_error > 0 ? 0U : 4U);
    EXPECT_EQ(world.states({0}), std::vector<BlockState>(1, BlockState::ready)) << "in host memory";
    after.drive.set_faults({});
    world.quiesce();
    expect_at_rest(world.stats());
  }
}

TEST(Disk, what_does_not_verify_is_a_miss_and_its_slot_comes_back) {
  DriveFaults faults;
  Drive drive(faults);
  World world(world_on(drive));
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  faults.bit_flip = 1;
  drive.drive.set_faults(faults);
  const auto ticket = world.load(0, range(0, 4), range(0, 4));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(0, 4)));
  drive.drive.set_faults({});
  EXPECT_LT(ticket->valid_blocks(), 4U);
  world.quiesce();
  ASSERT_TRUE(world.engine->drop(keys({9999})));  // waits for the wipes
  const EngineStats stats = world.stats();
  EXPECT_EQ(stats.promote_bad + stats.promote_good, 4U);
  EXPECT_GT(stats.promote_bad, 0U);
  EXPECT_EQ(stats.disks[0].classes[0].leaving, 0U);
  expect_at_rest(stats);
}

// A life from the first opening on, files that are made and grow included, with its n-th request failing;
// nullopt: none fails. Returns how many requests there were.
std::uint64_t run_with_failure(std::optional<std::uint64_t> n) {
  DriveFaults faults;
  faults.fail_nth = n;
  Drive drive(faults);
  World world(world_on(drive));
  done(world.store(0, {500}, {0}));
  flush(world);
  done(world.store(0, range(0, 5), range(0, 5)));
  flush(world);
  push_out(world);
  const auto ticket = world.load(0, range(0, 5), range(0, 5));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 5), range(0, 5)));
  static_cast<void>(world.engine->drop(keys({0, 3})));
  world.quiesce();
  EXPECT_EQ(world.states({0, 3}), std::vector<BlockState>(2, BlockState::miss));
  expect_at_rest(world.stats());
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
  return drive.drive.requests();
}

TEST(Disk, every_failing_request_is_a_miss_and_slots_are_conserved) {
  constexpr std::uint64_t kStep = turns(1, 5);
  const std::uint64_t requests = run_with_failure(std::nullopt);
  EXPECT_GT(requests, 15U);
  for (std::uint64_t n = 0; n < requests; n += kStep) {
    run_with_failure(n);
    if (HasFailure()) FAIL() << "request " << n;
  }
}

TEST(Disk, a_drive_that_never_answers_delays_only_those_who_wait_for_it) {
  Drive drive;
  World world(world_on(drive));
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  DriveFaults stuck;
  stuck.delay = 1;
  stuck.never_completes = true;
  drive.drive.set_faults(stuck);
  const auto ticket = world.load(0, range(0, 4), range(0, 4));
  EXPECT_EQ(
      ticket->wait(Moment::ready, std::chrono::steady_clock::now() + std::chrono::milliseconds(50)).code(),
      StatusCode::timeout);
  // The host tier serves on, and nothing that the drive may still write into is given to others.
  done(world.load(0, {1000}, {10}));
  EXPECT_EQ(world.engine->close(std::chrono::steady_clock::now() + std::chrono::milliseconds(50)).code(),
            StatusCode::timeout);
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(0, 4)));
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
}

DriveFaults silent() {
  DriveFaults faults;
  faults.delay = 1;
  faults.never_completes = true;
  return faults;
}

std::uint32_t unanswered(World& world) { return world.stats().disks.at(0).unanswered; }

// Until the drive has answered everything and is in service again.
void wait_for_service(World& world) {
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (unanswered(world) > 0 || world.stats().disks[0].health != "ok") {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up) << world.stats().disks[0].health;
    std::this_thread::yield();
  }
}

WorldOptions impatient_world_on(Drive& drive, std::chrono::milliseconds patience) {
  WorldOptions options = world_on(drive);
  options.disk.answer_within = patience;
  const auto adjust = options.disk.adjust;
  options.disk.adjust = [adjust](SlotStoreOptions& store, std::size_t disk) {
    adjust(store, disk);
    store.first_probe = std::chrono::milliseconds(5);
  };
  return options;
}

TEST(Disk, what_a_drive_does_not_answer_in_time_is_a_miss_and_its_slots_are_held_until_it_does) {
  Drive drive;
  World world(impatient_world_on(drive, std::chrono::milliseconds(300)));
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  const std::uint64_t before = world.stats().promote_failed;
  drive.drive.set_faults(silent());
  world.scribble(0);
  const auto ticket = world.load(0, range(0, 4), range(0, 4));
  ASSERT_TRUE(ticket->wait(Moment::ready, in_seconds(30)));
  EXPECT_EQ(ticket->outcomes(), all(4, BlockOutcome::missed));
  EXPECT_EQ(world.stats().promote_failed, before + 4);
  EXPECT_GE(unanswered(world), 4U);
  EXPECT_EQ(world.stats().quarantined_blocks, 4U);
  expect_consistent(world.stats());
  // The host tier serves on: its other half is stored to and loaded from.
  done(world.store(0, range(50, 54), range(8, 12)));
  const auto others = world.load(0, range(50, 54), range(16, 20));
  EXPECT_TRUE(world.right(0, *others, range(50, 54), range(16, 20)));
  EXPECT_EQ(others->valid_blocks(), 4U);
  EXPECT_EQ(world.stats().quarantined_blocks, 4U) << "still the drive's";
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  wait_for_service(world);
  EXPECT_EQ(world.stats().quarantined_blocks, 0U);
  const auto again = world.load(0, range(0, 4), range(0, 4));
  EXPECT_TRUE(world.right(0, *again, range(0, 4), range(0, 4)));
  EXPECT_EQ(again->valid_blocks(), 4U) << "the drive has kept them";
  world.quiesce();
  expect_at_rest(world.stats());
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
}

// The machine after a power loss: `drive` is what its files hold.
WorldOptions restarted_on(Drive& drive, SimulatedDrive& restarted) {
  WorldOptions options = world_on(drive);
  const auto adjust = options.disk.adjust;
  options.disk.adjust = [adjust, &restarted](SlotStoreOptions& store, std::size_t disk) {
    adjust(store, disk);
    store.make_queue = [&restarted](std::uint32_t depth) -> Result<std::unique_ptr<IoQueue>> {
      return restarted.make_queue(depth);
    };
  };
  return options;
}

TEST(Disk, a_block_whose_sync_failed_is_durable_only_once_it_was_written_again) {
  Drive drive;
  {
    World world(impatient_world_on(drive, std::chrono::seconds(30)));
    done(world.store(0, {500}, {0}));
    flush(world);
    drive.drive.set_faults({.sync_error = 1});
    const auto ticket = world.store(0, range(0, 3), range(0, 3));
    EXPECT_EQ(flush(world).durable, 0U);
    EXPECT_EQ(ticket->durable_blocks(), 0U);
    const auto again = world.store(0, range(0, 3), range(0, 3));
    EXPECT_EQ(flush(world).durable, 0U) << "nothing was written since";
    EXPECT_EQ(again->durable_blocks(), 0U);
    drive.drive.set_faults({});
    wait_for_service(world);
    const std::uint64_t writes = world.stats().disks[0].writes;
    const auto at_last = world.store(0, range(0, 3), range(0, 3));
    EXPECT_EQ(flush(world).durable, 3U);
    EXPECT_EQ(at_last->durable_blocks(), 3U);
    EXPECT_EQ(world.stats().disks[0].writes, writes + 3);
    drive.drive.power_loss();
  }
  SimulatedDrive restarted({});
  World world(restarted_on(drive, restarted));
  const auto ticket = world.load(0, range(0, 3), range(0, 3));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 3), range(0, 3)));
  EXPECT_EQ(ticket->valid_blocks(), 3U);
}

// A slot that was overwritten in vain may show on the drive what stood there before.
TEST(Disk, what_was_dropped_stays_away_though_the_write_over_it_was_lost) {
  int dropped = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Drive drive;
    drive.slots = 2;
    {
      World world(impatient_world_on(drive, std::chrono::seconds(30)));
      done(world.store(0, {1}, {1}));
      done(world.store(0, {2}, {2}));
      EXPECT_EQ(flush(world).durable, 2U);
      DriveFaults faults{.seed = seed};
      (seed % 2 == 0 ? faults.sync_error : faults.write_error) = 1;
      drive.drive.set_faults(faults);
      done(world.store(0, {3}, {3}));  // over one of them
      done(world.store(0, {4}, {4}));
      EXPECT_EQ(flush(world).durable, 0U);
      drive.drive.set_faults({.seed = seed});
      const auto give_up = in_seconds(30);
      Result<std::uint64_t> drop = world.engine->drop(keys({1, 2}));
      while (!drop && std::chrono::steady_clock::now() < give_up) drop = world.engine->drop(keys({1, 2}));
      EXPECT_TRUE(drop) << drop.status().message();
      ++dropped;
      drive.drive.power_loss();
    }
    SimulatedDrive restarted({});
    World world(restarted_on(drive, restarted));
    ASSERT_TRUE(world.engine->drop(keys({9999})));  // it waits for the scan
    EXPECT_EQ(world.states({1, 2}), std::vector<BlockState>(2, BlockState::miss)) << "seed " << seed;
  }
  EXPECT_EQ(dropped, 20);
}

TEST(Disk, a_flush_and_a_close_without_a_deadline_end_beside_a_drive_that_never_answers) {
  Drive drive;
  World world(impatient_world_on(drive, std::chrono::milliseconds(50)));
  done(world.store(0, range(0, 2), range(0, 2)));
  flush(world);
  drive.drive.set_faults(silent());
  const auto ticket = world.store(0, range(10, 14), range(0, 4));
  const FlushResult flushed = world.engine->flush(std::nullopt).value();
  EXPECT_EQ(flushed.durable, 0U);
  EXPECT_EQ(flushed.dropped, 4U);
  EXPECT_EQ(ticket->durable_blocks(), 0U);
  EXPECT_GT(unanswered(world), 0U);
  EXPECT_TRUE(world.engine->close(std::nullopt));
}

TEST(Disk, what_was_written_late_is_wiped_before_its_slot_is_used_again) {
  Drive drive;
  World world(impatient_world_on(drive, std::chrono::milliseconds(50)));
  done(world.store(0, range(20, 22), range(0, 2)));
  flush(world);
  drive.drive.set_faults(silent());
  done(world.store(0, range(0, 4), range(0, 4)));
  EXPECT_EQ(world.engine->flush(std::nullopt).value().dropped, 4U);
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  wait_for_service(world);
  world.quiesce();
  EXPECT_EQ(world.stats().pins, 0U) << "the drive has let go of the host slots";
  done(world.store(0, range(0, 4), range(0, 4)));
  EXPECT_EQ(flush(world).durable, 4U);
  push_out(world);
  world.scribble(0);
  const auto ticket = world.load(0, range(0, 4), range(0, 4));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(0, 4)));
  EXPECT_EQ(ticket->valid_blocks(), 4U);
  world.quiesce();
  expect_at_rest(world.stats());
  const auto give_up = in_seconds(30);
  while (world.stats().disks[0].classes[0].leaving > 0) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up) << "a slot was lost";
    std::this_thread::yield();
  }
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
}

// Nobody may wait for memory to be full: what has left the host tier is no candidate any more.
TEST(Disk, candidates_stay_bounded_while_a_drive_does_not_answer) {
  Drive drive;
  World world(impatient_world_on(drive, std::chrono::hours(1)));
  drive.drive.set_faults(silent());
  for (std::uint32_t n = 0; n < 20; ++n) {
    done(world.store(0, range(100 * n, 100 * n + 6), range(0, 6)));
  }
  const EngineStats stats = world.stats();
  EXPECT_GT(stats.disk_gone, 80U);
  EXPECT_LE(stats.disk_waiting, 40U);
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  flush(world);
  EXPECT_TRUE(world.engine->close(in_seconds(30)));
}

TEST(Disk, the_first_blocks_go_to_their_pages_while_others_are_still_being_read) {
  Drive drive;
  World world(world_on(drive));
  done(world.store(0, range(0, 6), range(0, 6)));
  flush(world);
  push_out(world);
  world.scribble(0);
  DriveFaults some_silent = silent();
  some_silent.delay = 0.5;
  some_silent.seed = 3;
  drive.drive.set_faults(some_silent);
  const auto ticket = world.load(0, range(0, 6), range(0, 6));
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  // What has arrived is pinned until its copy is over.
  for (EngineStats stats = world.stats(); stats.pins >= stats.promote_good; stats = world.stats()) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up) << "no copy before the last read";
  }
  EXPECT_EQ(ticket->wait(Moment::ready, std::chrono::steady_clock::now()).code(), StatusCode::timeout);
  drive.drive.set_faults({});
  drive.drive.release_delayed();
  EXPECT_TRUE(world.right(0, *ticket, range(0, 6), range(0, 6)));
  EXPECT_EQ(ticket->valid_blocks(), 6U);
}

TEST(Disk, a_layer_wise_load_refuses_what_is_on_disk_alone) {
  Drive drive;
  World world(world_on(drive));
  done(world.store(0, range(0, 2), range(0, 2)));
  flush(world);
  push_out(world);
  EXPECT_EQ(world.try_load(0, range(0, 2), range(0, 2), 0, 1).status().code(), StatusCode::unsupported);
  world.quiesce();
  EXPECT_EQ(world.stats().promote_good, 0U);
}

TEST(Disk, a_lease_keeps_blocks_on_a_full_disk) {
  Drive drive;
  drive.slots = 12;
  WorldOptions options = world_on(drive);
  World world(options);
  done(world.store(0, range(0, 4), range(0, 4)));
  flush(world);
  push_out(world);
  const auto lease = world.pin(range(0, 4));
  ASSERT_EQ(lease->num_blocks(), 4U);
  for (std::uint32_t n = 0; n < 5; ++n) {
    done(world.store(0, range(2000 + 8 * n, 2008 + 8 * n), range(0, 8)));
    flush(world);
  }
  EXPECT_GT(world.stats().disk_evictions, 20U);
  world.scribble(0);
  const auto ticket = world.load(0, range(0, 4), range(0, 4));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(0, 4)));
  EXPECT_EQ(ticket->valid_blocks(), 4U);
  lease->release();
  world.quiesce();
  expect_at_rest(world.stats());
}

TEST(Disk, once_full_a_block_is_written_at_its_second_use) {
  Drive drive;
  drive.slots = 8;
  WorldOptions options = world_on(drive);
  options.disk.admission = Admission::second_use;
  World world(options);
  done(world.store(0, range(0, 8), range(0, 8)));
  EXPECT_EQ(flush(world).durable, 8U);
  done(world.store(0, range(100, 104), range(0, 4)));
  EXPECT_EQ(flush(world).dropped, 4U);
  EXPECT_EQ(world.stats().disk_declined_admission, 1U);  // and the others hang on it
  done(world.store(0, range(100, 104), range(0, 4)));
  EXPECT_GT(flush(world).durable, 0U);
}

TEST(Disk, the_write_budget_fills_while_nobody_is_there_and_never_beyond_a_day) {
  constexpr std::uint64_t kDay = std::uint64_t{1} << 20;
  Drive drive;
  WorldOptions options = world_on(drive);
  options.disk.write_bytes_per_day = kDay;
  std::string file;
  {
    World world(options);
    file = drive.directory.path() + "/disk/stores/" + world.stats().disks[0].store + "/budget";
    EXPECT_EQ(world.stats().write_budget_left_bytes, kDay) << "a store without one is full";
    done(world.store(0, range(0, 4), range(0, 4)));
    EXPECT_EQ(flush(world).durable, 4U);
    EXPECT_LT(world.stats().write_budget_left_bytes, kDay);
    EXPECT_TRUE(world.engine->close(in_seconds(30)));
  }
  const auto left_after = [&](const SavedBudget& saved) {
    const std::vector<std::byte> bytes = encode_budget(saved);
    std::ofstream(file, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    World world(options);
    const std::uint64_t left = world.stats().write_budget_left_bytes;
    EXPECT_TRUE(world.engine->close(in_seconds(30)));
    return left;
  };
  const std::int64_t now = std::time(nullptr);
  const std::uint64_t half = left_after({kDay, 1000, now - 43200});
  EXPECT_GE(half, 1000 + kDay / 2);
  EXPECT_LT(half, 1000 + kDay / 2 + 60 * 13) << "and a minute";
  EXPECT_EQ(left_after({kDay, 1000, now + 86400}), 1000U) << "a clock that was set back fills nothing";
  EXPECT_EQ(left_after({64 * kDay, 64 * kDay, now}), kDay) << "it was more a day";
}

TEST(Disk, without_a_usable_drive_the_engine_runs_on_its_host_tier_and_says_so) {
  Drive drive;
  std::ofstream(drive.directory.path() + "/disk") << "a file";
  WorldOptions options = world_on(drive);
  options.disk.disks[0].path = drive.directory.path() + "/none/disk";
  World world(options);
  done(world.store(0, range(0, 4), range(0, 4)));
  const auto ticket = world.load(0, range(0, 4), range(0, 4));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 4), range(0, 4)));
  ASSERT_EQ(world.stats().disks.size(), 1U);
  EXPECT_NE(world.stats().disks[0].health.find("left out"), std::string::npos);
}

TEST(Disk, two_drives_share_the_blocks_and_each_stands_for_itself) {
  Drive drive;
  WorldOptions options = world_on(drive, 32);
  options.disk.disks.push_back({drive.directory.path() + "/other", kCapacity});
  CatalogHistory catalogs[2];
  auto adjust = options.disk.adjust;
  options.disk.adjust = [&catalogs, adjust](SlotStoreOptions& store, std::size_t disk) {
    adjust(store, disk);
    store.make_catalog = [&catalogs, disk](const Directory&) -> Result<std::unique_ptr<Catalog>> {
      return catalogs[disk].open(catalogs[disk].num_versions() - 1);
    };
  };
  {
    World world(options);
    while (world.stats().disks[0].classes[0].usable == 0 || world.stats().disks[1].classes[0].usable == 0) {
      std::this_thread::yield();  // until both files are there; a drive that is not ready is passed over
    }
    done(world.store(0, range(0, 32), range(0, 32)));
    flush(world);
    const EngineStats stats = world.stats();
    ASSERT_EQ(stats.disks.size(), 2U);
    EXPECT_GE(stats.disks[0].classes[0].ready, 1U);
    EXPECT_GE(stats.disks[1].classes[0].ready, 1U);
    EXPECT_EQ(stats.disks[0].classes[0].ready + stats.disks[1].classes[0].ready, 32U);
    EXPECT_TRUE(world.engine->close(in_seconds(30)));
  }
  World world(options);
  const auto ticket = world.load(0, range(0, 32), range(0, 32));
  EXPECT_TRUE(world.right(0, *ticket, range(0, 32), range(0, 32)));
  EXPECT_EQ(ticket->valid_blocks(), 32U);
}

TEST(Disk, right_bytes_or_a_miss_under_random_faults_on_both_sides) {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    DriveFaults faults;
    faults.seed = seed;
    Drive drive(faults);
    drive.slots = 20;
    WorldOptions options = world_on(drive, 10);
    options.seed = seed;
    World world(options);
    faults.read_error = 0.03;
    faults.bit_flip = 0.03;
    faults.misplaced = 0.01;
    faults.lost_write = 0.02;
    faults.delay = 0.1;
    drive.drive.set_faults(faults);
    Random random(seed);
    std::uint64_t loaded = 0;
    for (int step = 0; step < 40; ++step) {
      const std::uint32_t first = random.below(24);
      const Numbers blocks = range(first, first + 1 + random.below(6));
      const auto n = static_cast<std::uint32_t>(blocks.size());
      switch (random.below(5)) {
        case 0:
        case 1: done(world.store(0, blocks, range(0, n))); break;
        case 2:
        case 3: {
          const auto ticket = world.load(0, blocks, range(16, 16 + n));
          EXPECT_TRUE(world.right(0, *ticket, blocks, range(16, 16 + n)))
              << "seed " << seed << " step " << step;
          for (const BlockOutcome outcome : ticket->outcomes())
            loaded += outcome == BlockOutcome::loaded ? 1 : 0;
          break;
        }
        default:
          if (random.percent(30)) {
            static_cast<void>(world.engine->drop(keys(blocks)));
          } else {
            static_cast<void>(world.engine->prefetch(keys(blocks), std::nullopt));
          }
      }
    }
    drive.drive.set_faults({});
    drive.drive.release_delayed();
    world.quiesce();
    flush(world);
    static_cast<void>(world.engine->drop(keys({9999})));
    expect_at_rest(world.stats());
    EXPECT_GT(loaded, 10U) << "seed " << seed;
    EXPECT_TRUE(world.engine->close(in_seconds(30)));
  }
}

}  // namespace
}  // namespace kvtier::support
