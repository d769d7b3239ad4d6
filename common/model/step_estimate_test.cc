#include "common/model/step_estimate.h"

#include "gtest/gtest.h"

namespace codistill {
namespace {

const absl::Time kBegin = absl::FromUnixSeconds(1000);

GroupState State(uint64_t generation, int64_t step,
                 GroupState::Phase phase = GroupState::TRAINING) {
  GroupState state;
  state.set_phase(phase);
  state.mutable_version()->set_generation(generation);
  state.mutable_version()->set_step(step);
  state.set_stop_steps(10000);
  return state;
}

// 20 steps a second, told every 50 ms, for five seconds.
StepEstimate Steady(GroupState::Phase last = GroupState::TRAINING) {
  StepEstimate estimate;
  for (int i = 0; i <= 100; ++i) {
    estimate.Told(State(1, i, i == 100 ? last : GroupState::TRAINING),
                  kBegin + absl::Milliseconds(50) * i);
  }
  return estimate;
}

constexpr absl::Duration kSteady = absl::Seconds(5);

TEST(StepEstimateTest, WhileTheLeaderSpeaksItsWordCounts) {
  EXPECT_EQ(StepEstimate().At(kBegin), 0);
  const StepEstimate estimate = Steady();
  EXPECT_EQ(estimate.At(kBegin + kSteady), 100);
  EXPECT_EQ(estimate.At(kBegin + kSteady + StepEstimate::kPatience), 100);
}

TEST(StepEstimateTest, InSilenceTheGroupIsTakenToGoOn) {
  const StepEstimate estimate = Steady();
  EXPECT_EQ(estimate.At(kBegin + kSteady + absl::Seconds(2)), 140);
  EXPECT_EQ(estimate.At(kBegin + kSteady + absl::Seconds(60)), 1300);
  EXPECT_EQ(estimate.At(kBegin + kSteady + absl::Hours(10)), 10000);  // not past its end
}

TEST(StepEstimateTest, AGroupThatStoodStillIsNotTakenToMove) {
  for (const auto phase : {GroupState::PAUSED, GroupState::FINISHED, GroupState::FAILED}) {
    EXPECT_EQ(Steady(phase).At(kBegin + absl::Hours(1)), 100);
  }
}

TEST(StepEstimateTest, AnotherGenerationCountsAnew) {
  StepEstimate estimate = Steady();
  estimate.Told(State(2, 40), kBegin + kSteady);
  EXPECT_EQ(estimate.At(kBegin + kSteady), 40);
  EXPECT_EQ(estimate.At(kBegin + kSteady + absl::Seconds(9)), 40);  // no rate is known yet
}

}  // namespace
}  // namespace codistill
