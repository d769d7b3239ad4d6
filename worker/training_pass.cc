#include "worker/training_pass.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "glog/logging.h"
#include "worker/loss_options.h"

namespace codistill {

absl::StatusOr<std::unique_ptr<TrainingPass>> TrainingPass::Create(Options options) {
  auto pass = std::unique_ptr<TrainingPass>(new TrainingPass(std::move(options)));
  CODISTILL_RETURN_IF_ERROR(
      Annotate(ValidateLossOptions(pass->loss_options_, pass->options_.job.model().num_outputs(),
                                   /*teach=*/false),
               "model and codistillation"));
  return pass;
}

TrainingPass::TrainingPass(Options options)
    : options_(std::move(options)),
      loss_options_(LossOptionsOf(options_.job)),
      group_hash_(HashString(options_.job.groups(options_.group).name())) {}

absl::StatusOr<TrainingPass::Result> TrainingPass::Run(const BatchPipeline::Step& step,
                                                       const std::vector<Tensor>& inputs,
                                                       Model::States* states,
                                                       const TakePredictions& take,
                                                       const BeginGradients& begin) {
  CODISTILL_ASSIGN_OR_RETURN(Model::Logits logits, Forward(step, inputs, states));
  if (options_.test_delay > absl::ZeroDuration()) absl::SleepFor(options_.test_delay);
  CODISTILL_ASSIGN_OR_RETURN(const TeacherPredictions* const predictions, take());
  CODISTILL_ASSIGN_OR_RETURN(const Result result, ComputeLoss(step, logits, predictions));
  logits.values = Tensor();  // the graph keeps what the backward pass needs
  CODISTILL_RETURN_IF_ERROR(options_.model->Backward(gradient_, begin()));
  return result;
}

std::vector<Tensor> TrainingPass::InputGradients() const {
  std::vector<Tensor> gradients;
  for (int i = 0; i < options_.job.model().inputs_size(); ++i) {
    gradients.push_back(options_.model->InputGradient(i));
  }
  return gradients;
}

absl::StatusOr<Model::Logits> TrainingPass::Forward(const BatchPipeline::Step& step,
                                                    const std::vector<Tensor>& inputs,
                                                    Model::States* states) {
  const uint64_t seed =
      Mix(options_.job.seed(), group_hash_, step.assignment.step(), options_.rank);
  CODISTILL_ASSIGN_OR_RETURN(
      Model::Logits logits,
      options_.model->Forward(inputs, options_.job.model().states_size() > 0 ? states : nullptr,
                              seed));
  if (logits.rows != step.batch.rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("the model gives ", logits.rows, " rows of logits for a batch of ",
                     step.batch.examples, " examples with ", step.batch.rows, " labels"));
  }
  return logits;
}

absl::StatusOr<TrainingPass::Result> TrainingPass::ComputeLoss(
    const BatchPipeline::Step& step, const Model::Logits& logits,
    const TeacherPredictions* predictions) {
  LossInputs inputs;
  inputs.rows = logits.rows;
  inputs.classes = options_.job.model().num_outputs();
  inputs.logits = logits.values.As<float>().data();
  if (!step.batch.labels.empty()) inputs.labels = step.batch.labels.As<int64_t>().data();
  if (!step.batch.targets.empty()) inputs.targets = step.batch.targets.As<float>().data();
  std::vector<DenseTeacher> teachers;
  std::vector<TopKTeacher> topk_teachers;
  if (predictions != nullptr) {
    for (const Tensor& tensor : predictions->logits) {
      teachers.emplace_back().values = tensor.As<float>().data();
    }
    for (const TopKPrediction& top_k : predictions->top_k) {
      topk_teachers.push_back(TopKTeacherOf(top_k));
    }
  }
  inputs.teachers = teachers;
  inputs.topk_teachers = topk_teachers;
  const bool taught = !teachers.empty() || !topk_teachers.empty();
  inputs.teacher_weight = taught ? step.assignment.teacher_weight() : 0;
  if (gradient_.empty() || gradient_.shape() != logits.values.shape()) {
    gradient_ = Tensor::Allocate(DT_FLOAT, logits.values.shape());
  }
  const int threads = options_.job.training().worker_threads();
  LossOutputs outputs;
  outputs.gradient = gradient_.As<float>().data();
  absl::Status status = ComputeLossCpu(loss_options_, inputs, &outputs, threads);
  if (!status.ok() && inputs.teacher_weight > 0) {
    // A teacher that has diverged, or names classes that make no distribution, must not take its
    // students along: the labels alone, if they can.
    const std::string wrong(status.message());
    inputs.teacher_weight = 0;
    status = ComputeLossCpu(loss_options_, inputs, &outputs, threads);
    LOG_IF(WARNING, status.ok()) << "step " << step.assignment.step() << ": " << wrong
                                 << "; left out";
  }
  // What is not finite is the leader's to reject, as it is in the gradient of any other worker.
  if (!status.ok() && outputs.finite) {
    return Annotate(status, absl::StrCat("step ", step.assignment.step()));
  }
  return Result{outputs.sums, outputs.finite, inputs.teacher_weight > 0};
}

}  // namespace codistill
