// The CUDA twin of the loss (see loss.h for what is computed): softmax cross-entropy with every
// kind of teacher term, on device memory. No CUDA header is needed to use it. Built only with
// --config=cuda.
//
//   CODISTILL_RETURN_IF_ERROR(LaunchLoss(options, inputs, gradient, workspace, stream));
//   ...  // enqueue what uses the gradient
//   CODISTILL_RETURN_IF_ERROR(FinishLoss(inputs, workspace, stream, &outputs));
//
// Differs from ComputeLossCpu in this: only kSoftmaxCrossEntropy, at most kMaxCudaTeachers
// teachers, all with all their logits (topk_teachers are refused), everything in float32, every row
// counting alike, and labels are checked on the
// device, so that a bad one is reported by FinishLoss. Results are the same from run to run on one
// kind of device, and those of the CPU up to rounding.

#ifndef CODISTILL_CUDA_LOSS_CUDA_H_
#define CODISTILL_CUDA_LOSS_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/loss.h"

namespace codistill {

constexpr int kMaxCudaTeachers = 8;

// Bytes of device memory, 16-byte aligned, that a launch over so many rows needs until FinishLoss.
size_t CudaLossWorkspaceBytes(int64_t rows);

// Enqueues the kernels on `stream` (a cudaStream_t) of the current device and returns at once. All
// pointers in `inputs` are to device memory, but for the array of teachers itself, which is read
// before this returns. `gradient` is [rows, classes] in device memory, null for the sums alone, or
// the logits themselves. INVALID_ARGUMENT, naming the field, for bad options or inputs;
// UNIMPLEMENTED for other label losses and for topk_teachers; INTERNAL, with CUDA's name for the
// error, when the launch fails.
absl::Status LaunchLoss(const LossOptions& options, const LossInputs& inputs, void* gradient,
                        void* workspace, void* stream);

// Waits for the stream and fetches sums and the finite flag (`outputs->gradient` is left alone).
// What is not finite is INVALID_ARGUMENT, as ComputeLossCpu says.
// INVALID_ARGUMENT names row and value of the first label out of range; the gradient is then not to
// be used. INTERNAL for an error of CUDA, this launch's or an earlier one's.
absl::Status FinishLoss(const LossInputs& inputs, const void* workspace, void* stream,
                        LossOutputs* outputs);

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_CUDA_H_
