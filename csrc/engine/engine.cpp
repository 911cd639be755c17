// Opening, attaching, closing; and Engine itself, which owns the inside.
#include "kvtier/engine/engine.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <random>

#include "engine_impl.h"

#include "kvtier/core/ordering.h"

namespace kvtier {

EngineImpl::EngineImpl(EngineConfig config, const TierIndex::Options& options)
    : config_(std::move(config)),
      clock_(config_.clock ? config_.clock : std::make_shared<const SteadyClock>()),
      hash_seed_(options.hash_seed),
      tier_(options) {}

// The arena's thread calls back until it is joined: that must be before mutex_ and tier_ go.
// So are the drives' threads, which a failed start() leaves running.
EngineImpl::~EngineImpl() {
  {
    MutexLock lock(mutex_);
    closing_ = true;
  }
  if (disk_) {
    for (DiskTier::Volume& volume : disk_->volumes) {
      static_cast<void>(volume.store->close(std::nullopt));
      drives_hold_memory_ = drives_hold_memory_ || volume.store->stats().in_flight > 0;
    }
  }
  end_arena();
}

void EngineImpl::end_arena() {
  if (drives_hold_memory_ && arena_) {
    arena_->stop();  // its thread calls back into this
    keep_for_ever(std::move(arena_));
  }
  arena_.reset();
}

Status EngineImpl::start() {
  HostMemory& memory = config_.memory != nullptr ? *config_.memory : linux_host_memory();
  Result<std::unique_ptr<Arena>> arena = Arena::create(
      config_.geometry(), memory,
      [this](std::size_t class_index, std::uint32_t usable) {
        {
          MutexLock lock(mutex_);
          tier_.slots(class_index).grow(usable);
          idle_.notify_all();
        }
        offer_buffers();
      },
      [this](const Status& status) {
        // What was prefaulted serves on; the tier is only smaller than it was asked to be.
        MutexLock lock(mutex_);
        if (counters_.arena_problem.empty()) {
          counters_.arena_problem = status.message().empty() ? "prefaulting failed" : status.message();
        }
        idle_.notify_all();
      },
      config_.placement);
  if (!arena) return arena.status();
  arena_ = std::move(*arena);

  // While the arena is prefaulted, the drives say what they hold.
  KVTIER_RETURN_IF_ERROR(open_disks());
  open_ghosts();
  open_events();
  offer_buffers();

  // A block stored right after open() must find a slot, so the first chunk of each class is waited for.
  MutexLock lock(mutex_);
  for (std::size_t i = 0; i < tier_.num_classes(); ++i) {
    while (tier_.slots(i).usable() == 0 && counters_.arena_problem.empty()) idle_.wait(lock);
    if (tier_.slots(i).usable() == 0) return Status::resource("host tier: " + counters_.arena_problem);
  }
  return Status::ok();
}

Status EngineImpl::check_open() {
  if (closing_) return Status::closed("the engine is closed");
  return Status::ok();
}

void EngineImpl::mark_failed(const std::string& why) {
  MutexLock lock(mutex_);
  if (counters_.health == "ok") counters_.health = why;
}

Result<std::shared_ptr<Pages>> EngineImpl::attach(std::shared_ptr<Device> device, GroupId group,
                                                  std::span<const TensorView> tensors) {
  if (raw(group) >= config_.groups.size()) {
    return Status::invalid_argument("group is " + std::to_string(raw(group)) + "; allowed: 0 to " +
                                    std::to_string(config_.groups.size() - 1));
  }
  if (device == nullptr) return Status::invalid_argument("device is null");
  const GroupSpec& spec = config_.groups[raw(group)];
  if (spec.num_stripes > 1) {
    return Status::unsupported("group '" + spec.name +
                               "' has one stripe per rank: its pages are attached by workers");
  }
  Result<PageMap> map = PageMap::make(spec, tensors);
  if (!map) return map.status();

  MutexLock attach_lock(attach_mutex_);
  {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
  }
  Transfers* transfers = nullptr;
  for (AttachedDevice& attached : devices_) {
    if (attached.device == device) transfers = attached.transfers.get();
  }
  if (transfers == nullptr) {
    KVTIER_RETURN_IF_ERROR(device->health());
    Result<std::unique_ptr<Transfers>> made = Transfers::create(*device);
    if (!made) return made.status();
    transfers = made->get();
    devices_.push_back({device, std::move(*made)});
    arena_->register_with(*device);
    arena_->wait_until_offered(*device);  // store() and load() do not wait for copies
  }
  auto pages = std::make_shared<PagesImpl>(*this, group, std::move(device), *transfers, std::move(*map));
  MutexLock lock(mutex_);
  all_pages_.push_back(pages);
  return std::shared_ptr<Pages>(pages);
}

Status EngineImpl::detach(Pages& pages, Deadline deadline) {
  auto* mine = dynamic_cast<PagesImpl*>(&pages);
  if (mine == nullptr || mine->engine_ != this)
    return Status::invalid_argument("these pages are of another engine");
  MutexLock lock(mutex_);
  mine->attached_ = false;
  while (mine->running_ > 0 && ordering_enabled(OrderingPoint::detach_after_copies)) {
    if (mine->undrained_) {
      return Status::device("detach: device " + mine->device_->name() +
                            " cannot prove that its copies are over; the pages must never be freed");
    }
    if (!deadline) {
      idle_.wait(lock);
    } else if (!idle_.wait_until(lock, *deadline) && mine->running_ > 0) {
      return Status::timeout("detach: " + std::to_string(mine->running_) +
                             " transfers still touch the pages; they must not be freed yet");
    }
  }
  if (ordering_enabled(OrderingPoint::detach_after_copies)) {
    std::erase_if(all_pages_, [mine](const std::shared_ptr<Pages>& other) { return other.get() == mine; });
  }
  return Status::ok();
}

Status EngineImpl::wait_until_whole() {
  {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
    ++calls_;
  }
  const Status status = arena_->wait_until_whole();
  MutexLock lock(mutex_);
  --calls_;
  idle_.notify_all();
  return status;
}

void EngineImpl::open_events() {
  if (config_.events == 0) return;
  MutexLock lock(mutex_);
  events_ = std::make_unique<EventFeed>(config_.events);
  tier_.announce_to(*events_, Tier::host);
  if (disk_) disk_->index.announce_to(*events_, Tier::disk);
}

Result<BlockEvents> EngineImpl::take_events(std::size_t most) {
  BlockEvents all;
  for (bool more = true; more;) {
    MutexLock lock(mutex_);
    KVTIER_RETURN_IF_ERROR(check_open());
    if (events_ == nullptr) {
      return Status::unsupported("this engine keeps no events; open it with events=N, how many are kept");
    }
    BlockEvents part = events_->take(std::min(kKeysPerHold, most - all.events.size()));
    all.lost += part.lost;
    all.events.insert(all.events.end(), part.events.begin(), part.events.end());
    more = !part.events.empty() && all.events.size() < most;
  }
  return all;
}

void EngineImpl::announce_epoch(const Epoch& epoch) {
  MutexLock lock(mutex_);
  if (events_ != nullptr) events_->reset({epoch});
}

Result<EngineStats> EngineImpl::stats() {
  Arena::Stats arena;
  {
    MutexLock attach_lock(attach_mutex_);
    if (arena_) arena = arena_->stats();
  }
  MutexLock lock(mutex_);
  EngineStats stats = counters_;
  const ArenaGeometry geometry = config_.geometry();
  for (std::size_t i = 0; i < tier_.num_classes(); ++i) {
    const SlotPool& slots = tier_.slots(i);
    const SlotPool::Counts counts = slots.counts();
    stats.host.push_back({geometry.classes[i].slot_stride_bytes, slots.capacity(), slots.usable(),
                          counts.free, counts.filling, counts.ready, counts.leaving});
  }
  stats.host_bytes = arena.total_bytes;
  stats.host_prefaulted_bytes = arena.prefaulted_bytes;
  stats.registered_chunks = arena.registered_chunks;
  stats.refused_chunks = arena.refused_chunks;
  stats.host_numa_node = arena.numa_node;
  stats.index_bytes_per_block = tier_.bytes_per_block();
  stats.pins = tier_.pins();
  stats.pinned_blocks = tier_.pinned_blocks();
  stats.leases = static_cast<std::uint32_t>(leases_.size());
  stats.transfers_running = running_;
  stats.evictions = tier_.evictions();
  stats.orphans = tier_.orphans();
  add_disk_stats(stats);
  if (ghosts_) ghosts_->add_to(stats);
  stats.hops = {to_device_.stats(), from_disk_.stats()};
  return stats;
}

Result<Hops> EngineImpl::hops() {
  MutexLock lock(mutex_);
  KVTIER_RETURN_IF_ERROR(check_open());
  return Hops{to_device_.stats(), from_disk_.stats()};
}

bool EngineImpl::wait_idle(Deadline deadline) {
  MutexLock lock(mutex_);
  while (running_ > 0 || calls_ > 0) {
    if (!deadline) {
      idle_.wait(lock);
    } else if (!idle_.wait_until(lock, *deadline) && (running_ > 0 || calls_ > 0)) {
      return false;
    }
  }
  return true;
}

Status EngineImpl::close(Deadline deadline) {
  {
    MutexLock lock(mutex_);
    closing_ = true;
  }
  if (disk_) {
    std::vector<std::shared_ptr<Operation>> prefetches;
    {
      MutexLock lock(mutex_);
      prefetches = prefetches_;
    }
    cancel_reads(prefetches);
  }
  if (!wait_idle(deadline)) {
    return Status::timeout(
        "close: transfers are still running; the engine takes no new work, and close() may be "
        "called again");
  }
  Status unproved = Status::device(
      "close: a device cannot prove that its copies are over; the engine is closed, but its memory and "
      "attached "
      "pages must never be freed");
  bool closed_before = false;
  {
    MutexLock lock(mutex_);
    closed_before = closed_;
  }
  if (disk_ && !closed_before) {
    // What was stored goes to disk before the engine is closed.
    KVTIER_RETURN_IF_ERROR(wait_durable(~std::uint64_t{0}, deadline));
    KVTIER_RETURN_IF_ERROR(close_disks(deadline));
  }
  MutexLock attach_lock(attach_mutex_);
  bool leak = false;
  {
    MutexLock lock(mutex_);
    if (closed_) return undrained_ > 0 ? unproved : Status::ok();
    closed_ = true;
    while (!leases_.empty()) end_lease(*leases_.back());
    for (const std::shared_ptr<Pages>& pages : all_pages_) static_cast<PagesImpl&>(*pages).attached_ = false;
    all_pages_.clear();
    leak = undrained_ > 0;
  }
  // No transfer runs and no call is under way: only waiters' and arena's threads are left, and these end
  // here, with mutex_ free, since their last callbacks take it.
  if (leak) {
    // A device could not prove that its copies are over. The memory they may touch is never given back, and
    // nor is this object: the threads of the arena and of the transfers run on, and call back into it.
    keep_for_ever(shared_from_this());
    return unproved;
  }
  for (AttachedDevice& attached : devices_) attached.transfers.reset();
  for (AttachedDevice& attached : devices_) arena_->unregister_from(*attached.device);
  devices_.clear();
  end_arena();
  return Status::ok();
}

void EngineImpl::keep_for_ever(std::shared_ptr<void> what) {
  // In reach of a global, so that a leak checker tells it from a leak; never destroyed.
  static Mutex& mutex = *new Mutex;
  static auto& kept = *new std::vector<std::shared_ptr<void>>;
  MutexLock lock(mutex);
  kept.push_back(std::move(what));
}

bool EngineImpl::closed() {
  MutexLock lock(mutex_);
  return closing_;
}

namespace {

// How long dropping the last reference to an engine waits for transfers before it gives up its memory.
constexpr std::chrono::seconds kDropTimeout{10};

class LeaseHandle final : public Lease {
 public:
  LeaseHandle(std::weak_ptr<EngineImpl> engine, std::shared_ptr<LeaseState> state)
      : engine_(std::move(engine)), state_(std::move(state)), num_blocks_(state_->num_blocks) {}
  ~LeaseHandle() override { release(); }

