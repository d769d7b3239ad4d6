// What ComputeLossCpu hands to its vector kernels, after validation.

#ifndef CODISTILL_CUDA_LOSS_KERNELS_H_
#define CODISTILL_CUDA_LOSS_KERNELS_H_

#include <cstdint>
#include <string>
#include <utility>

#include "common/base/mutex.h"
#include "cuda/loss.h"
#include "cuda/loss_faults.h"

namespace codistill {
namespace internal {

// How far from 1 a teacher's probabilities may add up to: 16-bit floats have been rounded.
constexpr double kMassTolerance = 1e-2;

// The weight of a row; 0: it does not count.
inline double RowWeight(const LossOptions& options, const LossInputs& inputs, int64_t row) {
  if (options.ignored_label.has_value() && inputs.labels[row] == *options.ignored_label) return 0;
  return inputs.row_weights == nullptr ? 1 : inputs.row_weights[row];
}

// The first row in which the pass found something wrong, and what. Thread-safe.
class FaultLog {
 public:
  void Add(int64_t row, std::string what) {
    MutexLock lock(&mutex_);
    if (row_ >= 0 && row_ <= row) return;
    row_ = row;
    what_ = std::move(what);
  }

  // Empty: nothing.
  std::string what() const {
    MutexLock lock(&mutex_);
    return what_;
  }

 private:
  mutable Mutex mutex_;
  int64_t row_ ABSL_GUARDED_BY(mutex_) = -1;
  std::string what_ ABSL_GUARDED_BY(mutex_);
};

struct LossWork {
  const LossOptions* options;
  const LossInputs* inputs;
  bool teach;          // weight > 0
  double row_scale;    // of the gradient of a row with weight 1
  double prior_scale;  // 1 / (sum of label_prior)
  void* gradient;      // may be null
  bool bypass_cache;   // store the gradient past the caches: it is too large to stay there
  int64_t block_rows;  // element-wise losses: rows of a block, the unit of the sums
  // Per row (softmax) or per block (element-wise), so that sums do not depend on threads. Weighted.
  double* label_loss;
  double* teacher_loss;
  int64_t* correct;
  FaultLog* faults;
};

// See loss_faults.h.
inline std::string FindFault(const LossWork& work, int64_t row, bool finite) {
  return FindFault(*work.options, *work.inputs, row, row, finite);
}

// Softmax cross-entropy: rows [begin, end).
void SoftmaxLoss(const LossWork& work, int64_t begin, int64_t end);

// Sigmoid cross-entropy and squared error: blocks [begin, end) of block_rows rows.
void ElementwiseLoss(const LossWork& work, int64_t begin, int64_t end);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_KERNELS_H_
