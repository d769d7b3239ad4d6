#ifndef CODISTILL_COMMON_CONFIG_PARAMETER_GROUPS_H_
#define CODISTILL_COMMON_CONFIG_PARAMETER_GROUPS_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/repeated_field.h"
#include "proto/job.pb.h"
#include "proto/model.pb.h"
#include "proto/parameter_server.pb.h"

namespace codistill {

// How the optimizer treats one tensor.
struct ParameterPolicy {
  bool trained = false;  // a parameter that is not frozen
  double learning_rate_multiplier = 1;
  double weight_decay_multiplier = 0;
};

// By tensor, from training.optimizer.parameter_groups: the first group whose pattern matches the
// name of a parameter holds for it. Without one, parameters of rank >= 2 take weight decay, biases
// and norms do not. INVALID_ARGUMENT names every pattern that matches no parameter: it is nearly
// always a misspelling, and silence would train another model than was meant.
absl::StatusOr<std::vector<ParameterPolicy>> ResolveParameterGroups(
    const OptimizerConfig& optimizer,
    const google::protobuf::RepeatedPtrField<TensorSpec>& tensors);

// Writes what is frozen into the map of a group, where workers read it.
absl::Status MarkFrozen(const OptimizerConfig& optimizer, ShardMap* map);

// Whether the whole of `name` is as `pattern` says, in which '*' stands for any characters, none
// and dots included, and '?' for exactly one.
bool MatchesPattern(absl::string_view pattern, absl::string_view name);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_PARAMETER_GROUPS_H_
