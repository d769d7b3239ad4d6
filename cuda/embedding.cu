// Gather and segment sum on CUDA devices: a few neighbouring threads a row, each with 16 bytes of
// it at a time and several rows under way.

#include "cuda/device.h"
// device.h must come first.
#include <algorithm>
#include <cstdint>

#include "cuda/embedding_cuda.h"
#include "cuda/kernel_report.h"

namespace codistill {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsAtOnce = 4;
constexpr int kPlacesAtOnce = 8;
constexpr int kPiecesAtOnce = 8;
constexpr float kNothing = -0.0f;  // added to any number, -0 too, leaves it as it is
constexpr char kGather[] = "gather";
constexpr char kSegmentSum[] = "segment sum";

__device__ __forceinline__ float All(float x, float) { return x; }
__device__ __forceinline__ float4 All(float x, float4) { return make_float4(x, x, x, x); }
__device__ __forceinline__ float Plus(float a, float b) { return a + b; }
__device__ __forceinline__ float4 Plus(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Threads that share a row: a power of two, so that rows do not straddle warps.
struct Lanes {
  int log2;
  __host__ __device__ int count() const { return 1 << log2; }
};

Lanes LanesFor(int64_t vectors) {
  Lanes lanes = {0};
  while (lanes.log2 < 5 && lanes.count() < vectors) ++lanes.log2;
  return lanes;
}

struct GatherParams {
  const void* table;
  int64_t rows, vectors;  // of a row
  const uint32_t* index;
  int64_t places;
  void* to;
  Lowest* bad_place;
  Lanes lanes;
};

template <typename Vector>
__global__ void __launch_bounds__(kThreads) GatherKernel(const GatherParams params) {
  const int lane = static_cast<int>(threadIdx.x) & (params.lanes.count() - 1);
  const int group = static_cast<int>(threadIdx.x) >> params.lanes.log2;
  const int groups = kThreads >> params.lanes.log2;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups * kRowsAtOnce + group;
  const auto* const table = static_cast<const Vector*>(params.table);
  auto* const to = static_cast<Vector*>(params.to);

  const Vector* from[kRowsAtOnce];
#pragma unroll
  for (int u = 0; u < kRowsAtOnce; ++u) {
    const int64_t place = first + u * groups;
    from[u] = nullptr;
    if (place >= params.places) continue;
    const uint32_t row = __ldg(params.index + place);
    if (row < params.rows) {
      from[u] = table + row * params.vectors;
    } else if (lane == 0) {
      atomicMin(params.bad_place, static_cast<Lowest>(place));
    }
  }
  for (int64_t c = lane; c < params.vectors; c += params.lanes.count()) {
    Vector values[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (from[u] != nullptr) values[u] = __ldg(from[u] + c);
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (from[u] != nullptr) to[(first + u * groups) * params.vectors + c] = values[u];
    }
  }
}

// At the start of the workspace; the sums of the pieces follow.
struct SegmentReport {
  Lowest bad_position;  // element of positions
  Lowest bad_layout;    // number among segments, pieces and long segments, in this order
};
static_assert(sizeof(SegmentReport) == 16, "the sums behind it are aligned");

struct SegmentParams {
  SegmentsView segments;
  const void* gradients;
  int64_t gradient_rows, vectors;
  bool accumulate;
  void* to;
  SegmentReport* report;
  void* piece_sums;
  Lanes lanes;
};

// Column c of the sum of places [begin, end), begin < end, one after the other. A place that is no
// row is reported and left out.
template <typename Vector>
__device__ __forceinline__ Vector SumPlaces(const SegmentParams& params, int64_t begin, int64_t end,
                                            int64_t c) {
  const auto* const gradients = static_cast<const Vector*>(params.gradients);
  Vector sum = All(kNothing, Vector());
  for (int64_t i = begin; i < end; i += kPlacesAtOnce) {
    Vector values[kPlacesAtOnce];
#pragma unroll
    for (int u = 0; u < kPlacesAtOnce; ++u) {
      values[u] = All(kNothing, Vector());
      if (i + u >= end) continue;
      const uint32_t row = __ldg(params.segments.positions + i + u);
      if (row < params.gradient_rows) {
        values[u] = __ldg(gradients + row * params.vectors + c);
      } else {
        atomicMin(&params.report->bad_position, static_cast<Lowest>(i + u));
      }
    }
#pragma unroll
    for (int u = 0; u < kPlacesAtOnce; ++u) sum = Plus(sum, values[u]);
  }
  return sum;
}

// As many groups of threads as there are segments and pieces; a segment in pieces is left to
// FinishKernel.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) SegmentSumKernel(const SegmentParams params) {
  const int lane = static_cast<int>(threadIdx.x) & (params.lanes.count() - 1);
  const int64_t item =
      (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> params.lanes.log2;
  const SegmentsView& view = params.segments;
  if (item >= view.segments + view.num_pieces) return;
  const bool is_piece = item >= view.segments;
  int64_t begin, end;
  if (is_piece) {
    const SegmentPiece& piece = view.pieces[item - view.segments];
    begin = piece.begin;
    end = piece.end;
  } else {
    begin = __ldg(view.offsets + item);
    end = __ldg(view.offsets + item + 1);
  }
  if (end > view.places || begin > end || (is_piece && end - begin > kSegmentPiece)) {
    if (lane == 0) atomicMin(&params.report->bad_layout, static_cast<Lowest>(item));
    return;
  }
  if (!is_piece && end - begin > kSegmentPiece && view.num_pieces > 0) return;
  Vector* const to =
      is_piece ? static_cast<Vector*>(params.piece_sums) + (item - view.segments) * params.vectors
               : static_cast<Vector*>(params.to) + item * params.vectors;
  const bool accumulate = params.accumulate && !is_piece;
  if (begin == end && accumulate) return;
  for (int64_t c = lane; c < params.vectors; c += params.lanes.count()) {
    Vector total = All(begin == end ? 0.0f : kNothing, Vector());
    for (int64_t at = begin; at < end; at += kSegmentPiece) {
      const int64_t stop = at + kSegmentPiece < end ? at + kSegmentPiece : end;
      total = Plus(total, SumPlaces<Vector>(params, at, stop, c));
    }
    to[c] = accumulate ? Plus(to[c], total) : total;
  }
}

// The sums of pieces of a long segment, one after the other.
template <typename Vector>
__global__ void __launch_bounds__(kThreads) FinishKernel(const SegmentParams params) {
  const int lane = static_cast<int>(threadIdx.x) & (params.lanes.count() - 1);
  const int64_t item =
      (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> params.lanes.log2;
  const SegmentsView& view = params.segments;
  if (item >= view.num_long_segments) return;
  const LongSegment segment = view.long_segments[item];
  const int64_t first = segment.first_piece, pieces = segment.pieces;
  if (segment.segment >= view.segments || pieces < 1 || first + pieces > view.num_pieces) {
    if (lane == 0) {
      atomicMin(&params.report->bad_layout,
                static_cast<Lowest>(view.segments + view.num_pieces + item));
    }
    return;
  }
  const auto* const sums = static_cast<const Vector*>(params.piece_sums) + first * params.vectors;
  Vector* const to = static_cast<Vector*>(params.to) + segment.segment * params.vectors;
  for (int64_t c = lane; c < params.vectors; c += params.lanes.count()) {
    Vector total = sums[c];
    for (int64_t p = 1; p < pieces; p += kPiecesAtOnce) {
      Vector values[kPiecesAtOnce];
#pragma unroll
      for (int u = 0; u < kPiecesAtOnce; ++u) {
        if (p + u < pieces) values[u] = sums[(p + u) * params.vectors + c];
      }
#pragma unroll
      for (int u = 0; u < kPiecesAtOnce; ++u) {
        if (p + u < pieces) total = Plus(total, values[u]);
      }
    }
    to[c] = params.accumulate ? Plus(to[c], total) : total;
  }
}

int64_t BlocksFor(int64_t groups_of_lanes, Lanes lanes) {
  const int64_t in_block = kThreads >> lanes.log2;
  return (groups_of_lanes + in_block - 1) / in_block;
}

}  // namespace

size_t SegmentSumWorkspaceBytes(const SegmentsView& segments, int64_t dim) {
  return sizeof(SegmentReport) +
         static_cast<size_t>(segments.num_pieces) * static_cast<size_t>(dim) * sizeof(float);
}

absl::Status LaunchGatherRows(const float* table, int64_t rows, int64_t dim, const uint32_t* index,
                              int64_t places, float* to, void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateGather(table, rows, dim, index, places, to));
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kGather, workspace));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  CODISTILL_RETURN_IF_ERROR(ClearLowest(kGather, workspace, 1, cuda_stream));
  if (places == 0) return absl::OkStatus();
  const bool vectors = dim % 4 == 0 && IsAligned16(table) && IsAligned16(to);
  GatherParams params = {};
  params.table = table;
  params.rows = rows;
  params.vectors = vectors ? dim / 4 : dim;
  params.index = index;
  params.places = places;
  params.to = to;
  params.bad_place = static_cast<Lowest*>(workspace);
  params.lanes = LanesFor(params.vectors);
  const int64_t blocks = BlocksFor((places + kRowsAtOnce - 1) / kRowsAtOnce, params.lanes);
  CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kGather, "index", blocks));
  return CudaStatus(
      kGather, "launching the kernel",
      LaunchKernel(vectors ? &GatherKernel<float4> : &GatherKernel<float>,
                   dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, cuda_stream, params));
}

