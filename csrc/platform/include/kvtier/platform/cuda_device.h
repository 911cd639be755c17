// The `cuda` device: an NVIDIA GPU behind the Device seam (docs/cuda.md).
//
// The runtime is linked statically and the driver is opened at run time, so a module with this in it loads on
// machines without either; then, and in a build without CUDA, every function here answers `unsupported`.
//
// Beyond what device.h says:
//  * A framework stream is any cudaStream_t of this GPU; 0 is the legacy default stream, 2 the calling
//  thread's
//    own (cudaStreamPerThread). Nothing is ever submitted to a framework stream but event records and waits,
//    unless the caller names one in copy().
//  * Every call makes this GPU's primary context current and restores what was; it makes none on another GPU.
//  * Every call runs in relaxed capture mode: a capture elsewhere is neither disturbed nor in the way. A
//  stream
//    that captures is refused with kCaptureConflict.
//  * Where pinning host memory is refused (memlock limit, permission), register_host() fails and says so once
//    on standard error; copies then pass through a small pinned ring.
//  * The destructor frees streams and memory of its own, except in a child of fork() and after a sticky
//  error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kvtier/core/status.h"
#include "kvtier/platform/copy_path.h"
#include "kvtier/platform/device.h"

namespace kvtier {

enum class CalibrationUse : std::uint8_t {
  cached,  // from the cache file; measured and written there when there is none
  fresh,   // measured now; the cache is replaced
  none,    // default_path()
};

struct CudaOptions {
  int ordinal = 0;
  std::optional<CopyPath> path;  // for every copy that it can do; nullopt: by calibration
  unsigned max_sms = 8;          // that a copy kernel may use; at least 1
  // nullopt: none. A share of decoding is kept by what the calibration measured: it needs one.
  std::optional<CopyLimit> store_limit;
  std::optional<CopyLimit> load_limit;
  CalibrationUse calibration = CalibrationUse::cached;
  std::string cache_folder;  // empty: $XDG_CACHE_HOME/kvtier, or ~/.cache/kvtier
};

struct GpuFacts {
  int ordinal = 0;
  std::string name;
  int compute_capability = 0;  // 90 is sm_90
  int num_sms = 0;
  std::uint64_t memory_bytes = 0;
  std::string pci_bus;  // as in /sys/bus/pci/devices
  std::string link;     // of PCIe, as the kernel tells it: "32.0 GT/s PCIe x16"
  std::optional<int> numa_node;
};

struct CudaFacts {
  int driver_version = 0;  // 13000 is 13.0
  int runtime_version = 0;
  std::vector<GpuFacts> gpus;
};

// What there is. Makes no context. Errors: unsupported: a build without CUDA, no driver, too old a driver, or
// no GPU.
Result<CudaFacts> cuda_facts();

// Which GPU's memory a framework's pointer is. Errors: unsupported as above; invalid_argument for memory that
// no GPU of this process has.
Result<int> cuda_ordinal_of(const void* memory);

// Blocks: for tens of milliseconds when it has to calibrate. Errors: unsupported as above, and where a limit
// is a share of decoding and the calibration failed; invalid_argument for an ordinal that is not there or an
// option out of range; device for what the driver refuses.
Result<std::unique_ptr<Device>> make_cuda_device(const CudaOptions& options);

// Measurements on one GPU, for `kvtier bench device`. Everything blocks; no figure is taken from memory that
// a framework owns. Threads: one at a time.
class CudaBench {
 public:
  // Owns: the device that it measures, scratch memory, streams.
  static Result<std::unique_ptr<CudaBench>> create(const CudaOptions& options);
  virtual ~CudaBench() = default;

  virtual Device& device() = 0;
  // Device memory; registered host memory. Both live as long as this object.
  virtual Result<std::byte*> device_memory(std::size_t bytes) = 0;
  virtual Result<std::byte*> host_memory(std::size_t bytes) = 0;
  virtual Status fill_device(std::byte* begin, std::byte value, std::size_t bytes) = 0;
  virtual Status read_device(std::byte* to, const std::byte* from, std::size_t bytes) = 0;

  struct Timing {
    double copy_seconds = 0;    // on the GPU, from the first submission to the last completion
    double submit_seconds = 0;  // of the CPU, inside copy()
    double decode_seconds = 0;  // of the kernel beside it; 0 without one
  };
  // Which kernel runs beside the copies.
  enum class Beside : std::uint8_t { nothing, decode };
  // Copies by `path` (nullopt: the device's choice), each direction in a stream of its own, in batches of
  // `runs_per_batch`. Either list may be empty.
  virtual Result<Timing> time(std::span<const CopyRun> stores, std::span<const CopyRun> loads,
                              std::size_t runs_per_batch, std::optional<CopyPath> path, Beside beside) = 0;
  // How long the decode kernels of time() take alone, measured by this call: a GPU's clocks change.
  virtual Result<double> decode_alone() = 0;
  virtual CopyPaths paths() const = 0;
  virtual CopyPath chosen(Direction direction, std::uint64_t run_bytes) const = 0;
};

}  // namespace kvtier
