// What LaunchLoss hands to its kernels, and what they leave in the workspace.

#ifndef CODISTILL_CUDA_LOSS_PARAMS_H_
#define CODISTILL_CUDA_LOSS_PARAMS_H_

#include <cstdint>

#include "cuda/number_format.h"

namespace codistill::internal {

constexpr int kMaxTeachers = 8;  // dense ones; and as many that name classes

// How far from 1 a teacher's probabilities and a prior may add up to, as on the CPU.
constexpr double kCudaMassTolerance = 1e-2, kCudaPriorTolerance = 1e-3;

// psi, as far as kernels differ by it. kMatch: soft cross-entropy and KL(teacher || student), whose
// gradient is the same.
enum class Psi : int { kNone, kMatch, kReverse, kSquared };

struct DenseParams {
  const unsigned char* values;
  const float* scale;
  NumberFormat format;
  bool probabilities;
};

struct TopKParams {
  const int32_t* index;
  const float* value;
  const float* tail;  // null where k is the number of classes
  int64_t k;
};

// A class that top-k teachers name in a row.
struct NamedClass {
  int32_t index;
  float q;      // sum over the teachers of what they give it
  float share;  // sum over the teachers that do not name it of its share in their tails
};

// What a block found in its part of a row.
struct RowPart {
  double label_loss, teacher_loss;  // parts of phi and of psi
  int32_t correct;                  // the student got the row right; of the first part
  int32_t array_fault;              // a label or a top-k teacher is not as it must be
  int32_t teacher_fault;            // a dense teacher's probabilities are not as they must be
  int32_t bad_class;                // the first in this part whose logit is not finite, or -1
  float bad_logit;
  float weight;  // 0: the row does not count
};

// At the start of the workspace.
struct LossResult {
  // By the first kernel, where there are weights, an ignored label or a prior.
  double weight_sum;
  float prior_scale;  // 1 / (sum of the prior)
  int32_t array_fault;
  // By the last.
  double label_loss_sum, teacher_loss_sum, counted_weight;
  int64_t counted_rows, correct, array_faults, not_finite;
  int64_t fault_row;  // the first with losses or probabilities that are not as they must be, or -1
  int32_t fault_finite, bad_class;
  float bad_logit;
};

struct LossParams {
  int64_t rows;
  int32_t classes;
  const unsigned char* logits;
  unsigned char* gradient;  // may be null
  const int64_t* labels;
  const float* targets;
  const float* prior;
  const float* row_weights;
  bool has_ignored;
  int64_t ignored_label;

  bool sigmoid;  // of the element-wise losses
  float smoothing, temperature;
  float weight;      // of psi; with temperature or 1 / classes as the term needs it
  double row_scale;  // of the gradient of a row with weight 1; divided by the sum of weights if
                     // that is known on the device only
  Psi psi;
  bool divergence;      // kMatch: KL rather than cross-entropy
  bool average_logits;  // of several teachers
  int32_t power;        // T, if it is 1, 2, 3 or 4; else 0
  float inverse_t;
  int32_t num_dense, num_topk;
  DenseParams dense[kMaxTeachers];
  TopKParams topk[kMaxTeachers];
  int64_t named_per_row;  // sum of k

  LossResult* result;
  RowPart* row_parts;  // [rows, parts]
  NamedClass* named;   // [rows, named_per_row]
  bool prepared;       // the first kernel has run

  // How the softmax kernel is laid out: the blocks of a row, elements of a block, where in dynamic
  // shared memory which arrays are kept (-1: they are not), and the bitmaps of named classes.
  int32_t parts, part_elements;
  int32_t logits_at;
  int32_t teacher_at[kMaxTeachers];
  int32_t bitmaps_at;
};

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_LOSS_PARAMS_H_
