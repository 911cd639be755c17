// What goes before what: priorities, barriers, the order of a commit, the end. A gate holds the drive.
#include <gtest/gtest.h>

#include <algorithm>

#include "storage/gate_queue.h"
#include "storage/store_world.h"

#include "kvtier/storage/slot_store.h"

namespace kvtier {
namespace {

using namespace store_world;

// A store behind a gate, with blocks 0..3 durable in slots 0..3.
class SlotStoreOrder : public testing::Test {
 protected:
  void open_with(std::uint32_t depth) {
    SlotStoreOptions options = options_of(home);
    options.queue_depth = depth;
    options.commit_interval = std::chrono::hours(1);
    options.make_queue = [this](std::uint32_t d) -> Result<std::unique_ptr<IoQueue>> {
      return std::unique_ptr<IoQueue>(std::make_unique<GateQueue>(gate, d));
    };
    store = std::move(open(home, std::move(options)).store);
    wait_for_slots(*store, home.classes[0].num_slots);
    for (std::uint32_t i = 0; i < 4; ++i) write_durably(*store, i, {i, 1});
    gate->shut();
  }
  void wait_for_requests(std::size_t count) {
    wait_until([&] { return gate->seen().size() >= count; });
    ASSERT_EQ(gate->seen().size(), count);
  }
  // Slots of the first class that the newest catalog names.
  std::vector<std::uint32_t> catalogued() {
    std::vector<std::uint32_t> slots;
    const auto catalog = home.catalogs.open(home.catalogs.num_versions() - 1);
    const Status read = catalog->read([&](std::span<const CatalogRecord> records, std::size_t) {
      for (const CatalogRecord& record : records) slots.push_back(raw(record.place.slot));
    });
    EXPECT_TRUE(read) << read.message();
    std::ranges::sort(slots);
    return slots;
  }
  static bool is_slot(const IoRequest& request, std::uint32_t slot) {
    return request.op != IoOp::sync && request.offset == slot * kStride;
  }

