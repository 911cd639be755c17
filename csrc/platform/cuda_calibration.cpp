// Calibration: every path, both directions, a few run lengths, beside kernels that read HBM all the time.
#ifdef KVTIER_HAVE_CUDA

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

#include "cuda_scratch.h"

namespace kvtier::cuda {
namespace {

constexpr std::size_t kCheckBytes = std::size_t{2} << 20;
constexpr std::size_t kTimedBytes = std::size_t{8} << 20;
constexpr double kDecodeSeconds = 4e-4;
constexpr std::size_t kRunLengths[] = {4 << 10, 32 << 10, 256 << 10, 2 << 20};
constexpr CopyPath kMeasured[] = {CopyPath::merged, CopyPath::batched, CopyPath::kernel, CopyPath::staged,
                                  CopyPath::bulk};

class Calibrator {
 public:
  explicit Calibrator(CudaDevice& device) : device_(device), decode_(device, scratch_) {
    device_.set_measuring(true);
  }
  ~Calibrator() { device_.set_measuring(false); }
  Calibrator(const Calibrator&) = delete;
  Calibrator& operator=(const Calibrator&) = delete;

  Status run() {
    KVTIER_RETURN_IF_ERROR(prepare());
    const Scope scope(*device_.context());
    KVTIER_RETURN_IF_ERROR(scope.status());
    Calibration calibration;
    for (const CopyPath path : kMeasured) {
      if (!device_.paths().has(path)) continue;
      std::vector<PathScore> scores;
      Status status = check(path);
      if (status) status = measure(path, scores);
      KVTIER_RETURN_IF_ERROR(device_.health());
      if (status) {
        calibration.scores.insert(calibration.scores.end(), scores.begin(), scores.end());
      } else {
        device_.remove_path(path);
      }
    }
    device_.set_calibration(std::move(calibration));
    return Status::ok();
  }

 private:
  Status prepare() {
    Result<OwnedStream> stream = OwnedStream::create(device_);
    if (!stream) return stream.status();
    stream_ = owner_.emplace(std::move(*stream)).handle();
    for (auto [place, bytes] : {std::pair{&source_, kTimedBytes}, std::pair{&back_, kTimedBytes}}) {
      Result<std::byte*> memory = scratch_.host_memory(bytes);
      if (!memory) return memory.status();
      *place = *memory;
    }
    Result<std::byte*> pages = scratch_.device_memory(kTimedBytes);
    if (!pages) return pages.status();
    pages_ = *pages;
    std::uint64_t word = 1;  // Knuth's MMIX generator: no two words of the scratch memory alike
    for (std::size_t i = 0; i < kCheckBytes; i += sizeof(std::uint64_t)) {
      word = word * 6364136223846793005U + 1442695040888963407U;
      std::memcpy(source_ + i, &word, sizeof word);
    }
    return decode_.prepare(kDecodeSeconds);
  }

  Status copy(std::byte* host, std::size_t run_bytes, std::size_t bytes, Direction direction, CopyPath path) {
    return device_.copy_by(stream_, scattered_runs(host, pages_, run_bytes, bytes / run_bytes, direction),
                           direction, path);
  }
  Status finish() {
    KVTIER_RETURN_IF_ERROR(cover(device_, stream_));
    return to_status("cudaStreamSynchronize", cudaStreamSynchronize(native_stream(stream_)));
  }
  Status poison() {
    std::memset(back_, 0xee, kCheckBytes);
    KVTIER_RETURN_IF_ERROR(
        to_status("cudaMemset", cudaMemsetAsync(pages_, 0xdd, kCheckBytes, native_stream(stream_))));
    return finish();
  }

  // There and back, one way by the path and the other by plain copies, into poisoned memory.
  Status check(CopyPath path) {
    for (const std::size_t run_bytes : {kRunLengths[0], kRunLengths[2]}) {
      for (const Direction tested : {Direction::load, Direction::store}) {
        const auto by = [&](Direction way) { return way == tested ? path : CopyPath::plain; };
        KVTIER_RETURN_IF_ERROR(poison());
        KVTIER_RETURN_IF_ERROR(copy(source_, run_bytes, kCheckBytes, Direction::load, by(Direction::load)));
        KVTIER_RETURN_IF_ERROR(copy(back_, run_bytes, kCheckBytes, Direction::store, by(Direction::store)));
        KVTIER_RETURN_IF_ERROR(finish());
        if (std::memcmp(source_, back_, kCheckBytes) != 0) {
          return Status(StatusCode::corruption,
                        "path " + std::string(to_string(path)) + " copies wrong bytes");
        }
      }
    }
    return Status::ok();
  }

