// Whether there is a GPU to test on. With REQUIRE_GPU set its absence is a failure, not a skip: the
// suite of a GPU machine must not pass because it ran nothing.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <optional>
#include <string>

#include "kvtier/platform/cuda_device.h"

namespace kvtier {

inline std::optional<std::string> gpu_missing() {
  static const std::optional<std::string> why = []() -> std::optional<std::string> {
    const Result<CudaFacts> facts = cuda_facts();
    if (facts) return std::nullopt;
    return facts.status().message();
  }();
  if (why && std::getenv("REQUIRE_GPU") != nullptr) {
    std::fprintf(stderr, "REQUIRE_GPU is set, but %s\n", why->c_str());
    std::_Exit(1);
  }
  return why;
}

}  // namespace kvtier
