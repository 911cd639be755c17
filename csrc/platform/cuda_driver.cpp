#ifdef KVTIER_HAVE_CUDA

#include "cuda_driver.h"

#include <dlfcn.h>

#include <cstdio>
#include <utility>

#include "kvtier/core/process.h"
#include "kvtier/platform/device.h"

namespace kvtier::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Status no_driver(const std::string& why) { return Status::unsupported("no CUDA device: " + why); }

template <typename Function>
bool resolve(decltype(&::cuGetProcAddress) get, const char* name, int version, Function& function) {
  void* address = nullptr;
  CUdriverProcAddressQueryResult found{};
  if (get(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, &found) != CUDA_SUCCESS ||
      address == nullptr) {
    return false;
  }
  function = reinterpret_cast<Function>(address);
  return true;
}

Result<Driver> open_driver() {
  // Never closed: frameworks use the same library until the process ends.
  void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return no_driver("the NVIDIA driver (libcuda.so.1) is not installed");
  const auto init = reinterpret_cast<CUresult (*)(unsigned)>(::dlsym(library, "cuInit"));
  const auto get_version = reinterpret_cast<CUresult (*)(int*)>(::dlsym(library, "cuDriverGetVersion"));
  const auto get = reinterpret_cast<decltype(&::cuGetProcAddress)>(::dlsym(library, "cuGetProcAddress_v2"));
  Driver driver;
  if (init == nullptr || get_version == nullptr || get_version(&driver.version) != CUDA_SUCCESS) {
    return no_driver("libcuda.so.1 is not an NVIDIA driver");
  }
  if (get == nullptr || !driver_fits_runtime(driver.version, CUDART_VERSION)) {
    return no_driver("the NVIDIA driver is too old: it supports CUDA " + version_text(driver.version) +
                     ", this build needs " + version_text(CUDART_VERSION / 1000 * 1000) + " or later");
  }
  if (const CUresult error = init(0); error != CUDA_SUCCESS) {
    return no_driver(error == CUDA_ERROR_NO_DEVICE
                         ? "the driver sees no GPU (CUDA_VISIBLE_DEVICES may hide it)"
                         : "the driver does not start (error " + std::to_string(error) + ")");
  }
  constexpr int kBase = 12000;
  if (!resolve(get, "cuDeviceGet", kBase, driver.device_get) ||
      !resolve(get, "cuDevicePrimaryCtxRetain", kBase, driver.primary_retain) ||
      !resolve(get, "cuDevicePrimaryCtxRelease", kBase, driver.primary_release) ||
      !resolve(get, "cuCtxPushCurrent", kBase, driver.push) ||
      !resolve(get, "cuCtxPopCurrent", kBase, driver.pop) ||
      !resolve(get, "cuMemGetAddressRange", kBase, driver.address_range) ||
      !resolve(get, "cuPointerGetAttribute", kBase, driver.pointer_attribute)) {
    return no_driver("the NVIDIA driver lacks functions of CUDA 12.0");
  }
  // The version asked for decides the signature; a driver that lacks it leaves the path out.
  switch (batch_signature(driver.version)) {
    case BatchSignature::without_fail_index:
      resolve(get, "cuMemcpyBatchAsync", 13000, driver.batch_without_fail_index);
      break;
    case BatchSignature::with_fail_index:
      resolve(get, "cuMemcpyBatchAsync", 12080, driver.batch_with_fail_index);
      break;
    case BatchSignature::none: break;
  }
  return driver;
}

Status failed(const char* what, int number, const std::string& why) {
  if (is_capture_cuda_error(number)) {
    return Status::device(std::string(what) + ": a graph is being captured (" + why + ")", kCaptureConflict);
  }
  return Status::device(std::string(what) + ": " + why, number);
}

}  // namespace

Status to_status(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status::ok();
  // Our failure is told by our own Status; the framework shall not find it as its own last error.
  static_cast<void>(cudaGetLastError());
  const std::string why =
      std::string(cudaGetErrorName(error)) + ", " + std::string(cudaGetErrorString(error));
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    return Status::unsupported(std::string(what) + ": " + why);
  }
  return failed(what, error, why);
}

// Error numbers of the driver and of the runtime agree.
Status to_status(const char* what, CUresult error) {
  if (error == CUDA_SUCCESS) return Status::ok();
  return failed(what, error, "driver error " + std::to_string(error));
}

const Result<Driver>& Driver::get() {
  static const Result<Driver> driver = open_driver();
  return driver;
}

Result<std::shared_ptr<Context>> Context::open(int ordinal) {
  const Result<Driver>& driver = Driver::get();
  if (!driver) return driver.status();
  CUdevice device{};
  KVTIER_RETURN_IF_ERROR(to_status("cuDeviceGet", driver.value().device_get(&device, ordinal)));
  CUcontext context = nullptr;
  KVTIER_RETURN_IF_ERROR(
      to_status("cuDevicePrimaryCtxRetain", driver.value().primary_retain(&context, device)));
  return std::shared_ptr<Context>(new Context(driver.value(), ordinal, device, context));
}

Context::Context(const Driver& driver, int ordinal, CUdevice device, CUcontext context)
    : driver_(driver),
      ordinal_(ordinal),
      device_(device),
      context_(context),
      born_in_(process_generation()) {}

Context::~Context() {
  if (process_generation() == born_in_) static_cast<void>(driver_.primary_release(device_));
}

Scope::Scope(const Context& context) : context_(context) {
  if (process_generation() != context.born_in_) {
    status_ = Status::closed("this cuda device belongs to the parent process");
    return;
  }
  status_ = to_status("cuCtxPushCurrent", context.driver_.push(context.context_));
  if (!status_) return;
  exchanged_ = cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess;
}

Scope::~Scope() {
  if (!status_) return;
  if (exchanged_) static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_));
  CUcontext popped = nullptr;
  static_cast<void>(context_.driver_.pop(&popped));
}

}  // namespace kvtier::cuda

#endif
