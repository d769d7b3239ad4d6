#include "common/base/tuned_start.h"

#include "gtest/gtest.h"

namespace codistill {
namespace {

using internal::TunablesWithHugePages;

TEST(TunedStartTest, HugePagesAreAskedForWhereTheKernelGivesThemOnDemand) {
  EXPECT_EQ(TunablesWithHugePages("", "always [madvise] never\n"), "glibc.malloc.hugetlb=1");
  EXPECT_EQ(TunablesWithHugePages("glibc.malloc.arena_max=2", "always [madvise] never\n"),
            "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1");
}

TEST(TunedStartTest, ElsewhereNothingChanges) {
  EXPECT_EQ(TunablesWithHugePages("", "[always] madvise never\n"), "");
  EXPECT_EQ(TunablesWithHugePages("", "always madvise [never]\n"), "");
  EXPECT_EQ(TunablesWithHugePages("", ""), "");
}

TEST(TunedStartTest, WhatIsSetStays) {
  EXPECT_EQ(TunablesWithHugePages("glibc.malloc.hugetlb=0", "always [madvise] never\n"), "");
  EXPECT_EQ(TunablesWithHugePages("glibc.malloc.hugetlb=1", "always [madvise] never\n"), "");
}

}  // namespace
}  // namespace codistill
