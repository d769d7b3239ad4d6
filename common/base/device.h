// Names of devices, as jobs and command lines have them.

#ifndef CODISTILL_COMMON_BASE_DEVICE_H_
#define CODISTILL_COMMON_BASE_DEVICE_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace codistill {

// Where memory is and passes are computed: kHostDevice, or the ordinal of a CUDA device as this
// process sees them (CUDA_VISIBLE_DEVICES).
constexpr int kHostDevice = -1;

// "cpu" or "cuda:N" with N from 0 to 1023, without sign or leading zeros. INVALID_ARGUMENT says
// what would be right.
absl::StatusOr<int> ParseDevice(absl::string_view name);

// The inverse.
std::string DeviceName(int device);

}  // namespace codistill

#endif  // CODISTILL_COMMON_BASE_DEVICE_H_
