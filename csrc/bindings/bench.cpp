// What the machine itself can do, for benchmarks to hold our figures against: plain contiguous copies.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <latch>
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

// Seconds from the moment that all threads are ready until the last has finished its contiguous share.
double copy_seconds(void* to, const void* from, std::size_t bytes, CopyFunction copy, std::size_t threads) {
  constexpr std::size_t kShareAlignment = 4096;
  const std::size_t share = (bytes / threads + kShareAlignment - 1) / kShareAlignment * kShareAlignment;
  std::vector<Clock::time_point> begun(threads);
  std::vector<Clock::time_point> ended(threads);
  std::latch ready(static_cast<std::ptrdiff_t>(threads));
  const auto work = [&](std::size_t i) {
    const std::size_t begin = std::min(bytes, i * share);
    ready.arrive_and_wait();
    begun[i] = Clock::now();
    copy(static_cast<std::byte*>(to) + begin, static_cast<const std::byte*>(from) + begin,
         i + 1 == threads ? bytes - begin : std::min(share, bytes - begin));
    ended[i] = Clock::now();
  };
  std::vector<std::jthread> helpers;
  for (std::size_t i = 1; i < threads; ++i) helpers.emplace_back(work, i);
  work(0);
  helpers.clear();  // joins
  const auto begin = *std::min_element(begun.begin(), begun.end());
  return std::chrono::duration<double>(*std::max_element(ended.begin(), ended.end()) - begin).count();
}

// destination, source: C-contiguous uint8 arrays of equal length that do not overlap.
double copy_limit(py::array_t<std::uint8_t, py::array::c_style>& destination, const KeyArray& source,
                  const std::string& method, std::size_t threads) {
  const auto bytes = static_cast<std::size_t>(source.nbytes());
  if (destination.nbytes() != source.nbytes() || bytes == 0 || threads == 0 || threads > 64) {
    throw StatusError{Status::invalid_argument("copy_limit: arrays must be equally long, threads 1 to 64")};
  }
  const CopyFunction copy = copy_function(method);
  void* to = destination.mutable_data();
  const void* from = source.data();
  return without_gil([&] { return copy_seconds(to, from, bytes, copy, threads); });
}

}  // namespace

void bind_bench(py::module_& m) {
  m.def("copy_limit", &copy_limit, py::kw_only(), py::arg("destination").noconvert(),
        py::arg("source").noconvert(), py::arg("method"), py::arg("threads"),
        "Seconds that a plain contiguous copy takes: by 'memcpy' (the C library's) or 'streaming' "
        "(non-temporal).");
  m.def(
      "stream_isa", [] { return std::string(to_string(best_stream_isa())); },
      "Which non-temporal stores this machine has.");
}

}  // namespace kvtier::bindings
