#ifndef CODISTILL_COMMON_MODEL_CUDA_ERRORS_H_
#define CODISTILL_COMMON_MODEL_CUDA_ERRORS_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

// What errors of CUDA, as libtorch's exceptions tell them, mean for a process. Knows neither CUDA
// nor libtorch.
namespace codistill {

// What `message` says of CUDA, if it does at all:
//   RESOURCE_EXHAUSTED   out of memory: with what was asked for and what there is, and what to
//                        change. The device is all right; less may be tried.
//   FAILED_PRECONDITION  no driver, no such device, code for other devices: nothing will change
//                        while this process lives.
//   UNAVAILABLE          the device is lost to this process: a kernel that failed, memory that
//                        broke (ECC), a device that fell off its bus. CUDA gives the same answer to
//                        every later call of the process, so it has to end, and be started again.
// OK: `message` is not about CUDA. The status names CUDA's error ("cudaErrorIllegalAddress"), where
// one is known.
absl::Status CudaStatus(absl::string_view message);

// Whether a status is CudaStatus's UNAVAILABLE, whatever has been put before or after its message.
bool IsDeviceLost(const absl::Status& status);

// `what` and `status`'s message, with `device` in between; keeps the code and IsDeviceLost.
absl::Status AnnotateDevice(const absl::Status& status, absl::string_view what,
                            absl::string_view device);

// What is to be done once, when this process first loses a device: its own end, so that whoever
// supervises it starts it again. Called from whatever thread finds out, which has taken down
// nothing yet that it keeps on the device; others that find out wait. Called at once where the
// device is lost already. Null: nothing any more.
void SetDeviceLostHandler(std::function<void(const absl::Status&)> handler);
// Tells the handler, the first time.
void ReportDeviceLost(const absl::Status& status);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_CUDA_ERRORS_H_
