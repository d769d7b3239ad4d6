#ifndef CODISTILL_COMMON_TENSOR_SUM_OF_SQUARES_H_
#define CODISTILL_COMMON_TENSOR_SUM_OF_SQUARES_H_

#include <cstdint>

namespace codistill {

// Sum of the squares of `n` floats, in double and in an order that depends on `n` alone. It is
// finite exactly when every element is: the square of a float is far from the largest double.
double SumOfSquares(const float* values, int64_t n);

}  // namespace codistill

#endif  // CODISTILL_COMMON_TENSOR_SUM_OF_SQUARES_H_
