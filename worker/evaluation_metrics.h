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

// Number of rows of `logits` [rows, outputs] whose largest value is at the label's column; of equal
// values the first counts. A NaN in a row makes it a miss. `labels` has `rows` entries in [0,
// outputs).
int64_t CountCorrect(absl::Span<const float> logits, absl::Span<const int64_t> labels);

// The same for one logit a row: the prediction is 1 where the probability reaches one half (logit
// >= 0).
int64_t CountCorrectBinary(absl::Span<const float> logits, absl::Span<const float> labels);

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
