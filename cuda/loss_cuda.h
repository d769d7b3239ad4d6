// The CUDA twin of the loss (see loss.h for what is computed), on device memory: all label losses,
// teachers and formats. No CUDA header is needed to use it. Built only with --config=cuda.
//
//   CODISTILL_RETURN_IF_ERROR(LaunchLoss(options, inputs, gradient, workspace, stream));
//   ...  // enqueue what uses the gradient
//   CODISTILL_RETURN_IF_ERROR(FinishLoss(options, inputs, workspace, stream, &outputs));
//
// Differs from ComputeLossCpu in this: at most kMaxCudaTeachers teachers of either kind, and what
// ComputeLossCpu finds wrong with an array before it writes anything is found by the kernels, so
// that FinishLoss reports it and the gradient must not be used. Results are the same from run to
// run on one kind of device, and those of the CPU up to rounding.

#ifndef CODISTILL_CUDA_LOSS_CUDA_H_
#define CODISTILL_CUDA_LOSS_CUDA_H_

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "cuda/loss.h"

namespace codistill {

// Of `teachers`, and as many of `topk_teachers`.
constexpr int kMaxCudaTeachers = 8;

// Bytes of device memory, 16-byte aligned, that a launch with these inputs needs until FinishLoss:
// 320 a row, and 12 for each class that a top-k teacher names.
size_t CudaLossWorkspaceBytes(const LossInputs& inputs);

// Enqueues the kernels on `stream` (a cudaStream_t) of the current device and returns at once: it
// neither waits nor allocates. All arrays of `inputs` are in device memory, but for those of
// teachers, which are read before this returns. `gradient` is [rows, classes] of the logits' format
// in device memory, null for the sums alone, or the logits themselves. INVALID_ARGUMENT, naming the
// field, for bad options or inputs; INTERNAL, with CUDA's name for the error, when a launch fails.
// Thread-safe.
absl::Status LaunchLoss(const LossOptions& options, const LossInputs& inputs, void* gradient,
                        void* workspace, void* stream);

// Waits for the stream and fetches sums and the finite flag (`outputs->gradient` is left alone),
// for the same options and inputs, whose arrays but the logits must be as they were: where
// something is wrong, it looks at them again to say what, as ComputeLossCpu does. Its statuses are
// those of ComputeLossCpu, but for what LaunchLoss has said; INTERNAL for an error of CUDA, this
// launch's or an earlier one's.
absl::Status FinishLoss(const LossOptions& options, const LossInputs& inputs, const void* workspace,
                        void* stream, LossOutputs* outputs);

}  // namespace codistill

#endif  // CODISTILL_CUDA_LOSS_CUDA_H_
