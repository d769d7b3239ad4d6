#include "common/model/torch_support.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/model/cuda_errors.h"

namespace codistill::internal {
namespace {

const std::pair<DataType, at::ScalarType> kTypes[] = {
    {DT_FLOAT, at::kFloat}, {DT_DOUBLE, at::kDouble},     {DT_HALF, at::kHalf},
    {DT_INT32, at::kInt},   {DT_BFLOAT16, at::kBFloat16}, {DT_INT64, at::kLong},
    {DT_UINT8, at::kByte},  {DT_BOOL, at::kBool},         {DT_INT8, at::kChar},
};

}  // namespace

DataType FromTorchType(at::ScalarType type) {
  for (const auto& [ours, theirs] : kTypes) {
    if (theirs == type) return ours;
  }
  return DT_INVALID;
}

at::ScalarType ToTorchType(DataType dtype) {
  for (const auto& [ours, theirs] : kTypes) {
    if (ours == dtype) return theirs;
  }
  return at::ScalarType::Undefined;
}

at::Tensor ToTorch(const Tensor& tensor) {
  return at::from_blob(
      const_cast<void*>(tensor.data()), tensor.shape(), [owner = tensor.owner()](void*) {},
      at::TensorOptions().dtype(ToTorchType(tensor.dtype())));
}

Tensor FromTorch(const at::Tensor& tensor) {
  auto owner = std::make_shared<at::Tensor>(tensor.detach().to(at::kCPU).contiguous());
  const DataType dtype = FromTorchType(owner->scalar_type());
  std::vector<int64_t> shape = owner->sizes().vec();
  void* data = owner->data_ptr();
  return Tensor::Adopt(dtype, std::move(shape), data, std::move(owner));
}

namespace {

std::string MessageOf(const std::exception& error) {
  std::string text = error.what();
  if (const auto* c10_error = dynamic_cast<const c10::Error*>(&error)) {
    text = c10_error->what_without_backtrace();
  }
  // The interpreter puts the traceback of the script first and the error on the last line.
  if (text.find("Traceback of TorchScript") != std::string::npos) {
    std::string last;
    for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipWhitespace())) {
      last = std::string(absl::StripAsciiWhitespace(line));
    }
    return last;
  }
  return std::string(absl::StripAsciiWhitespace(text));
}

}  // namespace

std::string TorchMessage(const std::exception& error) {
  std::string message = MessageOf(error);
  // All that libtorch says of what is most often a vocabulary of another size.
  if (absl::EndsWith(message, "index out of range in self")) {
    message += "; an nn.Embedding has fewer rows than the indices it is given";
  }
  return message;
}

absl::Status ExceptionStatus(absl::StatusCode code, absl::string_view what,
                             const std::exception& error) {
  // All that it says: a script's trace of calls may come before the error and more lines behind it.
  const absl::Status cuda = CudaStatus(error.what());
  if (cuda.ok()) return absl::Status(code, absl::StrCat(what, ": ", TorchMessage(error)));
  const absl::Status status(cuda.code(), absl::StrCat(what, ": ", cuda.message()));
  if (IsDeviceLost(status)) ReportDeviceLost(status);
  return status;
}

void SetTorchThreads(int threads) {
  at::set_num_threads(threads);
  // libtorch leaves its BLAS library's threads alone; OpenBLAS, where that is the one, starts one a
  // core.
  using SetThreads = void (*)(int);
  if (auto* set = reinterpret_cast<SetThreads>(dlsym(RTLD_DEFAULT, "openblas_set_num_threads"))) {
    set(threads);
  }
}

}  // namespace codistill::internal
