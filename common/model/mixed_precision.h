#ifndef CODISTILL_COMMON_MODEL_MIXED_PRECISION_H_
#define CODISTILL_COMMON_MODEL_MIXED_PRECISION_H_

#include <torch/script.h>

#include "proto/job.pb.h"

// Automatic mixed precision (Micikevicius et al. 2018, "Mixed Precision Training") as libtorch has
// it. For .cc files of common/model only.
namespace codistill::internal {

// With BF16, and as long as it lives, what this thread computes on devices of `type` goes through
// libtorch's autocast: matrix products and convolutions take bfloat16 copies of their arguments,
// what needs the range of fp32 gets fp32. With FP32 it does nothing. A backward pass needs none: it
// follows the types of the forward pass, and gradients of fp32 parameters come out in fp32.
//
// A weight is cast once for all its uses under one object; the casts are forgotten at its end, so
// that the next pass sees the weights of then.
class MixedPrecision {
 public:
  MixedPrecision(Precision precision, at::DeviceType type);
  ~MixedPrecision();
  MixedPrecision(const MixedPrecision&) = delete;
  MixedPrecision& operator=(const MixedPrecision&) = delete;

 private:
  const bool on_;
  const at::DeviceType type_;
  bool was_enabled_ = false;
  at::ScalarType was_dtype_ = at::kFloat;
};

}  // namespace codistill::internal

#endif  // CODISTILL_COMMON_MODEL_MIXED_PRECISION_H_
