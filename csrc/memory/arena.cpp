#include "kvtier/memory/arena.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>
#include <system_error>
#include <utility>

#include "arena_impl.h"

namespace kvtier {

namespace {

bool is_of_huge_pages(int fd) {
  struct statfs filesystem{};
  return ::fstatfs(fd, &filesystem) == 0 && filesystem.f_type == HUGETLBFS_MAGIC;
}

}  // namespace

std::string Arena::Impl::readable(std::uint64_t bytes) {
  const bool small = bytes < (std::uint64_t{1} << 30);
  char text[64];
  std::snprintf(text, sizeof text, "%.1f %s (%llu bytes)",
                static_cast<double>(bytes) / (small ? 1U << 20 : 1U << 30), small ? "MiB" : "GiB",
                static_cast<unsigned long long>(bytes));
  return text;
}

// --- a new arena ---

Result<std::unique_ptr<Arena>> Arena::create(const ArenaGeometry& geometry, HostMemory& memory,
                                             OnUsable on_usable, OnFailure on_failure,
                                             std::optional<NumaPlacement> placement) {
  KVTIER_RETURN_IF_ERROR(geometry.validate());
  const std::uint64_t total = geometry.total_bytes();
  Result<int> created = memory.create_shared(total);
  if (!created) return created.status();
  Impl::Fd fd(*created);
  if (!is_of_huge_pages(fd.get())) {  // those are ours already, and an ordinary file has no pages yet
    Result<std::uint64_t> available = memory.available_bytes();
    if (!available) return available.status();
    if (*available < total) {
      return Status::resource("the host arena needs " + Impl::readable(total) +
                              ", but the cgroup or the machine leaves only " + Impl::readable(*available));
    }
  }
  return Impl::open(geometry, std::move(fd), memory, Impl::Role::creator, std::move(on_usable),
                    std::move(on_failure), placement);
}

Result<std::unique_ptr<Arena>> Arena::map(const ArenaGeometry& geometry, int fd, HostMemory& memory) {
  KVTIER_RETURN_IF_ERROR(geometry.validate());
  struct stat file{};
  if (::fstat(fd, &file) != 0) {
    const int error = errno;
    return Status(StatusCode::invalid_argument,
                  "arena descriptor " + std::to_string(fd) + ": " + std::generic_category().message(error),
                  error);
  }
  // One byte less than the geometry, and the last slot would be a SIGBUS.
  if (!S_ISREG(file.st_mode) || static_cast<std::uint64_t>(file.st_size) != geometry.total_bytes()) {
    return Status::invalid_argument(
        "arena descriptor " + std::to_string(fd) + " is not the arena of this geometry: it has " +
        std::to_string(file.st_size) + " bytes, not " + std::to_string(geometry.total_bytes()));
  }
  Impl::Fd own(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (own.get() < 0) {
    const int error = errno;
    return Status::resource(
        "cannot duplicate the arena descriptor: " + std::generic_category().message(error), error);
  }
  return Impl::open(geometry, std::move(own), memory, Impl::Role::guest, nullptr, nullptr, {});
}

Result<std::unique_ptr<Arena>> Arena::Impl::open(const ArenaGeometry& geometry, Fd fd, HostMemory& memory,
                                                 Role role, OnUsable on_usable, OnFailure on_failure,
                                                 std::optional<NumaPlacement> placement) {
  Result<std::byte*> base = memory.map_shared(fd.get(), geometry.total_bytes());
  if (!base) return base.status();
  auto impl = std::make_unique<Impl>(geometry, std::move(fd), *base, memory, role, std::move(on_usable),
                                     std::move(on_failure));
  if (placement) {
    const Status placed = memory.prefer_node(*base, geometry.total_bytes(), placement->node);
    if (!placed && placement->required) return placed;
    if (placed) impl->numa_node_ = placement->node;
  }
  KVTIER_RETURN_IF_ERROR(impl->start());
  return std::unique_ptr<Arena>(new Arena(std::move(impl)));
}

Arena::Impl::Impl(const ArenaGeometry& geometry, Fd fd, std::byte* base, HostMemory& memory, Role role,
                  OnUsable on_usable, OnFailure on_failure)
    : geometry_(geometry),
      chunks_(geometry.chunks()),
      memory_(memory),
      on_usable_(std::move(on_usable)),
      on_failure_(std::move(on_failure)),
      fd_(std::move(fd)),
      base_(base) {
  for (std::size_t i = 0; i < geometry_.classes.size(); ++i) {
    class_offsets_.push_back(geometry_.slot_offset(i, SlotId{0}));
  }
  if (role == Role::guest) prefaulted_ = announced_ = chunks_.size();
  struct stat file{};
  if (::fstat(fd_.get(), &file) == 0) {
    file_device_ = file.st_dev;
    inode_ = file.st_ino;
  }
  if (is_of_huge_pages(fd_.get())) huge_page_bytes_ = geometry_.total_bytes();
}

Arena::Impl::~Impl() {
  stop();
  std::vector<std::unique_ptr<Attachment>> attachments;
  bool clean = true;
  {
    MutexLock lock(mutex_);
    attachments.swap(attachments_);
    clean = !still_registered_;
  }
  for (const auto& attachment : attachments) clean &= unregister_all(*attachment);
  if (clean) memory_.unmap(base_, geometry_.total_bytes());
}

Arena::Arena(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

void Arena::stop() { impl_->stop(); }

Arena::~Arena() {
  if (!impl_->in_forked_child()) return;
  // The mapping is not here and the thread does not exist. Destroying the condition variable would wait
  // for that thread for ever, and the mutex may be held by it. So the object is given up whole.
  impl_->close_in_forked_child();
  static_cast<void>(impl_.release());
}

void Arena::Impl::close_in_forked_child() {
  // Kept open it would keep the memory of the whole arena. But a child that closed all its descriptors, as
  // daemons do, may use the number for something else by now.
  struct stat file{};
  if (::fstat(fd_.get(), &file) != 0) return;
  if (file.st_dev == file_device_ && file.st_ino == inode_) ::close(fd_.get());
}

// --- what is where ---

std::byte* Arena::Impl::slot(std::size_t class_index, SlotId slot) const {
  KVTIER_CHECK(class_index < class_offsets_.size());
  const ArenaClass& size_class = geometry_.classes[class_index];
  KVTIER_CHECK(raw(slot) < size_class.num_slots);
  return base_ + class_offsets_[class_index] + size_class.slot_stride_bytes * raw(slot);
}

Arena::Stats Arena::Impl::stats() const {
  MutexLock lock(mutex_);
  Stats stats;
  stats.total_bytes = geometry_.total_bytes();
  stats.prefaulted_bytes = prefaulted_bytes_;
  for (const auto& attachment : attachments_) stats.registered_chunks += attachment->registered.size();
  stats.refused_chunks = refused_;
  stats.numa_node = numa_node_;
  stats.huge_page_bytes = huge_page_bytes_;
  return stats;
}

const ArenaGeometry& Arena::geometry() const { return impl_->geometry(); }
int Arena::fd() const { return impl_->fd(); }
std::byte* Arena::slot(std::size_t class_index, SlotId slot) const { return impl_->slot(class_index, slot); }

void Arena::register_with(Device& device) {
  if (!impl_->in_forked_child()) impl_->register_with(device);
}

void Arena::wait_until_offered(const Device& device) {
  if (!impl_->in_forked_child()) impl_->wait_until_offered(device);
}

void Arena::unregister_from(Device& device) {
  if (!impl_->in_forked_child()) impl_->unregister_from(device);
}

Status Arena::wait_until_whole() {
  if (impl_->in_forked_child()) return Status::closed("the arena belongs to a parent process");
  return impl_->wait_until_whole();
}

Arena::Stats Arena::stats() const {
  if (impl_->in_forked_child()) return {};
  return impl_->stats();
}

}  // namespace kvtier