  Home home{16};
  std::shared_ptr<Gate> gate = std::make_shared<Gate>();
  std::unique_ptr<SlotStore> store;
};

TEST_F(SlotStoreOrder, demand_reads_come_before_prefetches_before_wipes_before_writes) {
  open_with(1);
  const auto first = start_read(*store, 0, {0, 1});
  wait_for_requests(1);
  const auto write = start_write(*store, 8, {8, 1});
  const auto wipe = start_wipe(*store, {3});
  const auto prefetch = start_read(*store, 2, {2, 1}, ReadPriority::prefetch);
  const auto demand = start_read(*store, 1, {1, 1});
  for (std::size_t i = 2; i <= 5; ++i) {
    gate->pass_all();
    wait_for_requests(i);
  }
  const std::vector<IoRequest> seen = gate->seen();
  EXPECT_TRUE(is_slot(seen[1], 1));
  EXPECT_TRUE(is_slot(seen[2], 2));
  EXPECT_TRUE(is_slot(seen[3], 3) && seen[3].bytes == kSlotHeaderBytes && seen[3].op == IoOp::write);
  EXPECT_TRUE(is_slot(seen[4], 8));
  gate->open();
  EXPECT_TRUE(wipe->wait());
}

TEST_F(SlotStoreOrder, a_hurried_prefetch_is_a_demand_read) {
  open_with(1);
  const auto first = start_read(*store, 0, {0, 1});
  wait_for_requests(1);
  const auto early = start_read(*store, 1, {1, 1}, ReadPriority::prefetch);
  const auto late = start_read(*store, 2, {2, 1}, ReadPriority::prefetch);
  store->hurry(late->job);
  gate->pass_all();
  wait_for_requests(2);
  EXPECT_TRUE(is_slot(gate->seen()[1], 2));
  gate->open();
  EXPECT_TRUE(early->done.wait().good());
  EXPECT_TRUE(late->done.wait().good());
}

TEST_F(SlotStoreOrder, what_has_not_begun_can_be_cancelled_and_what_has_cannot) {
  open_with(1);
  const auto running = start_read(*store, 0, {0, 1});
  wait_for_requests(1);
  const auto read = start_read(*store, 1, {1, 1});
  const auto write = start_write(*store, 8, {8, 1});
  EXPECT_FALSE(store->cancel(running->job));
  EXPECT_TRUE(store->cancel(read->job));
  EXPECT_TRUE(store->cancel(write->job));
  EXPECT_FALSE(store->cancel(write->job));
  EXPECT_EQ(read->done.wait().status.code(), StatusCode::closed);
  EXPECT_EQ(write->written.wait().code(), StatusCode::closed);
  gate->open();
  EXPECT_TRUE(running->done.wait().good());
  EXPECT_TRUE(store->flush(soon())) << "a cancelled write holds no flush";
  EXPECT_FALSE(write->durable.is_told());
  EXPECT_EQ(read->done.count(), 1);
  EXPECT_TRUE(serves(*store, 1, {1, 1})) << "the slot is as it was";
  const StoreStats stats = store->stats();
  EXPECT_EQ(stats.writes, 4U);
  EXPECT_EQ(stats.writes_failed, 0U);
  EXPECT_EQ(stats.reads, 2U);
}

TEST_F(SlotStoreOrder, the_drive_has_the_next_reads_before_a_callback_runs) {
  open_with(1);
  std::size_t seen_in_callback = 0;
  Told<Status> done;
  const Image image;
  SlotRead read;
  read.place = {0, SlotId{0}};
  read.key = key_of(0);
  read.group = identity_of(0).group;
  read.image = image.data();
  read.on_done = [&](const ReadOutcome& outcome) {
    seen_in_callback = gate->seen().size();
    done.tell(outcome.status);
  };
  store->read(read);
  wait_for_requests(1);
  const auto next = start_read(*store, 1, {1, 1});
  gate->pass_all();
  EXPECT_TRUE(done.wait());
  EXPECT_EQ(seen_in_callback, 2U);
  gate->open();
  EXPECT_TRUE(next->done.wait().good());
}

TEST_F(SlotStoreOrder, durable_comes_after_a_sync_that_began_after_the_write) {
  open_with(8);
  const auto write = start_write(*store, 8, {8, 1});
  wait_for_requests(1);
  const auto flushed = std::make_shared<Told<Status>>();
  store->wipe({}, [flushed](const Status& status) { flushed->tell(status); });
  gate->pass_all();
  EXPECT_TRUE(write->written.wait());
  wait_for_requests(2);
  EXPECT_EQ(gate->seen()[1].op, IoOp::sync);
  EXPECT_FALSE(write->durable.is_told());
  const std::size_t versions = home.catalogs.num_versions();
  gate->pass_all();
  EXPECT_TRUE(write->durable.wait());
  EXPECT_TRUE(flushed->wait());
  EXPECT_EQ(home.catalogs.num_versions(), versions + 1);
}

// The drive reports a lost cache once: to the sync that failed, and to none after it.
TEST_F(SlotStoreOrder, after_a_failed_sync_nothing_that_came_before_its_end_is_called_durable) {
  open_with(8);
  const auto cut = start_write(*store, 8, {8, 1});
  wait_for_requests(1);
  const auto flushed = std::make_shared<Told<Status>>();
  store->wipe({}, [flushed](const Status& status) { flushed->tell(status); });
  gate->pass_all();
  EXPECT_TRUE(cut->written.wait());
  wait_for_requests(2);  // its sync
  const auto behind = start_write(*store, 9, {9, 1});
  wait_for_requests(3);
  gate->pass([](const IoRequest& request) { return is_slot(request, 9); });
  EXPECT_TRUE(behind->written.wait());
  const auto under_way = start_write(*store, 10, {10, 1});
  wait_for_requests(4);
  const auto wiped = start_wipe(*store, {1});
  const auto wiping = start_wipe(*store, {2});
  wait_for_requests(6);
  gate->pass([](const IoRequest& request) { return is_slot(request, 1); });
  wait_until([&] { return store->stats().wipes == 1; });

  gate->fail([](const IoRequest& request) { return request.op == IoOp::sync; }, EIO);
  EXPECT_EQ(cut->durable.wait().code(), StatusCode::io);
  EXPECT_EQ(flushed->wait().code(), StatusCode::io);
  gate->open();
  EXPECT_TRUE(under_way->written.wait());
  EXPECT_EQ(behind->durable.wait().code(), StatusCode::io);
  EXPECT_EQ(under_way->durable.wait().code(), StatusCode::io);
  EXPECT_EQ(wiped->wait().code(), StatusCode::io);
  EXPECT_EQ(wiping->wait().code(), StatusCode::io);
  wait_until([&] { return store->can_write(); });
  EXPECT_EQ(verdict_of(*store, 9, {9, 1}), Verdict::good) << "it can be read as long as this process lives";
  write_durably(*store, 11, {11, 1});
  write_durably(*store, 9, {9, 2});
  EXPECT_TRUE(start_wipe(*store, {1, 2})->wait());

  static_cast<void>(store->close(soon()));
  EXPECT_FALSE(home.superblock.clean) << "slots 8 and 10 are to be looked at";
  EXPECT_EQ(catalogued(), (std::vector<std::uint32_t>{0, 3, 9, 11}));
}

// With direct I/O a sync flushes the drive's cache, and that is one for all files.
TEST_F(SlotStoreOrder, a_failed_sync_of_one_file_disowns_what_was_written_to_the_others) {
  home.superblock.class_strides = {kStride, 2 * kStride};
  home.classes = {{kStride, 16}, {2 * kStride, 16}};
  open_with(8);
  wait_for_slots(*store, 16, 1);
  const auto cut = start_write(*store, 8, {8, 1});
  wait_for_requests(1);
  const auto flushed = std::make_shared<Told<Status>>();
  store->begin_flush([flushed](const Status& status) { flushed->tell(status); });
  gate->pass_all();
  EXPECT_TRUE(cut->written.wait());
  wait_for_requests(2);  // its sync
  const auto other = start_write(*store, 0, {20, 1}, 1);
  wait_for_requests(3);
  gate->pass([](const IoRequest& request) { return request.op == IoOp::write; });
  EXPECT_TRUE(other->written.wait());
  gate->fail([](const IoRequest& request) { return request.op == IoOp::sync; }, EIO);
  EXPECT_EQ(flushed->wait().code(), StatusCode::io);
  gate->open();
  EXPECT_EQ(store->flush(soon()).code(), StatusCode::io) << "a write that was queued before it is lost";
  EXPECT_EQ(other->durable.wait().code(), StatusCode::io);
  EXPECT_TRUE(store->flush(soon())) << "that was told, and nothing is left";
}

// Nobody knows what a failed write has left: maybe what stood there, and is being dropped.
TEST_F(SlotStoreOrder, a_wipe_takes_with_it_what_is_doubtful) {
  open_with(8);
  const auto failing = start_write(*store, 1, {8, 1});
  wait_for_requests(1);
  gate->fail([](const IoRequest&) { return true; }, EIO);
  EXPECT_EQ(failing->written.wait().code(), StatusCode::io);
  EXPECT_EQ(start_wipe(*store, {})->wait().code(), StatusCode::io) << "out of service";
  gate->open();
  wait_until([&] { return store->can_write(); });  // the probe has chosen that very slot
  gate->shut();
  const auto again = start_write(*store, 2, {9, 1});
  wait_for_requests(2);
  const auto also = start_write(*store, 3, {10, 1});
  wait_for_requests(3);
  gate->fail([](const IoRequest&) { return true; }, EIO);
  EXPECT_EQ(again->written.wait().code(), StatusCode::io);
  EXPECT_EQ(also->written.wait().code(), StatusCode::io);
  gate->open();
  wait_until([&] { return store->can_write(); });  // one of the two is left
  gate->shut();
  const auto wiped = start_wipe(*store, {});
  wait_for_requests(4);
  const IoRequest swept = gate->seen()[3];
  EXPECT_TRUE(swept.op == IoOp::write && swept.bytes == kSlotHeaderBytes);
  EXPECT_TRUE(is_slot(swept, 2) || is_slot(swept, 3));
  const auto waits = start_write(*store, static_cast<std::uint32_t>(swept.offset / kStride), {11, 1});
  EXPECT_FALSE(wiped->is_told());
  gate->open();
  EXPECT_TRUE(wiped->wait());
  EXPECT_TRUE(store->flush(soon()));
  EXPECT_TRUE(waits->durable.wait()) << "it waited for the sweep";
  EXPECT_TRUE(store->close(soon()));
  EXPECT_TRUE(home.superblock.clean) << "nothing is doubtful any more";
}

TEST_F(SlotStoreOrder, a_wipe_is_not_done_when_something_doubtful_cannot_be_wiped) {
  open_with(8);
  const auto one = start_write(*store, 1, {8, 1});
  const auto two = start_write(*store, 2, {9, 1});
  wait_for_requests(2);
  gate->fail([](const IoRequest&) { return true; }, EIO);
  EXPECT_EQ(one->written.wait().code(), StatusCode::io);
  EXPECT_EQ(two->written.wait().code(), StatusCode::io);
  gate->open();
  wait_until([&] { return store->can_write(); });
  gate->shut();
  const auto wiped = start_wipe(*store, {});
  wait_for_requests(3);
  gate->fail([](const IoRequest&) { return true; }, EIO);
  EXPECT_EQ(wiped->wait().code(), StatusCode::io);
  gate->open();
}

// What `drop` relies on: a dropped block's slot may be under a write that was queued before.
TEST_F(SlotStoreOrder, a_wipe_waits_for_the_writes_that_were_queued_before_it) {
  open_with(8);
  const auto write = start_write(*store, 8, {8, 1});
  wait_for_requests(1);
  const auto wipe = start_wipe(*store, {1});
  wait_for_requests(2);
  gate->pass([](const IoRequest& request) { return is_slot(request, 1); });
  wait_until([&] { return store->stats().wipes == 1; });
  EXPECT_FALSE(wipe->is_told());
  EXPECT_EQ(gate->seen().size(), 2U) << "no sync before the write";
  gate->pass_all();
  EXPECT_TRUE(write->written.wait());
  wait_for_requests(3);
  EXPECT_EQ(gate->seen()[2].op, IoOp::sync);
  EXPECT_FALSE(wipe->is_told());
  gate->open();
  EXPECT_TRUE(wipe->wait());
  EXPECT_TRUE(write->durable.is_told());
}

TEST_F(SlotStoreOrder, a_wipe_gets_its_turn_however_many_reads_there_are) {
  open_with(1);
  std::vector<std::shared_ptr<PendingRead>> reads;
  for (int i = 0; i < 40; ++i) reads.push_back(start_read(*store, 0, {0, 1}));
  wait_for_requests(1);
  const auto wipe = start_wipe(*store, {3});
  std::size_t at = 0;
  for (std::size_t i = 2; at == 0 && i <= 20; ++i) {
    gate->pass_all();
    wait_for_requests(i);
    if (is_slot(gate->seen().back(), 3)) at = i;
  }
  EXPECT_GT(at, 0U);
  EXPECT_LE(at, 12U);
  gate->open();
  EXPECT_TRUE(wipe->wait());
  for (const auto& read : reads) EXPECT_TRUE(read->done.wait().good());
}

TEST_F(SlotStoreOrder, the_open_counter_is_durable_before_the_first_write) {
  Home fresh(16);
  SlotStoreOptions options = options_of(fresh);
  options.make_queue = [this](std::uint32_t d) -> Result<std::unique_ptr<IoQueue>> {
    return std::unique_ptr<IoQueue>(std::make_unique<GateQueue>(gate, d));
  };
  SlotStore::Opened opened = open(fresh, std::move(options));
  wait_for_slots(*opened.store, 16);
  EXPECT_EQ(fresh.superblock_writes, 0) << "nothing was written yet";
  gate->shut();
  const auto write = start_write(*opened.store, 0, {1, 1});
  wait_for_requests(1);
  {
    MutexLock lock(fresh.mutex);
    EXPECT_EQ(fresh.superblock.open_counter, 1U);
    EXPECT_FALSE(fresh.superblock.clean);
  }
  gate->open();
  EXPECT_TRUE(write->durable.wait());
  EXPECT_TRUE(opened.store->close(soon()));
  EXPECT_TRUE(fresh.superblock.clean);
}

TEST_F(SlotStoreOrder, a_flush_that_times_out_goes_on) {
  open_with(8);
  const auto write = start_write(*store, 8, {8, 1});
  wait_for_requests(1);
  EXPECT_EQ(store->flush(std::chrono::steady_clock::now()).code(), StatusCode::timeout);
  EXPECT_FALSE(write->written.is_told());
  gate->open();
  EXPECT_TRUE(write->durable.wait());
}

TEST_F(SlotStoreOrder, close_cancels_what_waits_and_gives_up_waiting_for_what_runs) {
  open_with(1);
  const auto running = start_read(*store, 0, {0, 1});
  wait_for_requests(1);
  const auto queued = start_read(*store, 1, {1, 1});
  const auto write = start_write(*store, 8, {8, 1});
  const auto in_a_moment = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  EXPECT_EQ(store->close(in_a_moment).code(), StatusCode::timeout);
  EXPECT_EQ(queued->done.wait().status.code(), StatusCode::closed);
  EXPECT_EQ(write->written.wait().code(), StatusCode::closed);
  EXPECT_FALSE(running->done.is_told()) << "its memory is still the drive's";
  EXPECT_EQ(home.leases, 1);
  gate->open();
  EXPECT_TRUE(store->close(soon()));
  EXPECT_TRUE(running->done.wait().good());
  EXPECT_EQ(home.leases, 0);
  EXPECT_TRUE(home.superblock.clean);
}

TEST_F(SlotStoreOrder, a_store_that_goes_with_requests_in_flight_ends_by_itself) {
  open_with(1);
  const auto running = start_read(*store, 0, {0, 1});
  wait_for_requests(1);
  EXPECT_EQ(store->close(std::chrono::steady_clock::now()).code(), StatusCode::timeout);
  store.reset();  // does not wait
  EXPECT_FALSE(running->done.is_told());
  gate->open();
  EXPECT_TRUE(running->done.wait().good());
  wait_until([this] {
    MutexLock lock(home.mutex);
    return home.leases == 0;
  });
}

}  // namespace
}  // namespace kvtier
