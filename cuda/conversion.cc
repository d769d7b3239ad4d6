#include "cuda/conversion.h"

#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "common/tensor/int8_rows.h"

namespace codistill {
namespace {

// Numbers a thread should have, to be worth starting.
constexpr int64_t kNumbersPerThread = 256 << 10;

absl::Status Invalid(absl::string_view argument, const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat("conversion: ", argument, " ", problem));
}

bool IsHalfWide(NumberFormat format) {
  return format == NumberFormat::kFloat16 || format == NumberFormat::kBfloat16;
}

}  // namespace

absl::Status ValidateConversion(const void* from, NumberFormat from_format, int64_t n,
                                const void* to, NumberFormat to_format) {
  const bool narrows = from_format == NumberFormat::kFloat32 && IsHalfWide(to_format);
  const bool widens = IsHalfWide(from_format) && to_format == NumberFormat::kFloat32;
  if (!narrows && !widens) {
    return Invalid("to_format",
                   absl::StrCat("is ", NameOf(to_format), " and from_format ", NameOf(from_format),
                                "; want float32 and one of float16 and bfloat16"));
  }
  if (n < 0) return Invalid("n", absl::StrCat("is ", n, "; want 0 or more"));
  if (n > 0 && from == nullptr) return Invalid("from", "is null");
  if (n > 0 && to == nullptr) return Invalid("to", "is null");
  return absl::OkStatus();
}

absl::Status ValidateInt8Rows(const void* from, const void* scales, int64_t rows, int64_t columns,
                              const void* to) {
  if (rows < 0) return Invalid("rows", absl::StrCat("is ", rows, "; want 0 or more"));
  if (columns < 0) return Invalid("columns", absl::StrCat("is ", columns, "; want 0 or more"));
  if (columns > 0 && rows > std::numeric_limits<int64_t>::max() / columns) {
    return Invalid(
        "rows", absl::StrCat("is ", rows, ", times ", columns, " columns more than 64 bits hold"));
  }
  if (rows > 0 && scales == nullptr) return Invalid("scales", "is null");
  if (rows > 0 && columns > 0 && from == nullptr) return Invalid("from", "is null");
  if (rows > 0 && columns > 0 && to == nullptr) return Invalid("to", "is null");
  return absl::OkStatus();
}

absl::Status RowNotFinite(int64_t row) {
  return Invalid("from", absl::StrCat("has a number that is not finite in row ", row));
}

absl::Status ConvertCpu(const void* from, NumberFormat from_format, int64_t n, void* to,
                        NumberFormat to_format, int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateConversion(from, from_format, n, to, to_format));
  ParallelFor(threads, n, kNumbersPerThread, [&](int64_t begin, int64_t end) {
    const size_t count = static_cast<size_t>(end - begin);
    if (from_format == NumberFormat::kFloat32) {
      const auto* const x = static_cast<const float*>(from) + begin;
      auto* const y = static_cast<uint16_t*>(to) + begin;
      to_format == NumberFormat::kFloat16 ? ToFloat16(x, count, y) : ToBfloat16(x, count, y);
    } else {
      const auto* const x = static_cast<const uint16_t*>(from) + begin;
      auto* const y = static_cast<float*>(to) + begin;
      from_format == NumberFormat::kFloat16 ? FromFloat16(x, count, y) : FromBfloat16(x, count, y);
    }
  });
  return absl::OkStatus();
}

absl::Status QuantizeRowsCpu(const float* from, int64_t rows, int64_t columns, int8_t* to,
                             float* scales, int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateInt8Rows(from, scales, rows, columns, to));
  // A range's threads do not wait for each other: each leaves the bad row where its range begins.
  std::vector<int64_t> bad(rows, -1);
  ParallelFor(threads, rows, 1 + kNumbersPerThread / (columns + 1),
              [&](int64_t begin, int64_t end) {
                const int64_t found = QuantizeInt8Rows(from + begin * columns, end - begin, columns,
                                                       to + begin * columns, scales + begin);
                if (found >= 0) bad[begin] = begin + found;
              });
  for (const int64_t row : bad) {
    if (row >= 0) return RowNotFinite(row);
  }
  return absl::OkStatus();
}

absl::Status DequantizeRowsCpu(const int8_t* from, const float* scales, int64_t rows,
                               int64_t columns, float* to, int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateInt8Rows(from, scales, rows, columns, to));
  ParallelFor(threads, rows, 1 + kNumbersPerThread / (columns + 1),
              [&](int64_t begin, int64_t end) {
                DequantizeInt8Rows(from + begin * columns, scales + begin, end - begin, columns,
                                   to + begin * columns);
              });
  return absl::OkStatus();
}

}  // namespace codistill
