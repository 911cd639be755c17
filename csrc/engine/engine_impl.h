// The engine's inside: one mutex, the state it guards, and the operations that run without it.
//
// Lock order: attach_mutex_, then mutex_. Devices, arena and tickets are called with mutex_ free.
// A waiter's thread may call finish_operation() until its Transfers is destroyed, so whatever that touches
// outlives all Transfers; close() sees to it.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"
#include "kvtier/engine/engine.h"
#include "kvtier/index/host_tier.h"
#include "kvtier/transfer/transfers.h"

namespace kvtier {

class EngineImpl;

class PagesImpl final : public Pages {
 public:
  PagesImpl(EngineImpl& engine, GroupId group, std::shared_ptr<Device> device, Transfers& transfers,
            PageMap map)
      : engine_(&engine),
        group_(group),
        device_(std::move(device)),
        transfers_(&transfers),
        map_(std::make_shared<const PageMap>(std::move(map))) {}

  const PageMap& map() const override { return *map_; }
  GroupId group() const override { return group_; }
  Device& device() const override { return *device_; }
  bool attached() const override { return attached_.load(); }

 private:
  friend class EngineImpl;
  EngineImpl* engine_;  // compared, never followed
  GroupId group_;
  std::shared_ptr<Device> device_;
  Transfers* transfers_;
  std::shared_ptr<const PageMap> map_;
  std::atomic<bool> attached_{true};
  // Guarded by EngineImpl::mutex_:
  std::uint32_t running_ = 0;
  bool undrained_ = false;  // a copy may touch these pages for ever
};

// What a lease holds; shared by the Lease and the engine's list. Guarded by EngineImpl::mutex_.
struct LeaseState {
  std::vector<EntryId> pinned;  // in prompt order, group by group
  std::size_t num_blocks = 0;
  std::optional<std::int64_t> expires_us;
  bool active = true;
};

// A running store or load: the owner of its reservations or pins (I5).
struct Operation {
  std::uint64_t grant_id = 0;      // 0: not a grant
  std::uint64_t store_number = 0;  // stores are numbered, for flush()
  Direction direction = Direction::store;
  GroupId group{0};
  std::shared_ptr<Ticket> ticket;
  PagesImpl* pages = nullptr;  // null for a grant; outlives the operation: detach() and close() wait for it
  std::vector<BlockOutcome> outcomes;
  std::vector<EntryId> entries;       // reserved or pinned, in prompt order
  std::vector<std::uint32_t> blocks;  // the key that each entry stands for
  std::vector<SlotId> slots;          // and the slot it has
  std::vector<EntryId> present;       // pinned by a store only while it reserves
  std::uint32_t parts_left = 1;
  bool admitted = false;  // close(), detach() and flush() wait for it
  TransferOutcome outcome;
  bool entries_settled = false;  // by an ordering point that a test disabled
};

class EngineImpl : public std::enable_shared_from_this<EngineImpl> {
 public:
  EngineImpl(EngineConfig config, const HostTier::Options& options);
  ~EngineImpl();
  Status start();

  Result<std::shared_ptr<Pages>> attach(std::shared_ptr<Device> device, GroupId group,
                                        std::span<const TensorView> tensors);
  Status detach(Pages& pages, Deadline deadline);
  Result<Match> lookup(std::span<const BlockKey> keys);
  Result<std::shared_ptr<LeaseState>> pin(std::span<const BlockKey> keys, std::size_t max_blocks,
                                          std::optional<std::int64_t> ttl_us);
  void release(LeaseState& lease);
  bool lease_active(const LeaseState& lease);
  Result<std::shared_ptr<Ticket>> store(Pages& pages, const StoreRequest& request);
  Result<std::shared_ptr<Ticket>> load(Pages& pages, const LoadRequest& request);
  Result<Grant> grant_store(GroupId group, const StoreRequest& request, std::uint32_t num_parts);
  Result<Grant> grant_load(GroupId group, const LoadRequest& request, std::uint32_t num_parts);
  Status finish_part(std::uint64_t grant_id, const TransferOutcome& outcome);
  Result<std::uint64_t> touch(std::span<const BlockKey> keys);
  Result<std::uint64_t> drop(std::span<const BlockKey> keys);
  Result<std::uint64_t> drop_namespace(std::string_view name_space);
  Result<std::uint32_t> poll();
  Result<FlushResult> flush(Deadline deadline);
  Status wait_until_whole();
  Result<EngineStats> stats();
  Status close(Deadline deadline);
  bool closed();

  const EngineConfig& config() const { return config_; }
  const Arena& arena() const { return *arena_; }
  bool in_forked_child() const { return process_generation() != born_in_; }

