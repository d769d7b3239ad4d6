#include "common/base/blas_kernels.h"

#include "gtest/gtest.h"

namespace codistill {
namespace {

using internal::BetterBlasKernels;

TEST(BlasKernelsTest, OldKernelsOnNewProcessorsAreReplaced) {
  EXPECT_EQ(BetterBlasKernels("Prescott", true, true), "SkylakeX");
  EXPECT_EQ(BetterBlasKernels("Prescott", true, false), "Haswell");
  EXPECT_EQ(BetterBlasKernels("Nehalem", true, false), "Haswell");
  EXPECT_EQ(BetterBlasKernels("Prescott", false, false), "");
}

TEST(BlasKernelsTest, WhatItHasChosenForTheProcessorStays) {
  for (const char* chosen : {"Haswell", "Zen", "SkylakeX", "Cooperlake", "Sapphirerapids", ""}) {
    EXPECT_EQ(BetterBlasKernels(chosen, true, true), "") << chosen;
  }
}

TEST(BlasKernelsTest, ProgramsWithoutOpenBlasGoOn) {
  char name[] = "test";
  char* argv[] = {name, nullptr};
  RestartWithFastBlas(argv);
}

}  // namespace
}  // namespace codistill
