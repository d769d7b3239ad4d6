#include "common/model/job_models.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "common/model/ensemble_model.h"
#include "common/model/frozen_model.h"

namespace codistill {

JobModels::JobModels(Options options) : options_(std::move(options)) {}

absl::StatusOr<std::shared_ptr<FollowedModel>> JobModels::Follow(const TeacherRef& model) {
  const auto known = models_.find(model.name);
  if (known != models_.end()) return known->second;
  absl::StatusOr<std::shared_ptr<FollowedModel>> created = Create(model);
  if (!created.ok()) return Annotate(created.status(), model.name);
  models_[model.name] = *created;
  return created;
}

absl::StatusOr<std::shared_ptr<FollowedModel>> JobModels::Create(const TeacherRef& model) {
  switch (model.kind) {
    case TeacherRef::kGroup: {
      FollowedModel::Options options;
      options.job = options_.job;
      options.group = model.index;
      options.threads = options_.threads;
      options.transfer_dtype = options_.transfer_dtype;
      options.weights = options_.weights;
      options.held_versions = options_.held_versions;
      options.low_priority = options_.low_priority;
      options.optimize_predict = options_.optimize_predict;
      options.device = options_.device;
      options.precision = options_.precision;
      return FollowedModel::Create(std::move(options));
    }
    case TeacherRef::kFrozen: {
      const FrozenTeacher& frozen = options_.job.teachers(model.index).frozen();
      FrozenModelOptions options;
      options.name = model.name;
      options.archive = frozen.archive();
      options.model = options_.job.model();
      options.checkpoint = frozen.checkpoint();
      options.follow = frozen.follow();
      options.threads = options_.threads;
      options.weights = options_.weights;
      options.held_versions = options_.held_versions;
      options.low_priority = options_.low_priority;
      options.optimize_predict = options_.optimize_predict;
      options.device = options_.device;
      options.precision = options_.precision;
      return LoadFrozenModel(std::move(options));
    }
    case TeacherRef::kEnsemble: {
      EnsembleOptions options;
      options.name = model.name;
      options.model = options_.job.model();
      options.average = options_.job.teachers(model.index).ensemble().average();
      for (const TeacherRef& member : MembersOf(options_.job, model)) {
        CODISTILL_ASSIGN_OR_RETURN(std::shared_ptr<FollowedModel> followed, Follow(member));
        options.members.push_back({member.name, std::move(followed)});
      }
      return CreateEnsemble(std::move(options));
    }
    case TeacherRef::kExternal:
      break;
  }
  return absl::FailedPreconditionError("an external teacher's weights are not here to be loaded");
}

}  // namespace codistill
