#include "kvtier/engine/rank_worker.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "kvtier/core/mutex.h"
#include "kvtier/core/ordering.h"
#include "kvtier/core/process.h"
#include "kvtier/transfer/plan.h"

namespace kvtier {
namespace {

// A device, and what runs on it.
struct DeviceUse {
  std::shared_ptr<Device> device;
  std::unique_ptr<Transfers> transfers;
};

class RankPages final : public Pages {
 public:
  RankPages(PageMap map, GroupId group, DeviceUse& use)
      : map_(std::make_shared<const PageMap>(std::move(map))), group_(group), use_(use) {}

  const PageMap& map() const override { return *map_; }
  GroupId group() const override { return group_; }
  Device& device() const override { return *use_.device; }
  bool attached() const override { return usable; }

  const std::shared_ptr<const PageMap>& shared_map() const { return map_; }
  DeviceUse& use() const { return use_; }

  std::atomic<bool> usable = true;  // until detach() begins
  // Guarded by the worker's mutex.
  std::uint32_t running = 0;
  std::uint32_t stuck = 0;  // orders whose copies nobody can prove to be over

 private:
  const std::shared_ptr<const PageMap> map_;
  const GroupId group_;
  DeviceUse& use_;  // lives as long as the worker
};

// The arena that is mapped at present.
struct Joined {
  std::unique_ptr<Arena> arena;
  std::vector<std::size_t> class_of_group;
};

// Never destroyed: what a device may still write to, and the devices that know of it.
struct Abandoned {
  std::shared_ptr<Joined> joined;
  std::vector<std::shared_ptr<Device>> devices;
};

void abandon(Abandoned what) {
  static Mutex mutex;
  static auto* const all = new std::vector<Abandoned>;
  MutexLock lock(mutex);
  all->push_back(std::move(what));
}

Status stuck_error() {
  return Status::device(
      "a device failed while it copied and cannot prove that it has stopped: the memory "
      "stays in use until the process ends");
}

class RankWorkerImpl final : public RankWorker {
 public:
  RankWorkerImpl(std::vector<GroupSpec> groups, std::uint32_t rank, HostMemory& memory, int ended_fd)
      : groups_(std::move(groups)), rank_(rank), memory_(memory), ended_fd_(ended_fd) {}
  ~RankWorkerImpl() override;
  RankWorkerImpl(const RankWorkerImpl&) = delete;
  RankWorkerImpl& operator=(const RankWorkerImpl&) = delete;

  Result<std::shared_ptr<Pages>> attach(std::shared_ptr<Device> device, GroupId group,
                                        std::span<const TensorView> tensors) override;
  Status detach(Pages& pages, Deadline deadline) override;
  Status join(const ArenaGeometry& geometry, std::span<const std::size_t> class_of_group, int fd) override;
  Status leave(Deadline deadline) override;
  Status wait_until_whole() override;
  Result<std::shared_ptr<Ticket>> run(Pages& pages, const RankOrder& order) override;
  int ended_fd() const override { return ended_fd_; }
  std::vector<EndedOrder> take_ended() override;
  Status close(Deadline deadline) override;

 private:
  Status in_this_process() const {
    return process_generation() == born_in_ ? Status::ok()
                                            : Status::closed("the rank's worker belongs to a parent process");
  }
  Result<DeviceUse*> use_of(std::shared_ptr<Device> device) KVTIER_REQUIRES(setup_);
  std::shared_ptr<RankPages> find(const Pages& pages, const MutexLock&) const KVTIER_REQUIRES(mutex_);
  Status check(const RankPages& pages, const RankOrder& order) const;
  void end(RankPages& pages, Ticket& ticket, std::uint64_t id, Direction direction,
           std::vector<BlockOutcome> outcomes, const TransferOutcome& outcome);

  const std::vector<GroupSpec> groups_;
  const std::uint32_t rank_;
  HostMemory& memory_;
  const int ended_fd_;
  const std::uint64_t born_in_ = process_generation();

  // What takes long and touches devices happens one at a time, under setup_; mutex_ is never held across
  // a device call (I6). setup_ is taken first.
  Mutex setup_;
  std::vector<std::unique_ptr<DeviceUse>> uses_ KVTIER_GUARDED_BY(setup_);

