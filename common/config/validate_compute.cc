// How a worker computes its batch: training.precision and training.micro_batches.

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {

void CheckCompute(const JobConfig& job, Mistakes* mistakes) {
  const TrainingConfig& training = job.training();
  if (training.precision() == BF16 && job.model().label_loss() == SQUARED_ERROR) {
    mistakes->Add("training.precision",
                  "too coarse for label_loss SQUARED_ERROR (BF16): a bfloat16 output keeps two to "
                  "three digits; FP32 would be right");
  }
  const int64_t parts = training.micro_batches(), batch = training.batch_size();
  mistakes->AtLeast("training.micro_batches", parts, 1);
  if (parts > 1 && batch >= 1 && batch % parts != 0) {
    mistakes->Add("training.micro_batches",
                  absl::StrCat("does not divide training.batch_size into equal parts (", parts,
                               " of ", batch, "); a divisor of ", batch, " would be right"));
  }
}

}  // namespace internal
}  // namespace codistill
