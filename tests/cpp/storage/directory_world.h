// What the tests of store directories share: a directory of their own, children, and harm done to files.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "kvtier/storage/checksum.h"
#include "kvtier/storage/store_directory.h"
#include "kvtier/storage/store_formats.h"

namespace kvtier::directory_world {

namespace fs = std::filesystem;

inline constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
inline const std::vector<std::uint64_t> kStrides = {8192};

inline Fingerprint fingerprint(unsigned char number) {
  Fingerprint result{};
  result.fill(std::byte{number});
  return result;
}

// A forked child that has opened a store, and holds it until it is killed.
class Child {
 public:
  explicit Child(const std::function<std::unique_ptr<StoreLease>()>& open_store) {
    int said[2] = {-1, -1};
    EXPECT_EQ(::pipe(said), 0);
    pid_ = ::fork();
    if (pid_ == 0) {
      ::alarm(60);
      const auto lease = open_store();
      const char answer = lease != nullptr ? 'y' : 'n';
      if (::write(said[1], &answer, 1) != 1) ::_exit(1);
      for (;;) ::pause();
    }
    ::close(said[1]);
    char answer = 0;
    EXPECT_EQ(::read(said[0], &answer, 1), 1);
    EXPECT_EQ(answer, 'y');
    ::close(said[0]);
  }
  ~Child() { kill(); }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    EXPECT_EQ(::waitpid(pid_, nullptr, 0), pid_);
    pid_ = 0;
  }

 private:
  pid_t pid_ = 0;
};

class World : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "kvtier-directory-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    above_ = name;
  }
  void TearDown() override {
    std::error_code ignored;
    fs::remove_all(above_, ignored);
  }

  const std::string& above() const { return above_; }
  std::string path() const { return above_ + "/disk"; }

  std::unique_ptr<StoreDirectory> open(std::uint64_t capacity_bytes) const {
    Result<std::unique_ptr<StoreDirectory>> directory = StoreDirectory::open(path(), capacity_bytes);
    EXPECT_TRUE(directory.is_ok()) << directory.status().message();
    return directory ? std::move(directory).value() : nullptr;
  }
  static std::unique_ptr<StoreLease> acquire(StoreDirectory& directory, unsigned char number) {
    Result<std::unique_ptr<StoreLease>> lease =
        directory.acquire(fingerprint(number), kStrides, SecondProcess::next_store);
    EXPECT_TRUE(lease.is_ok()) << lease.status().message();
    return lease ? std::move(lease).value() : nullptr;
  }

  // Real blocks on the drive, as slot files have them.
  void occupy(const std::string& name, std::uint64_t bytes) const {
    const int fd = ::open((path() + "/" + name).c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    EXPECT_GE(fd, 0) << name;
    EXPECT_EQ(::ftruncate(fd, static_cast<off_t>(bytes)), 0);
    if (bytes > 0) {
      EXPECT_EQ(::posix_fallocate(fd, 0, static_cast<off_t>(bytes)), 0);
    }
    ::close(fd);
  }

  // Every entry with its content.
  std::map<std::string, std::string> files(const std::string& below = "") const {
    std::map<std::string, std::string> found;
    for (const auto& entry : fs::recursive_directory_iterator(path() + "/" + below)) {
      std::ifstream file(entry.path(), std::ios::binary);
      found[entry.path().string()] =
          entry.is_regular_file() ? std::string(std::istreambuf_iterator<char>(file), {}) : "";
    }
    return found;
  }
  std::vector<std::string> store_names() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(path() + "/stores"))
      names.push_back(entry.path().filename());
    std::sort(names.begin(), names.end());
    return names;
  }

  bool read_ledger(Ledger& ledger) const {
    std::ifstream file(path() + "/ledger", std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(file), {});
    return decode_ledger(std::as_bytes(std::span(bytes)), ledger) == RecordVerdict::good;
  }
  void set_last_open(const std::map<unsigned char, std::int64_t>& times) const {
    Ledger ledger;
    ASSERT_TRUE(read_ledger(ledger));
    for (const auto& [number, time] : times) {
      const std::string prefix = store_name_prefix(fingerprint(number));
      for (LedgerEntry& entry : ledger.entries) {
        if (entry.store.starts_with(prefix)) entry.last_open_s = time;
      }
    }
    write(path() + "/ledger", encode_ledger(ledger));
  }

  void write_newer_superblock(const std::string& store) const {
    Superblock superblock;
    superblock.fingerprint = fingerprint(1);
    superblock.class_strides = kStrides;
    std::vector<std::byte> bytes = encode_superblock(superblock);
    bytes[8] = std::byte{2};
    const Checksum checksum = checksum_of(std::span(bytes).first(4080));
    for (std::size_t i = 0; i < 8; ++i) {
      bytes[4080 + i] = static_cast<std::byte>(checksum.low >> (8 * i));
      bytes[4088 + i] = static_cast<std::byte>(checksum.high >> (8 * i));
    }
    write(path() + "/stores/" + store + "/superblock", bytes);
  }
  static void write(const std::string& file, const std::vector<std::byte>& bytes) {
    std::ofstream stream(file, std::ios::binary);
    stream.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }

 private:
  std::string above_;
};

}  // namespace kvtier::directory_world
