#include "worker/training_pass.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "common/base/trace.h"
#include "glog/logging.h"
#include "worker/loss_options.h"

namespace codistill {

absl::StatusOr<std::unique_ptr<TrainingPass>> TrainingPass::Create(Options options) {
  auto pass = std::unique_ptr<TrainingPass>(new TrainingPass(std::move(options)));
  CODISTILL_RETURN_IF_ERROR(
      Annotate(ValidateLossOptions(pass->loss_options_, pass->options_.job.model().num_outputs(),
                                   /*teach=*/false),
               "model and codistillation"));
  pass->loss_ = pass->options_.loss;
  if (pass->loss_ == nullptr) {
    CODISTILL_ASSIGN_OR_RETURN(pass->own_loss_,
                               BatchLoss::Create(pass->loss_options_, pass->options_.model,
                                                 pass->options_.job.training().worker_threads()));
    pass->loss_ = pass->own_loss_.get();
  }
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
  const StudentBatch& batch = step.batch;
  const ModelConfig& model = options_.job.model();
  const std::vector<BatchPart> parts =
      SplitBatch(batch.examples, batch.rows, options_.job.training().micro_batches());
  // Of a step that came to nothing after some of its parts.
  if (parts.size() > 1) options_.model->ForgetGradients();
  input_gradients_.assign(inputs.size(), Tensor());
  Result total;
  Model::States states_after;
  const TeacherPredictions* predictions = nullptr;
  for (size_t p = 0; p < parts.size(); ++p) {
    const BatchPart& part = parts[p];
    std::vector<Tensor> part_inputs;
    for (const Tensor& input : inputs) {
      part_inputs.push_back(Slice(input, batch.examples, part.first, part.examples));
    }
    Model::States part_states = CutStates(model, *states, part);
    TraceSpan forward("compute", "forward");
    forward.Arg("step", step.assignment.step());
    CODISTILL_ASSIGN_OR_RETURN(Model::Logits logits,
                               Forward(step, part, p, part_inputs, &part_states));
    forward.End();
    if (p == 0) {
      if (options_.test_delay > absl::ZeroDuration()) absl::SleepFor(options_.test_delay);
      CODISTILL_ASSIGN_OR_RETURN(predictions, take());
    }
    TraceSpan computing("compute", "loss");
    computing.Arg("step", step.assignment.step());
    CODISTILL_ASSIGN_OR_RETURN(PartLoss begun, BeginLoss(step, part, logits, predictions));
    computing.End();
    logits.values = Tensor();  // the graph keeps what the backward pass needs
    const bool last = p + 1 == parts.size();
    const Model::OnGradient on_gradient = last ? begin() : Model::OnGradient();
    TraceSpan backward("compute", "backward");
    backward.Arg("step", step.assignment.step());
    if (last) {
      CODISTILL_RETURN_IF_ERROR(options_.model->Backward(begun.gradient, on_gradient));
    } else {
      CODISTILL_RETURN_IF_ERROR(options_.model->Accumulate(begun.gradient));
    }
    backward.End();
    CODISTILL_ASSIGN_OR_RETURN(const Result loss, EndLoss(step, std::move(begun)));
    total.sums.label_loss_sum += loss.sums.label_loss_sum;
    total.sums.teacher_loss_sum += loss.sums.teacher_loss_sum;
    total.sums.weight_sum += loss.sums.weight_sum;
    total.sums.counted_rows += loss.sums.counted_rows;
    total.sums.correct += loss.sums.correct;
    total.finite = total.finite && loss.finite;
    total.used_teacher = total.used_teacher || loss.used_teacher;
    PutStates(model, part, part_states, batch.examples, &states_after);
    for (size_t i = 0; i < inputs.size(); ++i) {
      PutExamples(part, options_.model->InputGradient(static_cast<int>(i)), batch.examples,
                  &input_gradients_[i]);
    }
  }
  *states = std::move(states_after);
  return total;
}

absl::StatusOr<Model::Logits> TrainingPass::Forward(const BatchPipeline::Step& step,
                                                    const BatchPart& part, uint64_t number,
                                                    const std::vector<Tensor>& inputs,
                                                    Model::States* states) {
  uint64_t seed = Mix(options_.job.seed(), group_hash_, step.assignment.step(), options_.rank);
  if (number > 0) seed = Mix(seed, number);
  CODISTILL_ASSIGN_OR_RETURN(
      Model::Logits logits,
      options_.model->Forward(inputs, options_.job.model().states_size() > 0 ? states : nullptr,
                              seed));
  const StudentBatch& batch = step.batch;
  if (logits.rows * batch.examples != part.examples * batch.rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the model gives ", logits.rows, " rows of logits for ",
        part.examples == batch.examples ? "" : absl::StrCat(part.examples, " examples of "),
        "a batch of ", batch.examples, " examples with ", batch.rows, " labels"));
  }
  return logits;
}

