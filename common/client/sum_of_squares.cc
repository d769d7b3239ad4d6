#include "common/client/sum_of_squares.h"

namespace codistill {

double SumOfSquares(const float* values, int64_t n) {
  // Sums that do not wait for one another; this file is compiled with -O3 in every configuration,
  // which makes vectors of them.
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double value = values[i + j];
      lanes[j] += value * value;
    }
  }
  for (; i < n; ++i) lanes[i % kLanes] += static_cast<double>(values[i]) * values[i];
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace codistill
