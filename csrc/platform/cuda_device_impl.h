// The cuda device's inside; also what calibration and measurements need of it.
#pragma once

#include <array>
#include <memory>
#include <optional>
#include <unordered_map>

#include "cuda_bounce.h"
#include "cuda_regions.h"
#include "cuda_staging.h"

#include "kvtier/core/mutex.h"
#include "kvtier/core/process.h"
#include "kvtier/platform/cuda_device.h"
#include "kvtier/platform/rate_limit.h"

namespace kvtier::cuda {

class CudaDevice final : public Device {
 public:
  static Result<std::unique_ptr<CudaDevice>> create(const CudaOptions& options);
  ~CudaDevice() override;
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  DeviceKind kind() const override { return DeviceKind::cuda; }
  int ordinal() const override { return options_.ordinal; }
  std::string name() const override { return name_; }

  Result<StreamHandle> create_stream() override;
  void destroy_stream(StreamHandle stream) override;
  Result<std::unique_ptr<Event>> create_event() override;
  Status record(Event& event, StreamHandle stream) override;
  Status wait(StreamHandle stream, Event& event) override;
  Result<bool> query(Event& event) override;
  Status synchronize(Event& event) override;
  Status copy(StreamHandle stream, std::span<const CopyRun> runs, Direction direction) override;
  Status register_host(void* begin, std::size_t bytes) override;
  Status unregister_host(void* begin) override;
  Status health() const override;

  // --- for calibration and measurements ---

  const std::shared_ptr<Context>& context() const { return context_; }
  const CudaOptions& options() const { return options_; }
  CopyPaths paths() const { return paths_; }
  unsigned num_sms() const { return num_sms_; }
  int compute_capability() const { return compute_capability_; }
  // copy() by one path, whatever the options say. Without a rate limit. Errors: unsupported where the stream
  // cannot be used for that path.
  Status copy_by(StreamHandle stream, std::span<const CopyRun> runs, Direction direction, CopyPath path);
  CopyPath chosen(Direction direction, std::uint64_t run_bytes) const;
  // Whether the direction's limit is a share of decoding.
  bool limits_decoding(Direction direction) const {
    const std::optional<CopyLimit>& limit = limit_of(direction);
    return limit && std::holds_alternative<DecodeShare>(*limit);
  }
  // Before anybody else uses the device.
  void set_calibration(Calibration calibration) { calibration_ = std::move(calibration); }
  const Calibration& calibration() const { return calibration_; }
  void remove_path(CopyPath path) { paths_.remove(path); }
  // Streams that are made while this holds can be used for every path, not only for those that copy() takes.
  void set_measuring(bool measuring) { measuring_ = measuring; }

 private:
  // A stream of ours, or for one call a framework's. Its mutex keeps the parts of a submission together.
  // What its copies need of the driver is made with it: an allocation in copy() would wait for the GPU.
  struct Stream {
    Mutex mutex;
    cudaStream_t native = nullptr;
    bool own = false;
    std::unique_ptr<StagingLane> lane KVTIER_GUARDED_BY(mutex);  // null: no staged copies in this stream
    TokenBucket* buckets KVTIER_GUARDED_BY(mutex) = nullptr;     // one for each direction; null: no limits
  };
  using StreamPtr = std::shared_ptr<Stream>;

  CudaDevice(const CudaOptions& options, std::shared_ptr<Context> context);
  Status start();
  void leak_all();
  // Makes what copies in a new stream will need. Errors: resource when a limit's bucket has no room in HBM; a
  // ring that has none costs its path alone.
  Status equip(Stream& stream);
  bool may_stage() const;
  void release(Stream& stream, bool alive);
  // Host memory could not be pinned: says so and makes the rings that its copies pass through, once.
  void expect_pageable(const Status& why);
  // Remembers a sticky error; returns `status`.
  Status noted(Status status) const;
  void mark_lost(Status why) const;
  // The stream by its handle. Errors: kCaptureConflict for a framework's stream that captures.
  Result<StreamPtr> stream_of(StreamHandle handle);
  Status join_lane(Stream& stream) KVTIER_REQUIRES(stream.mutex);
  Status drain(Stream& stream) KVTIER_REQUIRES(stream.mutex);

  Status copy_checked(Stream& stream, std::span<const CopyRun> runs, Direction direction,
                      std::optional<CopyPath> path);
  Status copy_registered(Stream& stream, std::span<const CopyRun> runs, Direction direction,
                         std::optional<CopyPath> path) KVTIER_REQUIRES(stream.mutex);
  Status copy_limited(Stream& stream, std::span<const CopyRun> runs, Direction direction)
      KVTIER_REQUIRES(stream.mutex);
  Status copy_pageable(Stream& stream, std::span<const CopyRun> runs, Direction direction)
      KVTIER_REQUIRES(stream.mutex);
  Status copy_by_driver(Stream& stream, std::span<const CopyRun> runs, Direction direction)
      KVTIER_REQUIRES(stream.mutex);
  Status bounce(Stream& stream, std::span<const CopyRun> runs, Direction direction, BounceRing& ring)
      KVTIER_REQUIRES(stream.mutex, ring.mutex());
  Status submit(Stream& stream, std::span<const CopyRun> runs, Direction direction, CopyPath path)
      KVTIER_REQUIRES(stream.mutex);
  // `path`, or what stands in for it where this stream cannot be used for it.
  CopyPath usable(const Stream& stream, CopyPath path, std::uint64_t run_bytes) const
      KVTIER_REQUIRES(stream.mutex);
  bool is_limited(const Stream& stream, Direction direction) const {
    return stream.own && limit_of(direction).has_value();
  }
  // Keeps what follows in the stream back until the direction's bucket admits `burst`, copied by `path`.
  Status pace(Stream& stream, std::span<const CopyRun> burst, Direction direction, CopyPath path)
      KVTIER_REQUIRES(stream.mutex);
  const std::optional<CopyLimit>& limit_of(Direction direction) const {
    return direction == Direction::store ? options_.store_limit : options_.load_limit;
  }
  // At what rate such runs may move; nullopt: no limit.
  std::optional<RateLimit> rate_of(Direction direction, CopyPath path, std::uint64_t run_bytes) const;

  const CudaOptions options_;
  const std::shared_ptr<Context> context_;
  const std::uint64_t born_in_ = process_generation();
  std::string name_;
  unsigned num_sms_ = 1;
  int compute_capability_ = 0;
  int priority_ = 0;  // the lowest
  CopyPaths paths_;
  bool measuring_ = false;
  Calibration calibration_;
  HostRegions regions_;
  std::array<BounceRing, 2> bounce_;

  mutable Mutex mutex_;
  std::unordered_map<std::uintptr_t, StreamPtr> streams_ KVTIER_GUARDED_BY(mutex_);
  mutable Status error_ KVTIER_GUARDED_BY(mutex_);
  bool said_pageable_ KVTIER_GUARDED_BY(mutex_) = false;
};

// Measures every path of the device on scratch memory and gives the device what it found; a path that copied
// wrong bytes, or failed, is taken out. Errors: what kept it from measuring; the device stays usable.
Status calibrate(CudaDevice& device);
// As options().calibration says: from the cache, or calibrate() and into the cache.
void settle_calibration(CudaDevice& device, const GpuFacts& gpu);

// Where bytes stand in a benchmark's or a calibration's memory: `count` runs of one length, the slots' side
// dense, the pages' side in an order of its own.
std::vector<CopyRun> scattered_runs(std::byte* host, std::byte* pages, std::size_t run_bytes,
                                    std::size_t count, Direction direction);

}  // namespace kvtier::cuda
