// The loss of a training step and its gradient with respect to the logits, in one go:
//
//   loss = sum over rows of w_r [ phi(label, logits) + weight * psi(teachers, logits) ] / sum w_r
//
// phi is the ordinary loss, psi the distillation term (Anil et al., ICLR 2018; temperature as in
// Hinton et al. 2015). The framework that computed the logits only has to propagate the gradient.
// w_r is the weight of a row, 1 where nothing else is said. Rows *count* unless their label is the
// ignored one or their weight is 0; only rows that count are in the sums, the others have a
// gradient of 0 and neither their logits nor their teachers are looked at.
//
// Below, z are a row's logits, C its number of classes, T the temperature, t_k the logits of
// teacher k of K. phi:
//   softmax cross-entropy     -sum_c y_c log softmax(z)_c, y the one-hot label smoothed by s:
//                             (1 - s) onehot + s u, u uniform (1 / C) or a prior (label_prior)
//   sigmoid cross-entropy     mean_c of -y_c log sigmoid(z_c) - (1 - y_c) log sigmoid(-z_c),
//   targets
//                             smoothed by s: (1 - s) y + s / 2
//   squared error             mean_c of (z_c - y_c)^2 / 2
// psi, with p = softmax(z / T) and q the teachers' average, either mean_k q_k, where q_k is
// softmax(t_k / T) or what the teacher itself gives as probabilities, or softmax(mean_k t_k / T):
//   soft cross-entropy        -T^2 sum_c q_c log p_c
//   KL(teacher || student)     T^2 sum_c q_c log(q_c / p_c)      (the same gradient)
//   KL(student || teacher)     T^2 sum_c p_c log(p_c / q_c)
//   squared error of logits   mean_c of (z_c - mean_k t_kc)^2 / 2, T and the kind of average being
//                             without effect
// A teacher may also name its k most likely classes, q_1 to q_k, and what all others have together,
// t. The others are then one alternative more, with P = sum of p over them; within it the teacher
// has no say, so that its tail is spread as the student's own is:
//   soft cross-entropy        -T^2 (sum_c q_c log p_c + t log P)
//   KL(teacher || student)     T^2 (sum_c q_c log(q_c / p_c) + t log(t / P))
//   gradient (of both)         T (p_c - q_c) for a class named, T p_c (1 - t / P) for another
// Several such teachers, or some of either kind, count by the mean of their psi. For the soft
// cross-entropy that is the psi of the average teacher, because it is linear in q: the gradients'
// mean is p less the mean of the q, each with its tail spread. The divergence of the average is
// less than the average divergence, by what does not depend on the student: the gradient is the
// same.
// When phi is the sigmoid cross-entropy, every class is a binary decision of its own: p and q are
// sigmoids, the sums run over the two outcomes, and psi is the mean over classes.

#ifndef CODISTILL_CUDA_LOSS_H_
#define CODISTILL_CUDA_LOSS_H_

#include <cstdint>
#include <optional>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "cuda/number_format.h"

namespace codistill {

struct LossOptions {
  enum LabelLoss { kSoftmaxCrossEntropy, kSigmoidCrossEntropy, kSquaredError };
  LabelLoss label_loss = kSoftmaxCrossEntropy;
  // s above, in [0, 1). Must be 0 with kSquaredError.
  float label_smoothing = 0;

  // With kSquaredError as the label loss only kSquaredErrorLogits has a meaning.
  enum TeacherLoss {
    kSoftCrossEntropy,
    kKlTeacherStudent,  // KL(teacher || student): follows all that the teacher finds likely
    kKlStudentTeacher,  // KL(student || teacher): shuns all that the teacher finds unlikely
    kSquaredErrorLogits,
  };
  TeacherLoss teacher_loss = kSoftCrossEntropy;
  // T above, > 0.
  float temperature = 1;
  enum TeacherAverage { kProbabilities, kLogits };
  TeacherAverage teacher_average = kProbabilities;

