// Drives that do not answer, and queues that break: who waits is told, and what the drive has stays its own.
#include <gtest/gtest.h>

#include <optional>

#include "storage/gate_queue.h"
#include "storage/store_world.h"

#include "kvtier/storage/slot_store.h"

namespace kvtier {
namespace {

using namespace store_world;
using std::chrono::milliseconds;

// A store behind a gate, with blocks 0..3 durable in slots 0..3.
class SlotStoreSilence : public testing::Test {
 protected:
  void open_with(milliseconds answer_within) {
    SlotStoreOptions options = options_of(home);
    options.answer_within = answer_within;
    options.make_queue = [this](std::uint32_t depth) -> Result<std::unique_ptr<IoQueue>> {
      return std::unique_ptr<IoQueue>(std::make_unique<GateQueue>(gate, depth));
    };
    store = std::move(open(home, std::move(options)).store);
    wait_for_slots(*store, home.classes[0].num_slots);
    for (std::uint32_t i = 0; i < 4; ++i) write_durably(*store, i, {i, 1});
    gate->shut();
  }
  void answer_and_wait_for_service() {
    gate->open();
    wait_until([this] { return store->can_read() && store->can_write() && store->stats().unanswered == 0; });
  }
  static bool is_slot(const IoRequest& request, std::uint32_t slot) {
    return request.op != IoOp::sync && request.offset == slot * kStride;
  }
  static bool is_sync(const IoRequest& request) { return request.op == IoOp::sync; }

