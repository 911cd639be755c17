// What CUDA's numbers mean to a Device. Pure: the numbers are CUDA's interface and stand here as such, so
// that this is tested without a toolkit.
#pragma once

#include <cstdint>

namespace kvtier {

// Errors after which the context is lost to this process: every later call fails, and no copy runs any more.
// Source: driver_types.h, "this leaves the process in an inconsistent state", and ECC and NVLink errors.
constexpr bool is_sticky_cuda_error(int code) {
  switch (code) {
    case 4:    // cudaErrorCudartUnloading
    case 214:  // cudaErrorECCUncorrectable
    case 220:  // cudaErrorNvlinkUncorrectable
    case 226:  // cudaErrorContained
    case 700:  // cudaErrorIllegalAddress
    case 702:  // cudaErrorLaunchTimeout
    case 709:  // cudaErrorContextIsDestroyed
    case 710:  // cudaErrorAssert
    case 714:  // cudaErrorHardwareStackError
    case 715:  // cudaErrorIllegalInstruction
    case 716:  // cudaErrorMisalignedAddress
    case 717:  // cudaErrorInvalidAddressSpace
    case 718:  // cudaErrorInvalidPc
    case 719:  // cudaErrorLaunchFailure
    case 721:  // cudaErrorTensorMemoryLeak
    case 999:  // cudaErrorUnknown: nothing is known that would be safe
      return true;
    default: return false;
  }
}

// Errors 900 to 908: a graph is being captured somewhere, and the call would have disturbed it.
constexpr bool is_capture_cuda_error(int code) { return code >= 900 && code <= 908; }

// Versions are 1000 x major + 10 x minor, as both the driver and the runtime give them. A runtime runs on
// drivers of its own major version or later.
constexpr bool driver_fits_runtime(int driver_version, int runtime_version) {
  return driver_version / 1000 >= runtime_version / 1000;
}

// The driver's batched copy: since 12.8 with a parameter for the index that failed, since 13.0 without.
enum class BatchSignature : std::uint8_t { none, with_fail_index, without_fail_index };

constexpr BatchSignature batch_signature(int driver_version) {
  if (driver_version >= 13000) return BatchSignature::without_fail_index;
  return driver_version >= 12080 ? BatchSignature::with_fail_index : BatchSignature::none;
}

}  // namespace kvtier
