// Whether there is a GPU to test on. With REQUIRE_GPU set its absence is a failure, not a skip: the
// suite of a GPU machine must not pass because it ran nothing.
#pragma once

#include <gtest/gtest.h>

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
  if (why && std::getenv("REQUIRE_GPU") != nullptr) ADD_FAILURE() << *why;
  return why;
}

}  // namespace kvtier
