#ifndef CODISTILL_WORKER_TRAINING_PASS_H_
#define CODISTILL_WORKER_TRAINING_PASS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/model/model.h"
#include "common/tensor/tensor.h"
#include "cuda/loss.h"
#include "proto/job.pb.h"
#include "worker/batch_loss.h"
#include "worker/batch_part.h"
#include "worker/batch_pipeline.h"
#include "worker/teacher_source.h"

namespace codistill {

// Forward pass, loss and backward pass of one step on the weights that are in the model. Used by
// one thread.
//
// With training.micro_batches the batch is computed in so many parts, one after another, so that
// the graph of a part is all that memory must hold. Their gradients are added up in the model and
// leave during the backward pass of the last part; each part's loss counts by its share of the
// batch, so that the sum is the gradient of the whole batch's mean. Each part has dropout of its
// own, and batch norm sees the parts as batches.
class TrainingPass {
 public:
  struct Options {
    JobConfig job;
    int group = 0;
    int rank = 0;
    Model* model = nullptr;     // not owned
    BatchLoss* loss = nullptr;  // not owned; null: BatchLoss::Create's, where the model computes
    // What labels are smoothed towards (LabelPriorOf); empty: every class alike.
    std::vector<float> label_prior;
    absl::Duration test_delay;  // for tests: the computation takes so much longer
  };
  // INVALID_ARGUMENT: a loss that the kernel does not take.
  static absl::StatusOr<std::unique_ptr<TrainingPass>> Create(Options options);

  // What the teachers said of the batch; null = nothing, or they are not wanted. Called once, after
  // the (first part's) forward pass.
  using TakePredictions = std::function<absl::StatusOr<const TeacherPredictions*>()>;
  // Says who takes the gradients. Called once, when the loss is known and its gradients are about
  // to come: after every forward pass, so that the model's buffers are those after the step.
  using BeginGradients = std::function<Model::OnGradient()>;

  struct Result {
    LossSums sums;
    bool finite = true;
    bool used_teacher = false;  // in a part at least
  };
  // `inputs`: those of forward(), with rows of embedding tables in their places. `states` (in and
  // out): recurrent state. Errors are of model, data or teachers: the step would fail again.
  absl::StatusOr<Result> Run(const BatchPipeline::Step& step, const std::vector<Tensor>& inputs,
                             Model::States* states, const TakePredictions& take,
                             const BeginGradients& begin);

  // After Run: gradients with respect to the inputs with an embedding table, by index in
  // model.inputs; empty for others.
  const std::vector<Tensor>& InputGradients() const { return input_gradients_; }

 private:
  explicit TrainingPass(Options options);
  // `number` of the part, from 0, makes its dropout another one.
  absl::StatusOr<Model::Logits> Forward(const BatchPipeline::Step& step, const BatchPart& part,
                                        uint64_t number, const std::vector<Tensor>& inputs,
                                        Model::States* states);
  // Weight of the rows of a part in that of the whole batch.
  double ShareOf(const StudentBatch& batch, const LossInputs& part) const;
  // The loss of a part, from its logits to what is known once the backward pass is under way.
  struct PartLoss {
    Tensor gradient;
    bool pending = false;  // status and outputs are not known yet
    absl::Status status;
    LossOutputs outputs;
    bool used_teacher = false;
  };
  // `predictions`, of the whole batch, may be null.
  absl::StatusOr<PartLoss> BeginLoss(const BatchPipeline::Step& step, const BatchPart& part,
                                     const Model::Logits& logits,
                                     const TeacherPredictions* predictions);
  absl::StatusOr<Result> EndLoss(const BatchPipeline::Step& step, PartLoss loss);

  const Options options_;
  const LossOptions loss_options_;
  const uint64_t group_hash_;
  std::unique_ptr<BatchLoss> own_loss_;
  BatchLoss* loss_ = nullptr;
  std::vector<Tensor> input_gradients_;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_TRAINING_PASS_H_
