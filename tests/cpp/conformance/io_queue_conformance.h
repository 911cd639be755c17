// What every IoQueue must do (kvtier/platform/io_queue.h), written once.
//
// An implementation derives a default-constructible harness from IoQueueHarness, and its test file says
//
//   INSTANTIATE_TYPED_TEST_SUITE_P(Threads, IoQueueConformance, ::testing::Types<ThreadsHarness>);
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/temp_directory.h"

#include "kvtier/platform/block_file.h"
#include "kvtier/platform/io_queue.h"

namespace kvtier::conformance {

class IoQueueHarness {
 public:
  virtual ~IoQueueHarness() = default;
  // Null: this machine has no such queue (why() says why), and the tests skip.
  virtual std::unique_ptr<IoQueue> make_queue(std::uint32_t depth) = 0;
  virtual std::string why() const { return {}; }
};

// Memory for direct I/O.
class IoBuffer {
 public:
  explicit IoBuffer(std::size_t bytes)
      : bytes_(bytes),
        begin_(static_cast<std::byte*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096))) {
    std::memset(begin_.get(), 0, bytes_);
  }
  std::byte* data() const { return begin_.get(); }
  std::span<std::byte> bytes() const { return {data(), bytes_}; }
  void fill(unsigned seed) const {
    std::mt19937 random(seed);
    for (std::byte& b : bytes()) b = static_cast<std::byte>(random());
  }
  friend bool operator==(const IoBuffer& a, const IoBuffer& b) {
    return a.bytes_ == b.bytes_ && std::memcmp(a.data(), b.data(), a.bytes_) == 0;
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> begin_;
};

template <typename Harness>
class IoQueueConformance : public ::testing::Test {
 protected:
  static constexpr std::uint32_t kDepth = 16;
  static constexpr std::uint64_t kBytes = 64 * 1024;

  void SetUp() override {
    queue_ = harness_.make_queue(kDepth);
    if (queue_ == nullptr) GTEST_SKIP() << harness_.why();
    Result<Directory> directory = Directory::open_or_create(temp_.path());
    ASSERT_TRUE(directory.is_ok()) << directory.status().message();
    directory_ = std::make_unique<Directory>(std::move(*directory));
    file_ = open_file("slots");
    ASSERT_TRUE(file_->grow(kDepth * kBytes).is_ok());
  }

  std::unique_ptr<BlockFile> open_file(const std::string& name) {
    Result<std::unique_ptr<BlockFile>> file = BlockFile::open(*directory_, name);
    EXPECT_TRUE(file.is_ok()) << file.status().message();
    return std::move(*file);
  }

  IoRequest read(std::uint64_t offset, const IoBuffer& into, std::uint64_t tag = 0) const {
    return {IoOp::read, file_->fd(), offset, into.data(), into.bytes().size(), tag};
  }
  IoRequest write(std::uint64_t offset, const IoBuffer& from, std::uint64_t tag = 0) const {
    return {IoOp::write, file_->fd(), offset, from.data(), from.bytes().size(), tag};
  }
  IoRequest sync(std::uint64_t tag = 0) const { return {IoOp::sync, file_->fd(), 0, nullptr, 0, tag}; }

  // All of them; their errors by tag.
  std::map<std::uint64_t, int> run(std::span<const IoRequest> requests) {
    queue_->submit(requests);
    return finish();
  }
  int run(const IoRequest& request) { return run(std::span(&request, 1)).at(request.tag); }
  std::map<std::uint64_t, int> finish() {
    std::map<std::uint64_t, int> errors;
    while (queue_->in_flight() > 0) {
      std::vector<IoCompletion> completions;
      const Status status = queue_->wait(completions, std::nullopt);
      EXPECT_TRUE(status.is_ok()) << status.message();
      if (!status) break;
      EXPECT_FALSE(completions.empty());
      for (const IoCompletion& c : completions) {
        EXPECT_TRUE(errors.emplace(c.tag, c.error).second) << "tag " << c.tag << " came twice";
      }
    }
    return errors;
  }

