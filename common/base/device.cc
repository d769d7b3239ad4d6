#include "common/base/device.h"

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace codistill {

absl::StatusOr<int> ParseDevice(absl::string_view name) {
  constexpr int kMaxDevices = 1024;
  if (name == "cpu") return kHostDevice;
  absl::string_view digits = name;
  int ordinal = 0;
  // The round trip refuses blanks, signs and leading zeros.
  if (absl::ConsumePrefix(&digits, "cuda:") && absl::SimpleAtoi(digits, &ordinal) && ordinal >= 0 &&
      ordinal < kMaxDevices && DeviceName(ordinal) == name) {
    return ordinal;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown device (", name, "); cpu or cuda:N would be right"));
}

std::string DeviceName(int device) {
  return device == kHostDevice ? "cpu" : absl::StrCat("cuda:", device);
}

}  // namespace codistill