  mutable Mutex mutex_;
  CondVar changed_;
  std::vector<std::shared_ptr<RankPages>> pages_ KVTIER_GUARDED_BY(mutex_);
  std::shared_ptr<Joined> joined_ KVTIER_GUARDED_BY(mutex_);
  bool leaving_ KVTIER_GUARDED_BY(mutex_) = false;
  bool closed_ KVTIER_GUARDED_BY(mutex_) = false;
  std::uint32_t running_ KVTIER_GUARDED_BY(mutex_) = 0;
  std::uint32_t stuck_ KVTIER_GUARDED_BY(mutex_) = 0;  // of the arena mapped at present
  bool unproved_ KVTIER_GUARDED_BY(mutex_) = false;    // some copy may touch pages of ours for ever
  std::vector<EndedOrder> ended_ KVTIER_GUARDED_BY(mutex_);
};

RankWorkerImpl::~RankWorkerImpl() {
  static_cast<void>(close(std::nullopt));
  {
    MutexLock setup(setup_);
    uses_.clear();
  }
  ::close(ended_fd_);
}

// --- pages ---

Result<DeviceUse*> RankWorkerImpl::use_of(std::shared_ptr<Device> device) {
  for (const auto& use : uses_) {
    if (use->device == device) return use.get();
  }
  Result<std::unique_ptr<Transfers>> transfers = Transfers::create(*device);
  if (!transfers) return transfers.status();
  uses_.push_back(std::make_unique<DeviceUse>(DeviceUse{std::move(device), std::move(transfers).value()}));
  std::shared_ptr<Joined> joined;
  {
    MutexLock lock(mutex_);
    joined = joined_;
  }
  if (joined) joined->arena->register_with(*uses_.back()->device);
  return uses_.back().get();
}

Result<std::shared_ptr<Pages>> RankWorkerImpl::attach(std::shared_ptr<Device> device, GroupId group,
                                                      std::span<const TensorView> tensors) {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  if (raw(group) >= groups_.size()) {
    return Status::invalid_argument("group is " + std::to_string(raw(group)) + "; allowed: 0 to " +
                                    std::to_string(groups_.size() - 1));
  }
  Result<PageMap> map = PageMap::make(groups_[raw(group)], tensors);
  if (!map) return map.status();
  MutexLock setup(setup_);
  {
    MutexLock lock(mutex_);
    if (closed_) return Status::closed("the rank's worker is closed");
  }
  Result<DeviceUse*> use = use_of(std::move(device));
  if (!use) return use.status();
  auto pages = std::make_shared<RankPages>(std::move(map).value(), group, **use);
  MutexLock lock(mutex_);
  pages_.push_back(pages);
  return std::shared_ptr<Pages>(std::move(pages));
}

std::shared_ptr<RankPages> RankWorkerImpl::find(const Pages& pages, const MutexLock& /*held*/) const {
  const auto found =
      std::find_if(pages_.begin(), pages_.end(), [&](const auto& p) { return p.get() == &pages; });
  return found == pages_.end() ? nullptr : *found;
}

Status RankWorkerImpl::detach(Pages& pages, Deadline deadline) {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  MutexLock lock(mutex_);
  const std::shared_ptr<RankPages> own = find(pages, lock);
  if (!own) {
    if (!pages.attached()) return Status::ok();
    return Status::invalid_argument("these pages are not attached to this rank's worker");
  }
  own->usable = false;
  while (own->running > 0 && ordering_enabled(OrderingPoint::detach_after_copies)) {
    if (!deadline) {
      changed_.wait(lock);
    } else if (!changed_.wait_until(lock, *deadline) && own->running > 0) {
      return Status::timeout(std::to_string(own->running) +
                             " transfers still touch the pages; they must not be freed yet");
    }
  }
  if (own->stuck > 0) return stuck_error();
  std::erase(pages_, own);
  return Status::ok();
}

// --- the arena ---

Status RankWorkerImpl::join(const ArenaGeometry& geometry, std::span<const std::size_t> class_of_group,
                            int fd) {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  KVTIER_RETURN_IF_ERROR(geometry.validate());
  if (class_of_group.size() != groups_.size()) {
    return Status::invalid_argument("class_of_group has " + std::to_string(class_of_group.size()) +
                                    " entries; there are " + std::to_string(groups_.size()) + " groups");
  }
  for (std::size_t i = 0; i < groups_.size(); ++i) {
    const std::size_t c = class_of_group[i];
    const std::uint64_t wanted = groups_[i].slot_stride_bytes();
    const std::uint64_t there = c < geometry.classes.size() ? geometry.classes[c].slot_stride_bytes : 0;
    if (there != wanted) {
      return Status::invalid_argument("group '" + groups_[i].name + "' needs slots of " +
                                      std::to_string(wanted) + " bytes; the keeper's arena has " +
                                      std::to_string(there) + " for it");
    }
  }
  MutexLock setup(setup_);
  {
    MutexLock lock(mutex_);
    if (closed_) return Status::closed("the rank's worker is closed");
    if (joined_) return Status::invalid_argument("an arena is mapped already; leave() it first");
  }
  Result<std::unique_ptr<Arena>> arena = Arena::map(geometry, fd, memory_);
  if (!arena) return arena.status();
  for (const auto& use : uses_) (*arena)->register_with(*use->device);
  MutexLock lock(mutex_);
  joined_ = std::make_shared<Joined>(
      Joined{std::move(arena).value(), {class_of_group.begin(), class_of_group.end()}});
  leaving_ = false;
  return Status::ok();
}

Status RankWorkerImpl::leave(Deadline deadline) {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  {
    MutexLock lock(mutex_);
    leaving_ = true;
    while (running_ > 0) {
      if (!deadline) {
        changed_.wait(lock);
      } else if (!changed_.wait_until(lock, *deadline) && running_ > 0) {
        return Status::timeout(std::to_string(running_) + " transfers still touch the arena; they go on");
      }
    }
  }
  MutexLock setup(setup_);
  std::shared_ptr<Joined> joined;
  {
    MutexLock lock(mutex_);
    joined = std::exchange(joined_, nullptr);
    if (!joined || std::exchange(stuck_, 0) == 0) return Status::ok();
  }
  // Unmapping under a running DMA would let it write into whatever is mapped there next.
  Abandoned abandoned{std::move(joined), {}};
  for (const auto& use : uses_) abandoned.devices.push_back(use->device);
  abandon(std::move(abandoned));
  return stuck_error();
}

Status RankWorkerImpl::wait_until_whole() {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  std::shared_ptr<Joined> joined;
  {
    MutexLock lock(mutex_);
    if (!joined_ || leaving_) return Status::closed("this rank has not joined a keeper");
    joined = joined_;
    ++running_;  // leave() waits for us
  }
  Status status = joined->arena->wait_until_whole();
  joined.reset();
  MutexLock lock(mutex_);
  --running_;
  changed_.notify_all();
  return status;
}

Status RankWorkerImpl::close(Deadline deadline) {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  {
    MutexLock lock(mutex_);
    closed_ = true;
  }
  KVTIER_RETURN_IF_ERROR(leave(deadline));
  MutexLock lock(mutex_);
  return unproved_ ? stuck_error() : Status::ok();  // each time: the tensors must never be freed
}

// --- orders ---

Status RankWorkerImpl::check(const RankPages& pages, const RankOrder& order) const {
  const GroupSpec& spec = pages.map().spec();
  const auto wanted = static_cast<std::size_t>(
      std::count(order.outcomes.begin(), order.outcomes.end(), BlockOutcome::running));
  if (order.slots.size() != wanted) {
    return Status::invalid_argument("the order names " + std::to_string(order.slots.size()) + " slots for " +
                                    std::to_string(wanted) + " blocks");
  }
  const std::size_t num_pages = order.outcomes.size() * spec.pages_per_block();
  if (order.pages.size() != num_pages) {
    return Status::invalid_argument("page_ids has " + std::to_string(order.pages.size()) +
                                    " entries; allowed: " + std::to_string(num_pages) + ", " +
                                    std::to_string(spec.pages_per_block()) + " for each of " +
                                    std::to_string(order.outcomes.size()) + " blocks");
  }
  if (order.direction == Direction::store && spec.num_stripes == 1 && rank_ != 0 && wanted > 0) {
    return Status::invalid_argument("group '" + spec.name +
                                    "' is the same on every rank, and rank 0 stores it");
  }
  if (order.layers_per_batch > 0 && (order.direction == Direction::store || wanted < order.outcomes.size())) {
    return Status::unsupported("layer by layer goes only a load whose blocks are all ready");
  }
  return Status::ok();
}

Result<std::shared_ptr<Ticket>> RankWorkerImpl::run(Pages& pages, const RankOrder& order) {
  KVTIER_RETURN_IF_ERROR(in_this_process());
  std::shared_ptr<RankPages> own;
  std::shared_ptr<Joined> joined;
  {
    MutexLock lock(mutex_);
    if (closed_) return Status::closed("the rank's worker is closed");
    own = find(pages, lock);
    if (!own || !own->usable)
      return Status::invalid_argument("these pages are not attached to this rank's worker");
    if (!joined_ || leaving_) return Status::closed("this rank has not joined a keeper");
    joined = joined_;
    // From here on leave() and detach() wait for this order.
    ++running_;
    ++own->running;
  }
  const auto give_up = [&](Status status) {
    joined.reset();
    MutexLock lock(mutex_);
    --running_;
    --own->running;
    changed_.notify_all();
    return status;
  };
  try {
    if (Status bad = check(*own, order); !bad) return give_up(std::move(bad));

    const GroupSpec& spec = own->map().spec();
    const std::size_t size_class = joined->class_of_group[raw(own->group())];
    const std::uint32_t num_slots = joined->arena->geometry().classes[size_class].num_slots;
    const std::uint64_t stripe =
        kSlotHeaderBytes + (spec.num_stripes > 1 ? rank_ * spec.stripe_bytes() : std::uint64_t{0});
    auto ticket = std::make_shared<Ticket>(order.direction, order.outcomes.size(), false);
    TransferRequest request;
    request.map = own->shared_map();
    request.direction = order.direction;
    request.framework_stream = order.stream;
    request.layers_per_batch = order.layers_per_batch;
    request.pages.assign(order.pages.begin(), order.pages.end());
    std::vector<BlockOutcome> outcomes(order.outcomes.begin(), order.outcomes.end());
    for (std::uint32_t i = 0; i < order.outcomes.size(); ++i) {
      if (outcomes[i] != BlockOutcome::running) continue;
      const SlotId slot = order.slots[request.moves.size()];
      if (raw(slot) >= num_slots) {
        return give_up(Status::invalid_argument("slot " + std::to_string(raw(slot)) +
                                                " is not in the arena; allowed: 0 to " +
                                                std::to_string(num_slots - 1)));
      }
      request.moves.push_back({joined->arena->slot(size_class, slot) + stripe, i * spec.pages_per_block(),
                               (order.first_block + i) % spec.blocks_per_page()});
    }
    if (Status bad = check_pages(own->map(), request.moves, request.pages, request.direction); !bad) {
      return give_up(std::move(bad));
    }
    joined.reset();  // leave() must be the one that lets go of the arena; it waits for running_
    const auto on_end = [this, own, ticket, id = order.id, direction = order.direction,
                         outcomes = std::move(outcomes)](const TransferOutcome& outcome) {
      end(*own, *ticket, id, direction, outcomes, outcome);
    };
    if (request.moves.empty()) {
      on_end({});
    } else {
      ticket->set_transfer(own->use().transfers->submit(std::move(request), on_end));
    }
    return ticket;
  } catch (const std::bad_alloc&) {
    // submit() throws only before it has submitted anything: what was counted above is counted no more.
    return give_up(Status::resource("out of memory before anything was submitted"));
  }
}

void RankWorkerImpl::end(RankPages& pages, Ticket& ticket, std::uint64_t id, Direction direction,
                         std::vector<BlockOutcome> outcomes, const TransferOutcome& outcome) {
  const BlockOutcome good = direction == Direction::store ? BlockOutcome::stored : BlockOutcome::loaded;
  std::replace(outcomes.begin(), outcomes.end(), BlockOutcome::running,
               outcome.status ? good : BlockOutcome::failed);
  ticket.set_outcomes(std::move(outcomes));
  if (!outcome.status) ticket.fail(outcome.status);
  ticket.settle(Moment::released, outcome.drained ? Status::ok() : outcome.status);
  ticket.settle(Moment::ready);

  MutexLock lock(mutex_);
  ended_.push_back({id, outcome});
  static_cast<void>(::eventfd_write(ended_fd_, 1));
  if (!outcome.drained) {
    ++stuck_;
    ++pages.stuck;
    unproved_ = true;
  }
  --running_;
  --pages.running;
  changed_.notify_all();
}

std::vector<EndedOrder> RankWorkerImpl::take_ended() {
  if (!in_this_process()) return {};
  MutexLock lock(mutex_);
  eventfd_t count = 0;
  static_cast<void>(::eventfd_read(ended_fd_, &count));
  return std::exchange(ended_, {});
}

}  // namespace

Result<std::shared_ptr<RankWorker>> RankWorker::create(std::vector<GroupSpec> groups, std::uint32_t rank,
                                                       HostMemory* memory) {
  if (groups.empty()) return Status::invalid_argument("groups is empty; at least one is needed");
  for (const GroupSpec& spec : groups) {
    KVTIER_RETURN_IF_ERROR(spec.validate());
    if (spec.num_stripes > 1 && rank >= spec.num_stripes) {
      return Status::invalid_argument("rank is " + std::to_string(rank) + "; group '" + spec.name +
                                      "' allows 0 to " + std::to_string(spec.num_stripes - 1));
    }
  }
  const int ended_fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (ended_fd < 0) {
    const int error = errno;
    return Status::resource(std::string("cannot make an eventfd: ") + std::strerror(error), error);
  }
  // In a child of fork() neither threads nor mapping are there and the mutexes may be held for ever: there
  // the object is given up whole.
  return std::shared_ptr<RankWorker>(
      new RankWorkerImpl(std::move(groups), rank, memory != nullptr ? *memory : linux_host_memory(),
                         ended_fd),
      [born_in = process_generation()](const RankWorkerImpl* worker) {
        if (process_generation() == born_in) delete worker;
      });
}

}  // namespace kvtier