  std::size_t num_blocks() const override { return num_blocks_; }
  bool active() const override {
    const std::shared_ptr<EngineImpl> engine = engine_.lock();
    return engine && !engine->in_forked_child() && engine->lease_active(*state_);
  }
  void release() final {
    const std::shared_ptr<EngineImpl> engine = engine_.lock();
    if (engine && !engine->in_forked_child()) engine->release(*state_);
  }

 private:
  std::weak_ptr<EngineImpl> engine_;
  std::shared_ptr<LeaseState> state_;
  std::size_t num_blocks_;
};

class ExpectationHandle final : public Expectation {
 public:
  ExpectationHandle(std::weak_ptr<EngineImpl> engine, std::span<const BlockKey> keys)
      : engine_(std::move(engine)), keys_(keys.begin(), keys.end()) {}
  ~ExpectationHandle() override { end(); }

  // Before anybody else has the handle. What a failure leaves begun, and no more, is ended by end().
  Status begin(EngineImpl& engine) {
    return engine.tell_expected(keys_, &TierIndex::expect, std::numeric_limits<std::size_t>::max(), begun_);
  }

  void end() final {
    if (ended_.exchange(true)) return;
    const std::shared_ptr<EngineImpl> engine = engine_.lock();
    if (!engine || engine->in_forked_child()) return;
    engine->contained([&] {
      std::size_t ended = 0;
      static_cast<void>(engine->tell_expected(keys_, &TierIndex::expect_no_more, begun_, ended));
    });
  }

