#include "control/report.h"

#include <functional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/config/teachers.h"
#include "control/svg_chart.h"
#include "google/protobuf/text_format.h"

namespace codistill {
namespace {

constexpr char kStyle[] = R"(
body { font: 15px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } .sub { color: #666; margin-top: 0; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; margin: .5rem 0; } svg text { font: 11px system-ui, sans-serif; fill: #555; }
svg .title { font-size: 14px; fill: #222; } svg .y, svg .legend { text-anchor: end; } svg .x { text-anchor: middle; }
svg .legend { font-size: 12px; }
svg .grid { stroke: #e5e5e5; } svg polyline { fill: none; stroke-width: 1.6; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12px; }
)";

// One chart with a series a group.
std::string GroupChart(const RunResult& result, const std::string& title, bool points,
                       const std::function<void(const GetHistoryReply&, ChartSeries*)>& fill) {
  std::vector<ChartSeries> series;
  for (int g = 0; g < result.job.groups_size(); ++g) {
    ChartSeries s;
    s.label = result.job.groups(g).name();
    s.color = g;
    s.points = points;
    fill(result.histories[g], &s);
    series.push_back(std::move(s));
  }
  return SvgChart(title, "step", series);
}

std::string TrainingChart(const RunResult& result, const std::string& title,
                          double (TrainingPoint::*value)() const, bool only_with_teacher) {
  return GroupChart(result, title, false, [&](const GetHistoryReply& history, ChartSeries* s) {
    for (const TrainingPoint& p : history.training()) {
      if (only_with_teacher && p.teacher_weight() <= 0) continue;
      s->xy.emplace_back(p.step(), (p.*value)());
    }
  });
}

std::string SummaryTable(const RunSummary& summary) {
  bool accuracy = false, auc = false;
  for (const GroupSummary& g : summary.groups()) {
    accuracy = accuracy || g.final().has_validation_accuracy();
    auc = auc || g.final().has_validation_auc();
  }
  const auto cell = [](bool shown, bool present, double value) {
    if (!shown) return std::string();
    return absl::StrCat("<td>", present ? absl::StrFormat("%.4f", value) : "", "</td>");
  };
  std::string out = absl::StrCat(
      "<table><tr><th>group</th><th>steps</th><th>examples/s</th><th>validation loss</th>",
      accuracy ? "<th>accuracy</th>" : "", auc ? "<th>AUC</th>" : "", "<th>restores</th></tr>\n");
  for (const GroupSummary& g : summary.groups()) {
    const FinalMetrics& f = g.final();
    absl::StrAppendFormat(
        &out, "<tr><td>%s</td><td>%d</td><td>%.0f</td><td>%.4f</td>%s%s<td>%d</td></tr>\n",
        EscapeHtml(g.name()), g.steps(), g.examples_per_second(), f.validation_loss(),
        cell(accuracy, f.has_validation_accuracy(), f.validation_accuracy()),
        cell(auc, f.has_validation_auc(), f.validation_auc()), g.restores());
  }
  return out + "</table>\n";
}

std::string TeacherTable(const RunSummary& summary) {
  std::string out =
      "<table><tr><th>group</th><th>teachers</th><th>first used at "
      "step</th><th>requests</th><th>failed</th>"
      "<th>steps without</th><th>staleness mean</th><th>max</th></tr>\n";
  for (const GroupSummary& g : summary.groups()) {
    const TeacherSummary& t = g.teacher();
    absl::StrAppendFormat(&out,
                          "<tr><td>%s</td><td>%s</td><td>%d</td><td>%d</td><td>%d</td><td>%d</td>"
                          "<td>%.1f</td><td>%d</td></tr>\n",
                          EscapeHtml(g.name()), EscapeHtml(absl::StrJoin(g.teachers(), ", ")),
                          t.first_step_used(), t.requests(), t.failures(), t.skipped_steps(),
                          t.mean_staleness_steps(), t.max_staleness_steps());
  }
  return out + "</table>\n";
}

}  // namespace

std::string ReportHtml(const RunResult& result, const RunSummary& summary) {
  const std::string name = EscapeHtml(summary.job());
  std::string out =
      absl::StrCat("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>", name,
                   "</title>\n<style>", kStyle, "</style></head><body>\n<h1>", name, "</h1>\n");
  absl::StrAppendFormat(&out, "<p class=\"sub\">%d group%s, %.0f s</p>\n", summary.groups_size(),
                        summary.groups_size() == 1 ? "" : "s", summary.wall_seconds());
  absl::StrAppend(&out, SummaryTable(summary));
  if (summary.groups_size() > 1 && summary.has_group_disagreement()) {
    absl::StrAppendFormat(&out,
                          "<p>The groups disagree by <b>%.5f</b>: mean |p<sub>a</sub> - "
                          "p<sub>b</sub>| over the validation set, codistillation %s.</p>\n",
                          summary.group_disagreement(), HasTeachers(result.job) ? "on" : "off");
  }
  out += GroupChart(result, "Validation loss (nats per label)", true,
                    [](const GetHistoryReply& history, ChartSeries* s) {
                      for (const EvaluationResult& e : history.evaluations()) {
                        s->xy.emplace_back(e.version().step(), e.loss());
                      }
                    });
  out += GroupChart(result, "Validation accuracy", true,
                    [](const GetHistoryReply& history, ChartSeries* s) {
                      for (const EvaluationResult& e : history.evaluations()) {
                        if (e.has_accuracy()) s->xy.emplace_back(e.version().step(), e.accuracy());
                      }
                    });
  out += TrainingChart(result, "Training loss on labels (nats per label)",
                       &TrainingPoint::label_loss, false);
  out += TrainingChart(result, "Distillation loss psi", &TrainingPoint::teacher_loss, true);
  out += TrainingChart(result, "Examples per second", &TrainingPoint::examples_per_second, false);
  if (HasTeachers(result.job)) {
    absl::StrAppend(&out, "<h2>Teachers</h2>\n", TeacherTable(summary));
  }
  std::string job;
  google::protobuf::TextFormat::PrintToString(result.job, &job);
  absl::StrAppend(&out, "<h2>Job</h2>\n<pre>", EscapeHtml(job), "</pre>\n</body></html>\n");
  return out;
}

}  // namespace codistill
