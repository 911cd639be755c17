#include "kvtier/platform/cuda_device.h"

#ifndef KVTIER_HAVE_CUDA

namespace kvtier {
namespace {

Status no_cuda() { return Status::unsupported("no CUDA device: this build of kvtier was made without CUDA"); }

}  // namespace

Result<CudaFacts> cuda_facts() { return no_cuda(); }
Result<int> cuda_ordinal_of(const void*) { return no_cuda(); }
Result<std::unique_ptr<Device>> make_cuda_device(const CudaOptions&) { return no_cuda(); }
Result<std::unique_ptr<CudaBench>> CudaBench::create(const CudaOptions&) { return no_cuda(); }

}  // namespace kvtier

#else

#include <algorithm>
#include <cstdio>
#include <utility>

#include "cuda_device_impl.h"
#include "cuda_kernels.h"

namespace kvtier::cuda {
namespace {

struct CudaEvent final : Event {
  CudaEvent(const CudaDevice* d, std::shared_ptr<Context> c) : device(d), context(std::move(c)) {}
  ~CudaEvent() override {
    const Scope scope(*context);  // refused in a child of fork()
    if (scope.status()) {
      raw = RawEvent();
    } else {
      raw.abandon();
    }
  }
  const CudaDevice* device;
  std::shared_ptr<Context> context;
  RawEvent raw;
};

CudaEvent& own(Event& event, const CudaDevice* device) {
  auto& mine = static_cast<CudaEvent&>(event);
  KVTIER_CHECK(mine.device == device);
  return mine;
}

bool is_allowed(const CopyLimit& limit) {
  if (const auto* rate = std::get_if<std::uint64_t>(&limit)) return *rate >= 1;
  const double share = std::get<DecodeShare>(limit).share;
  return share > 0 && share <= 1;
}

cudaStream_t native(StreamHandle handle) {
  return reinterpret_cast<cudaStream_t>(static_cast<std::uintptr_t>(handle));  // NOLINT: a native handle
}

}  // namespace

CudaDevice::CudaDevice(const CudaOptions& options, std::shared_ptr<Context> context)
    : options_(options), context_(std::move(context)) {}

Result<std::unique_ptr<CudaDevice>> CudaDevice::create(const CudaOptions& options) {
  const Result<CudaFacts> facts = cuda_facts();
  if (!facts) return facts.status();
  const auto num_gpus = static_cast<int>(facts.value().gpus.size());
  if (options.ordinal < 0 || options.ordinal >= num_gpus) {
    return Status::invalid_argument("cuda device: ordinal is " + std::to_string(options.ordinal) +
                                    "; allowed: 0 to " + std::to_string(num_gpus - 1));
  }
  if (options.max_sms < 1) return Status::invalid_argument("cuda device: max_sms must be at least 1");
  for (const std::optional<CopyLimit>& limit : {options.store_limit, options.load_limit}) {
    if (limit && !is_allowed(*limit)) {
      return Status::invalid_argument(
          "cuda device: a limit must be at least 1 byte per second, or a share of decoding above 0 and at "
          "most "
          "1");
    }
  }
  Result<std::shared_ptr<Context>> context = Context::open(options.ordinal);
  if (!context) return context.status();
  std::unique_ptr<CudaDevice> device(new CudaDevice(options, std::move(*context)));
  KVTIER_RETURN_IF_ERROR(device->start());
  settle_calibration(*device, facts.value().gpus[static_cast<std::size_t>(options.ordinal)]);
  KVTIER_RETURN_IF_ERROR(device->health());
  for (const Direction direction : {Direction::store, Direction::load}) {
    if (device->limits_decoding(direction) && !device->calibration().measured(direction)) {
      return Status::unsupported("cuda device: a limit in percent of decoding needs a calibration of " +
                                 device->name() + ", and there is none; allowed: bytes per second");
    }
  }
  return device;
}

Status CudaDevice::start() {
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  cudaDeviceProp properties{};
  KVTIER_RETURN_IF_ERROR(
      to_status("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, options_.ordinal)));
  name_ = "cuda:" + std::to_string(options_.ordinal) + " (" + properties.name + ")";
  num_sms_ = static_cast<unsigned>(std::max(properties.multiProcessorCount, 1));
  compute_capability_ = properties.major * 10 + properties.minor;
  int highest = 0;
  KVTIER_RETURN_IF_ERROR(
      to_status("cudaDeviceGetStreamPriorityRange", cudaDeviceGetStreamPriorityRange(&priority_, &highest)));
  paths_.add(CopyPath::merged);
  if (context_->driver().has_batch()) paths_.add(CopyPath::batched);
  // Kernels come loaded or not at all: a GPU that this build has no code for still has its copy engines.
  const Status kernels = to_status("kernels", load_kernels());
  if (!kernels && (options_.store_limit || options_.load_limit)) {
    return Status::unsupported("cuda device: a rate limit needs kernels, and " + name_ +
                               " runs none of this build: " + kernels.message());
  }
  if (kernels) {
    paths_.add(CopyPath::kernel);
    paths_.add(CopyPath::staged);
    if (compute_capability_ >= 90 && to_status("bulk kernels", load_bulk_kernel()))
      paths_.add(CopyPath::bulk);
  }
  return Status::ok();
}

CudaDevice::~CudaDevice() {
  if (process_generation() != born_in_) {
    leak_all();
    return;
  }
  std::unordered_map<std::uintptr_t, StreamPtr> streams;
  {
    MutexLock lock(mutex_);
    streams.swap(streams_);
  }
  const bool healthy = health().is_ok();
  const Scope scope(*context_);
  const bool alive = healthy && scope.status();
  for (auto& [handle, stream] : streams) release(*stream, alive);
  for (BounceRing& ring : bounce_) {
    MutexLock lock(ring.mutex());
    if (alive) {
      ring.free();
    } else {
      ring.abandon();
    }
  }
}

// In a child of fork(): the driver's state is the parent's, and any lock may be held for ever.
void CudaDevice::leak_all() KVTIER_NO_THREAD_SAFETY_ANALYSIS {
  static_cast<void>(new auto(std::move(streams_)));
  for (BounceRing& ring : bounce_) ring.abandon();
}

void CudaDevice::release(Stream& stream, bool alive) {
  MutexLock lock(stream.mutex);
  if (stream.lane && !alive) stream.lane->abandon();
  stream.lane.reset();
  if (!alive) return;
  static_cast<void>(cudaFree(stream.buckets));
  static_cast<void>(noted(to_status("cudaStreamDestroy", cudaStreamDestroy(stream.native))));
}

// --- health ---

Status CudaDevice::health() const {
  if (process_generation() != born_in_) {
    return Status::closed("this cuda device belongs to the parent process");
  }
  MutexLock lock(mutex_);
  return error_;
}

Status CudaDevice::noted(Status status) const {
  if (status.code() == StatusCode::device && is_sticky_cuda_error(status.native_code())) mark_lost(status);
  return status;
}

void CudaDevice::mark_lost(Status why) const {
  MutexLock lock(mutex_);
  if (error_) error_ = std::move(why);
}

// --- streams and events ---

Result<StreamHandle> CudaDevice::create_stream() {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  auto stream = std::make_shared<Stream>();
  stream->own = true;
  KVTIER_RETURN_IF_ERROR(noted(to_status(
      "cudaStreamCreate", cudaStreamCreateWithPriority(&stream->native, cudaStreamNonBlocking, priority_))));
  Status equipped = noted(equip(*stream));
  if (equipped) equipped = health();
  if (!equipped) {
    release(*stream, health().is_ok());
    return equipped;
  }
  const auto handle = reinterpret_cast<std::uintptr_t>(stream->native);
  MutexLock lock(mutex_);
  streams_.emplace(handle, std::move(stream));
  return StreamHandle{handle};
}

Status CudaDevice::equip(Stream& stream) {
  MutexLock lock(stream.mutex);
  if (may_stage()) {
    Result<std::unique_ptr<StagingLane>> lane = StagingLane::create(stream.native, priority_);
    if (lane) {
      stream.lane = std::move(*lane);
    } else {
      static_cast<void>(noted(lane.status()));
    }
  }
  if (!options_.store_limit && !options_.load_limit) return Status::ok();
  constexpr std::size_t kBytes = 2 * sizeof(TokenBucket);
  void* memory = nullptr;
  if (const Status status = to_status("cudaMalloc", cudaMalloc(&memory, kBytes)); !status) {
    return Status::resource("a rate limit's bucket: " + status.message(), status.native_code());
  }
  stream.buckets = static_cast<TokenBucket*>(memory);
  return to_status("cudaMemsetAsync", cudaMemsetAsync(memory, 0, kBytes, stream.native));
}

bool CudaDevice::may_stage() const {
  if (!paths_.has(CopyPath::staged)) return false;
  return measuring_ || !options_.path || *options_.path == CopyPath::staged || !paths_.has(*options_.path);
}

void CudaDevice::destroy_stream(StreamHandle handle) {
  if (!health()) return;
  StreamPtr stream;
  {
    MutexLock lock(mutex_);
    const auto found = streams_.find(static_cast<std::uintptr_t>(handle));
    if (found == streams_.end()) return;
    stream = std::move(found->second);
    streams_.erase(found);
  }
  const Scope scope(*context_);
  release(*stream, scope.status().is_ok());
}

Result<CudaDevice::StreamPtr> CudaDevice::stream_of(StreamHandle handle) {
  {
    MutexLock lock(mutex_);
    const auto found = streams_.find(static_cast<std::uintptr_t>(handle));
    if (found != streams_.end()) return found->second;
  }
  auto stream = std::make_shared<Stream>();
  stream->native = native(handle);
  cudaStreamCaptureStatus captures = cudaStreamCaptureStatusNone;
  KVTIER_RETURN_IF_ERROR(
      noted(to_status("cudaStreamIsCapturing", cudaStreamIsCapturing(stream->native, &captures))));
  if (captures != cudaStreamCaptureStatusNone) {
    return Status::device("the stream is being captured into a graph", kCaptureConflict);
  }
  return stream;
}

Result<std::unique_ptr<Event>> CudaDevice::create_event() {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  auto event = std::make_unique<CudaEvent>(this, context_);
  KVTIER_RETURN_IF_ERROR(noted(event->raw.create()));
  return std::unique_ptr<Event>(std::move(event));
}

Status CudaDevice::record(Event& event, StreamHandle handle) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  Result<StreamPtr> stream = stream_of(handle);
  if (!stream) return stream.status();
  MutexLock lock((*stream)->mutex);
  KVTIER_RETURN_IF_ERROR(join_lane(**stream));
  return noted(to_status("cudaEventRecord", cudaEventRecord(own(event, this).raw.get(), (*stream)->native)));
}

Status CudaDevice::wait(StreamHandle handle, Event& event) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  Result<StreamPtr> stream = stream_of(handle);
  if (!stream) return stream.status();
  MutexLock lock((*stream)->mutex);
  if ((*stream)->lane) {
    KVTIER_RETURN_IF_ERROR(join_lane(**stream));
    (*stream)->lane->fork_again();
  }
  return noted(to_status("cudaStreamWaitEvent",
                         cudaStreamWaitEvent((*stream)->native, own(event, this).raw.get(), 0)));
}

Result<bool> CudaDevice::query(Event& event) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  const cudaError_t error = cudaEventQuery(own(event, this).raw.get());
  if (error == cudaErrorNotReady) {
    static_cast<void>(cudaGetLastError());
    return false;
  }
  KVTIER_RETURN_IF_ERROR(noted(to_status("cudaEventQuery", error)));
  return true;
}

