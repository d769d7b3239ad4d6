#ifndef CODISTILL_COMMON_MODEL_ENSEMBLE_MODEL_H_
#define CODISTILL_COMMON_MODEL_ENSEMBLE_MODEL_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/model/followed_model.h"
#include "proto/job.pb.h"

namespace codistill {

// One of the models that an ensemble averages.
struct EnsembleMember {
  std::string name;  // in messages
  std::shared_ptr<FollowedModel> model;
};

struct EnsembleOptions {
  std::string name;   // in messages
  ModelConfig model;  // of every member
  CodistillationConfig::Average average = CodistillationConfig::PROBABILITIES;
  std::vector<EnsembleMember> members;  // at least 1
};

// The average of several models as a model of its own. A prediction runs the members one after the
// other on the calling thread. What is averaged, by the model's label_loss:
//   SOFTMAX_CROSS_ENTROPY  PROBABILITIES: softmax at temperature 1; the answer is the logarithm of
//                          the average (AverageSoftmax). LOGITS: the logits.
//   SIGMOID_CROSS_ENTROPY  PROBABILITIES: the answer is the log-odds of the average. LOGITS: as
//   above. SQUARED_ERROR          the outputs.
//
// A version of the ensemble is one combination of its members' versions, and its generation and
// step are the sums of theirs: it changes whenever a member changes, never names two combinations,
// and (generations of members never fall) never goes back within a generation. It is as stale as
// the stalest of the members: group_step is its own step plus the largest distance of a member to
// its group. loaded_at and precision are those of the member loaded first and rounded most. Two
// servers of the same ensemble that follow running groups may give one name to different
// combinations (20 + 10 and 10 + 20), so a version means something to the server that named it. One
// version is held, whatever held_versions says, and a request for another is NOT_FOUND as soon as
// any member has changed. UNAVAILABLE, naming the member, while one has nothing to answer with.
//
// INVALID_ARGUMENT for members with recurrent state: a student carries the states of one teacher,
// and an average has none.
absl::StatusOr<std::unique_ptr<FollowedModel>> CreateEnsemble(EnsembleOptions options);

}  // namespace codistill

#endif  // CODISTILL_COMMON_MODEL_ENSEMBLE_MODEL_H_
