// A SYNC, FIXED group ends with the very same bits however its network and its processes behave.
// This is the short form; tests/chaos/soak.sh runs the long one.

#include <cstdint>
#include <set>
#include <string>

#include "gtest/gtest.h"
#include "tests/chaos/chaos_run.h"
#include "tests/integration/job_harness.h"
#include "tests/integration/weights.h"

namespace codistill {
namespace {

constexpr int64_t kSteps = 120;

TEST(ChaosTest, EndsBitEqualThroughLossesDuplicatesDelaysReorderingAndKills) {
  JobHarness undisturbed(ChaosJob("calm", kSteps));
  const absl::StatusOr<Weights> expected = undisturbed.TrainToEnd();
  ASSERT_TRUE(expected.ok()) << expected.status();

  const auto result = TrainThroughChaos(ChaosJob("chaos", kSteps), 1, SeededKills(1, 5, kSteps));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->weights.version.step(), kSteps);
  EXPECT_EQ(FirstBitDifference(*expected, result->weights), "");
  // It was not calm: two shards were lost, and calls met faults.
  EXPECT_GE(result->restores, 1);
  EXPECT_GT(result->faults, 0);
}

TEST(ChaosTest, KillsAreSeededAndMeetEveryKindOfProcess) {
  std::set<std::string> victims;
  int64_t last = 0;
  for (const Kill& kill : SeededKills(7, 20, 500)) {
    EXPECT_GT(kill.step, last);
    EXPECT_LT(kill.step, 450);
    last = kill.step;
    victims.insert(kill.victim);
  }
  EXPECT_EQ(victims.size(), 5u);
  const auto again = SeededKills(7, 20, 500);
  const auto other = SeededKills(8, 20, 500);
  bool differs = false;
  for (size_t i = 0; i < again.size(); ++i) {
    differs |= again[i].point != other[i].point || again[i].step != other[i].step;
  }
  EXPECT_TRUE(differs);
}

}  // namespace
}  // namespace codistill
