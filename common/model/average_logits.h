#ifndef CODISTILL_COMMON_MODEL_AVERAGE_LOGITS_H_
#define CODISTILL_COMMON_MODEL_AVERAGE_LOGITS_H_

#include <cstdint>

#include "absl/types/span.h"

// What several models say of the same examples, as one. Each of `members` has rows * columns fp32
// logits, at least one member; `out`, as many, overlaps none of them. Vectorised for the processor
// at hand. A NaN in a row makes NaNs of that row (softmax) or column.
namespace codistill {

// The mean.
void AverageLogits(absl::Span<const float* const> members, int64_t rows, int64_t columns,
                   float* out);

// log(mean(softmax(z))): logits whose softmax is the mean of the members' probabilities. A class
// that every member holds for less likely than 1e-38 gets that much, so that no logit is infinite.
void AverageSoftmax(absl::Span<const float* const> members, int64_t rows, int64_t columns,
                    float* out);

// The log-odds of mean(sigmoid(z)), for each column by itself.
void AverageSigmoid(absl::Span<const float* const> members, int64_t rows, int64_t columns,
                    float* out);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_AVERAGE_LOGITS_H_
