#ifndef CODISTILL_SERVER_BUFFER_AVERAGE_H_
#define CODISTILL_SERVER_BUFFER_AVERAGE_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "proto/model.pb.h"

namespace codistill {

// What becomes of one buffer's elements when several ranks report theirs: the weighted mean for
// float types (summed in rank order, in double precision), the maximum for integer types.
// `sources[i]` has `count` elements and weight `weights[i]`; the weights sum to 1. `to` may be one
// of the sources.
void CombineBuffers(DataType dtype, absl::Span<const uint8_t* const> sources,
                    absl::Span<const double> weights, int64_t count, uint8_t* to);

// One 16-bit IEEE number to and from fp32; rounds to nearest even.
float HalfToFloat(uint16_t half);
uint16_t FloatToHalf(float value);

}  // namespace codistill

#endif  // CODISTILL_SERVER_BUFFER_AVERAGE_H_
