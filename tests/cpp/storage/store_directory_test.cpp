// The directory of a disk: who gets which store, how much, and what is left alone.
#include "kvtier/storage/store_directory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "storage/directory_world.h"

#include "kvtier/storage/store_formats.h"

namespace kvtier::directory_world {
namespace {

class StoreDirectoryTest : public World {};

TEST_F(StoreDirectoryTest, a_new_directory_is_private_and_says_its_version) {
  auto directory = open(16 * kMiB);
  ASSERT_NE(directory, nullptr);
  EXPECT_EQ(directory->capacity_bytes(), 16 * kMiB);
  std::ifstream version(path() + "/VERSION");
  std::string line;
  std::getline(version, line);
  EXPECT_EQ(line, "kvtier store directory 1");
  auto lease = acquire(*directory, 1);
  for (const auto& entry : fs::recursive_directory_iterator(path())) {
    const fs::perms wanted = entry.is_directory() ? fs::perms(0700) : fs::perms(0600);
    EXPECT_EQ(entry.symlink_status().permissions(), wanted) << entry.path();
  }
}

TEST_F(StoreDirectoryTest, paths_that_are_none_are_refused) {
  EXPECT_EQ(StoreDirectory::open("relative/path", 16 * kMiB).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(StoreDirectory::open("", 16 * kMiB).status().code(), StatusCode::invalid_argument);
  EXPECT_EQ(StoreDirectory::open(path(), 1000).status().code(), StatusCode::invalid_argument);
  std::ofstream(above() + "/file") << "x";
  EXPECT_EQ(StoreDirectory::open(above() + "/file", 16 * kMiB).status().code(), StatusCode::invalid_argument);
  ASSERT_NE(open(16 * kMiB), nullptr);
  fs::create_directory_symlink(path(), above() + "/link");
  for (const std::string link : {"/link", "/link/"}) {
    const auto through = StoreDirectory::open(above() + link, 16 * kMiB);
    EXPECT_EQ(through.status().code(), StatusCode::invalid_argument);
    EXPECT_NE(through.status().message().find("symbolic link"), std::string::npos)
        << through.status().message();
  }
  fs::permissions(path(), fs::perms(0777));
  EXPECT_EQ(StoreDirectory::open(path(), 16 * kMiB).status().code(), StatusCode::io)
      << "others may write into it";
  fs::permissions(path(), fs::perms(0700));
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(path().c_str(), 12345, 12345), 0);
    EXPECT_EQ(StoreDirectory::open(path(), 16 * kMiB).status().code(), StatusCode::io) << "another user's";
  }
}

TEST_F(StoreDirectoryTest, a_newer_version_is_refused_and_left_untouched) {
  open(16 * kMiB).reset();
  std::ofstream(path() + "/VERSION") << "kvtier store directory 2\n";
  fs::remove(path() + "/lock");
  const auto before = files();
  EXPECT_EQ(StoreDirectory::open(path(), 16 * kMiB).status().code(), StatusCode::unsupported);
  EXPECT_EQ(files(), before);
  std::ofstream(path() + "/VERSION") << "somebody else's file\n";
  EXPECT_EQ(StoreDirectory::open(path(), 16 * kMiB).status().code(), StatusCode::invalid_argument);
}

TEST_F(StoreDirectoryTest, a_store_is_found_again) {
  auto directory = open(16 * kMiB);
  auto lease = acquire(*directory, 1);
  EXPECT_TRUE(lease->is_new());
  EXPECT_EQ(lease->name(), "0101010101010101-0");
  EXPECT_EQ(lease->superblock().open_counter, 0U);
  const StoreId id = lease->superblock().store;
  EXPECT_NE(id, StoreId{});
  Superblock changed = lease->superblock();
  changed.open_counter = 7;
  changed.clean = true;
  ASSERT_TRUE(lease->write_superblock(changed).is_ok());
  lease.reset();
  lease = acquire(*directory, 1);
  EXPECT_FALSE(lease->is_new());
  EXPECT_EQ(lease->superblock().store, id);
  EXPECT_EQ(lease->superblock().open_counter, 7U);
  EXPECT_TRUE(lease->superblock().clean);
}

TEST_F(StoreDirectoryTest, a_second_opener_gets_the_next_store_or_is_refused) {
  auto directory = open(16 * kMiB);
  auto first = acquire(*directory, 1);
  const auto refused = directory->acquire(fingerprint(1), kStrides, SecondProcess::refuse);
  EXPECT_EQ(refused.status().code(), StatusCode::resource) << refused.status().message();
  auto second = acquire(*directory, 1);
  EXPECT_EQ(second->name(), "0101010101010101-1");
  EXPECT_NE(second->superblock().store, first->superblock().store);
  auto other = acquire(*directory, 2);
  EXPECT_EQ(other->name(), "0202020202020202-0");
  first.reset();
  EXPECT_EQ(acquire(*directory, 1)->name(), "0101010101010101-0") << "the first that nobody has open";
}

TEST_F(StoreDirectoryTest, another_process_is_seen_and_its_end_frees_the_store) {
  auto directory = open(16 * kMiB);
  Child child([&] {
    auto theirs = open(16 * kMiB);
    return acquire(*theirs, 1);
  });
  EXPECT_EQ(directory->acquire(fingerprint(1), kStrides, SecondProcess::refuse).status().code(),
            StatusCode::resource);
  auto stores = directory->stores();
  ASSERT_TRUE(stores.is_ok());
  ASSERT_EQ(stores->size(), 1U);
  EXPECT_TRUE(stores->at(0).in_use);
  child.kill();
  EXPECT_EQ(acquire(*directory, 1)->name(), "0101010101010101-0");
}

TEST_F(StoreDirectoryTest, an_unreadable_superblock_or_other_classes_make_a_store_anew) {
  auto directory = open(16 * kMiB);
  auto lease = acquire(*directory, 1);
  const std::string store = path() + "/stores/" + lease->name();
  const StoreId id = lease->superblock().store;
  lease.reset();
  const std::vector<std::function<void()>> harms = {
      [&] { fs::resize_file(store + "/superblock", 100); },
      [&] { fs::remove(store + "/superblock"); },
      [&] { std::ofstream(store + "/superblock") << std::string(4096, 'x'); },
      [&] {
        fs::remove(store + "/superblock");
        fs::create_symlink("/etc/hostname", store + "/superblock");
      },
      [&] {
        fs::remove(store + "/superblock");
        fs::create_directory(store + "/superblock");
      },
  };
  StoreId last = id;
  for (std::size_t i = 0; i < harms.size(); ++i) {
    std::ofstream(store + "/slots.0") << "old bytes";
    harms[i]();
    lease = acquire(*directory, 1);
    ASSERT_NE(lease, nullptr) << i;
    EXPECT_EQ(lease->name(), "0101010101010101-0");
    EXPECT_TRUE(lease->is_new()) << i;
    EXPECT_NE(lease->superblock().store, last) << i;
    EXPECT_FALSE(fs::exists(store + "/slots.0")) << "its bytes prove nothing";
    last = lease->superblock().store;
    lease.reset();
  }
  const std::vector<std::uint64_t> others = {4096, 8192};
  auto changed = directory->acquire(fingerprint(1), others, SecondProcess::next_store);
  ASSERT_TRUE(changed.is_ok());
  EXPECT_TRUE(changed.value()->is_new());
  EXPECT_EQ(changed.value()->superblock().class_strides, others);
}

TEST_F(StoreDirectoryTest, stores_of_newer_versions_and_of_equal_prefixes_are_left_alone) {
  auto directory = open(16 * kMiB);
  Fingerprint alike = fingerprint(1);
  alike[31] = std::byte{9};
  auto lease = directory->acquire(alike, kStrides, SecondProcess::next_store);
  ASSERT_TRUE(lease.is_ok());
  lease.value().reset();
  auto mine = acquire(*directory, 1);
  EXPECT_EQ(mine->name(), "0101010101010101-1") << "the other fingerprint begins alike, and is another";
  mine.reset();

  write_newer_superblock("0101010101010101-1");
  const auto before = files("stores/0101010101010101-1");
  mine = acquire(*directory, 1);
  EXPECT_EQ(mine->name(), "0101010101010101-2");
  EXPECT_LT(mine->reserve(16 * kMiB).value(), 16 * kMiB);
  EXPECT_EQ(files("stores/0101010101010101-1"), before) << "not even to make room";
  EXPECT_FALSE(fs::exists(path() + "/stores/0101010101010101-0")) << "that one is reclaimed";
}

TEST_F(StoreDirectoryTest, what_is_not_a_store_is_left_alone_and_counted) {
  auto directory = open(16 * kMiB);
  const std::string strange = path() + "/stores/0101010101010101-0";
  std::ofstream(strange) << "a file where a store would be";
  occupy("mine.bin", 4 * kMiB);
  auto lease = acquire(*directory, 1);
  EXPECT_EQ(lease->name(), "0101010101010101-1");
  const std::uint64_t granted = lease->reserve(16 * kMiB).value();
  EXPECT_LT(granted, 12 * kMiB);
  EXPECT_GT(granted, 11 * kMiB);
  EXPECT_TRUE(fs::exists(strange));
  EXPECT_TRUE(fs::exists(path() + "/mine.bin"));
}

TEST_F(StoreDirectoryTest, grants_stay_within_the_capacity) {
  auto directory = open(16 * kMiB);
  auto first = acquire(*directory, 1);
  EXPECT_EQ(first->reserve(5 * kMiB).value(), 5 * kMiB);
  EXPECT_EQ(first->reserved_bytes(), 5 * kMiB);
  auto second = acquire(*directory, 2);
  const std::uint64_t rest = second->reserve(100 * kMiB).value();
  EXPECT_LT(rest, 11 * kMiB);
  EXPECT_GT(rest, 10 * kMiB + kMiB / 2);
  EXPECT_EQ(first->reserve(6 * kMiB).value(), 5 * kMiB) << "nothing is left, and nothing is taken away";
  EXPECT_EQ(second->reserve(2 * kMiB).value(), 2 * kMiB) << "less is given back";
  EXPECT_EQ(first->reserve(13 * kMiB).value(), 13 * kMiB);
}

TEST_F(StoreDirectoryTest, a_smaller_capacity_grants_less) {
  auto lease = acquire(*open(16 * kMiB), 1);
  ASSERT_EQ(lease->reserve(12 * kMiB).value(), 12 * kMiB);
  occupy("stores/" + lease->name() + "/slots.0", 12 * kMiB);
  auto smaller = open(8 * kMiB);
  auto second = smaller->acquire(fingerprint(2), kStrides, SecondProcess::next_store);
  EXPECT_EQ(second.status().code(), StatusCode::resource) << "no room for even its small files";
  EXPECT_NE(second.status().message().find("capacity"), std::string::npos) << second.status().message();
  EXPECT_LT(lease->reserve(12 * kMiB).value(), 8 * kMiB) << "the last opener's word counts";
  fs::resize_file(path() + "/stores/" + lease->name() + "/slots.0", lease->reserved_bytes());
  EXPECT_LE(smaller->allocated_bytes().value(), 8 * kMiB);
}

TEST_F(StoreDirectoryTest, stores_that_nobody_has_open_make_room_oldest_first) {
  auto directory = open(16 * kMiB);
  for (const unsigned char number : std::vector<unsigned char>{3, 1, 2}) {
    auto lease = acquire(*directory, number);
    ASSERT_EQ(lease->reserve(4 * kMiB).value(), 4 * kMiB);
    occupy("stores/" + lease->name() + "/slots.0", 4 * kMiB);
  }
  set_last_open({{1, 100}, {2, 50}, {3, 200}});
  auto kept = acquire(*directory, 3);
  set_last_open({{3, 1}});
  auto lease = acquire(*directory, 9);
  EXPECT_EQ(lease->reserve(3 * kMiB).value(), 3 * kMiB);
  EXPECT_EQ(store_names(), (std::vector<std::string>{"0101010101010101-0", "0202020202020202-0",
                                                     "0303030303030303-0", "0909090909090909-0"}))
      << "there was room: nothing was removed";
  EXPECT_EQ(lease->reserve(7 * kMiB).value(), 7 * kMiB);
  EXPECT_EQ(store_names(),
            (std::vector<std::string>{"0101010101010101-0", "0303030303030303-0", "0909090909090909-0"}));
  EXPECT_LT(lease->reserve(14 * kMiB).value(), 12 * kMiB) << "one that is open stays, however old";
  EXPECT_EQ(store_names(), (std::vector<std::string>{"0303030303030303-0", "0909090909090909-0"}));
  EXPECT_LE(directory->allocated_bytes().value(), 16 * kMiB);
}

TEST_F(StoreDirectoryTest, a_lost_or_damaged_ledger_is_made_up_from_what_stands_there) {
  auto directory = open(16 * kMiB);
  auto lease = acquire(*directory, 1);
  ASSERT_EQ(lease->reserve(6 * kMiB).value(), 6 * kMiB);
  occupy("stores/" + lease->name() + "/slots.0", 6 * kMiB);
  for (const bool lost : {true, false}) {
    if (lost) {
      fs::remove(path() + "/ledger");
    } else {
      std::fstream file(path() + "/ledger", std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(40);
      file.put('!');
    }
    auto again = open(16 * kMiB);
    ASSERT_NE(again, nullptr);
    auto second = acquire(*again, 2);
    const std::uint64_t granted = second->reserve(16 * kMiB).value();
    EXPECT_LT(granted, 10 * kMiB);
    EXPECT_GT(granted, 9 * kMiB);
    Ledger ledger;
    ASSERT_TRUE(read_ledger(ledger)) << "it is whole again";
    EXPECT_EQ(ledger.entries.size(), 2U);
  }
}

TEST_F(StoreDirectoryTest, stores_says_what_is_there) {
  auto directory = open(16 * kMiB);
  auto lease = acquire(*directory, 1);
  ASSERT_TRUE(lease->reserve(kMiB).is_ok());
  acquire(*directory, 2).reset();
  fs::resize_file(path() + "/stores/0202020202020202-0/superblock", 10);
  auto stores = directory->stores();
  ASSERT_TRUE(stores.is_ok());
  ASSERT_EQ(stores->size(), 2U);
  EXPECT_EQ(stores->at(0).name, lease->name());
  EXPECT_TRUE(stores->at(0).readable);
  EXPECT_TRUE(stores->at(0).in_use);
  EXPECT_EQ(stores->at(0).granted_bytes, kMiB);
  EXPECT_GT(stores->at(0).allocated_bytes, 0U);
  EXPECT_GT(stores->at(0).last_open_s, 1'700'000'000);
  EXPECT_EQ(stores->at(0).superblock.store, lease->superblock().store);
  EXPECT_FALSE(stores->at(1).readable);
  EXPECT_FALSE(stores->at(1).in_use);
}

// --- several processes ---

TEST_F(StoreDirectoryTest, racing_processes_never_exceed_the_capacity) {
  constexpr int kProcesses = 4;
  open(16 * kMiB).reset();
  std::vector<pid_t> children;
  for (int process = 0; process < kProcesses; ++process) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(60);
      auto directory = open(16 * kMiB);
      if (directory == nullptr) ::_exit(10);
      for (int round = 0; round < 12; ++round) {
        auto lease = directory->acquire(fingerprint(static_cast<unsigned char>(1 + (process + round) % 3)),
                                        kStrides, SecondProcess::next_store);
        if (!lease) {
          if (lease.status().code() == StatusCode::resource) continue;
          ::_exit(11);
        }
        const auto granted = lease.value()->reserve((3 + static_cast<std::uint64_t>(round % 4)) * kMiB);
        if (!granted) ::_exit(12);
        occupy("stores/" + lease.value()->name() + "/slots.0", granted.value());
        if (directory->allocated_bytes().value() > 16 * kMiB) ::_exit(13);
        if (round % 5 == 4) directory = open(16 * kMiB);
      }
      ::_exit(0);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "exit code " << WEXITSTATUS(status) << " signal " << WTERMSIG(status);
  }
  EXPECT_LE(open(16 * kMiB)->allocated_bytes().value(), 16 * kMiB);
}

}  // namespace
}  // namespace kvtier::directory_world
