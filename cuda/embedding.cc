#include "cuda/embedding.h"

#include <algorithm>
#include <atomic>
#include <limits>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "cuda/embedding_loops.h"

namespace codistill {
namespace {

constexpr int64_t kMaxPlaces = std::numeric_limits<uint32_t>::max();
// Floats a thread should have to move, to be worth starting.
constexpr int64_t kFloatsPerThread = 128 << 10;

absl::Status Invalid(absl::string_view kernel, absl::string_view argument,
                     const std::string& problem) {
  return absl::InvalidArgumentError(absl::StrCat(kernel, ": ", argument, " ", problem));
}

// Keeps the lowest of the numbers offered.
void Lower(std::atomic<int64_t>* lowest, int64_t value) {
  int64_t before = lowest->load();
  while (value < before && !lowest->compare_exchange_weak(before, value)) {
  }
}

}  // namespace

SegmentsView Segments::View() const {
  SegmentsView view;
  view.segments = std::max<int64_t>(0, static_cast<int64_t>(offsets.size()) - 1);
  view.places = static_cast<int64_t>(positions.size());
  view.offsets = offsets.data();
  view.positions = positions.data();
  view.pieces = pieces.data();
  view.num_pieces = static_cast<int64_t>(pieces.size());
  view.long_segments = long_segments.data();
  view.num_long_segments = static_cast<int64_t>(long_segments.size());
  return view;
}

absl::Status ValidateGather(const float* table, int64_t rows, int64_t dim, const uint32_t* index,
                            int64_t places, const float* to) {
  constexpr char kName[] = "gather";
  if (rows < 0) return Invalid(kName, "rows", absl::StrCat("is ", rows, "; want 0 or more"));
  if (dim < 1) return Invalid(kName, "dim", absl::StrCat("is ", dim, "; want at least 1"));
  if (places < 0 || places > kMaxPlaces) {
    return Invalid(kName, "index", absl::StrCat("has ", places, " places; want 0 to ", kMaxPlaces));
  }
  if (places == 0) return absl::OkStatus();
  if (index == nullptr) return Invalid(kName, "index", "is null");
  if (table == nullptr && rows > 0) return Invalid(kName, "table", "is null");
  if (to == nullptr) return Invalid(kName, "to", "is null");
  return absl::OkStatus();
}

absl::Status ValidateSegmentSum(const SegmentsView& segments, const float* gradients,
                                int64_t gradient_rows, int64_t dim, const float* to) {
  constexpr char kName[] = "segment sum";
  if (segments.segments < 0) {
    return Invalid(kName, "segments", absl::StrCat("is ", segments.segments, "; want 0 or more"));
  }
  if (segments.places < 0 || segments.places > kMaxPlaces) {
    return Invalid(kName, "places",
                   absl::StrCat("is ", segments.places, "; want 0 to ", kMaxPlaces));
  }
  if (gradient_rows < 0) {
    return Invalid(kName, "gradient_rows", absl::StrCat("is ", gradient_rows, "; want 0 or more"));
  }
  if (dim < 1) return Invalid(kName, "dim", absl::StrCat("is ", dim, "; want at least 1"));
  if (segments.segments == 0) return absl::OkStatus();
  if (segments.offsets == nullptr) return Invalid(kName, "offsets", "is null");
  if (to == nullptr) return Invalid(kName, "to", "is null");
  if (segments.places == 0) return absl::OkStatus();
  if (segments.positions == nullptr) return Invalid(kName, "positions", "is null");
  if (gradients == nullptr && gradient_rows > 0) return Invalid(kName, "gradients", "is null");
  return absl::OkStatus();
}

absl::Status GatherRowsCpu(const float* table, int64_t rows, int64_t dim,
                           absl::Span<const uint32_t> index, float* to, int threads) {
  const int64_t places = static_cast<int64_t>(index.size());
  CODISTILL_RETURN_IF_ERROR(ValidateGather(table, rows, dim, index.data(), places, to));
  std::atomic<int64_t> bad{places};
  ParallelFor(threads, places, 1 + kFloatsPerThread / dim, [&](int64_t begin, int64_t end) {
    const int64_t found =
        internal::GatherLoop(table, rows, dim, index.data(), places, begin, end, to);
    if (found < end) Lower(&bad, found);
  });
  if (bad == places) return absl::OkStatus();
  return Invalid("gather", "index",
                 absl::StrCat("holds ", index[bad.load()], " at place ", bad.load(),
                              "; want less than ", rows));
}

absl::Status FindSegments(absl::Span<const uint32_t> index, int64_t rows, Segments* segments) {
  const int64_t places = static_cast<int64_t>(index.size());
  if (places > kMaxPlaces) {
    return Invalid("segments", "index",
                   absl::StrCat("has ", places, " places; want 0 to ", kMaxPlaces));
  }
  if (rows < 0 || rows > kMaxPlaces) {
    return Invalid("segments", "rows", absl::StrCat("is ", rows, "; want 0 to ", kMaxPlaces));
  }
  // Counted one further on, so that the sums of the counts are where segments begin, and end where
  // segments end once every place has been entered.
  std::vector<uint32_t>& offsets = segments->offsets;
  offsets.assign(rows + 2, 0);
  for (int64_t i = 0; i < places; ++i) {
    if (index[i] >= rows) {
      return Invalid("segments", "index",
                     absl::StrCat("holds ", index[i], " at place ", i, "; want less than ", rows));
    }
    ++offsets[index[i] + 2];
  }
  for (int64_t s = 2; s < rows + 2; ++s) offsets[s] += offsets[s - 1];
  segments->positions.resize(places);
  for (int64_t i = 0; i < places; ++i) {
    segments->positions[offsets[index[i] + 1]++] = static_cast<uint32_t>(i);
  }
  offsets.pop_back();

  segments->pieces.clear();
  segments->long_segments.clear();
  for (int64_t s = 0; s < rows; ++s) {
    const int64_t begin = offsets[s], end = offsets[s + 1];
    if (end - begin <= kSegmentPiece) continue;
    const int64_t pieces = (end - begin + kSegmentPiece - 1) / kSegmentPiece;
    segments->long_segments.push_back({static_cast<uint32_t>(s),
                                       static_cast<uint32_t>(segments->pieces.size()),
                                       static_cast<uint32_t>(pieces)});
    for (int64_t at = begin; at < end; at += kSegmentPiece) {
      segments->pieces.push_back(
          {static_cast<uint32_t>(at), static_cast<uint32_t>(std::min(at + kSegmentPiece, end))});
    }
  }
  return absl::OkStatus();
}

absl::Status SumSegmentsCpu(const SegmentsView& segments, const float* gradients,
                            int64_t gradient_rows, int64_t dim, bool accumulate, float* to,
                            int threads) {
  CODISTILL_RETURN_IF_ERROR(ValidateSegmentSum(segments, gradients, gradient_rows, dim, to));
  const uint32_t* const offsets = segments.offsets;
  for (int64_t s = 0; s < segments.segments; ++s) {
    if (offsets[s] > offsets[s + 1] || offsets[s + 1] > segments.places) {
      return Invalid("segment sum", "offsets",
                     absl::StrCat("of segment ", s, " are ", offsets[s], " to ", offsets[s + 1],
                                  "; want them to rise to ", segments.places, " at most"));
    }
  }
  // Shared out by the rows read and written, of which the common segment has few and one may have
  // most: the first segment whose rows and those of the segments before are beyond a thread's part.
  const int64_t work = segments.segments + segments.places;
  auto first_segment = [&](int64_t rows) {
    int64_t low = 0, high = segments.segments;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + offsets[middle] < rows) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  std::atomic<int64_t> bad{segments.places};
  ParallelFor(threads, work, 1 + kFloatsPerThread / dim, [&](int64_t begin, int64_t end) {
    const int64_t last = end == work ? segments.segments : first_segment(end);
    const int64_t found = internal::SegmentSumLoop(segments, gradients, gradient_rows, dim,
                                                   accumulate, first_segment(begin), last, to);
    Lower(&bad, found);
  });
  if (bad == segments.places) return absl::OkStatus();
  return Invalid("segment sum", "positions",
                 absl::StrCat("holds ", segments.positions[bad.load()], " at ", bad.load(),
                              "; want less than the ", gradient_rows, " rows of gradients"));
}

}  // namespace codistill
