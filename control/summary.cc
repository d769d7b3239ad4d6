#include "control/summary.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/base/file.h"
#include "common/base/status.h"
#include "common/config/teachers.h"
#include "nlohmann/json.hpp"

namespace codistill {
namespace {

// The measurement of the last cut on the whole validation set; null if there was none.
const EvaluationResult* FinalEvaluation(const GetHistoryReply& history) {
  const EvaluationResult* last = nullptr;
  for (const EvaluationResult& e : history.evaluations()) {
    if (e.final() && e.version().step() == history.state().version().step()) last = &e;
  }
  return last;
}

}  // namespace

absl::StatusOr<double> ReadDisagreement(const std::string& evaluation_file) {
  CODISTILL_ASSIGN_OR_RETURN(const std::string text, ReadFile(evaluation_file, 1 << 20));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("group_disagreement") ||
      !json["group_disagreement"].is_number()) {
    return absl::DataLossError(
        absl::StrCat(evaluation_file, ": no number \"group_disagreement\" in it"));
  }
  return json["group_disagreement"].get<double>();
}

RunSummary MakeSummary(const RunResult& result) {
  RunSummary summary;
  summary.set_job(result.job.name());
  summary.set_wall_seconds(result.wall_seconds);
  if (result.group_disagreement) summary.set_group_disagreement(*result.group_disagreement);
  for (int g = 0; g < result.job.groups_size(); ++g) {
    const GetHistoryReply& history = result.histories[g];
    const WorkerCounters& totals = history.totals();
    GroupSummary* group = summary.add_groups();
    group->set_name(result.job.groups(g).name());
    for (const TeacherRef& teacher : TeachersOf(result.job, g)) group->add_teachers(teacher.name);
    group->set_steps(history.state().version().step());
    group->set_examples(history.examples());
    if (history.training_seconds() > 0) {
      group->set_examples_per_second(history.examples() / history.training_seconds());
    }
    if (const EvaluationResult* e = FinalEvaluation(history)) {
      FinalMetrics* final = group->mutable_final();
      final->set_validation_loss(e->loss());
      if (e->has_accuracy()) final->set_validation_accuracy(e->accuracy());
      if (e->has_auc()) final->set_validation_auc(e->auc());
    }
    group->set_push_bytes(totals.push_bytes());
    group->set_pull_bytes(totals.pull_bytes());
    group->set_restores(history.restores());
    *group->mutable_pushes() = history.pushes();
    *group->mutable_membership() = history.membership();
    TeacherSummary* teacher = group->mutable_teacher();
    teacher->set_requests(totals.teacher_requests());
    teacher->set_failures(totals.teacher_failures());
    teacher->set_skipped_steps(totals.teacher_skipped_steps());
    teacher->set_used_steps(totals.teacher_used_steps());
    teacher->set_hedged_requests(totals.teacher_hedged());
    teacher->set_late_answers(totals.teacher_late());
    *teacher->mutable_teachers() = totals.teachers();
    teacher->set_first_step_used(totals.first_step_used());
    teacher->set_max_staleness_steps(totals.max_staleness_steps());
    if (totals.teacher_used_steps() > 0) {
      teacher->set_mean_staleness_steps(static_cast<double>(totals.sum_staleness_steps()) /
                                        totals.teacher_used_steps());
      teacher->set_mean_prefetch_lag_steps(static_cast<double>(totals.sum_prefetch_lag_steps()) /
                                           totals.teacher_used_steps());
    }
  }
  return summary;
}

std::string MetricsCsv(const RunResult& result) {
  std::string out = "group,step,name,value\n";
  for (int g = 0; g < result.job.groups_size(); ++g) {
    const std::string& name = result.job.groups(g).name();
    std::multimap<int64_t, std::string> lines;
    const auto add = [&](int64_t step, absl::string_view metric, double value) {
      lines.emplace(step, absl::StrFormat("%s,%d,%s,%.9g\n", name, step, metric, value));
    };
    const GetHistoryReply& history = result.histories[g];
    for (const TrainingPoint& p : history.training()) {
      add(p.step(), "train_loss", p.label_loss());
      if (p.teacher_weight() > 0) add(p.step(), "teacher_loss", p.teacher_loss());
      add(p.step(), "teacher_weight", p.teacher_weight());
      add(p.step(), "learning_rate", p.learning_rate());
      add(p.step(), "examples_per_second", p.examples_per_second());
      add(p.step(), "seconds", p.seconds());
    }
    for (const EvaluationResult& e : history.evaluations()) {
      add(e.version().step(), "validation_loss", e.loss());
      if (e.has_accuracy()) add(e.version().step(), "validation_accuracy", e.accuracy());
      if (e.has_auc()) add(e.version().step(), "validation_auc", e.auc());
    }
    for (const auto& [step, line] : lines) out += line;
  }
  return out;
}

std::string SummaryText(const RunSummary& summary) {
  std::string out;
  for (const GroupSummary& g : summary.groups()) {
    absl::StrAppendFormat(&out, "%-8s %d steps, %.0f examples/s", g.name(), g.steps(),
                          g.examples_per_second());
    if (g.has_final()) {
      absl::StrAppendFormat(&out, ", validation loss %.4f", g.final().validation_loss());
    }
    if (g.final().has_validation_accuracy()) {
      absl::StrAppendFormat(&out, ", accuracy %.4f", g.final().validation_accuracy());
    }
    if (g.final().has_validation_auc()) {
      absl::StrAppendFormat(&out, ", AUC %.4f", g.final().validation_auc());
    }
    if (g.teacher().requests() > 0) {
      absl::StrAppendFormat(
          &out,
          "\n         teacher used from step %d, %d requests, %d failed, %d steps "
          "without, staleness mean %.1f max %d steps",
          g.teacher().first_step_used(), g.teacher().requests(), g.teacher().failures(),
          g.teacher().skipped_steps(), g.teacher().mean_staleness_steps(),
          g.teacher().max_staleness_steps());
    }
    PushCounts answers;
    for (const RankPushes& rank : g.pushes()) {
      const PushCounts& c = rank.counts();
      answers.set_applied(answers.applied() + c.applied());
      answers.set_dropped_late(answers.dropped_late() + c.dropped_late());
      answers.set_too_stale(answers.too_stale() + c.too_stale());
      answers.set_rejected(answers.rejected() + c.rejected());
      answers.set_lost(answers.lost() + c.lost() + c.refused());
    }
    if (answers.dropped_late() + answers.too_stale() + answers.rejected() + answers.lost() > 0) {
      absl::StrAppendFormat(&out,
                            "\n         answers to pushes: %d applied, %d dropped late, %d too "
                            "stale, %d rejected, %d refused or lost",
                            answers.applied(), answers.dropped_late(), answers.too_stale(),
                            answers.rejected(), answers.lost());
    }
    absl::StrAppend(&out, "\n");
  }
  if (summary.groups_size() > 1 && summary.has_group_disagreement()) {
    absl::StrAppendFormat(&out,
                          "groups disagree by %.5f (mean |p_a - p_b| on the validation set)\n",
                          summary.group_disagreement());
  }
  return out;
}

}  // namespace codistill
