// What GPUs there are, and how they hang on the machine.
#ifdef KVTIER_HAVE_CUDA

#include <algorithm>
#include <cctype>
#include <charconv>
#include <fstream>
#include <string>
#include <system_error>

#include "cuda_driver.h"

namespace kvtier {
namespace {

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

Result<GpuFacts> facts_of(int ordinal) {
  cudaDeviceProp properties{};
  KVTIER_RETURN_IF_ERROR(
      cuda::to_status("cudaGetDeviceProperties", cudaGetDeviceProperties(&properties, ordinal)));
  GpuFacts facts;
  facts.ordinal = ordinal;
  facts.name = properties.name;
  facts.compute_capability = properties.major * 10 + properties.minor;
  facts.num_sms = properties.multiProcessorCount;
  facts.memory_bytes = properties.totalGlobalMem;
  char bus[32] = {};
  KVTIER_RETURN_IF_ERROR(
      cuda::to_status("cudaDeviceGetPCIBusId", cudaDeviceGetPCIBusId(bus, sizeof bus, ordinal)));
  facts.pci_bus = bus;
  std::transform(facts.pci_bus.begin(), facts.pci_bus.end(), facts.pci_bus.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const std::string folder = "/sys/bus/pci/devices/" + facts.pci_bus + "/";
  // The largest, for the link of an idle GPU runs slower.
  const std::string speed = read_line(folder + "max_link_speed");
  const std::string width = read_line(folder + "max_link_width");
  facts.link = speed.empty() || width.empty() ? "unknown" : speed + " x" + width;
  const std::string node = read_line(folder + "numa_node");
  int number = 0;
  const auto [end, error] = std::from_chars(node.data(), node.data() + node.size(), number);
  if (error == std::errc() && end != node.data() && number >= 0) facts.numa_node = number;  // -1: not known
  return facts;
}

}  // namespace

Result<CudaFacts> cuda_facts() {
  const Result<cuda::Driver>& driver = cuda::Driver::get();
  if (!driver) return driver.status();
  CudaFacts facts;
  facts.driver_version = driver.value().version;
  facts.runtime_version = CUDART_VERSION;
  int count = 0;
  KVTIER_RETURN_IF_ERROR(cuda::to_status("cudaGetDeviceCount", cudaGetDeviceCount(&count)));
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    Result<GpuFacts> gpu = facts_of(ordinal);
    if (!gpu) return gpu.status();
    facts.gpus.push_back(std::move(*gpu));
  }
  return facts;
}

Result<int> cuda_ordinal_of(const void* memory) {
  const Result<cuda::Driver>& driver = cuda::Driver::get();
  if (!driver) return driver.status();
  int ordinal = 0;
  if (driver.value().pointer_attribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                                       reinterpret_cast<CUdeviceptr>(memory)) != CUDA_SUCCESS) {
    return Status::invalid_argument("the driver does not know the memory as a GPU's");
  }
  return ordinal;
}

}  // namespace kvtier

#endif
