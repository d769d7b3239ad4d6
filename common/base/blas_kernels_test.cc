#include "common/base/blas_kernels.h"

#include <stdlib.h>

#include <string>

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

TEST(BlasKernelsTest, ProgramsWithoutOpenBlasStayAsTheyAre) { EXPECT_FALSE(ChooseBlasKernels()); }

TEST(BlasKernelsTest, WhatIsSetForOneDnnStays) {
  setenv("ONEDNN_MAX_CPU_ISA", "AVX2", 1);
  AvoidTilesOfUnknownShape();
  EXPECT_STREQ(getenv("ONEDNN_MAX_CPU_ISA"), "AVX2");
  // An environment that has been taken care of is not changed again.
  unsetenv("ONEDNN_MAX_CPU_ISA");
  AvoidTilesOfUnknownShape();
  const char* const first = getenv("ONEDNN_MAX_CPU_ISA");
  const std::string kept = first == nullptr ? "" : first;
  AvoidTilesOfUnknownShape();
  const char* const second = getenv("ONEDNN_MAX_CPU_ISA");
  EXPECT_EQ(kept, second == nullptr ? "" : second);
  EXPECT_TRUE(kept.empty() || kept == "AVX512_CORE_BF16") << kept;
}

}  // namespace
}  // namespace codistill
