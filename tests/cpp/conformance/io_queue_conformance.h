// What every IoQueue must do (kvtier/platform/io_queue.h), written once, in
// platform/io_queue_conformance_test.cpp.
//
// An implementation derives a harness from IoQueueHarness, and its test file instantiates IoQueueConformance
// (conformance/kind.h).
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "conformance/kind.h"
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

class IoQueueConformance : public ::testing::TestWithParam<Kind<IoQueueHarness>> {
 protected:
  static constexpr std::uint32_t kDepth = 16;
  static constexpr std::uint64_t kBytes = 64 * 1024;

  void SetUp() override {
    queue_ = harness_->make_queue(kDepth);
    if (queue_ == nullptr) GTEST_SKIP() << harness_->why();
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

  std::unique_ptr<IoQueueHarness> harness_ = GetParam().make();
  TempDirectory temp_;
  std::unique_ptr<Directory> directory_;
  std::unique_ptr<BlockFile> file_;
  std::unique_ptr<IoQueue> queue_;
};

}  // namespace kvtier::conformance
