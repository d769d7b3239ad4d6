#ifndef CODISTILL_WORKER_EVALUATION_METRICS_H_
#define CODISTILL_WORKER_EVALUATION_METRICS_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"

namespace codistill {

// A score and whether its example is a positive one. The score may be any increasing function of
// the probability; -inf and inf are scores like others, NaN is not one.
struct ScoredLabel {
  float score = 0;
  bool positive = false;
};

// Area under the ROC curve, exactly: the probability that a random positive scores above a random
// negative, equal scores counting one half (the Mann-Whitney U statistic over midranks). Absent
// where there are no positives, no negatives, or a NaN among the scores. O(n log n).
std::optional<double> AreaUnderRoc(std::vector<ScoredLabel> examples);

// Sum of |a_i - b_i|.
double SumOfDifferences(absl::Span<const float> a, absl::Span<const float> b);

// A sum that keeps its accuracy over any number of terms (Neumaier's variant of Kahan's).
class CompensatedSum {
 public:
  void Add(double term);
  double value() const { return sum_ + compensation_; }

 private:
  double sum_ = 0;
  double compensation_ = 0;
};

}  // namespace codistill

#endif  // CODISTILL_WORKER_EVALUATION_METRICS_H_