absl::Status FinishGatherRows(int64_t rows, const void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kGather, workspace));
  int64_t bad = -1;
  CODISTILL_RETURN_IF_ERROR(
      FetchReport(kGather, workspace, sizeof(bad), &bad, static_cast<cudaStream_t>(stream)));
  if (bad < 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("gather: index holds at place ", bad, " what is no row; want less than ", rows));
}

absl::Status LaunchSegmentSum(const SegmentsView& segments, const float* gradients,
                              int64_t gradient_rows, int64_t dim, bool accumulate, float* to,
                              void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateSegmentSum(segments, gradients, gradient_rows, dim, to));
  if (segments.num_pieces < 0 || (segments.num_pieces > 0 && segments.pieces == nullptr)) {
    return absl::InvalidArgumentError(absl::StrCat("segment sum: pieces is null or their number, ",
                                                   segments.num_pieces, ", negative"));
  }
  if ((segments.num_pieces > 0) != (segments.num_long_segments > 0) ||
      segments.num_long_segments < 0 ||
      (segments.num_long_segments > 0 && segments.long_segments == nullptr)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "segment sum: long_segments is null, or their number, ", segments.num_long_segments,
        ", does not go with that of the pieces, ", segments.num_pieces));
  }
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kSegmentSum, workspace));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  CODISTILL_RETURN_IF_ERROR(ClearLowest(kSegmentSum, workspace, 2, cuda_stream));
  if (segments.segments == 0) return absl::OkStatus();
  const bool vectors = dim % 4 == 0 && IsAligned16(gradients) && IsAligned16(to);
  SegmentParams params = {};
  params.segments = segments;
  params.gradients = gradients;
  params.gradient_rows = gradient_rows;
  params.vectors = vectors ? dim / 4 : dim;
  params.accumulate = accumulate;
  params.to = to;
  params.report = static_cast<SegmentReport*>(workspace);
  params.piece_sums = params.report + 1;
  params.lanes = LanesFor(params.vectors);
  const int64_t blocks = BlocksFor(segments.segments + segments.num_pieces, params.lanes);
  CODISTILL_RETURN_IF_ERROR(ValidateBlocks(kSegmentSum, "segments", blocks));
  CODISTILL_RETURN_IF_ERROR(CudaStatus(
      kSegmentSum, "launching the kernel",
      LaunchKernel(vectors ? &SegmentSumKernel<float4> : &SegmentSumKernel<float>,
                   dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, cuda_stream, params)));
  if (segments.num_long_segments == 0) return absl::OkStatus();
  const int64_t finish_blocks = BlocksFor(segments.num_long_segments, params.lanes);
  return CudaStatus(kSegmentSum, "launching the kernel for long segments",
                    LaunchKernel(vectors ? &FinishKernel<float4> : &FinishKernel<float>,
                                 dim3(static_cast<unsigned>(finish_blocks)), dim3(kThreads), 0,
                                 cuda_stream, params));
}

absl::Status FinishSegmentSum(const SegmentsView& segments, int64_t gradient_rows,
                              const void* workspace, void* stream) {
  CODISTILL_RETURN_IF_ERROR(ValidateWorkspace(kSegmentSum, workspace));
  int64_t report[2] = {-1, -1};
  CODISTILL_RETURN_IF_ERROR(FetchReport(kSegmentSum, workspace, sizeof(report), report,
                                        static_cast<cudaStream_t>(stream)));
  if (report[1] >= 0) {
    int64_t number = report[1];
    const char* array = "offsets of segment ";
    if (number >= segments.segments) {
      number -= segments.segments;
      array = "pieces: number ";
      if (number >= segments.num_pieces) {
        number -= segments.num_pieces;
        array = "long_segments: number ";
      }
    }
    return absl::InvalidArgumentError(absl::StrCat("segment sum: ", array, number,
                                                   " is not as FindSegments makes them for ",
                                                   segments.places, " places"));
  }
  if (report[0] >= 0) {
    return absl::InvalidArgumentError(absl::StrCat("segment sum: positions holds at ", report[0],
                                                   " what is no row; want less than the ",
                                                   gradient_rows, " rows of gradients"));
  }
  return absl::OkStatus();
}

}  // namespace codistill
