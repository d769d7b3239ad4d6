#ifndef CODISTILL_COMMON_TENSOR_INT8_ROWS_H_
#define CODISTILL_COMMON_TENSOR_INT8_ROWS_H_

#include <cstdint>

// Rows of numbers as 8-bit integers with one scale a row: x = scale * q, q in [-127, 127], scale =
// max|x| / 127 of the row. Symmetric, so that 0 stays 0 and a product of quantised rows needs no
// correction. An element is off by at most scale / 2. For logits that means a divergence of about
// scale^2 / 24 nats between the softmax of what was written and of what is read: below 1e-2 as long
// as no logit is beyond 60.
namespace codistill {

// Quantises `rows` x `columns` numbers, row-major, to `to`, and writes a scale a row; q is rounded
// to nearest, ties to even. A row without a magnitude of 2^-100 or more counts as zeros, scale 0.
// Returns the first row with a number that is not finite, -1 if there is none; the rows from that
// one on are then unspecified. The ranges do not overlap. Thread-safe.
int64_t QuantizeInt8Rows(const float* from, int64_t rows, int64_t columns, int8_t* to,
                         float* scales);

// The largest magnitude of `n` numbers; NaN if one of them is not finite.
float LargestMagnitude(const float* from, int64_t n);

// The numbers again.
void DequantizeInt8Rows(const int8_t* from, const float* scales, int64_t rows, int64_t columns,
                        float* to);

}  // namespace codistill

#endif  // CODISTILL_COMMON_TENSOR_INT8_ROWS_H_
