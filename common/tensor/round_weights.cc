#include "common/tensor/round_weights.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "common/tensor/bfloat16.h"

namespace codistill {
namespace {

// Largest magnitude of `n` values. Bits of a positive float are in the order of the floats, and a
// maximum of integers vectorises without further licence.
float Largest(const float* values, int64_t n) {
  int32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float result;
  std::memcpy(&result, &largest, sizeof(result));
  return result;
}

void RoundRow(float* values, int64_t n) {
  const float largest = Largest(values, n);
  const float scale = largest / 127;
  if (scale < std::numeric_limits<float>::min()) {
    std::fill(values, values + n, 0.0f);
    return;
  }
  // Adding and taking away 1.5 * 2^23 rounds a number of magnitude below 2^22 to the nearest
  // integer.
  constexpr float kRound = 12582912.0f;
  const float inverse = 127 / largest;
  for (int64_t i = 0; i < n; ++i) values[i] = (values[i] * inverse + kRound - kRound) * scale;
}

}  // namespace

void RoundToBfloat16(float* values, int64_t n) {
  constexpr int64_t kBlock = 1024;  // stays in the first-level cache
  uint16_t narrow[kBlock];
  for (int64_t at = 0; at < n; at += kBlock) {
    const auto count = static_cast<size_t>(std::min(kBlock, n - at));
    ToBfloat16(values + at, count, narrow);
    FromBfloat16(narrow, count, values + at);
  }
}

void RoundToInt8(float* values, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) RoundRow(values + r * columns, columns);
}

}  // namespace codistill
