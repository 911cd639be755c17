#include "kvtier/platform/cuda_codes.h"

#include <gtest/gtest.h>

namespace kvtier {
namespace {

TEST(CudaCodes, errors_that_end_the_context_are_sticky_and_others_are_not) {
  for (const int code : {214, 700, 702, 710, 715, 716, 717, 719, 999})
    EXPECT_TRUE(is_sticky_cuda_error(code));
  // success, invalid value, out of memory, no device, not ready, registered twice, launch configuration
  for (const int code : {0, 1, 2, 100, 600, 701, 712, 713, 801}) EXPECT_FALSE(is_sticky_cuda_error(code));
}

TEST(CudaCodes, what_a_capture_refuses_is_never_sticky) {
  for (int code = 0; code <= 1000; ++code) {
    EXPECT_FALSE(is_capture_cuda_error(code) && is_sticky_cuda_error(code)) << code;
    EXPECT_EQ(is_capture_cuda_error(code), code >= 900 && code <= 908) << code;
  }
}

TEST(CudaCodes, a_runtime_needs_a_driver_of_its_major_version) {
  EXPECT_TRUE(driver_fits_runtime(13000, 13000));
  EXPECT_TRUE(driver_fits_runtime(13000, 13020));  // minor versions are compatible
  EXPECT_TRUE(driver_fits_runtime(14000, 13000));
  EXPECT_FALSE(driver_fits_runtime(12090, 13000));
}

TEST(CudaCodes, the_batched_copy_changed_its_signature_in_13_0) {
  EXPECT_EQ(batch_signature(12070), BatchSignature::none);
  EXPECT_EQ(batch_signature(12080), BatchSignature::with_fail_index);
  EXPECT_EQ(batch_signature(12090), BatchSignature::with_fail_index);
  EXPECT_EQ(batch_signature(13000), BatchSignature::without_fail_index);
  EXPECT_EQ(batch_signature(13020), BatchSignature::without_fail_index);
}

}  // namespace
}  // namespace kvtier
