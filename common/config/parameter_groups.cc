#include "common/config/parameter_groups.h"

#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"

namespace codistill {

bool MatchesPattern(absl::string_view pattern, absl::string_view name) {
  // Where the last '*' stands and how much of the name it has taken so far: a mismatch later lets
  // it take one character more, so that the time is at most the product of both lengths.
  size_t star = absl::string_view::npos, taken_to = 0;
  size_t p = 0, n = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      taken_to = n;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++p;
      ++n;
    } else if (star != absl::string_view::npos) {
      p = star + 1;
      n = ++taken_to;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

absl::StatusOr<std::vector<ParameterPolicy>> ResolveParameterGroups(
    const OptimizerConfig& optimizer,
    const google::protobuf::RepeatedPtrField<TensorSpec>& tensors) {
  std::vector<ParameterPolicy> policies(tensors.size());
  std::vector<bool> matched(optimizer.parameter_groups_size(), false);
  for (int t = 0; t < tensors.size(); ++t) {
    const TensorSpec& spec = tensors[t];
    if (spec.role() != TensorSpec::PARAMETER) continue;
    ParameterPolicy& policy = policies[t];
    policy.trained = true;
    policy.weight_decay_multiplier = spec.shape_size() >= 2 ? 1 : 0;
    bool decided = false;
    // All patterns are tried, so that one is not called useless for standing behind a wider one.
    for (int g = 0; g < optimizer.parameter_groups_size(); ++g) {
      const ParameterGroup& group = optimizer.parameter_groups(g);
      if (!MatchesPattern(group.pattern(), spec.name())) continue;
      matched[g] = true;
      if (decided) continue;
      decided = true;
      policy.trained = !group.frozen();
      policy.learning_rate_multiplier = group.learning_rate_multiplier();
      if (group.has_weight_decay_multiplier()) {
        policy.weight_decay_multiplier = group.weight_decay_multiplier();
      }
    }
  }
  ErrorList errors;
  for (int g = 0; g < optimizer.parameter_groups_size(); ++g) {
    if (matched[g]) continue;
    errors.Add(absl::StrCat("training.optimizer.parameter_groups[", g,
                            "].pattern: matches no parameter of the model (",
                            optimizer.parameter_groups(g).pattern(),
                            "); a name in its tensor list, with '*' for any characters, would be "
                            "right"));
  }
  CODISTILL_RETURN_IF_ERROR(errors.ToStatus("parameter groups:"));
  return policies;
}

absl::Status MarkFrozen(const OptimizerConfig& optimizer, ShardMap* map) {
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<ParameterPolicy> policies,
                             ResolveParameterGroups(optimizer, map->tensors()));
  map->clear_frozen();
  for (size_t t = 0; t < policies.size(); ++t) {
    const bool parameter = map->tensors(static_cast<int>(t)).role() == TensorSpec::PARAMETER;
    if (parameter && !policies[t].trained) map->add_frozen(static_cast<uint32_t>(t));
  }
  return absl::OkStatus();
}

}  // namespace codistill
