// The rules of training.optimizer.

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/config/validate.h"

namespace codistill {
namespace internal {
namespace {

constexpr char kPath[] = "training.optimizer";

std::string Field(absl::string_view name) { return absl::StrCat(kPath, ".", name); }

void CheckSchedule(const std::string& path, const Schedule& schedule, Mistakes* mistakes) {
  mistakes->AtLeast(absl::StrCat(path, ".warmup_steps"), schedule.warmup_steps(), 0);
  mistakes->AtLeast(absl::StrCat(path, ".decay_steps"), schedule.decay_steps(), 0);
  mistakes->NotNegative(absl::StrCat(path, ".end_factor"), schedule.end_factor());
  mistakes->Positive(absl::StrCat(path, ".step_factor"), schedule.step_factor());
  if (schedule.kind() == Schedule::STEP) {
    mistakes->Required(absl::StrCat(path, ".step_boundaries"), schedule.step_boundaries_size() > 0,
                       "the steps at which the factor changes, as kind STEP needs them");
  }
  for (int i = 0; i < schedule.step_boundaries_size(); ++i) {
    const int64_t previous = i == 0 ? 0 : schedule.step_boundaries(i - 1);
    if (schedule.step_boundaries(i) <= previous) {
      mistakes->Add(absl::StrCat(path, ".step_boundaries[", i, "]"),
                    absl::StrCat("not growing (", schedule.step_boundaries(i), "); more than ",
                                 previous, " would be right"));
    }
  }
}

void CheckParameterGroups(const OptimizerConfig& optimizer, Mistakes* mistakes) {
  for (int i = 0; i < optimizer.parameter_groups_size(); ++i) {
    const ParameterGroup& group = optimizer.parameter_groups(i);
    const std::string path = absl::StrCat(Field("parameter_groups"), "[", i, "]");
    mistakes->Required(absl::StrCat(path, ".pattern"), !group.pattern().empty(),
                       "a parameter's name, with '*' for any characters,");
    mistakes->NotNegative(absl::StrCat(path, ".weight_decay_multiplier"),
                          group.weight_decay_multiplier());
    mistakes->NotNegative(absl::StrCat(path, ".learning_rate_multiplier"),
                          group.learning_rate_multiplier());
    if (group.frozen() &&
        (group.has_weight_decay_multiplier() || group.has_learning_rate_multiplier())) {
      mistakes->Add(absl::StrCat(path, ".frozen"),
                    "a multiplier beside it, which a frozen parameter has no use for; one of the "
                    "two would be right");
    }
  }
}

}  // namespace

void CheckOptimizer(const TrainingConfig& training, Mistakes* mistakes) {
  const OptimizerConfig& optimizer = training.optimizer();
  if (optimizer.kind() == OptimizerConfig::FTRL) {
    mistakes->Add(Field("kind"),
                  "for rows of embedding tables only (FTRL), where "
                  "model.embedding_tables.optimizer.kind chooses it; SGD, MOMENTUM, ADAM, "
                  "NESTEROV, ADAGRAD, ADAMW or LARS would be right");
  }
  if (optimizer.kind() == OptimizerConfig::LARS && training.update_mode() != TrainingConfig::SYNC) {
    mistakes->Add(Field("kind"),
                  absl::StrCat("not possible with training.update_mode ",
                               TrainingConfig::UpdateMode_Name(training.update_mode()),
                               " (LARS): its rates come from the norms of whole tensors at one "
                               "step, which only SYNC has; SYNC or another kind would be right"));
  }
  mistakes->Positive(Field("learning_rate"), optimizer.learning_rate());
  mistakes->Fraction(Field("momentum"), optimizer.momentum());
  mistakes->Fraction(Field("beta1"), optimizer.beta1());
  mistakes->Fraction(Field("beta2"), optimizer.beta2());
  mistakes->Positive(Field("epsilon"), optimizer.epsilon());
  mistakes->NotNegative(Field("weight_decay"), optimizer.weight_decay());
  mistakes->NotNegative(Field("clip_norm"), optimizer.clip_norm());
  mistakes->NotNegative(Field("initial_accumulator"), optimizer.initial_accumulator());
  mistakes->Positive(Field("trust_coefficient"), optimizer.trust_coefficient());
  CheckSchedule(Field("schedule"), optimizer.schedule(), mistakes);
  CheckSchedule(Field("weight_decay_schedule"), optimizer.weight_decay_schedule(), mistakes);
  CheckParameterGroups(optimizer, mistakes);
}

}  // namespace internal
}  // namespace codistill
