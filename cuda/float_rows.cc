#include "cuda/float_rows.h"

#include <cstring>

#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"
#include "common/tensor/int8_rows.h"

namespace codistill {
namespace internal {

FloatRows::FloatRows(const void* data, NumberFormat format, const float* scale, int64_t n,
                     int slots)
    : data_(data), format_(format), scale_(scale), n_(n), slots_(slots) {
  if (format != NumberFormat::kFloat32) scratch_ = hwy::AllocateAligned<float>(n * slots);
}

const float* FloatRows::Row(int64_t r) {
  row_ = r;
  if (format_ == NumberFormat::kFloat32) return static_cast<const float*>(data_) + r * n_;
  slot_ = (slot_ + 1) % slots_;
  return Slot();
}

void FloatRows::Decode(int64_t begin, int64_t count) {
  if (format_ == NumberFormat::kFloat32) return;
  DecodeNumbers(data_, format_, row_ * n_ + begin, count,
                format_ == NumberFormat::kInt8 ? scale_[row_] : 0, Slot() + begin);
}

void DecodeNumbers(const void* data, NumberFormat format, int64_t begin, int64_t count, float scale,
                   float* to) {
  switch (format) {
    case NumberFormat::kFloat32:
      std::memcpy(to, static_cast<const float*>(data) + begin, count * sizeof(float));
      return;
    case NumberFormat::kFloat16:
      return FromFloat16(static_cast<const uint16_t*>(data) + begin, count, to);
    case NumberFormat::kBfloat16:
      return FromBfloat16(static_cast<const uint16_t*>(data) + begin, count, to);
    case NumberFormat::kInt8:
      return DequantizeInt8Rows(static_cast<const int8_t*>(data) + begin, &scale, 1, count, to);
  }
}

float ReadNumber(const void* data, NumberFormat format, int64_t index) {
  switch (format) {
    case NumberFormat::kFloat16:
      return FromFloat16(static_cast<const uint16_t*>(data)[index]);
    case NumberFormat::kBfloat16:
      return FromBfloat16(static_cast<const uint16_t*>(data)[index]);
    case NumberFormat::kInt8:
      return static_cast<const int8_t*>(data)[index];
    case NumberFormat::kFloat32:
      break;
  }
  return static_cast<const float*>(data)[index];
}

}  // namespace internal
}  // namespace codistill
