#ifndef CODISTILL_PREDSERVER_OUTPUT_FORMAT_H_
#define CODISTILL_PREDSERVER_OUTPUT_FORMAT_H_

#include <vector>

#include "absl/status/statusor.h"
#include "common/tensor/tensor.h"
#include "predserver/prediction.h"
#include "predserver/request_check.h"
#include "proto/job.pb.h"

// The forms in which a model's logits leave a prediction server. With z a row's logits, C their
// number, T the temperature and p = softmax(z / T):
//
//   logits         z as [rows, C] FP32, FP16, BF16, or INT8, z = logits_scale * logits
//   logits_scale   FP32 [rows], INT8 only: max|z| / 127 of the row (common/tensor/int8_rows.h)
//   probabilities  p as [rows, C] FP32, FP16 or BF16; where every class is a decision of its own
//                  (SIGMOID_CROSS_ENTROPY) sigmoid(z / T); not for models of SQUARED_ERROR
//   topk_index     INT32 [rows, k], the classes of the k largest z, in descending order, of equal
//                  ones the smaller class first; for models of SOFTMAX_CROSS_ENTROPY only
//   topk_value     their p as [rows, k] FP32, FP16 or BF16
//   tail_mass      FP32 [rows], what the C - k other classes have together: summed over them, so
//                  that it is neither negative nor off where next to nothing is left
//
// 64 of 24,000 classes in half precision are 388 bytes a row in place of 96,000.
namespace codistill {

// What a checked request asks for of its own rows of `logits`, FP32 [rows, C]: the outputs wanted
// in `plan` but for the states, in the order above. `loss` is the model's. Each tensor is written
// once, in the memory that a response may hold on to; FP32 logits share memory and ownership with
// `logits`. FAILED_PRECONDITION names the row that has a logit that is not finite, or beyond what
// the asked type holds. Thread-safe.
absl::StatusOr<std::vector<NamedTensor>> FormatOutputs(const Tensor& logits, LabelLoss loss,
                                                       const RequestPlan& plan,
                                                       const OutputFormat& format);

}  // namespace codistill

#endif  // CODISTILL_PREDSERVER_OUTPUT_FORMAT_H_
