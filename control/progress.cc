#include "control/progress.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "control/json_output.h"

namespace codistill {

std::string ClockTime(double seconds) {
  if (!(seconds >= 0) || seconds > 1e7) return "?";
  const int64_t s = std::llround(seconds);
  if (s >= 3600) return absl::StrFormat("%d:%02d:%02d", s / 3600, s / 60 % 60, s % 60);
  return absl::StrFormat("%d:%02d", s / 60, s % 60);
}

std::string ProgressLine(const DaemonStatus& leader) {
  const GroupState& state = leader.group_state();
  const GetHistoryReply& history = leader.history();
  const int64_t step = state.version().step();
  std::string line = absl::StrFormat("%-8s step %*d/%d", leader.group(),
                                     static_cast<int>(absl::StrCat(state.stop_steps()).size()),
                                     step, state.stop_steps());
  if (state.phase() != GroupState::TRAINING && state.phase() != GroupState::FINISHED) {
    absl::StrAppend(&line, "  ", leader.state());
    if (!leader.detail().empty()) absl::StrAppend(&line, " (", leader.detail(), ")");
  }
  if (history.training_size() > 0) {
    const TrainingPoint& last = history.training(history.training_size() - 1);
    absl::StrAppendFormat(&line, "  loss %.3f", last.label_loss());
    if (last.teacher_weight() > 0) absl::StrAppendFormat(&line, " + psi %.3f", last.teacher_loss());
  }
  if (history.evaluations_size() > 0) {
    const EvaluationResult& last = history.evaluations(history.evaluations_size() - 1);
    absl::StrAppendFormat(&line, "  val %.3f", last.loss());
    if (last.has_accuracy()) absl::StrAppendFormat(&line, " acc %.3f", last.accuracy());
  }
  double rate = 0;
  for (const MemberStatus& member : leader.members()) {
    rate += member.counters().examples_per_second();
  }
  if (state.phase() == GroupState::FINISHED) {
    rate = history.training_seconds() > 0 ? history.examples() / history.training_seconds() : 0;
  }
  if (rate > 0) absl::StrAppendFormat(&line, "  %.0f examples/s", rate);
  const WorkerCounters& totals = history.totals();
  if (totals.teacher_used_steps() > 0) {
    absl::StrAppendFormat(
        &line, "  teacher age %.0f",
        static_cast<double>(totals.sum_staleness_steps()) / totals.teacher_used_steps());
  }
  if (state.phase() == GroupState::FINISHED) {
    absl::StrAppend(&line, "  done in ", ClockTime(history.training_seconds()));
  } else if (step > 0 && leader.rate() > 0) {
    absl::StrAppend(&line, "  ETA ", ClockTime((state.stop_steps() - step) / leader.rate()));
  }
  return line;
}

ProgressDisplay::ProgressDisplay(std::FILE* out, bool terminal, bool json)
    : out_(out), terminal_(terminal && !json), json_(json) {}

void ProgressDisplay::Say(const std::string& line) {
  if (json_) return;
  if (terminal_ && lines_on_screen_ > 0) {
    std::fprintf(out_, "\033[%dA\033[J", lines_on_screen_);
    lines_on_screen_ = 0;
  }
  std::fprintf(out_, "%s\n", line.c_str());
  std::fflush(out_);
}

void ProgressDisplay::Print(const std::vector<DaemonStatus>& leaders) {
  if (terminal_ && lines_on_screen_ > 0) std::fprintf(out_, "\033[%dA\033[J", lines_on_screen_);
  for (const DaemonStatus& leader : leaders) {
    if (json_) {
      DaemonStatus brief = leader;
      // The curves are in metrics.csv; a line of progress needs the last point only.
      auto* training = brief.mutable_history()->mutable_training();
      if (training->size() > 1) training->DeleteSubrange(0, training->size() - 1);
      brief.mutable_group_state()->clear_shard_map();
      std::fprintf(out_, "%s\n", ToJson(brief, 0).c_str());
    } else {
      std::fprintf(out_, "%s\n", ProgressLine(leader).c_str());
    }
  }
  lines_on_screen_ = static_cast<int>(leaders.size());
  std::fflush(out_);
}

void ProgressDisplay::Update(const std::vector<DaemonStatus>& leaders, absl::Time now) {
  if (leaders.empty()) return;
  if (now - last_ < (terminal_ ? absl::Seconds(1) : absl::Seconds(5))) return;
  last_ = now;
  Print(leaders);
}

void ProgressDisplay::Finish(const std::vector<DaemonStatus>& leaders) {
  if (!leaders.empty()) Print(leaders);
  lines_on_screen_ = 0;
}

}  // namespace codistill
