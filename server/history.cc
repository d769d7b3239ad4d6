#include "server/history.h"

#include <algorithm>
#include <utility>

namespace codistill {
namespace {

double Ratio(double numerator, double denominator) {
  return denominator > 0 ? numerator / denominator : 0;
}

}  // namespace

void History::AddStep(int64_t step, const StepStatistics& statistics, double learning_rate,
                      double seconds, bool last) {
  window_.examples += statistics.examples;
  window_.label_loss_sum += statistics.label_loss_sum;
  window_.labels += statistics.labels;
  window_.teacher_loss_sum += statistics.teacher_loss_sum;
  window_.teacher_labels += statistics.teacher_labels;
  window_.teacher_weight = statistics.teacher_weight;
  if (step % window_steps_ != 0 && !last) return;

  TrainingPoint* const point = curves_.add_training();
  point->set_step(step);
  point->set_label_loss(Ratio(window_.label_loss_sum, static_cast<double>(window_.labels)));
  point->set_teacher_loss(
      Ratio(window_.teacher_loss_sum, static_cast<double>(window_.teacher_labels)));
  point->set_examples_per_second(
      Ratio(static_cast<double>(window_.examples), seconds - window_begin_seconds_));
  point->set_learning_rate(learning_rate);
  point->set_seconds(seconds);
  point->set_teacher_weight(window_.teacher_weight);
  window_ = StepStatistics();
  window_begin_seconds_ = seconds;
  if (curves_.training_size() > kMaxPoints) Thin();
}

void History::Thin() {
  GetHistoryReply thinned;
  int64_t previous_step = 0;
  for (int i = 0; i < curves_.training_size(); i += 2) {
    const TrainingPoint& a = curves_.training(i);
    TrainingPoint* const merged = thinned.add_training();
    *merged = a;
    if (i + 1 < curves_.training_size()) {
      const TrainingPoint& b = curves_.training(i + 1);
      *merged = b;
      const double share = Ratio(static_cast<double>(a.step() - previous_step),
                                 static_cast<double>(b.step() - previous_step));
      const auto mix = [share](double x, double y) { return share * x + (1 - share) * y; };
      merged->set_label_loss(mix(a.label_loss(), b.label_loss()));
      merged->set_examples_per_second(mix(a.examples_per_second(), b.examples_per_second()));
      if (a.teacher_weight() > 0) {
        merged->set_teacher_loss(mix(a.teacher_loss(), b.teacher_loss()));
      }
    }
    previous_step = merged->step();
  }
  curves_.mutable_training()->Swap(thinned.mutable_training());
}

void History::AddEvaluation(const EvaluationResult& result) {
  for (EvaluationResult& known : *curves_.mutable_evaluations()) {
    if (known.version().generation() == result.version().generation() &&
        known.version().step() == result.version().step()) {
      known = result;
      return;
    }
  }
  *curves_.add_evaluations() = result;
  if (curves_.evaluations_size() > kMaxPoints) {
    curves_.mutable_evaluations()->DeleteSubrange(0, 1);
  }
}

void History::Fill(GetHistoryReply* reply) const {
  *reply->mutable_training() = curves_.training();
  *reply->mutable_evaluations() = curves_.evaluations();
}

void History::Reset(const GetHistoryReply& saved, int64_t step, double seconds) {
  const GetHistoryReply before = std::move(curves_);
  curves_.Clear();
  *curves_.mutable_training() = saved.training();
  *curves_.mutable_evaluations() = saved.evaluations();
  for (const EvaluationResult& result : before.evaluations()) {
    if (result.version().step() <= step) AddEvaluation(result);
  }
  window_ = StepStatistics();
  window_begin_seconds_ = seconds;
}

}  // namespace codistill
