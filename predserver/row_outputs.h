#ifndef CODISTILL_PREDSERVER_ROW_OUTPUTS_H_
#define CODISTILL_PREDSERVER_ROW_OUTPUTS_H_

#include <cstdint>

#include "cuda/number_target.h"

// The vector loops behind output_format.h, for the processor at hand; those of the k largest are in
// cuda/row_topk.h.
namespace codistill::internal {

// Both return the first row with a logit that is not finite, -1 if there is none; what is
// written of that row and the rows after it is unspecified. Logits are [rows, columns], row-major;
// probabilities are those at `temperature`, before they are rounded to the target's type within
// 2e-6 relative (on a processor without fused multiply-add, 1.5e-7 more for every nat below 1).

int64_t SoftmaxRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const NumberTarget& to);

int64_t SigmoidRows(const float* logits, int64_t rows, int64_t columns, double temperature,
                    const NumberTarget& to);

}  // namespace codistill::internal

#endif  // CODISTILL_PREDSERVER_ROW_OUTPUTS_H_
