#include "common/model/cuda_errors.h"

#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/mutex.h"

namespace codistill {
namespace {

constexpr char kDeviceLost[] = "the device is lost to this process";

// CUDA's texts (cudaGetErrorString) and names. Those not in it are taken for lost devices.
struct Known {
  absl::string_view text;
  absl::string_view name;
  absl::StatusCode code;
};
constexpr Known kKnown[] = {
    {"out of memory", "cudaErrorMemoryAllocation", absl::StatusCode::kResourceExhausted},
    {"no CUDA-capable device is detected", "cudaErrorNoDevice",
     absl::StatusCode::kFailedPrecondition},
    {"CUDA driver version is insufficient", "cudaErrorInsufficientDriver",
     absl::StatusCode::kFailedPrecondition},
    {"invalid device ordinal", "cudaErrorInvalidDevice", absl::StatusCode::kFailedPrecondition},
    {"no kernel image is available", "cudaErrorNoKernelImageForDevice",
     absl::StatusCode::kFailedPrecondition},
    {"the provided PTX was compiled with an unsupported toolchain",
     "cudaErrorUnsupportedPtxVersion", absl::StatusCode::kFailedPrecondition},
    {"system not yet initialized", "cudaErrorSystemNotReady",
     absl::StatusCode::kFailedPrecondition},
    {"CUDA-capable device(s) is/are busy or unavailable", "cudaErrorDevicesUnavailable",
     absl::StatusCode::kFailedPrecondition},
    {"an illegal memory access was encountered", "cudaErrorIllegalAddress",
     absl::StatusCode::kUnavailable},
    {"misaligned address", "cudaErrorMisalignedAddress", absl::StatusCode::kUnavailable},
    {"device-side assert triggered", "cudaErrorAssert", absl::StatusCode::kUnavailable},
    {"uncorrectable ECC error encountered", "cudaErrorECCUncorrectable",
     absl::StatusCode::kUnavailable},
    {"uncorrectable NVLink error", "cudaErrorNvlinkUncorrectable", absl::StatusCode::kUnavailable},
    {"unspecified launch failure", "cudaErrorLaunchFailure", absl::StatusCode::kUnavailable},
    {"the launch timed out and was terminated", "cudaErrorLaunchTimeout",
     absl::StatusCode::kUnavailable},
    {"hardware stack error", "cudaErrorHardwareStackError", absl::StatusCode::kUnavailable},
    {"illegal instruction was encountered", "cudaErrorIllegalInstruction",
     absl::StatusCode::kUnavailable},
};

const Known* Find(absl::string_view message) {
  for (const Known& known : kKnown) {
    if (absl::StrContains(message, known.text) || absl::StrContains(message, known.name)) {
      return &known;
    }
  }
  return nullptr;
}

// What CUDA and its libraries call themselves in messages.
constexpr absl::string_view kMarks[] = {
    "CUDA error",     "CUDA out of memory", "CUDA driver",           "cudaError",
    "CUBLAS_STATUS_", "CUDNN_STATUS_",      "Found no NVIDIA driver"};

bool IsAboutCuda(absl::string_view text) {
  for (const absl::string_view mark : kMarks) {
    if (absl::StrContains(text, mark)) return true;
  }
  return false;
}

// The line that says it: a script's trace of calls may come before, advice about debugging behind.
std::string TheLine(absl::string_view message) {
  for (absl::string_view line : absl::StrSplit(message, '\n')) {
    if (!IsAboutCuda(line)) continue;
    line = absl::StripAsciiWhitespace(line);
    absl::ConsumePrefix(&line, "RuntimeError: ");
    return std::string(line);
  }
  return std::string(message);
}

// "cudaErrorX" from libtorch's "Search for `cudaErrorX' in ...", or from a status of our kernels.
std::string NameIn(absl::string_view message) {
  const size_t begin = message.find("cudaError");
  if (begin == absl::string_view::npos) return "";
  size_t end = begin;
  while (end < message.size() && absl::ascii_isalnum(message[end])) ++end;
  return std::string(message.substr(begin, end - begin));
}

absl::Status OutOfMemory(absl::string_view message) {
  // "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.21 GiB is free.
  // ... Of the allocated memory 70.1 GiB is allocated by PyTorch, ...": facts up to the advice.
  std::string facts = TheLine(message);
  const size_t advice = facts.find(" If reserved but unallocated");
  if (advice != std::string::npos) facts.resize(advice);
  return absl::ResourceExhaustedError(absl::StrCat(
      facts, absl::EndsWith(facts, ".") ? "" : ".",
      " Smaller batches (training.batch_size, evaluation.batch_size, prediction.max_batch_size), "
      "more training.micro_batches, training.precision BF16, or fewer processes on this device "
      "would need less"));
}

}  // namespace

absl::Status CudaStatus(absl::string_view message) {
  if (!IsAboutCuda(message)) return absl::OkStatus();
  if (absl::StrContains(message, "Found no NVIDIA driver")) {
    return absl::FailedPreconditionError("this machine has no driver for NVIDIA GPUs");
  }
  if (absl::StrContains(message, "CUDA out of memory")) return OutOfMemory(message);
  // cuBLAS and cuDNN take their workspaces from the device themselves.
  if (absl::StrContains(message, "CUBLAS_STATUS_ALLOC_FAILED") ||
      absl::StrContains(message, "CUDNN_STATUS_ALLOC_FAILED") ||
      absl::StrContains(message, "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED") ||
      absl::StrContains(message, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")) {
    return OutOfMemory(message);
  }
  const Known* const known = Find(message);
  // A convolution or product that these libraries do not have is the model's fault.
  if (known == nullptr && (absl::StrContains(message, "_STATUS_NOT_SUPPORTED") ||
                           absl::StrContains(message, "_STATUS_INVALID_VALUE") ||
                           absl::StrContains(message, "_STATUS_BAD_PARAM"))) {
    return absl::OkStatus();
  }
  if (known != nullptr && known->code == absl::StatusCode::kResourceExhausted) {
    return OutOfMemory(message);
  }
  std::string name = NameIn(message);
  if (name.empty() && known != nullptr) name = std::string(known->name);
  std::string text = TheLine(message);
  if (!name.empty() && !absl::StrContains(text, name)) text = absl::StrCat(name, ": ", text);
  if (known != nullptr && known->code == absl::StatusCode::kFailedPrecondition) {
    return absl::FailedPreconditionError(text);
  }
  return absl::UnavailableError(
      absl::StrCat(text, " (", kDeviceLost, ", which must be started again)"));
}

bool IsDeviceLost(const absl::Status& status) {
  return absl::IsUnavailable(status) && absl::StrContains(status.message(), kDeviceLost);
}

absl::Status AnnotateDevice(const absl::Status& status, absl::string_view what,
                            absl::string_view device) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(what, ": ", device, ": ", status.message()));
}

namespace {

struct Handler {
  Mutex mu;
  std::function<void(const absl::Status&)> handler ABSL_GUARDED_BY(mu);
  absl::Status lost ABSL_GUARDED_BY(mu);
};

// Never destroyed: threads may report while the process ends.
Handler& TheHandler() {
  static Handler* const handler = new Handler;
  return *handler;
}

}  // namespace

void SetDeviceLostHandler(std::function<void(const absl::Status&)> handler) {
  Handler& the = TheHandler();
  MutexLock lock(&the.mu);
  the.handler = std::move(handler);
  if (the.handler != nullptr && !the.lost.ok()) the.handler(the.lost);
}

void ReportDeviceLost(const absl::Status& status) {
  Handler& the = TheHandler();
  MutexLock lock(&the.mu);
  if (!the.lost.ok()) return;
  the.lost = status;
  if (the.handler != nullptr) the.handler(status);
}

}  // namespace codistill
