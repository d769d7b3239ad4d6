#ifndef CODISTILL_CUDA_EMBEDDING_LOOPS_H_
#define CODISTILL_CUDA_EMBEDDING_LOOPS_H_

#include <cstdint>

#include "cuda/embedding.h"

// The vector loops behind embedding.h, for the processor at hand.
namespace codistill::internal {

// Places [begin, end) of `places`. Returns the first whose index is no row, `end` if there is none.
int64_t GatherLoop(const float* table, int64_t rows, int64_t dim, const uint32_t* index,
                   int64_t places, int64_t begin, int64_t end, float* to);

// Segments [begin, end), whose offsets are valid. Returns the lowest element of positions that is
// no row of the gradients, `places` if there is none.
int64_t SegmentSumLoop(const SegmentsView& segments, const float* gradients, int64_t gradient_rows,
                       int64_t dim, bool accumulate, int64_t begin, int64_t end, float* to);

}  // namespace codistill::internal

#endif  // CODISTILL_CUDA_EMBEDDING_LOOPS_H_