  // Runs f; a broken invariant inside marks the engine failed instead of leaving it (release builds).
  template <typename F>
  auto guarded(F&& f) -> decltype(f()) {
    if (in_forked_child()) return forked();
    try {
      return f();
    } catch (const std::bad_alloc&) {
      return Status::resource("out of memory");
    } catch (const std::exception& bug) {
      mark_failed(bug.what());
      return Status::internal(bug.what());
    }
  }
  // For threads, copies or children of fork() that may use the inside for ever.
  static void keep_for_ever(std::shared_ptr<EngineImpl> engine);

 private:
  struct AttachedDevice {
    std::shared_ptr<Device> device;
    std::unique_ptr<Transfers> transfers;
  };
  // An API call that submits: close() waits until it has returned.
  class Call {
   public:
    explicit Call(EngineImpl& engine);
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

   private:
    EngineImpl& engine_;
  };

  static Status forked() {
    return Status::closed("this engine belongs to the parent process; open one of your own after fork()");
  }
  Status check_open() KVTIER_REQUIRES(mutex_);
  void mark_failed(const std::string& why) KVTIER_EXCLUDES(mutex_);

  // Steps 1 and 3 of every operation; see engine.h.
  Status admit(Operation& operation) KVTIER_REQUIRES(mutex_);
  Status begin_store(Operation& operation, const StoreRequest& request);
  Status begin_load(Operation& operation, const LoadRequest& request);
  // Exactly once for every admitted operation, whatever happened: else close() would wait for ever.
  void finish_operation(const std::shared_ptr<Operation>& operation) noexcept;
  void fail_operation(const std::shared_ptr<Operation>& operation, const Status& why) noexcept;
  // f() begins and submits. An exception in it ends the operation, if it was admitted, before it goes on.
  template <typename F>
  auto finished_if_thrown(const std::shared_ptr<Operation>& operation, F&& f) -> decltype(f());
  void settle_entries(Operation& operation);
  void release_present(Operation& operation);
  void count(const Operation& operation) KVTIER_REQUIRES(mutex_);
  void submit(const std::shared_ptr<Operation>& operation, std::span<const PageId> pages, StreamHandle stream,
              std::uint32_t first_block, std::uint32_t layers_per_batch);
  void break_order_for_tests(const std::shared_ptr<Operation>& operation);
  Result<PagesImpl*> checked(Pages& pages);
  static Status check_request(const GroupSpec& spec, std::size_t num_keys, std::size_t num_pages,
                              std::uint32_t first_block);
  std::shared_ptr<Operation> make_operation(Direction direction, GroupId group, std::size_t num_blocks);
  Status check_grant(GroupId group, std::uint32_t num_parts, std::size_t num_keys,
                     std::uint32_t first_block) const;
  static Status check_depth(std::size_t num_keys, std::uint32_t first_block);
  Result<Grant> make_grant(const std::shared_ptr<Operation>& operation, std::uint32_t num_parts);

  NamespaceId intern(std::string_view name_space) KVTIER_REQUIRES(mutex_);
  void expire_leases() KVTIER_REQUIRES(mutex_);
  void end_lease(LeaseState& lease) KVTIER_REQUIRES(mutex_);
  std::size_t ready_prefix(const std::vector<std::vector<BlockState>>& states, std::size_t num_keys) const;
  bool wait_idle(Deadline deadline) KVTIER_EXCLUDES(mutex_);

  const EngineConfig config_;
  const std::vector<std::size_t> class_of_group_ = config_.class_of_group();
  const std::shared_ptr<const Clock> clock_;
  const std::uint64_t born_in_ = process_generation();

  Mutex attach_mutex_;
  std::unique_ptr<Arena> arena_;  // written by start() and close() only
  std::vector<AttachedDevice> devices_ KVTIER_GUARDED_BY(attach_mutex_);

  Mutex mutex_;
  CondVar idle_;  // running_, calls_ or a PagesImpl::running_ went down
  HostTier tier_ KVTIER_GUARDED_BY(mutex_);
  EngineStats counters_ KVTIER_GUARDED_BY(mutex_);
  std::unordered_map<std::uint64_t, std::shared_ptr<Operation>> grants_ KVTIER_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<Pages>> all_pages_ KVTIER_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<LeaseState>> leases_ KVTIER_GUARDED_BY(mutex_);
  std::map<std::string, NamespaceId, std::less<>> namespaces_ KVTIER_GUARDED_BY(mutex_);
  std::uint64_t next_grant_ KVTIER_GUARDED_BY(mutex_) = 1;
  std::uint64_t stores_begun_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::set<std::uint64_t> running_stores_ KVTIER_GUARDED_BY(mutex_);  // their numbers, for flush()
  std::uint32_t running_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint32_t calls_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint32_t undrained_ KVTIER_GUARDED_BY(mutex_) = 0;  // transfers that may run for ever
  bool closing_ KVTIER_GUARDED_BY(mutex_) = false;
  bool closed_ KVTIER_GUARDED_BY(mutex_) = false;
};

}  // namespace kvtier
