// KVTIER_HOST_DEVICE: functions that both the GPU's kernels and the CPU run, so that the tests without a GPU
// run the kernels' own address arithmetic.
#pragma once

#if defined(__CUDACC__)
#define KVTIER_HOST_DEVICE __host__ __device__
#else
#define KVTIER_HOST_DEVICE
#endif
