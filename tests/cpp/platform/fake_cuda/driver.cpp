// What kvtier asks libcuda.so.1 for.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>

#include "machine.h"

using fake_cuda::Machine;

namespace {

constexpr int kVersion = CUDA_VERSION;

CUcontext context_of(CUdevice device) {
  return reinterpret_cast<CUcontext>(static_cast<std::uintptr_t>(device) + 1);  // NOLINT: never followed
}

CUresult device_get(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < fake_cuda::kNumGpus ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult primary_retain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}

CUresult primary_release(CUdevice) { return CUDA_SUCCESS; }

CUresult push(CUcontext context) {
  fake_cuda::context_stack().push_back(context);
  return CUDA_SUCCESS;
}

CUresult pop(CUcontext* context) {
  if (fake_cuda::context_stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = fake_cuda::context_stack().back();
  fake_cuda::context_stack().pop_back();
  return CUDA_SUCCESS;
}

const void* pointer(CUdeviceptr address) {
  return reinterpret_cast<const void*>(static_cast<std::uintptr_t>(address));  // NOLINT: CUDA's own type
}

CUresult address_range(CUdeviceptr* base, std::size_t* size, CUdeviceptr address) {
  const auto [begin, bytes] = Machine::get().allocation_of(pointer(address));
  if (begin == nullptr) return CUDA_ERROR_NOT_FOUND;
  *base = reinterpret_cast<CUdeviceptr>(begin);
  *size = bytes;
  return CUDA_SUCCESS;
}

CUresult pointer_attribute(void* ordinal, CUpointer_attribute, CUdeviceptr address) {
  if (Machine::get().allocation_of(pointer(address)).first == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<int*>(ordinal) = 0;
  return CUDA_SUCCESS;
}

CUresult batch(CUdeviceptr* to, CUdeviceptr* from, std::size_t* sizes, std::size_t count,
               CUmemcpyAttributes* attributes, std::size_t* first, std::size_t num_attributes,
               CUstream stream) {
  if (count == 0 || num_attributes != 1 || *first != 0) return CUDA_ERROR_INVALID_VALUE;
  if (attributes->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM) return CUDA_ERROR_INVALID_VALUE;
  // The legacy default stream is refused.
  if (stream == nullptr || stream == cudaStreamLegacy) return CUDA_ERROR_INVALID_VALUE;
  struct Copy {
    void* to;
    const void* from;
    std::size_t bytes;
  };
  auto copies = std::make_shared<std::vector<Copy>>();
  for (std::size_t i = 0; i < count; ++i) {
    if (sizes[i] == 0) return CUDA_ERROR_INVALID_VALUE;
    if (!Machine::get().reaches(pointer(to[i]), sizes[i]) ||
        !Machine::get().reaches(pointer(from[i]), sizes[i])) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    copies->push_back({const_cast<void*>(pointer(to[i])), pointer(from[i]), sizes[i]});
  }
  std::shuffle(copies->begin(), copies->end(), std::mt19937(Machine::get().random()));
  const auto run = [copies] {
    for (const Copy& copy : *copies) std::memcpy(copy.to, copy.from, copy.bytes);
  };
  Machine::get().submit(stream, {run, nullptr, nullptr});
  return CUDA_SUCCESS;
}

template <typename Function>
void* address_of(Function* function) {
  return reinterpret_cast<void*>(function);
}

void* function_named(std::string_view name, int wanted) {
  if (name == "cuDeviceGet") return address_of(device_get);
  if (name == "cuDevicePrimaryCtxRetain") return address_of(primary_retain);
  if (name == "cuDevicePrimaryCtxRelease") return address_of(primary_release);
  if (name == "cuCtxPushCurrent") return address_of(push);
  if (name == "cuCtxPopCurrent") return address_of(pop);
  if (name == "cuMemGetAddressRange") return address_of(address_range);
  if (name == "cuPointerGetAttribute") return address_of(pointer_attribute);
  if (name == "cuMemcpyBatchAsync" && wanted == 13000) return address_of(batch);
  return nullptr;
}

}  // namespace

#undef cuGetProcAddress

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* found) {
  *found = kVersion;
  return CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char* name, void** address, int wanted, cuuint64_t,
                             CUdriverProcAddressQueryResult*) {
  *address = function_named(name, wanted);
  return *address == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

}  // extern "C"
