// One implementation of a seam, as its conformance tests are instantiated with it:
//
//   INSTANTIATE_TEST_SUITE_P(Cpu, DeviceConformance,
//                            ::testing::Values(kind_of<DeviceHarness, CpuHarness>("alone")),
//                            kind_name<DeviceHarness>);
//
// Values, not types: the bodies of the tests are compiled once, however many implementations there are.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <ostream>
#include <string>

namespace kvtier::conformance {

template <typename Harness>
struct Kind {
  const char* name;  // what a test's name ends with: letters, digits, underscores
  std::unique_ptr<Harness> (*make)();

  friend std::ostream& operator<<(std::ostream& out, const Kind& kind) { return out << kind.name; }
};

template <typename Harness, typename Implementation>
Kind<Harness> kind_of(const char* name) {
  return {name, []() -> std::unique_ptr<Harness> { return std::make_unique<Implementation>(); }};
}

template <typename Harness>
std::string kind_name(const ::testing::TestParamInfo<Kind<Harness>>& info) {
  return info.param.name;
}

}  // namespace kvtier::conformance
