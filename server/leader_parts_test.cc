#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/history.h"
#include "server/membership.h"
#include "server/step_collector.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const absl::Time kNow = absl::FromUnixSeconds(1000);

RegisterRequest Process(int rank, uint64_t nonce) {
  RegisterRequest request;
  request.set_rank(rank);
  request.set_process_nonce(nonce);
  return request;
}

TEST(MembershipTest, NewestProcessOfARankWins) {
  Membership members("alpha", 2);
  EXPECT_EQ(members.Register(Process(2, 1), kNow).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(members.Register(Process(-1, 1), kNow).status().code(),
            absl::StatusCode::kInvalidArgument);
  const uint64_t first = members.Register(Process(1, 10), kNow).value();
  EXPECT_EQ(members.Register(Process(1, 10), kNow).value(), first);  // asked again
  EXPECT_FALSE(members.AllRegistered());
  EXPECT_THAT(members.Unregistered(), ElementsAre(0));
  const uint64_t second = members.Register(Process(1, 11), kNow).value();
  EXPECT_GT(second, first);
  EXPECT_EQ(members.Check(1, first, true).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(members.Check(1, first, false, 10).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(members.Check(1, second, true).ok());
  // Of itself, before a leader that has forgotten it gave it another: it is to ask, not to leave.
  EXPECT_EQ(members.Check(1, first, false, 11).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(members.Check(1, second + 1, true).code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(members.Check(1, second + 1, false).ok());
  // The loser cannot come back, or two processes would replace one another for ever.
  EXPECT_EQ(members.Register(Process(1, 10), kNow).status().code(),
            absl::StatusCode::kFailedPrecondition);
  // A leader that was restarted later still gives larger ones.
  Membership later("alpha", 2);
  EXPECT_GT(later.Register(Process(1, 12), kNow + absl::Seconds(1)).value(), second);
}

TEST(MembershipTest, CountersAddUpOverIncarnations) {
  Membership members("alpha", 2);
  const auto beat = [&](int rank, int64_t steps, int64_t first_used, int64_t staleness) {
    HeartbeatRequest request;
    request.set_rank(rank);
    request.mutable_counters()->set_steps(steps);
    request.mutable_counters()->set_first_step_used(first_used);
    request.mutable_counters()->set_max_staleness_steps(staleness);
    members.Heartbeat(request, kNow);
  };
  ASSERT_TRUE(members.Register(Process(0, 1), kNow).ok());
  ASSERT_TRUE(members.Register(Process(1, 2), kNow).ok());
  beat(0, 5, 0, 3);
  beat(1, 7, 31, 9);
  ASSERT_TRUE(members.Register(Process(0, 3), kNow).ok());
  beat(0, 2, 33, 4);
  WorkerCounters base;
  base.set_steps(100);
  members.Load(CheckpointManifest(), base);  // of a manifest without members
  EXPECT_EQ(members.Totals().steps(), 114);
  EXPECT_EQ(members.Totals().first_step_used(), 31);
  EXPECT_EQ(members.Totals().max_staleness_steps(), 9);
}

TEST(MembershipTest, AProcessThatOutlivesItsLeaderIsCountedOnce) {
  const auto beat = [&](Membership* members, int rank, int64_t steps) {
    HeartbeatRequest request;
    request.set_rank(rank);
    request.mutable_counters()->set_steps(steps);
    members->Heartbeat(request, kNow);
  };
  Membership first("alpha", 3);
  WorkerCounters base;
  base.set_steps(1000);
  first.Load(CheckpointManifest(), base);
  for (int rank = 0; rank < 3; ++rank) {
    ASSERT_TRUE(first.Register(Process(rank, 10 + rank), kNow).ok());
    beat(&first, rank, 7);
  }
  ASSERT_TRUE(first.Register(Process(0, 20), kNow).ok());
  beat(&first, 0, 5);
  CheckpointManifest manifest;
  first.Save(&manifest);
  EXPECT_EQ(first.Totals().steps(), 1026);

  Membership second("alpha", 2);  // with fewer workers: what they did was done
  second.Load(manifest, first.Totals());
  EXPECT_EQ(second.Totals().steps(), 1026);
  EXPECT_FALSE(second.registered(0));
  ASSERT_TRUE(second.Register(Process(0, 20), kNow).ok());  // survived
  ASSERT_TRUE(second.Register(Process(1, 30), kNow).ok());  // another process
  EXPECT_EQ(second.Totals().steps(), 1026);
  beat(&second, 0, 6);
  beat(&second, 1, 1);
  EXPECT_EQ(second.Totals().steps(), 1028);
  CheckpointManifest again;
  second.Save(&again);
  Membership third("alpha", 2);
  third.Load(again, second.Totals());
  EXPECT_EQ(third.Totals().steps(), 1028);
}

ReportEndRequest End(int rank, int shard, uint64_t incarnation, int64_t examples,
                     bool finite = true) {
  ReportEndRequest request;
  request.set_rank(rank);
  request.set_shard(shard);
  request.set_incarnation(incarnation);
  request.mutable_end()->set_num_examples(examples);
  request.mutable_end()->set_finite(finite);
  request.mutable_end()->set_label_loss_sum(2.0 * static_cast<double>(examples));
  request.mutable_end()->set_num_labels(examples);
  if (!finite) request.mutable_end()->set_not_finite_tensor("w");
  return request;
}

TEST(StepCollectorTest, NeedsEveryShardOfEveryRank) {
  StepCollector collector(2, 2);
  collector.Add(End(0, 0, 5, 4));
  collector.Add(End(0, 1, 5, 4));
  EXPECT_THAT(collector.Missing({0, 1}), ElementsAre(1));
  collector.Add(End(1, 1, 6, 8));
  collector.Add(End(1, 1, 6, 8));  // reported again
  EXPECT_FALSE(collector.Whole(1));
  collector.Add(End(1, 0, 6, 8));
  ASSERT_TRUE(collector.Whole(1));
  const StepCollector::Decision decision = collector.Decide({0, 1});
  ASSERT_EQ(decision.contributors.size(), 2u);
  EXPECT_EQ(decision.contributors[1].rank(), 1);
  EXPECT_EQ(decision.contributors[1].incarnation(), 6u);
  EXPECT_EQ(decision.contributors[1].num_examples(), 8);
  EXPECT_EQ(decision.statistics.examples, 12);
}

TEST(StepCollectorTest, AWorkerThatDiedBetweenTwoShardsIsNotMixedWithItsSuccessor) {
  StepCollector collector(1, 2);
  collector.Add(End(0, 0, 5, 4));
  collector.Add(End(0, 1, 6, 4));
  EXPECT_FALSE(collector.Whole(0));
  collector.Add(End(0, 0, 5, 4));  // the dead one's, late
  EXPECT_FALSE(collector.Whole(0));
  collector.Add(End(0, 0, 6, 4));
  ASSERT_TRUE(collector.Whole(0));
  EXPECT_EQ(collector.Decide({0}).contributors[0].incarnation(), 6u);
  collector.ForgetOlder(0, 7);
  EXPECT_FALSE(collector.Whole(0));
}

// What the leader's one decision is for: worker 1 was killed after its END had reached shard 0 and
// before shard 1 had it. partial_push_test.cc shows the same over real shards.
TEST(StepCollectorTest, DecidingOnEachShardAloneWouldMixMembers) {
  const std::vector<int32_t> members = {0, 1};
  const double gradients[] = {2, 10}, weight = 100, rate = 0.5;
  const auto model = [&](const StepCollector::Decision& decision) {
    double sum = 0, examples = 0;
    for (const Contributor& c : decision.contributors) {
      sum += static_cast<double>(c.num_examples()) * gradients[c.rank()];
      examples += static_cast<double>(c.num_examples());
    }
    return weight - rate * sum / examples;
  };
  StepCollector together(2, /*num_shards=*/2);
  std::vector<StepCollector> alone(2, StepCollector(2, /*num_shards=*/1));
  for (const auto& [rank, shard] : {std::pair(0, 0), std::pair(0, 1), std::pair(1, 0)}) {
    together.Add(End(rank, shard, 5, 4));
    alone[shard].Add(End(rank, shard, 5, 4));
  }
  // One decision: both shards take worker 0 alone.
  EXPECT_THAT(together.Missing(members), ElementsAre(1));
  EXPECT_THAT(together.Decide(members).dropped, ElementsAre(1));
  EXPECT_EQ(model(together.Decide(members)), 99);
  // Each by what it has: a model that no set of workers has computed.
  EXPECT_EQ(model(alone[0].Decide(members)), 97);
  EXPECT_EQ(model(alone[1].Decide(members)), 99);
}

TEST(StepCollectorTest, NotFiniteOnOneShardRejectsTheWholePush) {
  StepCollector collector(2, 2);
  collector.Add(End(0, 0, 1, 4));
  collector.Add(End(0, 1, 1, 4, /*finite=*/false));
  collector.Add(End(1, 0, 1, 4));
  collector.Add(End(1, 1, 1, 4));
  const StepCollector::Decision decision = collector.Decide({0, 1});
  EXPECT_THAT(decision.rejected, ElementsAre(0));
  EXPECT_THAT(decision.not_finite, ElementsAre("w"));
  ASSERT_EQ(decision.contributors.size(), 1u);
  EXPECT_EQ(decision.contributors[0].rank(), 1);
}

StepStatistics Statistics(double loss, int64_t labels, bool teacher = false) {
  StepStatistics statistics;
  statistics.examples = labels;
  statistics.labels = labels;
  statistics.label_loss_sum = loss * static_cast<double>(labels);
  if (teacher) {
    statistics.teacher_loss_sum = 3.0 * static_cast<double>(labels);
    statistics.teacher_labels = labels;
    statistics.teacher_weight = 0.5;
  }
  return statistics;
}

TEST(HistoryTest, AveragesOverWindows) {
  History history(2);
  history.AddStep(1, Statistics(1.0, 30), 0.1, 1.0, false);
  history.AddStep(2, Statistics(5.0, 10, true), 0.2, 2.0, false);
  history.AddStep(3, Statistics(7.0, 10), 0.3, 4.0, /*last=*/true);
  GetHistoryReply reply;
  history.Fill(&reply);
  ASSERT_EQ(reply.training_size(), 2);
  EXPECT_EQ(reply.training(0).step(), 2);
  EXPECT_DOUBLE_EQ(reply.training(0).label_loss(), 2.0);
  EXPECT_DOUBLE_EQ(reply.training(0).teacher_loss(), 3.0);
  EXPECT_DOUBLE_EQ(reply.training(0).examples_per_second(), 20.0);
  EXPECT_DOUBLE_EQ(reply.training(0).learning_rate(), 0.2);
  EXPECT_EQ(reply.training(1).step(), 3);
  EXPECT_DOUBLE_EQ(reply.training(1).examples_per_second(), 5.0);
  EXPECT_DOUBLE_EQ(reply.training(1).teacher_loss(), 0.0);
}

TEST(HistoryTest, StaysBoundedAndKeepsTheMean) {
  History history(1);
  const int64_t steps = 3 * History::kMaxPoints;
  for (int64_t step = 1; step <= steps; ++step) {
    history.AddStep(step, Statistics(static_cast<double>(step), 1), 0.1, static_cast<double>(step),
                    false);
    ASSERT_LE(history.points(), History::kMaxPoints);
  }
  GetHistoryReply reply;
  history.Fill(&reply);
  double sum = 0;
  int64_t previous = 0;
  for (const TrainingPoint& point : reply.training()) {
    sum += point.label_loss() * static_cast<double>(point.step() - previous);
    previous = point.step();
  }
  EXPECT_EQ(previous, steps);
  EXPECT_NEAR(sum, static_cast<double>(steps) * static_cast<double>(steps + 1) / 2, 1e-3);
}

TEST(HistoryTest, RollsBack) {
  History history(1);
  history.AddStep(1, Statistics(1.0, 1), 0.1, 1.0, false);
  EvaluationResult evaluation;
  evaluation.mutable_version()->set_step(1);
  evaluation.set_loss(4);
  history.AddEvaluation(evaluation);
  evaluation.set_loss(5);
  history.AddEvaluation(evaluation);  // measured again
  GetHistoryReply saved;
  history.Fill(&saved);
  ASSERT_EQ(saved.evaluations_size(), 1);
  EXPECT_EQ(saved.evaluations(0).loss(), 5);
  history.AddStep(2, Statistics(2.0, 1), 0.1, 2.0, false);
  // What was measured after the curves were saved: of the weights that stay, and of others.
  evaluation.set_loss(6);
  history.AddEvaluation(evaluation);
  evaluation.mutable_version()->set_step(0);
  history.AddEvaluation(evaluation);
  evaluation.mutable_version()->set_step(2);
  history.AddEvaluation(evaluation);
  history.Reset(saved, /*step=*/1, 10.0);
  EXPECT_EQ(history.points(), 1);
  GetHistoryReply kept;
  history.Fill(&kept);
  ASSERT_EQ(kept.evaluations_size(), 2);
  EXPECT_EQ(kept.evaluations(0).version().step(), 1);
  EXPECT_EQ(kept.evaluations(0).loss(), 6);
  EXPECT_EQ(kept.evaluations(1).version().step(), 0);
  history.AddStep(2, Statistics(3.0, 5), 0.1, 11.0, false);
  GetHistoryReply after;
  history.Fill(&after);
  EXPECT_DOUBLE_EQ(after.training(1).label_loss(), 3.0);
  EXPECT_DOUBLE_EQ(after.training(1).examples_per_second(), 5.0);
}

}  // namespace
}  // namespace codistill
