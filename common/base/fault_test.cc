#include "common/base/fault.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <string>

#include "gtest/gtest.h"

namespace codistill {
namespace {

FaultRule Rule(const std::string& point, FaultKind kind) {
  FaultRule rule;
  rule.point = point;
  rule.kind = kind;
  return rule;
}

TEST(FaultTest, NothingHappensWithoutLeave) {
  FaultInjector faults;
  const absl::Status status = faults.SetRules(1, {Rule("*", FaultKind::kKill)});
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(status.message().find("--allow_fault_injection"), std::string::npos) << status;
  EXPECT_FALSE(faults.Hit("anything").any());
}

TEST(FaultTest, RulesMatchOnePointOrAllThatBeginSo) {
  FaultInjector faults;
  faults.Enable();
  ASSERT_TRUE(faults
                  .SetRules(1, {Rule("shard.commit", FaultKind::kDrop),
                                Rule("rpc:/codistill.Leader/*", FaultKind::kDropReply)})
                  .ok());
  EXPECT_TRUE(faults.Hit("shard.commit").drop);
  EXPECT_FALSE(faults.Hit("shard.commit.applied").any());
  EXPECT_TRUE(faults.Hit("rpc:/codistill.Leader/Register").drop_reply);
  EXPECT_FALSE(faults.Hit("rpc:/codistill.Shard/Commit").any());
}

TEST(FaultTest, AfterAndTimesBoundWhichHitsAreMeant) {
  FaultInjector faults;
  faults.Enable();
  FaultRule rule = Rule("p", FaultKind::kDuplicate);
  rule.after = 2;
  rule.times = 3;
  ASSERT_TRUE(faults.SetRules(1, {rule}).ok());
  std::string seen;
  for (int i = 0; i < 8; ++i) seen += faults.Hit("p").duplicate ? 'x' : '.';
  EXPECT_EQ(seen, "..xxx...");
  EXPECT_EQ(faults.counts()[0].hits, 8);
  EXPECT_EQ(faults.counts()[0].faults, 3);
}

TEST(FaultTest, TheSameSeedDrawsTheSameFaults) {
  const auto draw = [](uint64_t seed) {
    FaultInjector faults;
    faults.Enable();
    FaultRule rule = Rule("p", FaultKind::kDelay);
    rule.probability = 0.3;
    rule.delay = absl::Milliseconds(7);
    EXPECT_TRUE(faults.SetRules(seed, {rule}).ok());
    std::string drawn;
    for (int i = 0; i < 1000; ++i)
      drawn += faults.Hit("p").delay > absl::ZeroDuration() ? '1' : '0';
    return drawn;
  };
  const std::string one = draw(1);
  EXPECT_EQ(one, draw(1));
  EXPECT_NE(one, draw(2));
  EXPECT_NEAR(std::count(one.begin(), one.end(), '1'), 300, 60);
}

TEST(FaultTest, BadRulesAreRefusedByNameAndChangeNothing) {
  FaultInjector faults;
  faults.Enable();
  ASSERT_TRUE(faults.SetRules(1, {Rule("p", FaultKind::kDrop)}).ok());
  FaultRule rule = Rule("q", FaultKind::kDrop);
  rule.probability = 1.5;
  const absl::Status status = faults.SetRules(1, {Rule("p", FaultKind::kKill), rule});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("rules[1]"), std::string::npos) << status;
  EXPECT_NE(status.message().find("probability"), std::string::npos) << status;
  EXPECT_TRUE(faults.Hit("p").drop);
}

TEST(FaultDeathTest, AKillIsASignalNobodyCatches) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_EXIT(
      {
        FaultInjector::Global().Enable();
        FaultRule rule = Rule("here", FaultKind::kKill);
        rule.after = 1;
        if (!FaultInjector::Global().SetRules(1, {rule}).ok()) _exit(3);
        FaultPoint("here");
        FaultPoint("elsewhere");
        FaultPoint("here");
        _exit(4);
      },
      testing::KilledBySignal(SIGKILL), "");
}

}  // namespace
}  // namespace codistill
