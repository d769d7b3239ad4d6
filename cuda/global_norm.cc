#include "cuda/global_norm.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/parallel.h"
#include "common/base/status.h"
#include "common/tensor/sum_of_squares.h"

namespace codistill {
namespace {

// Elements summed by one thread at a time: 256 KiB.
constexpr int64_t kChunk = 64 << 10;
// Chunks a thread should have, to be worth starting.
constexpr int64_t kChunksPerThread = 8;

}  // namespace

absl::Status ValidateGlobalNorm(absl::Span<const FloatArray> tensors) {
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (tensors[t].size < 0) {
      return absl::InvalidArgumentError(absl::StrCat("global norm: tensors: the size of ", t,
                                                     " is ", tensors[t].size, "; want 0 or more"));
    }
    if (tensors[t].size > 0 && tensors[t].values == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("global norm: tensors: ", t, " is null"));
    }
  }
  return absl::OkStatus();
}

absl::Status GlobalNormCpu(absl::Span<const FloatArray> tensors, int threads, GlobalNorm* result) {
  CODISTILL_RETURN_IF_ERROR(ValidateGlobalNorm(tensors));
  struct Chunk {
    size_t tensor;
    int64_t begin;
  };
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t begin = 0; begin < tensors[t].size; begin += kChunk) chunks.push_back({t, begin});
  }
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<double> sums(n);
  ParallelFor(threads, n, kChunksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const FloatArray& tensor = tensors[chunks[i].tensor];
      sums[i] = SumOfSquares(tensor.values + chunks[i].begin,
                             std::min(kChunk, tensor.size - chunks[i].begin));
    }
  });
  *result = GlobalNorm();
  for (int64_t i = 0; i < n; ++i) {
    result->sum_of_squares += sums[i];
    if (result->first_not_finite < 0 && !std::isfinite(sums[i])) {
      result->first_not_finite = static_cast<int64_t>(chunks[i].tensor);
    }
  }
  return absl::OkStatus();
}

}  // namespace codistill
