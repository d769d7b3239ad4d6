#include "worker/worker_progress.h"

#include "absl/time/time.h"
#include "common/base/simulated_clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::HasSubstr;

WorkerProgress::StepReport Applied(int64_t step, int64_t examples) {
  WorkerProgress::StepReport report;
  report.step = step;
  report.outcome = APPLIED;
  report.examples = examples;
  return report;
}

TEST(WorkerProgressTest, RateIsThatOfTheLastFewSeconds) {
  SimulatedClock clock;
  WorkerProgress progress(nullptr, &clock);
  EXPECT_EQ(progress.counters().examples_per_second(), 0);
  int64_t step = 0;
  for (int i = 0; i < 100; ++i) {  // 20 s of 500 examples/s
    clock.Advance(absl::Milliseconds(200));
    progress.StepDone(Applied(++step, 100));
  }
  EXPECT_NEAR(progress.counters().examples_per_second(), 500, 1);
  for (int i = 0; i < 50; ++i) {  // 10 s of 50
    clock.Advance(absl::Milliseconds(200));
    progress.StepDone(Applied(++step, 10));
  }
  EXPECT_NEAR(progress.counters().examples_per_second(), 50, 1);
  clock.Advance(absl::Seconds(100));
  EXPECT_LT(progress.counters().examples_per_second(), 5) << "a worker that waits gets slower";
}

TEST(WorkerProgressTest, StatusPage) {
  WorkerProgress progress(nullptr);
  EXPECT_EQ(progress.state(), "starting");
  EXPECT_EQ(progress.description(), "starting");
  progress.SetState("waiting", "for the next step");
  progress.SetGeneration(4);
  progress.StepDone(Applied(12, 7));
  DaemonStatus status;
  progress.FillStatus(&status);
  EXPECT_EQ(status.state(), "waiting");
  EXPECT_EQ(status.detail(), "for the next step");
  EXPECT_EQ(progress.description(), "waiting for the next step");
  EXPECT_EQ(status.step(), 12);
  EXPECT_EQ(status.generation(), 4u);
  EXPECT_EQ(status.rate_unit(), "examples/s");
  EXPECT_EQ(status.worker().examples(), 7);
}

TEST(WorkerProgressTest, TimesAndTeachers) {
  WorkerProgress progress(nullptr);
  progress.AddTime(WorkerProgress::kCompute, absl::Milliseconds(300));
  progress.AddTime(WorkerProgress::kPull, absl::Milliseconds(200));
  progress.AddTime(WorkerProgress::kPush, absl::Milliseconds(100));
  WorkerProgress::StepReport report = Applied(5, 1);
  report.wanted_teacher = true;
  progress.StepDone(report);
  report.step = 6;
  report.used_teacher = true;
  report.staleness_steps = 9;
  progress.StepDone(report);
  report.step = 7;
  report.staleness_steps = 4;
  progress.StepDone(report);
  const WorkerCounters counters = progress.counters();
  EXPECT_NEAR(counters.compute_seconds(), 0.3, 1e-9);
  EXPECT_NEAR(counters.wait_seconds(), 0.3, 1e-9);
  EXPECT_EQ(counters.teacher_skipped_steps(), 1);
  EXPECT_EQ(counters.teacher_used_steps(), 2);
  EXPECT_EQ(counters.first_step_used(), 6);
  EXPECT_EQ(counters.max_staleness_steps(), 9);
  EXPECT_EQ(counters.sum_staleness_steps(), 13);
}

TEST(WorkerProgressTest, MetricsFollow) {
  const auto metrics = Metrics::Create({{"group", "alpha"}});
  WorkerProgress progress(metrics.get());
  WorkerProgress::StepReport report = Applied(5, 3);
  report.push_bytes = 100;
  progress.StepDone(report);
  report.outcome = REJECTED;
  progress.StepDone(report);
  progress.AddPulled(50);
  progress.AddTime(WorkerProgress::kCompute, absl::Seconds(2));
  TeacherSource::Counters teachers;
  teachers.requests = 7;
  teachers.failures = 2;
  progress.SetTeachers(teachers);
  const TeacherSource::Counters before = teachers;
  teachers.requests = 9;
  teachers.refused = 1;
  teachers.hedged = 3;
  teachers.late = 4;
  teachers.teachers = {{"beta", teachers}};
  progress.SetTeachers(teachers);
  // Heartbeats take snapshots too, and may come late with theirs.
  progress.SetTeachers(before);
  EXPECT_EQ(progress.counters().teacher_requests(), 9);
  progress.SetTeachers(teachers);
  const std::string text = metrics->Text();
  EXPECT_THAT(text, HasSubstr("codistill_worker_steps_total{group=\"alpha\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_examples_total{group=\"alpha\"} 3\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_push_bytes_total{group=\"alpha\"} 200\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_pull_bytes_total{group=\"alpha\"} 50\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_teacher_requests_total{group=\"alpha\"} 9\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_teacher_failures_total{group=\"alpha\"} 2\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_teacher_refused_total{group=\"alpha\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_teacher_hedged_total{group=\"alpha\"} 3\n"));
  EXPECT_THAT(text, HasSubstr("codistill_worker_teacher_late_total{group=\"alpha\"} 4\n"));
  ASSERT_EQ(progress.counters().teachers_size(), 1);
  EXPECT_EQ(progress.counters().teachers(0).name(), "beta");
  EXPECT_EQ(progress.counters().teachers(0).late(), 4);
  EXPECT_THAT(text, HasSubstr("outcome=\"applied\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("outcome=\"rejected\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("activity=\"compute\"} 2\n"));
}

}  // namespace
}  // namespace codistill
