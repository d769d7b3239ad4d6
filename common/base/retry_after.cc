#include "common/base/retry_after.h"

#include <cstdint>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/string_view.h"

namespace codistill {
namespace {

// RetryInfo { Duration retry_delay = 1; }, Duration { int64 seconds = 1; int32 nanos = 2; } in
// protobuf's wire format, by hand: this folder knows no protobuf.
constexpr char kDelayTag = 1 << 3 | 2;
constexpr char kSecondsTag = 1 << 3;
constexpr char kNanosTag = 2 << 3;

void AppendVarint(uint64_t value, std::string* to) {
  for (; value >= 0x80; value >>= 7) to->push_back(static_cast<char>(value | 0x80));
  to->push_back(static_cast<char>(value));
}

bool TakeVarint(absl::string_view* from, uint64_t* value) {
  *value = 0;
  for (int shift = 0; shift < 64 && !from->empty(); shift += 7) {
    const auto byte = static_cast<uint8_t>(from->front());
    from->remove_prefix(1);
    *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
    if ((byte & 0x80) == 0) return true;
  }
  return false;
}

}  // namespace

absl::Status WithRetryAfter(absl::Status status, absl::Duration delay) {
  if (status.ok()) return status;
  absl::Duration rest;
  const int64_t seconds = absl::IDivDuration(delay, absl::Seconds(1), &rest);
  std::string duration;
  duration.push_back(kSecondsTag);
  AppendVarint(static_cast<uint64_t>(seconds), &duration);
  duration.push_back(kNanosTag);
  AppendVarint(static_cast<uint64_t>(absl::ToInt64Nanoseconds(rest)), &duration);
  std::string info(1, kDelayTag);
  AppendVarint(duration.size(), &info);
  status.SetPayload(kRetryInfoType, absl::Cord(info + duration));
  return status;
}

absl::optional<absl::Duration> RetryAfter(const absl::Status& status) {
  const absl::optional<absl::Cord> payload = status.GetPayload(kRetryInfoType);
  if (!payload.has_value()) return absl::nullopt;
  const std::string bytes(*payload);
  absl::string_view left = bytes;
  uint64_t size = 0;
  if (left.empty() || left.front() != kDelayTag) return absl::nullopt;
  left.remove_prefix(1);
  if (!TakeVarint(&left, &size) || size != left.size()) return absl::nullopt;
  absl::Duration delay;
  while (!left.empty()) {
    const char tag = left.front();
    left.remove_prefix(1);
    uint64_t value = 0;
    if ((tag != kSecondsTag && tag != kNanosTag) || !TakeVarint(&left, &value)) {
      return absl::nullopt;
    }
    delay += tag == kSecondsTag ? absl::Seconds(static_cast<int64_t>(value))
                                : absl::Nanoseconds(static_cast<int64_t>(value));
  }
  return delay;
}

}  // namespace codistill
