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

int64_t CountCorrect(absl::Span<const float> logits, absl::Span<const int64_t> labels) {
  if (labels.empty()) return 0;
  const size_t outputs = logits.size() / labels.size();
  int64_t correct = 0;
  for (size_t row = 0; row < labels.size(); ++row) {
    const float* values = logits.data() + row * outputs;
    const size_t label = static_cast<size_t>(labels[row]);
    const float at_label = values[label];
    // Two plain loops without an exit: they vectorise, which matters with tens of thousands of
    // classes.
    bool beaten = false;
    for (size_t i = 0; i < label; ++i) beaten |= !(values[i] < at_label);
    for (size_t i = label; i < outputs; ++i) beaten |= !(values[i] <= at_label);
    correct += beaten ? 0 : 1;
  }
  return correct;
}

int64_t CountCorrectBinary(absl::Span<const float> logits, absl::Span<const float> labels) {
  int64_t correct = 0;
  for (size_t row = 0; row < labels.size(); ++row) {
    if (std::isnan(logits[row])) continue;
    correct += (logits[row] >= 0) == (labels[row] >= 0.5f) ? 1 : 0;
  }
  return correct;
}

void CompensatedSum::Add(double term) {
  const double total = sum_ + term;
  compensation_ += std::abs(sum_) >= std::abs(term) ? (sum_ - total) + term : (term - total) + sum_;
  sum_ = total;
}

}  // namespace codistill
