#include "server/member_plan.h"

#include <cstdint>
#include <optional>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace codistill {
namespace {

TEST(MemberPlanTest, IsAPureFunctionOfStepAndRankWhileNobodyComesOrGoes) {
  MemberPlan plan(/*batch=*/4);
  plan.Reset(10, 1000, {{0, 0}, {1, 0}, {2, 0}});
  for (int64_t step = 11; step < 20; ++step) {
    for (int32_t rank = 0; rank < 3; ++rank) {
      EXPECT_EQ(plan.FirstExample(step, rank), 1000u + (step - 11) * 12 + rank * 4);
    }
    EXPECT_EQ(plan.NextExample(step), 1000u + (step - 10) * 12);
  }
  EXPECT_EQ(plan.NextExample(10), 1000u);
  EXPECT_EQ(plan.FirstExample(11, 3), std::nullopt);
  EXPECT_TRUE(plan.Has(11, 2, 77));  // whichever process
}

TEST(MemberPlanTest, ChangesConcernLaterStepsOnly) {
  MemberPlan plan(4);
  plan.Reset(0, 0, {{0, 5}, {1, 6}});
  plan.ChangeFrom(4, {{0, 5}, {1, 6}, {3, 9}});
  plan.ChangeFrom(6, {{3, 9}});
  EXPECT_EQ(plan.FirstExample(3, 1), 20u);
  EXPECT_EQ(plan.FirstExample(4, 0), 24u);
  EXPECT_EQ(plan.FirstExample(4, 3), 32u);
  EXPECT_EQ(plan.FirstExample(5, 3), 44u);
  EXPECT_EQ(plan.FirstExample(6, 3), 48u);
  EXPECT_EQ(plan.FirstExample(6, 0), std::nullopt);
  EXPECT_EQ(plan.NextExample(6), 52u);
  EXPECT_FALSE(plan.Has(4, 3, 8));
  EXPECT_TRUE(plan.Has(4, 3, 9));
  // Before anybody was given step 5 it changes again: what was planned for later goes with it.
  plan.ChangeFrom(5, {{1, 6}});
  EXPECT_EQ(plan.FirstExample(4, 3), 32u);
  EXPECT_EQ(plan.FirstExample(5, 1), 36u);
  EXPECT_EQ(plan.FirstExample(6, 1), 40u);
  plan.Forget(5);
  EXPECT_EQ(plan.FirstExample(6, 1), 40u);
  EXPECT_EQ(plan.NextExample(5), 40u);
  // From the very first step known on.
  plan.ChangeFrom(6, {{7, 1}});
  EXPECT_EQ(plan.FirstExample(6, 7), 40u);
  plan.Forget(100);
  EXPECT_EQ(plan.FirstExample(101, 7), 40u + 95 * 4);
}

TEST(MemberPlanTest, NoExampleIsGivenTwiceHoweverMembersChange) {
  MemberPlan plan(2);
  plan.Reset(0, 0, {{0, 1}});
  std::set<uint64_t> given;
  uint64_t state = 1;
  for (int64_t step = 1; step <= 2000; ++step) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    if ((state >> 60) < 4) {
      std::vector<MemberPlan::Member> members;
      for (int32_t rank = 0; rank < 6; ++rank) {
        if ((state >> (40 + rank)) & 1) members.push_back({rank, 1});
      }
      plan.ChangeFrom(step + static_cast<int64_t>((state >> 50) % 3), members);
    }
    for (const MemberPlan::Member& member : plan.At(step)) {
      const uint64_t first = plan.FirstExample(step, member.rank).value();
      EXPECT_TRUE(given.insert(first).second && given.insert(first + 1).second) << step;
    }
    plan.Forget(step);
    ASSERT_EQ(plan.NextExample(step), given.size());  // nor is any left out
  }
}

}  // namespace
}  // namespace codistill