double TrainingPass::ShareOf(const StudentBatch& batch, const LossInputs& part) const {
  if (part.rows == batch.rows) return 1;
  LossInputs whole;
  whole.rows = batch.rows;
  if (!batch.labels.empty()) whole.labels = batch.labels.As<int64_t>().data();
  const double weight = WeightOf(loss_options_, whole);
  return weight > 0 ? WeightOf(loss_options_, part) / weight : 0;
}

absl::StatusOr<TrainingPass::PartLoss> TrainingPass::BeginLoss(
    const BatchPipeline::Step& step, const BatchPart& part, const Model::Logits& logits,
    const TeacherPredictions* predictions) {
  const StudentBatch& batch = step.batch;
  LossInputs inputs;
  inputs.rows = logits.rows;
  inputs.classes = options_.job.model().num_outputs();
  if (logits.values.dtype() == DT_BFLOAT16) inputs.logits_format = NumberFormat::kBfloat16;
  const auto rows_of = [&part, &batch](const auto& all) {
    return Slice(all, batch.rows, part.first_row, part.rows);
  };
  // Views, as long as what they are cut from.
  const Tensor labels = rows_of(batch.labels), targets = rows_of(batch.targets);
  if (!labels.empty()) inputs.labels = labels.As<int64_t>().data();
  if (!targets.empty()) inputs.targets = targets.As<float>().data();
  inputs.gradient_scale = ShareOf(batch, inputs);
  if (!options_.label_prior.empty()) inputs.label_prior = options_.label_prior.data();
  std::vector<DenseTeacher> teachers;
  std::vector<TopKTeacher> topk_teachers;
  if (predictions != nullptr) {
    for (const Tensor& all : predictions->logits) {
      teachers.push_back(DenseTeacherOf(rows_of(all)));
    }
    for (const TopKPrediction& all : predictions->top_k) {
      topk_teachers.push_back(TopKTeacherOf(rows_of(all)));
    }
  }
  inputs.teachers = teachers;
  inputs.topk_teachers = topk_teachers;
  const bool taught = !teachers.empty() || !topk_teachers.empty();
  inputs.teacher_weight = taught ? step.assignment.teacher_weight() : 0;
  PartLoss loss;
  const auto begin = [&]() -> absl::Status {
    CODISTILL_ASSIGN_OR_RETURN(loss.gradient, loss_->Begin(inputs, logits.values));
    // A device goes on with the backward pass while nobody knows yet what it finds in the batch.
    // But what a teacher has wrong is to be left out before any gradient leaves.
    loss.pending = loss_->asynchronous() && inputs.teacher_weight == 0;
    loss.outputs = LossOutputs();
    return loss.pending ? absl::OkStatus() : loss_->End(&loss.outputs);
  };
  loss.status = begin();
  if (absl::IsInvalidArgument(loss.status) && inputs.teacher_weight > 0) {
    // A teacher that has diverged, or names classes that make no distribution, must not take its
    // students along: the labels alone, if they can.
    const std::string wrong(loss.status.message());
    inputs.teacher_weight = 0;
    loss.status = begin();
    LOG_IF(WARNING, loss.status.ok())
        << "step " << step.assignment.step() << ": " << wrong << "; left out";
  }
  loss.used_teacher = inputs.teacher_weight > 0;
  if (!loss.status.ok() && loss.outputs.finite) {
    return Annotate(loss.status, absl::StrCat("step ", step.assignment.step()));
  }
  return loss;
}

absl::StatusOr<TrainingPass::Result> TrainingPass::EndLoss(const BatchPipeline::Step& step,
                                                           PartLoss loss) {
  if (loss.pending) loss.status = loss_->End(&loss.outputs);
  LOG_IF(WARNING, !loss.status.ok() && !loss.outputs.finite)
      << "step " << step.assignment.step() << ": " << loss.status.message();
  // What is not finite is the leader's to reject, as it is in the gradient of any other worker.
  if (!loss.status.ok() && loss.outputs.finite) {
    return Annotate(loss.status, absl::StrCat("step ", step.assignment.step()));
  }
  return Result{loss.outputs.sums, loss.outputs.finite, loss.used_teacher};
}

}  // namespace codistill