  // Rows with this label do not count (the padding of a language model); inside or outside the
  // classes. kSoftmaxCrossEntropy only.
  std::optional<int64_t> ignored_label;
};

// What a teacher says of every class. Arrays are row-major and owned by the caller.
struct DenseTeacher {
  enum Kind {
    kLogits,
    // At temperature T, each finite and not negative, a row together 1 within 1e-2 (divided by its
    // sum); for the sigmoid cross-entropy each class's own, in [0, 1]. Neither with
    // kSquaredErrorLogits nor with the average kLogits. KL(student || teacher) and a logarithm of
    // what is 0: probabilities below 2^-126 count as 2^-126 there.
    kProbabilities,
  };
  const void* values = nullptr;                  // [rows, classes], aligned as its numbers are
  NumberFormat format = NumberFormat::kFloat32;  // kInt8 with kLogits only
  const float* scale = nullptr;  // [rows], kInt8 only, finite: a logit is scale * value
  Kind kind = kLogits;
};

// A teacher that names k classes a row. Arrays are row-major and owned by the caller. Values and
// tail at temperature T, each finite and not negative, together 1 within 1e-2 (they are divided by
// their sum).
struct TopKTeacher {
  const int32_t* index = nullptr;  // [rows, k], each in [0, classes), all of a row different
  const float* value = nullptr;    // [rows, k], their probabilities
  const float* tail = nullptr;     // [rows], of all other classes; not read where k = classes
  int64_t k = 0;                   // 1 to classes
};

// Arrays are row-major and owned by the caller.
struct LossInputs {
  int64_t rows = 0;              // >= 1: an empty batch has no mean
  int64_t classes = 0;           // >= 1; to 262,144 is tested
  const void* logits = nullptr;  // [rows, classes], aligned as its numbers are
  NumberFormat logits_format = NumberFormat::kFloat32;  // or kBfloat16; the gradient's too
  // Labels: `labels` for kSoftmaxCrossEntropy, `targets` for the others.
  const int64_t* labels = nullptr;  // [rows], each in [0, classes) or the ignored label
  const float* targets = nullptr;   // [rows, classes]
  // u above: [classes], finite, not negative, together 1 within 1e-3 (divided by their sum). Null:
  // uniform. For kSoftmaxCrossEntropy only; without effect where s is 0.
  const float* label_prior = nullptr;
  // w above: [rows], finite and not negative. Null: all 1.
  const float* row_weights = nullptr;
  // Teachers with all their classes; none, one or more.
  absl::Span<const DenseTeacher> teachers;
  // More teachers, for kSoftmaxCrossEntropy with kSoftCrossEntropy or kKlTeacherStudent and the
  // average kProbabilities.
  absl::Span<const TopKTeacher> topk_teachers;
  // 0 switches psi off: teachers are then not even read, and every result is bit for bit that of a
  // call without teachers. Above 0 there must be a teacher.
  float teacher_weight = 0;
  // The gradient is multiplied by this. For a batch that is computed in parts: WeightOf the part /
  // WeightOf the batch makes the parts' gradients those of the whole batch's mean.
  double gradient_scale = 1;
};

// All over the rows that count.
struct LossSums {
  double label_loss_sum = 0;    // sum of w phi, in nats
  double teacher_loss_sum = 0;  // sum of w psi, T^2 included, weight not; 0 when switched off
  double weight_sum = 0;        // sum of w: the loss is the sums of losses over this
  int64_t counted_rows = 0;
  // Rows the student got right. Softmax: the first of the largest logits is the label. Sigmoid: all
  // classes have z > 0 exactly where the target is > 0.5. Squared error: always 0.
  int64_t correct = 0;
};

struct LossOutputs {
  // [rows, classes] in logits_format, of the caller; null computes the sums alone, as an evaluation
  // wants. May be the logits themselves (the gradient then replaces them); must not overlap an
  // input in any other way.
  void* gradient = nullptr;
  LossSums sums;
  // Whether phi and psi of every row that counts are finite.
  bool finite = true;
};

// Computes on the processor, with the widest vectors it has, on up to `threads` threads. All
// results are the same for any number of threads (on one kind of processor). Thread-safe.
//
// INVALID_ARGUMENT names the tensor and, where it is one row's, the row (from 0) and what is wrong
// there. There are two times for that:
// - Before anything is written: options, shapes, null arrays, an empty batch, labels outside the
//   classes, a prior or weights that are none, k > classes, top-k teachers' contents. `outputs` is
//   as it was, `finite` included.
// - By the pass itself, which looks at every number anyhow: sums and gradient have been written and
//   must not be used. With `finite` false: a row's logits, targets or a teacher's values that are
//   not finite (a logit of -inf alone is a class ruled out, and no error where the loss is finite
//   all the same), or a loss that overflowed: the step is to be rejected, or the teachers left out.
//   With `finite` true: a dense teacher's probabilities that are negative or add up to something
//   else than 1 (for the sigmoid cross-entropy: that are not in [0, 1]).
//   Of several such rows the first is named, and of its tensors the logits before the teachers.
absl::Status ComputeLossCpu(const LossOptions& options, const LossInputs& inputs,
                            LossOutputs* outputs, int threads);

// Sum of the weights of the rows that count.
double WeightOf(const LossOptions& options, const LossInputs& inputs);

// What can be said without a batch. `teach`: whether there will be teachers.
absl::Status ValidateLossOptions(const LossOptions& options, int64_t classes, bool teach = true);

// The checks of ComputeLossCpu that read no array but the span of teachers, shared with the CUDA
// twin.
absl::Status ValidateLoss(const LossOptions& options, const LossInputs& inputs);

// Whether every row of a top-k teacher with complete arrays is as said above; names the first that
// is not. ComputeLossCpu checks this too, so that only those call it who want to know earlier.
absl::Status CheckTopKTeacher(const TopKTeacher& teacher, int64_t rows, int64_t classes,
                              int threads = 1);

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_H_
