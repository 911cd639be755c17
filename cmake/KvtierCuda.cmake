# Decides KVTIER_HAVE_CUDA and enables the language. Without .cu sources there is nothing to compile, and
# the compiler is not even looked for. The runtime is linked statically: the module imports without a driver.
set(KVTIER_HAVE_CUDA OFF)
set(kvtier_cuda_said "!! CUDA: NOT COMPILED: no nvcc was found")
file(GLOB kvtier_cuda_sources CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/csrc/platform/*.cu" "${PROJECT_SOURCE_DIR}/csrc/transfer/*.cu")

if(KVTIER_CUDA STREQUAL "OFF")
  set(kvtier_cuda_said "!! CUDA: NOT COMPILED: KVTIER_CUDA is OFF")
elseif(kvtier_cuda_sources)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 100-virtual)
    endif()
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(KVTIER_HAVE_CUDA ON)
    list(JOIN CMAKE_CUDA_ARCHITECTURES ", " kvtier_cuda_said)
    string(REPLACE "-real" "" kvtier_cuda_said "${kvtier_cuda_said}")
    string(REPLACE "-virtual" " as PTX" kvtier_cuda_said "${kvtier_cuda_said}")
    string(CONCAT kvtier_cuda_said
      "CUDA: compiled for ${kvtier_cuda_said} with nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
  elseif(KVTIER_CUDA STREQUAL "ON")
    message(FATAL_ERROR "KVTIER_CUDA=ON, but no CUDA compiler was found")
  endif()
endif()
message(STATUS "kvtier: ${kvtier_cuda_said}")
file(WRITE "${PROJECT_BINARY_DIR}/kvtier-cuda.txt" "${kvtier_cuda_said}\n")  # `make build` shows it
