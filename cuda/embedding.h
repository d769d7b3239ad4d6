// Rows of an embedding table: taken by index before the forward pass, their gradients summed by
// row after the backward pass. On the CPU; embedding_cuda.h has the same on CUDA devices, with the
// same bits.

#ifndef CODISTILL_CUDA_EMBEDDING_H_
#define CODISTILL_CUDA_EMBEDDING_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace codistill {

// to[i] = table[index[i]] for rows of `dim` floats: table is [rows, dim], to [index.size(), dim],
// and they do not overlap. No alignment is needed. INVALID_ARGUMENT names the argument at fault;
// for an index that is no row its place and value, and what of `to` has been written is then
// unspecified. Thread-safe; the same for any number of threads.
absl::Status GatherRowsCpu(const float* table, int64_t rows, int64_t dim,
                           absl::Span<const uint32_t> index, float* to, int threads);

// Places of one segment whose gradients are added one after the other; those of longer segments in
// pieces of this many, whose sums are then added one after the other. What a segment's sum is to
// the last bit depends on its own gradients alone, and a device can share a long one out.
constexpr int64_t kSegmentPiece = 128;

// A part of a segment longer than kSegmentPiece: places positions[begin] to positions[end - 1].
struct SegmentPiece {
  uint32_t begin, end;
};

// Which pieces are those of a long segment.
struct LongSegment {
  uint32_t segment, first_piece, pieces;
};

// For every row of a table the places of a batch in which it occurs: compressed sparse rows.
// Segment s has the places positions[offsets[s]] to positions[offsets[s + 1] - 1]. Does not own the
// arrays, which lie where the code that uses them runs: on the CPU or on the device.
struct SegmentsView {
  int64_t segments = 0;
  int64_t places = 0;
  const uint32_t* offsets = nullptr;    // [segments + 1], rising from 0 to places
  const uint32_t* positions = nullptr;  // [places], rising within a segment
  // For the device only, in the order of segments.
  const SegmentPiece* pieces = nullptr;
  int64_t num_pieces = 0;
  const LongSegment* long_segments = nullptr;
  int64_t num_long_segments = 0;
};

struct Segments {
  std::vector<uint32_t> offsets, positions;
  std::vector<SegmentPiece> pieces;
  std::vector<LongSegment> long_segments;

  SegmentsView View() const;
};

// The segments of a batch in which place i has row index[i] of a table of `rows` rows. Two passes
// over `index`. INVALID_ARGUMENT names the first place whose index is no row.
absl::Status FindSegments(absl::Span<const uint32_t> index, int64_t rows, Segments* segments);

// to[s] = the sum of gradients[p] over the places p of segment s, for rows of `dim` floats;
// `gradients` is [gradient_rows, dim], `to` [segments, dim]. With `accumulate` the sum is added to
// what is there, else a segment without a place becomes zeros. FP32, in the order that
// kSegmentPiece describes, so the same for any number of threads. INVALID_ARGUMENT names the
// argument at fault; for a place beyond the gradients its number, and what of `to` has been written
// is then unspecified. Thread-safe.
absl::Status SumSegmentsCpu(const SegmentsView& segments, const float* gradients,
                            int64_t gradient_rows, int64_t dim, bool accumulate, float* to,
                            int threads);

// The checks that need no look at the arrays' contents, shared with the CUDA twins.
absl::Status ValidateGather(const float* table, int64_t rows, int64_t dim, const uint32_t* index,
                            int64_t places, const float* to);
absl::Status ValidateSegmentSum(const SegmentsView& segments, const float* gradients,
                                int64_t gradient_rows, int64_t dim, const float* to);

}  // namespace codistill

#endif  // CODISTILL_CUDA_EMBEDDING_H_
