#ifndef CODISTILL_COMMON_MODEL_TORCH_SUPPORT_H_
#define CODISTILL_COMMON_MODEL_TORCH_SUPPORT_H_

#include <torch/script.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "common/tensor/tensor.h"
#include "proto/model.pb.h"

// Between libtorch's types and ours. For .cc files of common/model only.
namespace codistill::internal {

// DT_INVALID for types that we do not carry.
DataType FromTorchType(at::ScalarType type);
at::ScalarType ToTorchType(DataType dtype);

// A torch tensor over the same bytes, which it keeps alive.
at::Tensor ToTorch(const Tensor& tensor);
// Our tensor over the torch tensor's bytes (detached; on the CPU and contiguous, else a copy that
// is).
Tensor FromTorch(const at::Tensor& tensor);

// What an exception of libtorch says, without the C++ or TorchScript back trace around it.
std::string TorchMessage(const std::exception& error);

// "what: message" with `code`, or with that of CudaStatus where the exception is about a device's
// errors; one that is lost is reported (cuda_errors.h).
absl::Status ExceptionStatus(absl::StatusCode code, absl::string_view what,
                             const std::exception& error);

// Runs `f`, which returns a Status or StatusOr; an exception becomes a status: ExceptionStatus.
template <typename F>
auto CatchTorch(absl::StatusCode code, absl::string_view what, F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::exception& error) {
    return ExceptionStatus(code, what, error);
  }
}

// Threads of the forward and backward pass in this process: libtorch's own and its BLAS library's.
void SetTorchThreads(int threads);

}  // namespace codistill::internal

#endif  // CODISTILL_COMMON_MODEL_TORCH_SUPPORT_H_