 private:
  std::weak_ptr<EngineImpl> engine_;
  std::vector<BlockKey> keys_;  // of the epoch in which they were expected
  std::size_t begun_ = 0;       // as tell_expected() counts
  std::atomic<bool> ended_{false};
};

// Keys as the index and the drives have them. Borrows the caller's where the epoch changes nothing.
class EpochKeys {
 public:
  EpochKeys(std::span<const BlockKey> keys, const std::optional<Epoch>& epoch) : keys_(keys) {
    if (!epoch) return;
    mixed_.assign(keys.begin(), keys.end());
    for (BlockKey& key : mixed_) key = mix(key, *epoch);
    keys_ = mixed_;
  }
  EpochKeys(const EpochKeys&) = delete;
  EpochKeys& operator=(const EpochKeys&) = delete;
  operator std::span<const BlockKey>() const { return keys_; }  // NOLINT: a span of keys is what it is

  static BlockKey mix(const BlockKey& key, const Epoch& epoch) {
    BlockKey mixed = key;
    for (std::size_t i = 0; i < epoch.size(); ++i) mixed.bytes[i] ^= epoch[i];
    return mixed;
  }

 private:
  std::vector<BlockKey> mixed_;
  std::span<const BlockKey> keys_;
};

class EngineHandle final : public Engine {
 public:
  explicit EngineHandle(std::shared_ptr<EngineImpl> impl) : impl_(std::move(impl)) {}