  Harness harness_;
  TempDirectory temp_;
  std::unique_ptr<Directory> directory_;
  std::unique_ptr<BlockFile> file_;
  std::unique_ptr<IoQueue> queue_;
};
TYPED_TEST_SUITE_P(IoQueueConformance);

TYPED_TEST_P(IoQueueConformance, reads_what_was_written) {
  const IoBuffer from(this->kBytes);
  const IoBuffer into(this->kBytes);
  from.fill(1);
  EXPECT_EQ(this->run(this->write(4096, from)), 0);
  EXPECT_EQ(this->run(this->read(4096, into)), 0);
  EXPECT_TRUE(from == into);
}

TYPED_TEST_P(IoQueueConformance, each_request_of_a_full_queue_completes_once_with_its_tag_and_bytes) {
  std::vector<IoBuffer> buffers;
  for (unsigned round = 0; round < 8; ++round) {
    std::vector<IoBuffer> from;
    std::vector<IoBuffer> into;
    std::vector<IoRequest> writes;
    std::vector<IoRequest> reads;
    for (unsigned i = 0; i < this->kDepth; ++i) {
      from.emplace_back(this->kBytes).fill(round * 100 + i);
      into.emplace_back(this->kBytes);
      writes.push_back(this->write(i * this->kBytes, from[i], ~std::uint64_t{0} - i));
      reads.push_back(this->read(i * this->kBytes, into[i], i));
    }
    const auto written = this->run(writes);
    EXPECT_EQ(written.size(), this->kDepth);
    for (const auto& [tag, error] : written) EXPECT_EQ(error, 0) << tag;
    const auto errors = this->run(reads);
    ASSERT_EQ(errors.size(), this->kDepth);
    for (unsigned i = 0; i < this->kDepth; ++i) {
      EXPECT_EQ(errors.at(i), 0);
      EXPECT_TRUE(from[i] == into[i]) << i;
    }
  }
}

TYPED_TEST_P(IoQueueConformance, in_flight_counts_what_wait_has_not_returned) {
  const IoBuffer into(this->kBytes);
  EXPECT_EQ(this->queue_->depth(), this->kDepth);
  EXPECT_EQ(this->queue_->in_flight(), 0U);
  this->queue_->submit({});
  EXPECT_EQ(this->queue_->in_flight(), 0U);
  const std::vector<IoRequest> requests{this->read(0, into, 1), this->sync(2)};
  this->queue_->submit(requests);
  EXPECT_EQ(this->queue_->in_flight(), 2U);
  std::vector<IoCompletion> completions;
  while (completions.size() < 2) {
    ASSERT_TRUE(this->queue_->wait(completions, std::nullopt).is_ok());
    EXPECT_EQ(this->queue_->in_flight() + completions.size(), 2U);
  }
}

TYPED_TEST_P(IoQueueConformance, a_read_beyond_the_end_fails_with_ENODATA) {
  const IoBuffer into(this->kBytes);
  EXPECT_EQ(this->run(this->read(this->kDepth * this->kBytes, into)), ENODATA);
  EXPECT_EQ(this->run(this->read(this->kDepth * this->kBytes - 4096, into)), ENODATA);
  // An end that no sector has.
  ASSERT_EQ(::ftruncate(this->file_->fd(), 3 * 4096 + 100), 0);
  EXPECT_EQ(this->run(this->read(0, into)), ENODATA);
  EXPECT_EQ(this->run(this->read(3 * 4096, into)), ENODATA);
}

