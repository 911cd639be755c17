// What the machine itself can do, for benchmarks to hold our figures against: plain copies, contiguous or run
// by run.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <latch>
#include <span>
#include <string>
#include <thread>

#include "common.h"

#include "kvtier/platform/copy.h"

namespace kvtier::bindings {
namespace {

using Clock = std::chrono::steady_clock;
using CopyFunction = void (*)(void*, const void*, std::size_t);

CopyFunction copy_function(const std::string& method) {
  if (method == "memcpy") return [](void* to, const void* from, std::size_t n) { std::memcpy(to, from, n); };
  if (method == "streaming")
    return [](void* to, const void* from, std::size_t n) { stream_copy(to, from, n); };
  throw StatusError{Status::invalid_argument("method '" + method + "': must be memcpy or streaming")};
}

// Seconds from the moment that all threads are ready until the last of them has done its share(index).
template <typename Share>
double seconds_of_threads(std::size_t threads, const Share& share) {
  std::vector<Clock::time_point> begun(threads);
  std::vector<Clock::time_point> ended(threads);
  std::latch ready(static_cast<std::ptrdiff_t>(threads));
  const auto work = [&](std::size_t i) {
    ready.arrive_and_wait();
    begun[i] = Clock::now();
    share(i);
    ended[i] = Clock::now();
  };
  std::vector<std::jthread> helpers;
  for (std::size_t i = 1; i < threads; ++i) helpers.emplace_back(work, i);
  work(0);
  helpers.clear();  // joins
  const auto begin = *std::min_element(begun.begin(), begun.end());
  return std::chrono::duration<double>(*std::max_element(ended.begin(), ended.end()) - begin).count();
}

void check_threads(std::size_t threads) {
  if (threads == 0 || threads > 64) {
    throw StatusError{
        Status::invalid_argument("copy_limit: threads is " + std::to_string(threads) + "; allowed: 1 to 64")};
  }
}

// destination, source: C-contiguous uint8 arrays of equal length that do not overlap.
double copy_limit(py::array_t<std::uint8_t, py::array::c_style>& destination, const KeyArray& source,
                  const std::string& method, std::size_t threads) {
  const auto bytes = static_cast<std::size_t>(source.nbytes());
  if (destination.nbytes() != source.nbytes() || bytes == 0) {
    throw StatusError{Status::invalid_argument("copy_limit: arrays must be equally long, and not empty")};
  }
  check_threads(threads);
  const CopyFunction copy = copy_function(method);
  auto* to = reinterpret_cast<std::byte*>(destination.mutable_data());
  const auto* from = reinterpret_cast<const std::byte*>(source.data());
  constexpr std::size_t kShareAlignment = 4096;
  const std::size_t share = (bytes / threads + kShareAlignment - 1) / kShareAlignment * kShareAlignment;
  return without_gil([&] {
    return seconds_of_threads(threads, [&](std::size_t i) {
      const std::size_t begin = std::min(bytes, i * share);
      copy(to + begin, from + begin, i + 1 == threads ? bytes - begin : std::min(share, bytes - begin));
    });
  });
}

using Offsets = py::array_t<std::int64_t, py::array::c_style>;

// Offsets that may be read, or written, at; their runs lie in `bytes`.
std::span<const std::int64_t> checked(const Offsets& offsets, const char* name, std::size_t bytes,
                                      std::size_t run_bytes) {
  const std::span<const std::int64_t> all(offsets.data(), static_cast<std::size_t>(offsets.size()));
  for (const std::int64_t offset : all) {
    if (offset < 0 || run_bytes > bytes || static_cast<std::size_t>(offset) > bytes - run_bytes) {
      throw StatusError{Status::invalid_argument(std::string("copy_runs_limit: ") + name + " has " +
                                                 std::to_string(offset) + "; allowed: 0 to " +
                                                 std::to_string(bytes) + " - " + std::to_string(run_bytes))};
    }
  }
  return all;
}

// Runs of equal length, one call of the method for each, in order; each thread has as many of them.
double copy_runs_limit(py::array_t<std::uint8_t, py::array::c_style>& destination, const KeyArray& source,
                       const Offsets& to_offsets, const Offsets& from_offsets, std::size_t run_bytes,
                       const std::string& method, std::size_t threads) {
  const auto to_at =
      checked(to_offsets, "to_offsets", static_cast<std::size_t>(destination.nbytes()), run_bytes);
  const auto from_at =
      checked(from_offsets, "from_offsets", static_cast<std::size_t>(source.nbytes()), run_bytes);
  if (to_at.size() != from_at.size() || to_at.empty() || run_bytes == 0) {
    throw StatusError{
        Status::invalid_argument("copy_runs_limit: to_offsets and from_offsets must be equally long, and not "
                                 "empty, run_bytes at least 1")};
  }
  check_threads(threads);
  const CopyFunction copy = copy_function(method);
  auto* to = reinterpret_cast<std::byte*>(destination.mutable_data());
  const auto* from = reinterpret_cast<const std::byte*>(source.data());
  const std::size_t runs = to_at.size();
  return without_gil([&] {
    return seconds_of_threads(threads, [&](std::size_t i) {
      for (std::size_t run = runs * i / threads; run < runs * (i + 1) / threads; ++run) {
        copy(to + to_at[run], from + from_at[run], run_bytes);
      }
    });
  });
}

}  // namespace

void bind_bench(py::module_& m) {
  m.def("copy_limit", &copy_limit, py::kw_only(), py::arg("destination").noconvert(),
        py::arg("source").noconvert(), py::arg("method"), py::arg("threads"),
        "Seconds that a plain contiguous copy takes: by 'memcpy' (the C library's) or 'streaming' "
        "(non-temporal).");
  m.def("copy_runs_limit", &copy_runs_limit, py::kw_only(), py::arg("destination").noconvert(),
        py::arg("source").noconvert(), py::arg("to_offsets").noconvert(), py::arg("from_offsets").noconvert(),
        py::arg("run_bytes"), py::arg("method"), py::arg("threads"),
        "Seconds that as many plain copies take as there are offsets, one after another in each thread.");
  m.def(
      "stream_isa", [] { return std::string(to_string(best_stream_isa())); },
      "Which non-temporal stores this machine has.");
}

}  // namespace kvtier::bindings