  ~EngineHandle() override {
    // Threads that a forked child does not have, or copies that will not end, may still use the inside:
    // then it is never freed. In the child without keep_for_ever(): its mutex may be locked for good.
    if (impl_->in_forked_child()) {
      // A reference that is never given back, made without an allocation that could fail.
      alignas(std::shared_ptr<EngineImpl>) std::byte kept[sizeof(std::shared_ptr<EngineImpl>)];
      ::new (static_cast<void*>(kept)) std::shared_ptr<EngineImpl>(impl_);
      return;
    }
    if (!close(std::chrono::steady_clock::now() + kDropTimeout)) EngineImpl::keep_for_ever(impl_);
  }

  Result<std::shared_ptr<Pages>> attach(std::shared_ptr<Device> device, GroupId group,
                                        std::span<const TensorView> tensors) override {
    return impl_->guarded([&] { return impl_->attach(std::move(device), group, tensors); });
  }
  Status detach(Pages& pages, Deadline deadline) override {
    return impl_->guarded([&] { return impl_->detach(pages, deadline); });
  }
  Result<Match> lookup(std::span<const BlockKey> keys) override {
    return impl_->guarded([&] { return impl_->lookup(EpochKeys(keys, epoch())); });
  }
  Result<std::shared_ptr<Lease>> pin(std::span<const BlockKey> keys, std::size_t max_blocks,
                                     std::optional<std::int64_t> ttl_us, const Match* match) override {
    return impl_->guarded([&]() -> Result<std::shared_ptr<Lease>> {
      Result<std::shared_ptr<LeaseState>> state =
          impl_->pin(EpochKeys(keys, epoch()), max_blocks, ttl_us, match);
      if (!state) return state.status();
      return std::shared_ptr<Lease>(std::make_shared<LeaseHandle>(impl_, std::move(*state)));
    });
  }
  Result<std::shared_ptr<Ticket>> store(Pages& pages, const StoreRequest& request) override {
    return impl_->guarded([&] {
      return with_epoch(request, [&](const StoreRequest& mixed) { return impl_->store(pages, mixed); });
    });
  }
  Result<std::shared_ptr<Ticket>> load(Pages& pages, const LoadRequest& request) override {
    return impl_->guarded([&] {
      return with_epoch(request, [&](const LoadRequest& mixed) { return impl_->load(pages, mixed); });
    });
  }
  Result<Grant> grant_store(GroupId group, const StoreRequest& request, std::uint32_t num_parts) override {
    return impl_->guarded([&] {
      return with_epoch(
          request, [&](const StoreRequest& mixed) { return impl_->grant_store(group, mixed, num_parts); });
    });
  }
  Result<Grant> grant_load(GroupId group, const LoadRequest& request, std::uint32_t num_parts) override {
    return impl_->guarded([&] {
      return with_epoch(request,
                        [&](const LoadRequest& mixed) { return impl_->grant_load(group, mixed, num_parts); });
    });
  }
  Status finish_part(std::uint64_t grant_id, const TransferOutcome& outcome) override {
    return impl_->guarded([&] { return impl_->finish_part(grant_id, outcome); });
  }
  Result<std::shared_ptr<Expectation>> expect(std::span<const BlockKey> keys) override {
    return impl_->guarded([&]() -> Result<std::shared_ptr<Expectation>> {
      const EpochKeys mixed(keys, epoch());
      auto expectation = std::make_shared<ExpectationHandle>(impl_, mixed);
      KVTIER_RETURN_IF_ERROR(expectation->begin(*impl_));
      return std::shared_ptr<Expectation>(std::move(expectation));
    });
  }
  Result<std::uint64_t> touch(std::span<const BlockKey> keys) override {
    return impl_->guarded([&] { return impl_->touch(EpochKeys(keys, epoch())); });
  }
  Result<std::uint64_t> drop(std::span<const BlockKey> keys) override {
    return impl_->guarded([&] { return impl_->drop(EpochKeys(keys, epoch())); });
  }
  Result<std::uint64_t> drop_namespace(std::string_view name_space) override {
    return impl_->guarded([&] { return impl_->drop_namespace(name_space); });
  }
  Result<std::shared_ptr<Ticket>> prefetch(std::span<const BlockKey> keys, Deadline deadline) override {
    return impl_->guarded([&] { return impl_->prefetch(EpochKeys(keys, epoch()), deadline); });
  }
  Result<std::uint64_t> cancel_prefetch(const std::shared_ptr<Ticket>& ticket) override {
    return impl_->guarded([&] { return impl_->cancel_prefetch(ticket); });
  }
  Status set_epoch(const Epoch& epoch) override {
    return impl_->guarded([&] {
      if (impl_->closed()) return Status::closed("the engine is closed");
      const bool is_none = epoch == Epoch{};
      MutexLock lock(epoch_mutex_);
      impl_->announce_epoch(epoch);  // first: what is stored under it is told of behind
      epoch_ = is_none ? std::nullopt : std::optional(epoch);
      return Status::ok();
    });
  }
  Result<std::uint32_t> poll() override {
    return impl_->guarded([&] { return impl_->poll(); });
  }
  Result<FlushPoint> flush_point() override {
    return impl_->guarded([&] { return impl_->flush_point(); });
  }
  Result<FlushResult> flush(const FlushPoint& point, Deadline deadline) override {
    return impl_->guarded([&] { return impl_->flush(point, deadline); });
  }
  Status wait_until_whole() override {
    return impl_->guarded([&] { return impl_->wait_until_whole(); });
  }
  Result<BlockEvents> take_events(std::size_t most) override {
    return impl_->guarded([&] { return impl_->take_events(most); });
  }
  Result<EngineStats> stats() override {
    return impl_->guarded([&] { return impl_->stats(); });
  }
  Status pause_ghosts() override {
    return impl_->guarded([&] { return impl_->pause_ghosts(/*paused=*/true); });
  }
  Status resume_ghosts() override {
    return impl_->guarded([&] { return impl_->pause_ghosts(/*paused=*/false); });
  }
  Result<Hops> hops() override {
    return impl_->guarded([&] { return impl_->hops(); });
  }
  Status close(Deadline deadline) final {
    return impl_->guarded([&] { return impl_->close(deadline); });
  }
  bool closed() const override { return impl_->in_forked_child() || impl_->closed(); }
  const EngineConfig& config() const override { return impl_->config(); }
  const Arena& arena() const override { return impl_->arena(); }

