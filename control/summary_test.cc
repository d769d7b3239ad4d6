#include "control/summary.h"

#include "common/base/file.h"
#include "control/report.h"
#include "control/svg_chart.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

RunResult TwoGroups() {
  RunResult result;
  result.job.set_name("a<b");
  result.wall_seconds = 12.5;
  result.group_disagreement = 0.125;
  for (const char* name : {"alpha", "beta"}) {
    result.job.add_groups()->set_name(name);
    GetHistoryReply history;
    history.mutable_state()->mutable_version()->set_step(20);
    history.set_examples(640);
    history.set_training_seconds(2);
    history.set_restores(1);
    WorkerCounters* totals = history.mutable_totals();
    totals->set_push_bytes(1000);
    totals->set_pull_bytes(2000);
    totals->set_teacher_requests(11);
    totals->set_teacher_used_steps(10);
    totals->set_teacher_hedged(3);
    totals->set_teacher_late(2);
    totals->set_sum_prefetch_lag_steps(15);
    totals->add_teachers()->set_name("other");
    totals->set_sum_staleness_steps(45);
    totals->set_max_staleness_steps(9);
    totals->set_first_step_used(11);
    for (const int step : {10, 20}) {
      TrainingPoint* point = history.add_training();
      point->set_step(step);
      point->set_label_loss(3.0 / step);
      point->set_teacher_weight(step > 10 ? 1 : 0);
      point->set_teacher_loss(0.75);
    }
    EvaluationResult* last = history.add_evaluations();
    last->mutable_version()->set_step(20);
    last->set_loss(0.5);
    last->set_accuracy(0.875);
    last->set_final(true);
    // A late report of an earlier cut does not take the final one's place.
    EvaluationResult* late = history.add_evaluations();
    late->mutable_version()->set_step(10);
    late->set_loss(0.9);
    result.histories.push_back(history);
  }
  return result;
}

TEST(SummaryTest, TakesFinalEvaluationAndTotals) {
  const RunSummary summary = MakeSummary(TwoGroups());
  ASSERT_EQ(summary.groups_size(), 2);
  const GroupSummary& g = summary.groups(1);
  EXPECT_EQ(g.name(), "beta");
  EXPECT_EQ(g.steps(), 20);
  EXPECT_EQ(g.examples_per_second(), 320);
  EXPECT_EQ(g.final().validation_loss(), 0.5);
  EXPECT_EQ(g.final().validation_accuracy(), 0.875);
  EXPECT_FALSE(g.final().has_validation_auc());
  EXPECT_EQ(g.teacher().mean_staleness_steps(), 4.5);
  EXPECT_EQ(g.teacher().first_step_used(), 11);
  EXPECT_EQ(g.teacher().used_steps(), 10);
  EXPECT_EQ(g.teacher().hedged_requests(), 3);
  EXPECT_EQ(g.teacher().late_answers(), 2);
  EXPECT_EQ(g.teacher().mean_prefetch_lag_steps(), 1.5);
  ASSERT_EQ(g.teacher().teachers_size(), 1);
  EXPECT_EQ(g.teacher().teachers(0).name(), "other");
  EXPECT_EQ(g.push_bytes(), 1000u);
  EXPECT_THAT(g.teachers(), ElementsAre("alpha"));
  EXPECT_EQ(g.restores(), 1);
  EXPECT_THAT(SummaryText(summary), HasSubstr("groups disagree by 0.12500"));
}

TEST(SummaryTest, NamesTheTeachersOfOneGroup) {
  RunResult result = TwoGroups();
  result.job.mutable_groups()->RemoveLast();
  EXPECT_THAT(ReportHtml(result, MakeSummary(result)), Not(HasSubstr("<h2>Teachers</h2>")));
  for (const char* name : {"old<", "older"}) {
    TeacherConfig* teacher = result.job.add_teachers();
    teacher->set_name(name);
    teacher->mutable_frozen()->set_archive("a.pt");
  }
  const RunSummary summary = MakeSummary(result);
  EXPECT_THAT(summary.groups(0).teachers(), ElementsAre("old<", "older"));
  EXPECT_THAT(ReportHtml(result, summary),
              HasSubstr("<tr><td>alpha</td><td>old&lt;, older</td><td>11</td><td>11</td>"));
}

TEST(SummaryTest, LeavesOutWhatWasNotMeasured) {
  RunResult result = TwoGroups();
  result.group_disagreement.reset();
  // The whole set, but an older cut.
  result.histories[0].mutable_evaluations(0)->mutable_version()->set_step(10);
  result.histories[1].clear_evaluations();
  const RunSummary summary = MakeSummary(result);
  EXPECT_FALSE(summary.has_group_disagreement());
  EXPECT_FALSE(summary.groups(0).has_final());
  EXPECT_FALSE(summary.groups(1).has_final());
  EXPECT_THAT(SummaryText(summary), Not(HasSubstr("disagree")));
  EXPECT_THAT(SummaryText(summary), Not(HasSubstr("validation loss")));
}

TEST(SummaryTest, CsvIsOrderedByStep) {
  const std::string csv = MetricsCsv(TwoGroups());
  EXPECT_EQ(csv.substr(0, csv.find('\n')), "group,step,name,value");
  EXPECT_THAT(csv, HasSubstr("\nalpha,20,validation_accuracy,0.875\n"));
  EXPECT_THAT(csv, HasSubstr("\nbeta,10,validation_loss,0.9\n"));
  EXPECT_THAT(csv, Not(HasSubstr("alpha,10,teacher_loss")));
  EXPECT_LT(csv.find("alpha,10,validation_loss"), csv.find("alpha,20,validation_loss"));
}

TEST(SummaryTest, ReadsDisagreementOrNamesTheFile) {
  const std::string path = ::testing::TempDir() + "/evaluation.json";
  ASSERT_TRUE(WriteFileAtomically(path, "{\"group_disagreement\": 0.25}").ok());
  EXPECT_EQ(*ReadDisagreement(path), 0.25);
  ASSERT_TRUE(WriteFileAtomically(path, "{\"group_disagreement\": ").ok());
  EXPECT_THAT(std::string(ReadDisagreement(path).status().message()), HasSubstr(path));
}

TEST(ReportTest, IsSelfContainedAndEscaped) {
  const RunResult result = TwoGroups();
  const std::string html = ReportHtml(result, MakeSummary(result));
  EXPECT_THAT(html, HasSubstr("<title>a&lt;b</title>"));
  EXPECT_THAT(html, HasSubstr("Validation loss"));
  EXPECT_THAT(html, HasSubstr("<polyline"));
  EXPECT_THAT(html, Not(HasSubstr("http")));
  EXPECT_THAT(html, Not(HasSubstr("<script")));
}

TEST(SvgChartTest, TicksAreRound) {
  EXPECT_THAT(RoundTicks(0, 10, 5), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_THAT(RoundTicks(0.1, 0.9, 4), ElementsAre(0.2, 0.4, 0.6000000000000001, 0.8));
  EXPECT_TRUE(RoundTicks(1, 1, 4).empty());
}

TEST(SvgChartTest, LeavesOutWhatIsNotFinite) {
  ChartSeries series;
  series.label = "alpha";
  EXPECT_EQ(SvgChart("t", "x", {series}), "");
  series.xy = {{1, 0.0 / 0.0}, {2, 3}, {4, 5}};
  const std::string svg = SvgChart("t", "x", {series});
  EXPECT_THAT(svg, HasSubstr("<svg"));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
}

}  // namespace
}  // namespace codistill
