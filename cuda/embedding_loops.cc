#include "cuda/embedding_loops.h"

#include <algorithm>
#include <cstring>

// The sets between these bring nothing here.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_AVX3_DL)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cuda/embedding_loops.cc"
#include "hwy/foreach_target.h"
// foreach_target.h must come first.
#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace codistill {
namespace internal {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Rows ahead whose memory is asked for: a row comes from anywhere, so that no processor guesses it.
constexpr int64_t kRowsAhead = 16;
constexpr int64_t kLineFloats = 64 / sizeof(float);
constexpr int64_t kLongRow = 64;  // floats from which on memcpy's way with a row is the best

HWY_INLINE void PrefetchRow(const float* row, int64_t dim) {
  // Of long rows the beginning: the processor itself sees how it goes on.
  const int64_t end = HWY_MIN(dim, 4 * kLineFloats);
  for (int64_t d = 0; d < end; d += kLineFloats) hwy::Prefetch(row + d);
  if (dim <= 4 * kLineFloats) hwy::Prefetch(row + dim - 1);
}

HWY_INLINE void CopyRow(const float* HWY_RESTRICT from, int64_t dim, float* HWY_RESTRICT to) {
  if (dim >= kLongRow) {
    std::memcpy(to, from, dim * sizeof(float));
    return;
  }
  const hn::ScalableTag<float> d;
  const hn::CappedTag<float, 4> d4;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t lanes4 = static_cast<int64_t>(hn::Lanes(d4));
  int64_t i = 0;
  for (; i + lanes <= dim; i += lanes) hn::StoreU(hn::LoadU(d, from + i), d, to + i);
  for (; i + lanes4 <= dim; i += lanes4) hn::StoreU(hn::LoadU(d4, from + i), d4, to + i);
  for (; i < dim; ++i) to[i] = from[i];
}

int64_t Gather(const float* HWY_RESTRICT table, int64_t rows, int64_t dim,
               const uint32_t* HWY_RESTRICT index, int64_t places, int64_t begin, int64_t end,
               float* HWY_RESTRICT to) {
  if (dim == 1) {
    for (int64_t i = begin; i < end; ++i) {
      if (index[i] >= rows) return i;
      to[i] = table[index[i]];
    }
    return end;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (i + kRowsAhead < places && index[i + kRowsAhead] < rows) {
      PrefetchRow(table + index[i + kRowsAhead] * dim, dim);
    }
    if (index[i] >= rows) return i;
    CopyRow(table + index[i] * dim, dim, to + i * dim);
  }
  return end;
}

// Columns [column, column + kVectors vectors) of the sums of one segment. All positions are rows.
template <int kVectors, class D>
HWY_INLINE void SumColumns(D d, const float* HWY_RESTRICT gradients, int64_t dim,
                           const uint32_t* HWY_RESTRICT positions, int64_t n, bool accumulate,
                           float* HWY_RESTRICT to) {
  using V = hn::Vec<D>;
  constexpr int64_t kLanes = hn::MaxLanes(D());  // every x86 vector has as many
  V total[kVectors];
  for (int v = 0; v < kVectors; ++v) total[v] = hn::Zero(d);
  for (int64_t begin = 0; begin < n; begin += kSegmentPiece) {
    const int64_t end = HWY_MIN(begin + kSegmentPiece, n);
    const float* row = gradients + positions[begin] * dim;
    V sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = hn::LoadU(d, row + v * kLanes);
    for (int64_t i = begin + 1; i < end; ++i) {
      row = gradients + positions[i] * dim;
      for (int v = 0; v < kVectors; ++v) sum[v] = hn::Add(sum[v], hn::LoadU(d, row + v * kLanes));
    }
    for (int v = 0; v < kVectors; ++v) total[v] = begin == 0 ? sum[v] : hn::Add(total[v], sum[v]);
  }
  for (int v = 0; v < kVectors; ++v) {
    if (accumulate) total[v] = hn::Add(hn::LoadU(d, to + v * kLanes), total[v]);
    hn::StoreU(total[v], d, to + v * kLanes);
  }
}

int64_t SegmentSum(const SegmentsView& segments, const float* HWY_RESTRICT gradients,
                   int64_t gradient_rows, int64_t dim, bool accumulate, int64_t begin, int64_t end,
                   float* HWY_RESTRICT to) {
  const hn::CappedTag<float, 16> d;
  const hn::CappedTag<float, 4> d4;
  const hn::CappedTag<float, 1> d1;
  constexpr int64_t kLanes = hn::MaxLanes(hn::CappedTag<float, 16>());
  constexpr int64_t kLanes4 = hn::MaxLanes(hn::CappedTag<float, 4>());
  int64_t bad = segments.places;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = segments.offsets[s], n = segments.offsets[s + 1] - first;
    const uint32_t* const positions = segments.positions + first;
    float* const sum = to + s * dim;
    if (n == 0) {
      if (!accumulate) std::fill(sum, sum + dim, 0.0f);
      continue;
    }
    bool all_good = true;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t ahead = first + i + kRowsAhead;
      if (ahead < segments.places && segments.positions[ahead] < gradient_rows) {
        PrefetchRow(gradients + segments.positions[ahead] * dim, dim);
      }
      if (positions[i] >= gradient_rows) {
        bad = HWY_MIN(bad, first + i);
        all_good = false;
      }
    }
    if (!all_good) continue;
    int64_t c = 0;
    for (; c + 4 * kLanes <= dim; c += 4 * kLanes) {
      SumColumns<4>(d, gradients + c, dim, positions, n, accumulate, sum + c);
    }
    for (; c + kLanes <= dim; c += kLanes) {
      SumColumns<1>(d, gradients + c, dim, positions, n, accumulate, sum + c);
    }
    for (; c + kLanes4 <= dim; c += kLanes4) {
      SumColumns<1>(d4, gradients + c, dim, positions, n, accumulate, sum + c);
    }
    for (; c < dim; ++c) {
      SumColumns<1>(d1, gradients + c, dim, positions, n, accumulate, sum + c);
    }
  }
  return bad;
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace internal
}  // namespace codistill
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace codistill {
namespace internal {

HWY_EXPORT(Gather);
HWY_EXPORT(SegmentSum);

int64_t GatherLoop(const float* table, int64_t rows, int64_t dim, const uint32_t* index,
                   int64_t places, int64_t begin, int64_t end, float* to) {
  return HWY_DYNAMIC_DISPATCH(Gather)(table, rows, dim, index, places, begin, end, to);
}

int64_t SegmentSumLoop(const SegmentsView& segments, const float* gradients, int64_t gradient_rows,
                       int64_t dim, bool accumulate, int64_t begin, int64_t end, float* to) {
  return HWY_DYNAMIC_DISPATCH(SegmentSum)(segments, gradients, gradient_rows, dim, accumulate,
                                          begin, end, to);
}

}  // namespace internal
}  // namespace codistill
#endif  // HWY_ONCE