 private:
  std::optional<Epoch> epoch() const {
    MutexLock lock(epoch_mutex_);
    return epoch_;
  }
  template <typename Request, typename F>
  auto with_epoch(Request request, F&& f) const -> decltype(f(request)) {
    const std::optional<Epoch> epoch = this->epoch();
    const EpochKeys keys(request.keys, epoch);
    request.keys = keys;
    if constexpr (requires { request.parent; }) {
      if (epoch && request.parent) request.parent = EpochKeys::mix(*request.parent, *epoch);
    }
    return f(request);
  }

  std::shared_ptr<EngineImpl> impl_;
  mutable Mutex epoch_mutex_;  // held for the copy of an epoch alone
  std::optional<Epoch> epoch_ KVTIER_GUARDED_BY(epoch_mutex_);
};

}  // namespace

Result<std::shared_ptr<Engine>> Engine::open(EngineConfig config) {
  KVTIER_RETURN_IF_ERROR(config.validate());
  const ArenaGeometry geometry = config.geometry();
  KVTIER_RETURN_IF_ERROR(geometry.validate());
  TierIndex::Options options;
  for (const ArenaClass& size_class : geometry.classes) {
    options.slots_per_class.push_back(size_class.num_slots);
    options.block_bytes.push_back(size_class.slot_stride_bytes);
  }
  const std::string eviction = config.eviction;  // outlives the options
  options.eviction = eviction;
  options.class_of_group = config.class_of_group();
  try {
    if (config.hash_seed) {
      options.hash_seed = *config.hash_seed;
    } else {
      std::random_device random;
      options.hash_seed = (std::uint64_t{random()} << 32) | random();
    }
    auto impl = std::make_shared<EngineImpl>(std::move(config), options);
    KVTIER_RETURN_IF_ERROR(impl->start());
    return std::shared_ptr<Engine>(std::make_shared<EngineHandle>(std::move(impl)));
  } catch (const std::bad_alloc&) {
    return Status::resource("no memory for the index of " + std::to_string(geometry.total_bytes()) +
                            " host bytes");
  } catch (const std::exception& error) {
    return Status::internal(std::string("open: ") + error.what());
  }
}

}  // namespace kvtier