TYPED_TEST_P(IoQueueConformance, a_file_that_is_not_direct_takes_any_offset_and_length) {
  const FileHandle plain(::open((this->temp_.path() + "/plain").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_TRUE(plain.is_open());
  const IoBuffer from(1234);
  const IoBuffer into(1234);
  from.fill(7);
  EXPECT_EQ(this->run({IoOp::write, plain.fd(), 17, from.data(), 1234, 0}), 0);
  EXPECT_EQ(this->run({IoOp::read, plain.fd(), 17, into.data(), 1234, 0}), 0);
  EXPECT_TRUE(from == into);
  EXPECT_EQ(this->run({IoOp::read, plain.fd(), 18, into.data(), 1234, 0}), ENODATA);
  EXPECT_EQ(this->run({IoOp::read, plain.fd(), 17, into.data(), 0, 0}), 0);
}

TYPED_TEST_P(IoQueueConformance, what_cannot_be_started_completes_with_its_errno_beside_the_others) {
  const FileHandle read_only(::open((this->temp_.path() + "/slots").c_str(), O_RDONLY | O_CLOEXEC));
  // A buffer each: what is in flight at once may touch its memory at once.
  const IoBuffer unread(4096);
  const IoBuffer into(4096);
  const IoBuffer unwritten(4096);
  const IoBuffer from(4096);
  const std::vector<IoRequest> requests{
      {IoOp::read, -1, 0, unread.data(), 4096, 0},
      this->read(0, into, 1),
      {IoOp::sync, -1, 0, nullptr, 0, 2},
      {IoOp::write, read_only.fd(), 0, unwritten.data(), 4096, 3},
      this->write(4096, from, 4),
  };
  const auto errors = this->run(requests);
  EXPECT_EQ(errors, (std::map<std::uint64_t, int>{{0, EBADF}, {1, 0}, {2, EBADF}, {3, EBADF}, {4, 0}}));
}

TYPED_TEST_P(IoQueueConformance, syncs_of_a_file_complete) {
  const IoBuffer from(this->kBytes);
  const std::vector<IoRequest> requests{this->sync(1), this->write(0, from, 2), this->sync(3)};
  for (const auto& [tag, error] : this->run(requests)) EXPECT_EQ(error, 0) << tag;
}

TYPED_TEST_P(IoQueueConformance, a_deadline_ends_the_wait_and_nothing_else) {
  std::vector<IoCompletion> completions;
  const auto start = IoQueue::TimePoint::clock::now();
  ASSERT_TRUE(this->queue_->wait(completions, start + std::chrono::milliseconds(20)).is_ok());
  EXPECT_GE(IoQueue::TimePoint::clock::now() - start, std::chrono::milliseconds(20));
  ASSERT_TRUE(this->queue_->wait(completions, start).is_ok());
  EXPECT_TRUE(completions.empty());

  const IoBuffer into(this->kBytes);
  const IoRequest request = this->read(0, into, 5);
  this->queue_->submit({&request, 1});
  while (completions.empty()) ASSERT_TRUE(this->queue_->wait(completions, start).is_ok());
  EXPECT_EQ(completions[0].tag, 5U);
  EXPECT_EQ(completions[0].error, 0);
}

TYPED_TEST_P(IoQueueConformance, completions_are_appended) {
  std::vector<IoCompletion> completions{{.tag = 99, .error = 99}};
  const IoRequest request = this->sync(5);
  this->queue_->submit({&request, 1});
  ASSERT_TRUE(this->queue_->wait(completions, std::nullopt).is_ok());
  ASSERT_EQ(completions.size(), 2U);
  EXPECT_EQ(completions[0].tag, 99U);
  EXPECT_EQ(completions[1].tag, 5U);
}

TYPED_TEST_P(IoQueueConformance, a_wake_before_the_wait_ends_it_once) {
  std::vector<IoCompletion> completions;
  for (int round = 0; round < 3; ++round) {
    this->queue_->wake();
    this->queue_->wake();
    ASSERT_TRUE(this->queue_->wait(completions, std::nullopt).is_ok());
    const auto start = IoQueue::TimePoint::clock::now();
    ASSERT_TRUE(this->queue_->wait(completions, start + std::chrono::milliseconds(5)).is_ok());
    EXPECT_GE(IoQueue::TimePoint::clock::now() - start, std::chrono::milliseconds(5));
  }
  EXPECT_TRUE(completions.empty());
}

// Work comes in exactly as the owner takes it: a wake that is lost leaves a number behind, and the test
// hangs.
TYPED_TEST_P(IoQueueConformance, no_wake_is_lost_among_completions) {
  constexpr std::uint64_t kItems = 5000;
  constexpr int kProducers = 3;
  std::atomic<std::uint64_t> given{0};
  std::vector<std::thread> producers;
  for (int p = 0; p < kProducers; ++p) {
    producers.emplace_back([&] {
      for (std::uint64_t i = 0; i < kItems; ++i) {
        given.fetch_add(1);
        this->queue_->wake();
      }
    });
  }
  const IoBuffer into(4096);
  std::vector<IoCompletion> completions;
  std::uint64_t seen = 0;
  std::uint64_t turns = 0;
  while (seen < kProducers * kItems) {
    if (this->queue_->in_flight() == 0 && ++turns % 4 == 0) {
      const IoRequest request = this->read(0, into);
      this->queue_->submit({&request, 1});
    }
    ASSERT_TRUE(this->queue_->wait(completions, std::nullopt).is_ok());
    seen = given.load();
  }
  for (std::thread& producer : producers) producer.join();
  this->finish();
}

TYPED_TEST_P(IoQueueConformance, a_wake_ends_a_wait_that_sleeps) {
  std::atomic<bool> awake{false};
  std::thread waker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    awake = true;
    this->queue_->wake();
  });
  std::vector<IoCompletion> completions;
  ASSERT_TRUE(this->queue_->wait(completions, std::nullopt).is_ok());
  EXPECT_TRUE(awake);
  EXPECT_TRUE(completions.empty());
  waker.join();
}