  Status measure(CopyPath path, std::vector<PathScore>& scores) {
    for (const std::size_t run_bytes : kRunLengths) {
      for (const Direction direction : {Direction::store, Direction::load}) {
        PathScore best{direction, run_bytes, path, 0, 0};
        for (int i = 0; i < 2; ++i) {
          Result<PathScore> score = time(best);
          if (!score) return score.status();
          if (worth(*score) > worth(best)) best = *score;
        }
        if (best.bytes_per_second > 0) scores.push_back(best);
      }
    }
    return Status::ok();
  }

  Result<PathScore> time(PathScore score) {
    TimingEvent begin;
    TimingEvent end;
    KVTIER_RETURN_IF_ERROR(begin.create(device_.context()));
    KVTIER_RETURN_IF_ERROR(end.create(device_.context()));
    const cudaStream_t stream = native_stream(stream_);
    KVTIER_RETURN_IF_ERROR(finish());
    Result<double> alone = decode_.run();
    if (!alone) return alone.status();
    KVTIER_RETURN_IF_ERROR(decode_.launch());
    KVTIER_RETURN_IF_ERROR(begin.record(stream));
    KVTIER_RETURN_IF_ERROR(copy(back_, score.run_bytes, kTimedBytes, score.direction, score.path));
    KVTIER_RETURN_IF_ERROR(cover(device_, stream_));
    KVTIER_RETURN_IF_ERROR(end.record(stream));
    Result<double> taken = end.seconds_since(begin);
    if (!taken) return taken.status();
    Result<double> decode = decode_.seconds();
    if (!decode) return decode.status();
    const double seconds = std::max(*taken, 1e-7);
    const double together = std::min(seconds, *decode);
    score.bytes_per_second = static_cast<double>(kTimedBytes) / seconds;
    score.slowdown = std::max(0.0, *decode - *alone) / std::max(together, 1e-7);
    return score;
  }

  CudaDevice& device_;
  Scratch scratch_{device_};
  DecodeLoad decode_;
  std::optional<OwnedStream> owner_;
  StreamHandle stream_{0};
  std::byte* source_ = nullptr;
  std::byte* back_ = nullptr;
  std::byte* pages_ = nullptr;
};

CalibrationKey key_of(const CudaDevice& device, const GpuFacts& gpu) {
  return {gpu.name + " sm_" + std::to_string(gpu.compute_capability),
          gpu.link,
          gpu.numa_node ? std::to_string(*gpu.numa_node) : "unknown",
          std::to_string(device.context()->driver().version),
          std::to_string(::sysconf(_SC_PAGESIZE)),
          std::string(KVTIER_VERSION) + " " + std::to_string(device.options().max_sms) + " SMs"};
}

std::filesystem::path cache_file(const CudaOptions& options, const CalibrationKey& key) {
  std::filesystem::path folder = options.cache_folder;
  if (folder.empty()) {
    const char* cache = std::getenv("XDG_CACHE_HOME");
    const char* home = std::getenv("HOME");
    if (cache != nullptr && *cache == '/') {
      folder = std::filesystem::path(cache) / "kvtier";
    } else if (home != nullptr && *home == '/') {
      folder = std::filesystem::path(home) / ".cache" / "kvtier";
    } else {
      return {};
    }
  }
  std::uint64_t hash = 14695981039346656037U;  // FNV-1a; the file itself holds the whole key
  for (const char c : key.text()) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211U;
  return folder / ("calibration-" + std::to_string(hash) + ".txt");
}

// A cache that cannot be written is measured again next time.
void write_cache(const std::filesystem::path& file, const std::string& text) {
  std::error_code ignored;
  std::filesystem::create_directories(file.parent_path(), ignored);
  const std::filesystem::path part = file.string() + "." + std::to_string(::getpid());
  {
    std::ofstream out(part, std::ios::trunc);
    out << text;
    if (!out.flush()) return;
  }
  std::filesystem::rename(part, file, ignored);
  if (ignored) std::filesystem::remove(part, ignored);
}

}  // namespace

Status calibrate(CudaDevice& device) { return Calibrator(device).run(); }

void settle_calibration(CudaDevice& device, const GpuFacts& gpu) {
  const CudaOptions& options = device.options();
  if (options.calibration == CalibrationUse::none) return;
  const bool limited = device.limits_decoding(Direction::store) || device.limits_decoding(Direction::load);
  if (options.path && !limited && options.calibration == CalibrationUse::cached) return;  // nothing to choose
  const CalibrationKey key = key_of(device, gpu);
  const std::filesystem::path file = cache_file(options, key);
  if (options.calibration == CalibrationUse::cached && !file.empty()) {
    std::ifstream in(file);
    std::stringstream text;
    text << in.rdbuf();
    if (Result<Calibration> known = Calibration::parse(text.str(), key)) {
      device.set_calibration(std::move(*known));
      return;
    }
  }
  if (!calibrate(device)) return;
  if (!file.empty()) write_cache(file, device.calibration().format(key));
}

}  // namespace kvtier::cuda

#endif
