// The long form of chaos_test: 500 steps and 20 kills a run. Run by tests/chaos/soak.sh, which says
// from which seed (CODISTILL_SOAK_SEED) and how often (CODISTILL_SOAK_RUNS).

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/chaos/chaos_run.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

constexpr int64_t kSteps = 500;
constexpr int kKills = 20;

uint64_t Setting(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  uint64_t value = otherwise;
  if (text != nullptr && !absl::SimpleAtoi(text, &value)) ADD_FAILURE() << name << "=" << text;
  return value;
}

TEST(SoakTest, EndsBitEqual) {
  JobHarness undisturbed(ChaosJob("calm", kSteps));
  const absl::StatusOr<Weights> expected = undisturbed.TrainToEnd();
  ASSERT_TRUE(expected.ok()) << expected.status();
  const uint64_t first = Setting("CODISTILL_SOAK_SEED", 1);
  const uint64_t runs = Setting("CODISTILL_SOAK_RUNS", 1);
  for (uint64_t seed = first; seed < first + runs; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    const auto result = TrainThroughChaos(ChaosJob(absl::StrCat("soak-", seed), kSteps), seed,
                                          SeededKills(seed, kKills, kSteps));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->weights.version.step(), kSteps);
    EXPECT_EQ(FirstBitDifference(*expected, result->weights), "");
    EXPECT_LE(result->longest_recovery, 10);
    std::fprintf(stderr, "seed %llu: %lld restores, longest recovery %.2f s\n",
                 static_cast<unsigned long long>(seed), static_cast<long long>(result->restores),
                 result->longest_recovery);
  }
}

}  // namespace
}  // namespace codistill
