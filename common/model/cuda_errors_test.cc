#include "common/model/cuda_errors.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace codistill {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// As libtorch 2.11 says it (c10::OutOfMemoryError).
constexpr char kOutOfMemory[] =
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.21 GiB is free. Including non-PyTorch memory, this process has 77.89 GiB memory in "
    "use. Of the allocated memory 70.10 GiB is allocated by PyTorch, and 6.20 GiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
    "Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)";

constexpr char kIllegalAddress[] =
    "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegalAddress' in "
    "https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more "
    "information.\nCUDA kernel errors might be asynchronously reported at some other API call, so "
    "the stacktrace below might be incorrect.\nFor debugging consider passing "
    "CUDA_LAUNCH_BLOCKING=1\n";

TEST(CudaErrorsTest, OutOfMemoryTellsHowMuchAndWhatToChange) {
  const absl::Status status = CudaStatus(kOutOfMemory);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(Message(status),
              AllOf(HasSubstr("Tried to allocate 2.00 GiB"), HasSubstr("1.21 GiB is free"),
                    HasSubstr("70.10 GiB"), HasSubstr("training.batch_size"),
                    HasSubstr("training.micro_batches")));
  EXPECT_THAT(Message(status), Not(HasSubstr("PYTORCH_ALLOC_CONF")));
  EXPECT_FALSE(IsDeviceLost(status));
  for (const char* other :
       {"CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "loss on cuda:0: cudaErrorMemoryAllocation"}) {
    EXPECT_TRUE(absl::IsResourceExhausted(CudaStatus(other))) << other;
  }
}

TEST(CudaErrorsTest, LostDevicesAreToldByName) {
  const absl::Status status = CudaStatus(kIllegalAddress);
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_TRUE(IsDeviceLost(status));
  EXPECT_THAT(Message(status),
              AllOf(HasSubstr("cudaErrorIllegalAddress"), HasSubstr("an illegal memory access"),
                    HasSubstr("must be started again")));
  EXPECT_THAT(Message(status), Not(HasSubstr("CUDA_LAUNCH_BLOCKING")));
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"CUDA error: uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"},
      {"CUDA error: unspecified launch failure", "cudaErrorLaunchFailure"},
      {"CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' in",
       "cudaErrorAssert"},
      {"CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
       "CUBLAS_STATUS_EXECUTION_FAILED"},
      {"cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED"},
      {"loss: cudaErrorLaunchFailure (unspecified launch failure)", "cudaErrorLaunchFailure"},
      // Not known here, so taken for the worst.
      {"CUDA error: something new\nSearch for `cudaErrorNew' in", "cudaErrorNew"}};
  for (const auto& [message, name] : cases) {
    const absl::Status lost = CudaStatus(message);
    EXPECT_TRUE(IsDeviceLost(lost)) << message << " gives " << lost;
    EXPECT_THAT(Message(lost), HasSubstr(name));
    EXPECT_TRUE(IsDeviceLost(AnnotateDevice(lost, "step 7", "cuda:1")));
  }
  EXPECT_THAT(Message(AnnotateDevice(status, "step 7", "cuda:1")),
              testing::StartsWith("step 7: cuda:1: cudaErrorIllegalAddress: "));
}

TEST(CudaErrorsTest, FindsTheErrorBehindAScriptsTraceOfCalls) {
  const std::string script =
      "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript "
      "(most recent call last):\n  File \"m.py\", line 7, in forward\n    return self.fc(x)\n"
      "           ~~~~~~~ <--- HERE\nRuntimeError: ";
  const absl::Status lost = CudaStatus(script + kIllegalAddress);
  EXPECT_TRUE(IsDeviceLost(lost));
  EXPECT_THAT(Message(lost),
              testing::StartsWith("cudaErrorIllegalAddress: CUDA error: an illegal"));
  const absl::Status memory = CudaStatus(script + kOutOfMemory);
  EXPECT_TRUE(absl::IsResourceExhausted(memory));
  EXPECT_THAT(Message(memory), testing::StartsWith("CUDA out of memory. Tried"));
}

TEST(CudaErrorsTest, DevicesThatAreNotThereAreAPrecondition) {
  for (const char* message :
       {"Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "CUDA error: no CUDA-capable device is detected", "CUDA error: invalid device ordinal",
        "CUDA driver version is insufficient for CUDA runtime version: cudaErrorInsufficientDriver",
        "CUDA error: no kernel image is available for execution on the device"}) {
    EXPECT_TRUE(absl::IsFailedPrecondition(CudaStatus(message))) << message;
  }
}

TEST(CudaErrorsTest, OtherErrorsAreSomebodyElses) {
  for (const char* message :
       {"", "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", "out of memory",
        "DefaultCPUAllocator: can't allocate memory", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `f()`"}) {
    EXPECT_TRUE(CudaStatus(message).ok()) << message;
  }
  EXPECT_FALSE(IsDeviceLost(absl::UnavailableError("no route to host")));
}

TEST(CudaErrorsTest, TheHandlerIsToldOnce) {
  std::vector<std::string> told;
  SetDeviceLostHandler([&](const absl::Status& status) { told.push_back(Message(status)); });
  ReportDeviceLost(absl::UnavailableError("first"));
  ReportDeviceLost(absl::UnavailableError("second"));
  EXPECT_THAT(told, testing::ElementsAre("first"));
  // One that comes late learns of it.
  std::vector<std::string> late;
  SetDeviceLostHandler([&](const absl::Status& status) { late.push_back(Message(status)); });
  EXPECT_THAT(late, testing::ElementsAre("first"));
  SetDeviceLostHandler(nullptr);
}

}  // namespace
}  // namespace codistill