Status CudaDevice::synchronize(Event& event) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  return noted(to_status("cudaEventSynchronize", cudaEventSynchronize(own(event, this).raw.get())));
}

// --- host memory ---

Status CudaDevice::register_host(void* begin, std::size_t bytes) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  Status status = noted(regions_.add(begin, bytes));
  const bool refused = status.code() == StatusCode::device && !is_capture_conflict(status) &&
                       status.native_code() != cudaErrorHostMemoryAlreadyRegistered;
  if (refused) expect_pageable(status);
  return status;
}

void CudaDevice::expect_pageable(const Status& why) {
  {
    MutexLock lock(mutex_);
    if (std::exchange(said_pageable_, true)) return;
  }
  std::fprintf(stderr,
               "kvtier: %s cannot pin host memory (%s); copies of it pass through a small pinned ring "
               "and are slower. See `ulimit -l`.\n",
               name_.c_str(), why.message().c_str());
  for (BounceRing& ring : bounce_) {
    MutexLock lock(ring.mutex());
    static_cast<void>(noted(ring.prepare()));  // without it the driver's own staging serves
  }
}

Status CudaDevice::unregister_host(void* begin) {
  KVTIER_RETURN_IF_ERROR(health());
  const Scope scope(*context_);
  KVTIER_RETURN_IF_ERROR(scope.status());
  return noted(regions_.remove(begin));
}

}  // namespace kvtier::cuda

namespace kvtier {

Result<std::unique_ptr<Device>> make_cuda_device(const CudaOptions& options) {
  Result<std::unique_ptr<cuda::CudaDevice>> device = cuda::CudaDevice::create(options);
  if (!device) return device.status();
  return std::unique_ptr<Device>(std::move(*device));
}

}  // namespace kvtier

#endif
