#include "cuda/number_target.h"

#include <cstring>

#include "common/tensor/bfloat16.h"
#include "common/tensor/float16.h"

namespace codistill {

void StoreNumbers(const float* from, int64_t n, const NumberTarget& to, int64_t begin) {
  switch (to.format) {
    case NumberFormat::kFloat16:
      ToFloat16(from, n, static_cast<uint16_t*>(to.data) + begin);
      return;
    case NumberFormat::kBfloat16:
      ToBfloat16(from, n, static_cast<uint16_t*>(to.data) + begin);
      return;
    default:
      std::memcpy(static_cast<float*>(to.data) + begin, from, n * sizeof(float));
      return;
  }
}

}  // namespace codistill
