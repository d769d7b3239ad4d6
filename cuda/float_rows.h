// Rows of numbers in any format, as float32.

#ifndef CODISTILL_CUDA_FLOAT_ROWS_H_
#define CODISTILL_CUDA_FLOAT_ROWS_H_

#include <cstdint>

#include "cuda/number_format.h"
#include "hwy/aligned_allocator.h"

namespace codistill {
namespace internal {

// One row after the other of a [rows, n] array that outlives this: where it is, if it is float32,
// else decoded a piece at a time into scratch of its own. For one thread.
class FloatRows {
 public:
  // `scale`: [rows], of kInt8. A row stays valid until Row() has been called `slots` times more.
  FloatRows(const void* data, NumberFormat format, const float* scale, int64_t n, int slots);

  // Where row r is. Scratch holds it only as far as Decode has been called since.
  const float* Row(int64_t r);
  // Elements [begin, begin + count) of the row last asked for.
  void Decode(int64_t begin, int64_t count);

 private:
  float* Slot() const { return scratch_.get() + slot_ * n_; }

  const void* const data_;
  const NumberFormat format_;
  const float* const scale_;
  const int64_t n_;
  const int slots_;
  int64_t row_ = 0;
  int slot_ = 0;
  hwy::AlignedFreeUniquePtr<float[]> scratch_;
};

// Numbers [begin, begin + count) of an array, as float32; `scale` is that of kInt8.
void DecodeNumbers(const void* data, NumberFormat format, int64_t begin, int64_t count, float scale,
                   float* to);

// One number of an array of `format`, without its scale: for errors and tests.
float ReadNumber(const void* data, NumberFormat format, int64_t index);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_CUDA_FLOAT_ROWS_H_
