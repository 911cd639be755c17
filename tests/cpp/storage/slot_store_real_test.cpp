// The whole disk tier on a real drive: directory, lease, ledger, catalog helper, io_uring. And SIGKILL.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>
#include <thread>

#include "storage/real_store.h"

#include "kvtier/storage/slot_store.h"

namespace kvtier {
namespace {

using namespace store_world;

#ifdef KVTIER_TEST_CATALOG_HELPER

class SlotStoreReal : public RealStore {
 protected:
  // Writes blocks of ever new versions and tells of each that became durable, until it is killed.
  [[noreturn]] void write_until_killed(int out, std::uint32_t first_version) {
    SlotStore::Opened opened = open_real();
    wait_for_slots(*opened.store, kSlots);
    std::mt19937 random(first_version);
    for (std::uint32_t version = first_version;; ++version) {
      const auto slot = static_cast<std::uint32_t>(random() % kSlots);
      const Block block{slot, version};
      // Before anything is overwritten: from now on the old block is not owed.
      const std::uint32_t begun[] = {0, slot, version};
      static_cast<void>(::write(out, begun, sizeof begun));
      const auto pending = start_write(*opened.store, slot, block);
      if (!pending->written.wait()) ::_exit(3);
      if (version % 4 != 0) continue;
      if (!pending->durable.wait()) ::_exit(3);
      const std::uint32_t durable[] = {1, slot, version};
      static_cast<void>(::write(out, durable, sizeof durable));
    }
  }
};

TEST_F(SlotStoreReal, what_was_flushed_is_found_again_through_directory_and_catalog) {
  for (std::uint32_t round = 0; round < 3; ++round) {
    SlotStore::Opened opened = open_real();
    EXPECT_EQ(opened.report.source, round == 0 ? OpenReport::Source::fresh : OpenReport::Source::catalog);
    EXPECT_EQ(opened.blocks.size(), 10 * round);
    EXPECT_EQ(opened.store->stats().catalog_health, "ok");
    wait_for_slots(*opened.store, kSlots);
    for (const CatalogRecord& record : opened.blocks) {
      const std::uint32_t slot = raw(record.place.slot);
      EXPECT_TRUE(serves(*opened.store, slot, {slot, 1}));
    }
    for (std::uint32_t i = 10 * round; i < 10 * round + 10; ++i) write_durably(*opened.store, i, {i, 1});
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_LE(directory->allocated_bytes().value(), directory->capacity_bytes());
}

TEST_F(SlotStoreReal, after_sigkill_what_was_durable_is_served) {
  std::map<std::uint32_t, std::uint32_t> owed;  // slot -> version
  std::uint32_t version = 1;
  std::uint64_t hits = 0;
  for (std::uint32_t cycle = 0; cycle < 12; ++cycle) {
    int pipe_ends[2];
    ASSERT_EQ(::pipe(pipe_ends), 0);
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(pipe_ends[0]);
      write_until_killed(pipe_ends[1], version);
    }
    ::close(pipe_ends[1]);
    std::map<std::uint32_t, std::uint32_t> begun;
    std::uint32_t message[3];
    for (std::uint32_t durable = 0; ::read(pipe_ends[0], message, sizeof message) == sizeof message;) {
      const auto [kind, slot, number] = message;
      version = number + 1;
      if (kind == 0) {
        begun[slot] = number;
        owed.erase(slot);
      } else if (begun[slot] == number) {
        owed[slot] = number;
      }
      durable += kind;
      if (durable == 3 + cycle) ::kill(child, SIGKILL);  // what is still in the pipe counts
    }
    ::close(pipe_ends[0]);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child ended by itself";

    std::map<std::uint32_t, CatalogRecord> named;
    SlotStore::Opened opened = open_and_scan(named);
    for (const auto& [slot, number] : owed) {
      EXPECT_TRUE(named.contains(slot)) << "cycle " << cycle;
      EXPECT_TRUE(serves(*opened.store, slot, {slot, number})) << "cycle " << cycle;
      ++hits;
    }
    EXPECT_TRUE(opened.store->close(soon()));
  }
  EXPECT_GE(hits, 12U * 3U) << "or it proves little";
}

#endif

}  // namespace
}  // namespace kvtier
