// kill -9 at every point at which a process changes a store directory: what it leaves opens again, within its
// capacity.
//
// The calls that change what is on a drive are counted here, in front of the C library's: this program's
// definitions come first. A kill leaves the kernel's view as it was, so the states before each of them are
// all that a kill can leave.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <string>

#include "storage/directory_world.h"
#include "storage/kill_points.h"

using kvtier::kill_points::count_call;

extern "C" {
int fsync(int fd) {
  count_call();
  return static_cast<int>(::syscall(SYS_fsync, fd));
}
int fdatasync(int fd) {
  count_call();
  return static_cast<int>(::syscall(SYS_fdatasync, fd));
}
ssize_t pwrite(int fd, const void* data, size_t bytes, off_t offset) {
  count_call();
  return ::syscall(SYS_pwrite64, fd, data, bytes, offset);
}
ssize_t pwrite64(int fd, const void* data, size_t bytes, off64_t offset) {
  count_call();
  return ::syscall(SYS_pwrite64, fd, data, bytes, offset);
}
// To the catalog's helper.
ssize_t send(int fd, const void* data, size_t bytes, int flags) {
  count_call();
  return ::syscall(SYS_sendto, fd, data, bytes, flags, nullptr, 0);
}
int renameat(int from_fd, const char* from, int to_fd, const char* to) noexcept {
  count_call();
  return static_cast<int>(::syscall(SYS_renameat2, from_fd, from, to_fd, to, 0U));
}
int unlinkat(int fd, const char* name, int flags) noexcept {
  count_call();
  return static_cast<int>(::syscall(SYS_unlinkat, fd, name, flags));
}
int mkdirat(int fd, const char* name, mode_t mode) noexcept {
  count_call();
  return static_cast<int>(::syscall(SYS_mkdirat, fd, name, mode));
}
}

namespace kvtier::directory_world {
namespace {

class StoreKillTest : public World {
 protected:
  // What the victim does: it opens the directory, makes or finds its store, counts its opening, and takes the
  // room of stores that nobody has open. Returns the step that failed.
  int live() const {
    Result<std::unique_ptr<StoreDirectory>> directory = StoreDirectory::open(path(), 16 * kMiB);
    if (!directory) return 1;
    Result<std::unique_ptr<StoreLease>> lease =
        directory.value()->acquire(fingerprint(1), kStrides, SecondProcess::refuse);
    if (!lease) return 2;
    StoreLease& store = *lease.value();
    Superblock superblock = store.superblock();
    ++superblock.open_counter;
    superblock.clean = false;
    if (!store.write_superblock(superblock)) return 3;
    const Result<std::uint64_t> granted = store.reserve(12 * kMiB);
    if (!granted || granted.value() != 12 * kMiB) return 4;
    occupy("stores/" + store.name() + "/slots.0", granted.value());
    superblock.clean = true;
    if (!store.write_superblock(superblock)) return 5;
    return directory.value()->allocated_bytes().value() <= 16 * kMiB ? 0 : 6;
  }

  bool killed_at(int point) const {
    return kill_points::is_killed_at(point, [this] { return live(); });
  }

  void expect_sound(int point) const {
    ASSERT_EQ(live(), 0) << "after a kill at point " << point;
    auto directory = open(16 * kMiB);
    auto stores = directory->stores();
    ASSERT_TRUE(stores.is_ok());
    bool own = false;
    for (const StoreDirectory::StoreInfo& store : *stores) {
      // One whose removal was cut short is no store any more; what is left of it goes when its room is
      // wanted.
      if (store.name.starts_with("01")) {
        own = true;
        EXPECT_TRUE(store.readable) << store.name << " after point " << point;
      }
      EXPECT_FALSE(store.in_use);
    }
    EXPECT_TRUE(own);
    auto lease = acquire(*directory, 1);
    EXPECT_GT(lease->reserve(16 * kMiB).value(), 15 * kMiB) << "nothing that a kill left keeps room for ever";
  }

  void add_unowned_store(unsigned char number) const {
    auto directory = open(16 * kMiB);
    auto lease = acquire(*directory, number);
    ASSERT_EQ(lease->reserve(6 * kMiB).value(), 6 * kMiB);
    occupy("stores/" + lease->name() + "/slots.0", 6 * kMiB);
  }
};

TEST_F(StoreKillTest, a_directory_that_is_being_made_opens_again) {
  int point = 0;
  for (; point < 500; ++point) {
    fs::remove_all(path());
    const bool killed = killed_at(point);
    expect_sound(point);
    if (!killed) break;
  }
  EXPECT_GT(point, 20) << "so many points there are at least";
  EXPECT_LT(point, 500);
}

TEST_F(StoreKillTest, a_directory_whose_stores_are_being_reclaimed_opens_again) {
  int point = 0;
  for (; point < 500; ++point) {
    fs::remove_all(path());
    add_unowned_store(2);
    add_unowned_store(3);
    const bool killed = killed_at(point);
    auto directory = open(16 * kMiB);
    EXPECT_LE(directory->allocated_bytes().value(), 16 * kMiB) << point;
    directory.reset();
    expect_sound(point);
    if (!killed) break;
  }
  EXPECT_GT(point, 20);
  EXPECT_LT(point, 500);
}

}  // namespace
}  // namespace kvtier::directory_world