  Home home{16};
  std::shared_ptr<Gate> gate = std::make_shared<Gate>();
  std::unique_ptr<SlotStore> store;
};

TEST_F(SlotStoreSilence, a_read_without_an_answer_is_given_up_and_its_memory_stays_the_drives) {
  open_with(milliseconds(30));
  testing::internal::CaptureStderr();
  const auto read = start_read(*store, 0, {0, 1});
  const ReadOutcome outcome = read->done.wait();
  EXPECT_EQ(outcome.status.code(), StatusCode::timeout);
  EXPECT_NE(outcome.status.message().find("has not answered for 30 ms"), std::string::npos)
      << outcome.status.message();
  wait_until([this] { return !store->can_read(); });
  EXPECT_FALSE(store->can_write());
  EXPECT_GE(store->stats().unanswered, 1U);
  EXPECT_LE(store->stats().unanswered, 8U) << "the queue's depth";
  EXPECT_FALSE(read->let_go.is_told());
  const auto refused = start_read(*store, 1, {1, 1});
  EXPECT_EQ(refused->done.wait().status.code(), StatusCode::io) << "at once: it is out of service";
  answer_and_wait_for_service();
  EXPECT_TRUE(read->let_go.wait());
  EXPECT_EQ(read->done.count(), 1);
  EXPECT_FALSE(refused->let_go.is_told());
  EXPECT_TRUE(serves(*store, 0, {0, 1}));
  const std::string told = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(told.begin(), told.end(), '\n'), 2) << "one line each way: " << told;
  EXPECT_TRUE(store->close(soon()));
}

TEST_F(SlotStoreSilence, a_write_without_an_answer_ends_a_flush_and_its_slot_is_left_alone) {
  open_with(milliseconds(30));
  const auto write = start_write(*store, 8, {8, 1});
  EXPECT_EQ(store->flush(std::nullopt).code(), StatusCode::timeout) << "as the write before it";
  EXPECT_EQ(write->written.wait().code(), StatusCode::timeout);
  EXPECT_FALSE(write->let_go.is_told());
  answer_and_wait_for_service();
  EXPECT_TRUE(write->let_go.wait());
  EXPECT_FALSE(write->durable.is_told());
  write_durably(*store, 8, {8, 2});
  EXPECT_TRUE(serves(*store, 8, {8, 2}));
  EXPECT_TRUE(store->close(soon()));
}

TEST_F(SlotStoreSilence, a_sync_without_an_answer_makes_nothing_durable) {
  open_with(milliseconds(300));
  const auto write = start_write(*store, 8, {8, 1});
  wait_until([this] { return gate->num_held() > 0; });
  gate->pass([](const IoRequest& request) { return !is_sync(request); });
  EXPECT_TRUE(write->written.wait());
  EXPECT_FALSE(write->durable.wait());
  EXPECT_FALSE(store->can_write());
  answer_and_wait_for_service();
  EXPECT_EQ(write->durable.count(), 1);
  EXPECT_FALSE(write->let_go.is_told()) << "the write itself was answered";
  write_durably(*store, 9, {9, 1});
  EXPECT_TRUE(serves(*store, 9, {9, 1}));
}

// It may fail yet, and whatever was written and synced beside it would be lost with it.
TEST_F(SlotStoreSilence, a_store_stays_out_of_service_while_a_sync_is_unanswered) {
  open_with(milliseconds(100));
  const auto write = start_write(*store, 8, {8, 1});
  wait_until([this] { return gate->num_held() > 0; });
  gate->pass([](const IoRequest& request) { return !is_sync(request); });
  EXPECT_TRUE(write->written.wait());
  wait_until([this] { return gate->num_held() > 0; });
  const std::vector<IoRequest> seen = gate->seen();
  ASSERT_TRUE(is_sync(seen.back()));
  EXPECT_FALSE(write->durable.wait());
  const auto first = [tag = seen.back().tag](const IoRequest& request) {
    return is_sync(request) && request.tag == tag;
  };
  for (int i = 0; i < 50; ++i) {
    gate->pass([&](const IoRequest& request) { return !first(request); });
    ::usleep(2000);
    ASSERT_FALSE(store->can_write());
  }
  gate->fail(first, EIO);
  answer_and_wait_for_service();
  write_durably(*store, 9, {9, 1});
}

// Here the probe has begun before the sync is given up.
TEST_F(SlotStoreSilence, a_probe_that_has_begun_does_not_bring_a_store_back_beside_an_unanswered_sync) {
  open_with(milliseconds(100));
  const auto silent = start_write(*store, 9, {9, 1});
  ::usleep(50'000);
  const auto write = start_write(*store, 8, {8, 1});
  const auto is_write = [](const IoRequest& request) { return is_slot(request, 8); };
  wait_until([&] {
    gate->pass(is_write);
    return write->written.is_told();
  });
  std::optional<std::uint64_t> sync;
  wait_until([&] {
    for (const IoRequest& request : gate->seen()) {
      if (is_sync(request)) sync = request.tag;
    }
    return sync.has_value();
  });
  const auto unanswered = [&](const IoRequest& request) {
    return is_slot(request, 9) || (is_sync(request) && request.tag == *sync);
  };
  for (int i = 0; i < 150; ++i) {
    gate->pass([&](const IoRequest& request) { return !unanswered(request); });
    ::usleep(2000);
    ASSERT_FALSE(store->can_write() && write->durable.is_told()) << i;
  }
  EXPECT_FALSE(write->durable.wait());
  answer_and_wait_for_service();
  EXPECT_TRUE(silent->let_go.wait());
}

TEST_F(SlotStoreSilence, a_wipe_without_an_answer_fails_and_can_be_had_later) {
  open_with(milliseconds(30));
  const auto wipe = start_wipe(*store, {2});
  EXPECT_FALSE(wipe->wait());
  answer_and_wait_for_service();
  EXPECT_TRUE(start_wipe(*store, {2})->wait());
  EXPECT_FALSE(serves(*store, 2, {2, 1}));
  EXPECT_TRUE(serves(*store, 3, {3, 1}));
}

TEST_F(SlotStoreSilence, a_queue_full_of_requests_without_an_answer_holds_up_nobody) {
  open_with(milliseconds(30));
  const auto unsynced = start_write(*store, 9, {9, 1});
  wait_until([this] { return gate->num_held() > 0; });
  gate->pass([](const IoRequest& request) { return !is_sync(request); });
  std::vector<std::shared_ptr<PendingRead>> reads;
  for (std::uint32_t i = 0; i < 30; ++i) reads.push_back(start_read(*store, i % 4, {i % 4, 1}));
  const auto wipe = start_wipe(*store, {3});
  for (const auto& read : reads) EXPECT_FALSE(read->done.wait().status);
  EXPECT_FALSE(wipe->wait());
  wait_until([this] { return store->stats().unanswered >= 8; });
  static_cast<void>(unsynced->written.wait());
  const auto later = start_wipe(*store, {2});
  EXPECT_FALSE(later->wait());
  static_cast<void>(store->flush(std::nullopt));
  EXPECT_EQ(store->close(std::nullopt).code(), StatusCode::io);
}

TEST_F(SlotStoreSilence, back_in_service_the_slot_of_a_late_write_is_left_alone_until_it_has_come) {
  open_with(milliseconds(100));
  const auto late = start_write(*store, 8, {8, 1});
  wait_until([this] { return gate->num_held() > 0; });
  EXPECT_EQ(late->written.wait().code(), StatusCode::timeout);
  const auto give_up = soon();
  while (!store->can_write()) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up);
    gate->pass([](const IoRequest& request) { return !is_slot(request, 8); });
  }
  const auto pass_others = [this](const auto& waiting) {
    while (!waiting->is_told()) gate->pass([](const IoRequest& request) { return !is_slot(request, 8); });
  };
  const auto again = start_write(*store, 8, {8, 2});
  EXPECT_EQ(again->written.wait().code(), StatusCode::io);
  const auto wipe = start_wipe(*store, {8});
  pass_others(wipe);
  EXPECT_EQ(wipe->wait().code(), StatusCode::io);
  const auto elsewhere = start_wipe(*store, {2});
  pass_others(elsewhere);
  EXPECT_TRUE(elsewhere->wait());
  const auto barrier = start_wipe(*store, {});
  pass_others(barrier);
  EXPECT_EQ(barrier->wait().code(), StatusCode::io) << "what was dropped may still come to the drive";
  answer_and_wait_for_service();
  EXPECT_TRUE(late->let_go.wait());
  EXPECT_TRUE(start_wipe(*store, {8})->wait());
  write_durably(*store, 8, {8, 3});
  EXPECT_TRUE(serves(*store, 8, {8, 3}));
}

