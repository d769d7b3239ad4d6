#include "worker/evaluation_metrics.h"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace codistill {

std::optional<double> AreaUnderRoc(std::vector<ScoredLabel> examples) {
  for (const ScoredLabel& example : examples) {
    if (std::isnan(example.score)) return std::nullopt;
  }
  std::sort(examples.begin(), examples.end(),
            [](const ScoredLabel& a, const ScoredLabel& b) { return a.score < b.score; });
  // Twice the number of (positive, negative) pairs in the right order, ties once: an integer, so
  // that the result does not depend on the order of equal scores. Fits for up to 2^32 examples.
  uint64_t twice_ordered = 0;
  uint64_t positives = 0, negatives = 0;
  for (size_t begin = 0; begin < examples.size();) {
    size_t end = begin;
    uint64_t tied_positives = 0;
    for (; end < examples.size() && examples[end].score == examples[begin].score; ++end) {
      tied_positives += examples[end].positive ? 1 : 0;
    }
    const uint64_t tied_negatives = (end - begin) - tied_positives;
    twice_ordered += tied_positives * (2 * negatives + tied_negatives);
    positives += tied_positives;
    negatives += tied_negatives;
    begin = end;
  }
  if (positives == 0 || negatives == 0) return std::nullopt;
  return static_cast<double>(twice_ordered) /
         (2.0 * static_cast<double>(positives) * static_cast<double>(negatives));
}

double SumOfDifferences(absl::Span<const float> a, absl::Span<const float> b) {
  // Independent partial sums, which the compiler turns into vectors; short enough to be exact to a
  // few units in the last place before they go into the double.
  constexpr size_t kLanes = 16, kBlock = 1024;
  double sum = 0;
  const size_t n = std::min(a.size(), b.size());
  for (size_t begin = 0; begin < n; begin += kBlock) {
    const size_t end = std::min(n, begin + kBlock);
    float lanes[kLanes] = {};
    size_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      for (size_t j = 0; j < kLanes; ++j) lanes[j] += std::abs(a[i + j] - b[i + j]);
    }
    for (; i < end; ++i) lanes[0] += std::abs(a[i] - b[i]);
    for (float lane : lanes) sum += lane;
  }
  return sum;
}

void CompensatedSum::Add(double term) {
  const double total = sum_ + term;
  compensation_ += std::abs(sum_) >= std::abs(term) ? (sum_ - total) + term : (term - total) + sum_;
  sum_ = total;
}

}  // namespace codistill
