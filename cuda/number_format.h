// How the numbers of an array are stored, as far as kernels take several formats.

#ifndef CODISTILL_CUDA_NUMBER_FORMAT_H_
#define CODISTILL_CUDA_NUMBER_FORMAT_H_

#include <cstddef>
#include <cstdint>

namespace codistill {

enum class NumberFormat : uint8_t {
  kFloat32,
  kFloat16,   // IEEE 754 binary16
  kBfloat16,  // the upper half of a float32
  kInt8,      // two's complement; what one is worth is said apart, by a scale a row
};

// Bytes of one number.
constexpr size_t BytesOf(NumberFormat format) {
  return format == NumberFormat::kFloat32 ? 4 : format == NumberFormat::kInt8 ? 1 : 2;
}

// As messages name it: "float32", ...
constexpr const char* NameOf(NumberFormat format) {
  return format == NumberFormat::kFloat32    ? "float32"
         : format == NumberFormat::kFloat16  ? "float16"
         : format == NumberFormat::kBfloat16 ? "bfloat16"
                                             : "int8";
}

}  // namespace codistill

#endif  // CODISTILL_CUDA_NUMBER_FORMAT_H_