// The I/O thread was held up, not the drive.
TEST_F(SlotStoreSilence, answers_that_are_there_count_however_late_we_look) {
  open_with(milliseconds(30));
  const Image image;
  Told<Status> slow;
  SlotRead first;
  first.place = {0, SlotId{0}};
  first.key = key_of(0);
  first.group = identity_of(0).group;
  first.image = image.data();
  first.on_done = [&](const ReadOutcome& outcome) {
    gate->pass_all();
    ::usleep(100'000);
    slow.tell(outcome.status);
  };
  store->read(first);
  wait_until([this] { return gate->num_held() == 1; });
  gate->pass_all();
  const auto second = start_read(*store, 1, {1, 1});
  // Whether the second is in the queue when the first is answered is not certain: then it was never late.
  EXPECT_TRUE(slow.wait());
  gate->open();
  EXPECT_TRUE(second->done.wait().good());
  EXPECT_TRUE(store->can_read());
}

TEST_F(SlotStoreSilence, close_ends_beside_a_drive_that_never_answers_and_keeps_the_lock) {
  open_with(milliseconds(30));
  const auto read = start_read(*store, 0, {0, 1});
  EXPECT_EQ(read->done.wait().status.code(), StatusCode::timeout);
  const Status closed = store->close(std::nullopt);
  EXPECT_EQ(closed.code(), StatusCode::io) << closed.message();
  EXPECT_GT(store->stats().in_flight, 0U);
  EXPECT_FALSE(read->let_go.is_told());
  EXPECT_FALSE(home.superblock.clean);
  store.reset();
  EXPECT_EQ(home.leases, 1) << "the drive may still write into these files";
}

TEST_F(SlotStoreSilence, a_broken_queue_ends_every_wait) {
  open_with(std::chrono::hours(1));
  const auto read = start_read(*store, 0, {0, 1});
  const auto write = start_write(*store, 8, {8, 1});
  const auto wipe = start_wipe(*store, {3});
  wait_until([this] { return gate->num_held() == 3; });
  testing::internal::CaptureStderr();
  gate->break_queue();
  EXPECT_EQ(read->done.wait().status.code(), StatusCode::timeout);
  EXPECT_EQ(write->written.wait().code(), StatusCode::timeout);
  EXPECT_FALSE(wipe->wait());
  EXPECT_FALSE(store->flush(std::nullopt));
  EXPECT_FALSE(store->can_read());
  EXPECT_FALSE(store->can_write());
  EXPECT_FALSE(start_wipe(*store, {1})->wait());
  EXPECT_EQ(start_read(*store, 1, {1, 1})->done.wait().status.code(), StatusCode::io);
  EXPECT_NE(store->stats().health.find("the gate fell down"), std::string::npos) << store->stats().health;
  const std::string told = testing::internal::GetCapturedStderr();
  EXPECT_EQ(std::count(told.begin(), told.end(), '\n'), 1) << told;
  EXPECT_FALSE(read->let_go.is_told());
  gate->pass_all();  // some answers come even so
  EXPECT_TRUE(read->let_go.wait());
  EXPECT_TRUE(write->let_go.wait());
  EXPECT_EQ(store->close(std::nullopt).code(), StatusCode::io);
}

TEST_F(SlotStoreSilence, what_a_broken_queue_has_written_and_not_synced_is_not_durable) {
  open_with(std::chrono::hours(1));
  const auto write = start_write(*store, 8, {8, 1});
  wait_until([this] { return gate->num_held() > 0; });
  gate->pass([](const IoRequest& request) { return !is_sync(request); });
  EXPECT_TRUE(write->written.wait());
  gate->break_queue();
  EXPECT_FALSE(write->durable.wait());
  EXPECT_EQ(store->close(std::nullopt).code(), StatusCode::io);
  EXPECT_FALSE(home.superblock.clean);
}

}  // namespace
}  // namespace kvtier