// A buffer that is freed at once after the queue: a sanitizer sees whoever still writes into it.
TYPED_TEST_P(IoQueueConformance, destruction_waits_for_what_is_in_flight) {
  const IoBuffer from(this->kBytes);
  from.fill(3);
  std::vector<IoRequest> requests;
  for (unsigned i = 0; i < this->kDepth; ++i) requests.push_back(this->write(i * this->kBytes, from, i));
  this->queue_->submit(requests);
  this->queue_.reset();
  this->queue_ = this->harness_.make_queue(this->kDepth);
  const IoBuffer into(this->kBytes);
  for (unsigned i = 0; i < this->kDepth; ++i) {
    EXPECT_EQ(this->run(this->read(i * this->kBytes, into)), 0);
    EXPECT_TRUE(from == into) << i;
  }
}

TYPED_TEST_P(IoQueueConformance, the_maker_may_destroy_what_another_thread_owned) {
  const IoBuffer from(this->kBytes);
  std::thread([&] { EXPECT_EQ(this->run(this->write(0, from)), 0); }).join();
  this->queue_.reset();
}

TYPED_TEST_P(IoQueueConformance, registered_buffers_change_nothing_but_cost) {
  const IoBuffer one(2 * this->kBytes);
  const IoBuffer two(this->kBytes);
  const IoBuffer strange(this->kBytes);
  const std::string plain = this->queue_->description();
  const Status status = this->queue_->register_buffer(two.bytes());
  EXPECT_EQ(this->queue_->description() != plain, status.is_ok()) << status.message();
  EXPECT_EQ(this->queue_->register_file(this->file_->fd()).is_ok(), status.is_ok());

  one.fill(1);
  two.fill(2);
  strange.fill(3);
  const auto part = [&](IoOp op, const IoBuffer& buffer, std::uint64_t skip, std::uint64_t place) {
    return IoRequest{op, this->file_->fd(), place * this->kBytes, buffer.data() + skip, this->kBytes, place};
  };
  const std::vector<IoRequest> writes{part(IoOp::write, one, 0, 0), part(IoOp::write, one, this->kBytes, 1),
                                      part(IoOp::write, two, 0, 2), part(IoOp::write, strange, 0, 3)};
  this->queue_->submit(writes);
  EXPECT_EQ(this->queue_->register_buffer(one.bytes()).is_ok(), status.is_ok());  // while they run
  for (const auto& [tag, error] : this->finish()) EXPECT_EQ(error, 0) << tag;
  const IoBuffer all(4 * this->kBytes);
  EXPECT_EQ(this->run(this->read(0, all)), 0);
  EXPECT_EQ(std::memcmp(all.data(), one.data(), 2 * this->kBytes), 0);
  EXPECT_EQ(std::memcmp(all.data() + 2 * this->kBytes, two.data(), this->kBytes), 0);
  EXPECT_EQ(std::memcmp(all.data() + 3 * this->kBytes, strange.data(), this->kBytes), 0);
  EXPECT_EQ(this->run(part(IoOp::read, one, this->kBytes / 2, 3)), 0);
  EXPECT_EQ(std::memcmp(one.data() + this->kBytes / 2, strange.data(), this->kBytes), 0);

  EXPECT_EQ(this->run(part(IoOp::write, one, this->kBytes, 0)), 0);
  EXPECT_EQ(this->run(part(IoOp::read, two, 0, 0)), 0);
  EXPECT_EQ(std::memcmp(one.data() + this->kBytes, two.data(), this->kBytes), 0);
  EXPECT_EQ(this->run(IoRequest{IoOp::sync, this->file_->fd(), 0, nullptr, 0, 0}), 0);
}

