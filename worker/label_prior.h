#ifndef CODISTILL_WORKER_LABEL_PRIOR_H_
#define CODISTILL_WORKER_LABEL_PRIOR_H_

#include <vector>

#include "absl/status/statusor.h"
#include "proto/job.pb.h"
#include "worker/data/dataset.h"

namespace codistill {

// What smoothed labels of a group are mixed with, by class: with model.label_smoothing_prior
// UNIGRAM the frequencies of the labels in its training data, ignored ones left out; empty where
// every class is alike. The same in every worker of the group. INVALID_ARGUMENT: every label is an
// ignored one.
absl::StatusOr<std::vector<float>> LabelPriorOf(const JobConfig& job, int group,
                                                const Dataset& training);

}  // namespace codistill

#endif  // CODISTILL_WORKER_LABEL_PRIOR_H_