TYPED_TEST_P(IoQueueConformance, unsuitable_buffers_are_refused_and_all_else_goes_on) {
  std::byte* nowhere = nullptr;
  EXPECT_FALSE(this->queue_->register_buffer({nowhere, (std::uint64_t{1} << 30) + 4096}).is_ok());
  EXPECT_FALSE(this->queue_->register_buffer({reinterpret_cast<std::byte*>(4096), 4096}).is_ok());
  EXPECT_FALSE(this->queue_->register_file(-2).is_ok());
  const IoBuffer into(this->kBytes);
  EXPECT_EQ(this->run(this->read(0, into)), 0);
}

TYPED_TEST_P(IoQueueConformance, random_requests_leave_what_a_model_says) {
  constexpr unsigned kSlots = 32;
  ASSERT_TRUE(this->file_->grow(kSlots * 4096).is_ok());
  std::mt19937 random(11);
  std::vector<unsigned> model(kSlots, 0);  // the seed of what stands there; 0: zeros
  std::vector<IoBuffer> buffers;
  for (unsigned i = 0; i < this->kDepth; ++i) buffers.emplace_back(4096);
  const auto expect_seed = [&](const IoBuffer& found, unsigned seed) {
    const IoBuffer expected(4096);
    if (seed != 0) expected.fill(seed);
    EXPECT_TRUE(found == expected);
  };
  for (unsigned round = 1; round <= 200; ++round) {
    std::set<unsigned> slots;  // a slot is in flight once
    std::vector<std::pair<unsigned, bool>> started;
    std::vector<IoRequest> requests;
    const unsigned count = 1 + static_cast<unsigned>(random()) % this->kDepth;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned slot = static_cast<unsigned>(random()) % kSlots;
      if (!slots.insert(slot).second) continue;
      const bool writes = random() % 2 == 0;
      const auto index = static_cast<unsigned>(started.size());
      if (writes) buffers[index].fill(model[slot] = round * 1000 + slot);
      requests.push_back(writes ? this->write(slot * 4096, buffers[index], index)
                                : this->read(slot * 4096, buffers[index], index));
      started.emplace_back(slot, writes);
    }
    for (const auto& [tag, error] : this->run(requests)) {
      ASSERT_EQ(error, 0);
      if (!started[tag].second) expect_seed(buffers[tag], model[started[tag].first]);
    }
  }
}

REGISTER_TYPED_TEST_SUITE_P(
    IoQueueConformance, reads_what_was_written,
    each_request_of_a_full_queue_completes_once_with_its_tag_and_bytes,
    in_flight_counts_what_wait_has_not_returned, a_read_beyond_the_end_fails_with_ENODATA,
    a_file_that_is_not_direct_takes_any_offset_and_length,
    what_cannot_be_started_completes_with_its_errno_beside_the_others, syncs_of_a_file_complete,
    a_deadline_ends_the_wait_and_nothing_else, completions_are_appended, a_wake_before_the_wait_ends_it_once,
    no_wake_is_lost_among_completions, a_wake_ends_a_wait_that_sleeps,
    destruction_waits_for_what_is_in_flight, the_maker_may_destroy_what_another_thread_owned,
    registered_buffers_change_nothing_but_cost, unsuitable_buffers_are_refused_and_all_else_goes_on,
    random_requests_leave_what_a_model_says);

}  // namespace kvtier::conformance
